// The one SIMD source of the Gram kernel, compiled once per instruction set (CFL_ISA_AMX,
// CFL_ISA_AVX512, CFL_ISA_AVX2, or none of them: SSE2 on x86-64, NEON on aarch64).
//
// No C++ standard library here: its inline functions would be compiled with this file's
// instructions, and the linker could then pick them for code that runs on older machines. For the
// same reason everything but the entry point lives in an unnamed namespace.
//
// Scheme. Columns are cut into panels of NR. For each block of kc rows, a panel is packed (and
// converted to the accumulation type) as kc runs of NR numbers. The block (strip i, panel p), p >=
// i, of the output is the product of two packed panels; "strip" is a panel in its role as the left
// factor. Without weights both roles share one packing. Dense targets are further panels on the
// right. The lower triangle is written as the transpose of each block after its last row block.

#include "gram_kernel_isa.h"

#include <string.h>

#include "vectors_isa.h"

#if defined(CFL_ISA_AMX)
#define CFL_ENTRY kernel_amx
#elif defined(CFL_ISA_AVX512)
#define CFL_ENTRY kernel_avx512
#elif defined(CFL_ISA_AVX2)
#define CFL_ENTRY kernel_avx2
#else
#define CFL_ENTRY kernel_generic
#endif

namespace cfl::cpu::detail {
namespace {

// ---- vectors ------------------------------------------------------------------------------------

typedef uint32_t U32v __attribute__((vector_size(kBytes)));
typedef float F32h __attribute__((vector_size(kBytes / 2)));
typedef uint32_t U32h __attribute__((vector_size(kBytes / 2)));
typedef uint16_t U16h __attribute__((vector_size(kBytes / 2)));
typedef uint16_t U16q __attribute__((vector_size(kBytes / 4)));

template <class V>
CFL_INLINE V load_as(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
CFL_INLINE void store_as(void* p, V v) {
  memcpy(p, &v, sizeof(V));
}

// Stores past the caches; p is aligned to a vector.
template <class V>
CFL_INLINE void stream(void* p, V v) {
#if defined(CFL_ISA_AMX) || defined(CFL_ISA_AVX512)
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif defined(CFL_ISA_AVX2)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#else
  store_as(p, v);
#endif
}
#if defined(CFL_ISA_AMX) || defined(CFL_ISA_AVX512) || defined(CFL_ISA_AVX2)
constexpr bool kCanStream = true;
#else
constexpr bool kCanStream = false;
#endif
CFL_INLINE void stream_fence() {
#if defined(CFL_ISA_AMX) || defined(CFL_ISA_AVX512) || defined(CFL_ISA_AVX2)
  _mm_sfence();
#endif
}

CFL_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The next row of a tile. Hidden from the optimiser, which would compute all row addresses before
// the inner loop and push its operands out of the vector registers to keep them.
template <class T>
CFL_INLINE T* next_row(T* at, int64_t ld) {
  at += ld;
  asm volatile("" : "+r"(at));
  return at;
}

// ---- element types ------------------------------------------------------------------------------

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

CFL_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
CFL_INLINE float to_float(float v) { return v; }
CFL_INLINE double to_float(double v) { return v; }
CFL_INLINE float to_float(BF16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
CFL_INLINE float to_float(F16 v) {
  // Moves exponent and fraction into place and rescales by 2^112, which is right for subnormals
  // too; an all-ones exponent (Inf, NaN) is set to all ones again.
  const uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13;
  uint32_t u;
  const float f = bits_to_float(magnitude) * 0x1p112f;
  memcpy(&u, &f, 4);
  if (magnitude >= 0x0f800000u) u |= 0x7f800000u;
  return bits_to_float(u | uint32_t(v.bits & 0x8000) << 16);
}

CFL_INLINE F32v widen(const BF16* p) {
  return (F32v)(__builtin_convertvector(load_as<U16h>(p), U32v) << 16);
}
CFL_INLINE F32h widen_half(const BF16* p) {
  return (F32h)(__builtin_convertvector(load_as<U16q>(p), U32h) << 16);
}
#if defined(CFL_ISA_AMX) || defined(CFL_ISA_AVX512)
CFL_INLINE F32v widen(const F16* p) {
  return (F32v)_mm512_maskz_cvtph_ps(__mmask16(-1), load_as<__m256i>(p));
}
CFL_INLINE F32h widen_half(const F16* p) { return (F32h)_mm256_cvtph_ps(load_as<__m128i>(p)); }
#elif defined(CFL_ISA_AVX2)
CFL_INLINE F32v widen(const F16* p) { return (F32v)_mm256_cvtph_ps(load_as<__m128i>(p)); }
CFL_INLINE F32h widen_half(const F16* p) {
  return (F32h)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
#else
CFL_INLINE F32v widen(const F16* p) {
  const U32v h = __builtin_convertvector(load_as<U16h>(p), U32v);
  const U32v magnitude = (h & 0x7fff) << 13;
  const U32v special = (U32v)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (F32v)((U32v)((F32v)magnitude * 0x1p112f) | special | ((h & 0x8000) << 16));
}
CFL_INLINE F32h widen_half(const F16* p) {
  F32h v;
  for (int i = 0; i < kBytes / 8; ++i) v[i] = to_float(p[i]);
  return v;
}
#endif

// A vector of accumulation type from consecutive elements of any input type.
template <class T>
struct Convert;
template <>
struct Convert<float> {
  static CFL_INLINE F32v load(const float* p) { return load_as<F32v>(p); }
  template <class S>
  static CFL_INLINE F32v load(const S* p) {
    return widen(p);
  }
};
template <>
struct Convert<double> {
  static CFL_INLINE F64v load(const double* p) { return load_as<F64v>(p); }
  static CFL_INLINE F64v load(const float* p) {
    return __builtin_convertvector(load_as<F32h>(p), F64v);
  }
  template <class S>
  static CFL_INLINE F64v load(const S* p) {
    return __builtin_convertvector(widen_half(p), F64v);
  }
};

// ---- transposition ------------------------------------------------------------------------------

// dst (cols x rows, leading dimension ldd) = transpose of src (rows x cols, lds).
template <class T, bool kStream>
void transpose_block(const T* src, int64_t lds, T* dst, int64_t ldd, int64_t rows, int64_t cols) {
  constexpr int n = kLanes<T>;
  const int64_t full_rows = rows / n * n, full_cols = cols / n * n;
  for (int64_t j = 0; j < full_cols; j += n) {
    for (int64_t i = 0; i < full_rows; i += n) {
      Vec<T> r[n];
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m) r[m] = load_as<Vec<T>>(src + (i + m) * lds + j);
      transpose<T>(r);
#pragma GCC unroll 16
      for (int m = 0; m < n; ++m) {
        T* d = dst + (j + m) * ldd + i;
        if constexpr (kStream) {
          stream(d, r[m]);
        } else {
          store_as(d, r[m]);
        }
      }
    }
  }
  for (int64_t j = 0; j < cols; ++j) {
    const int64_t begin = j < full_cols ? full_rows : 0;
    for (int64_t i = begin; i < rows; ++i) dst[j * ldd + i] = src[i * lds + j];
  }
}

// ---- packing ------------------------------------------------------------------------------------

// A rectangle of the input: rows x cols elements, all columns present.
template <class S>
struct Source {
  const S* data;
  int64_t row_stride, col_stride;
};

// dst[k * ld + c] = scale[k] * src(k, c), for c < cols; `scale` may be null.
template <class T, class S>
void pack_columns(const Source<S>& src, int64_t rows, int64_t cols, const T* scale, T* dst,
                  int64_t ld) {
  constexpr int n = kLanes<T>;
  const int64_t full = cols / n * n;
  int64_t packed = 0;  // columns that a vector loop has dealt with
  if (src.col_stride == 1) {
    packed = full;
    for (int64_t k = 0; k < rows; ++k) {
      const S* s = src.data + k * src.row_stride;
      T* d = dst + k * ld;
      // The next panel's part of this row: its rows are too far apart for the hardware to guess.
      for (int64_t c = 0; c < cols; c += 64 / int64_t(sizeof(S))) __builtin_prefetch(s + ld + c);
      if (scale) {
        for (int64_t c = 0; c < full; c += n) store_as(d + c, Convert<T>::load(s + c) * scale[k]);
      } else {
        for (int64_t c = 0; c < full; c += n) store_as(d + c, Convert<T>::load(s + c));
      }
    }
  } else if (src.row_stride == 1) {
    packed = full;
    const int64_t full_rows = rows / n * n;
    for (int64_t c = 0; c < full; c += n) {
      for (int64_t k = 0; k < full_rows; k += n) {
        Vec<T> r[n];
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) {
          r[m] = Convert<T>::load(src.data + (c + m) * src.col_stride + k);
          if (scale) r[m] *= load_as<Vec<T>>(scale + k);
        }
        transpose<T>(r);
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) store_as(dst + (k + m) * ld + c, r[m]);
      }
      for (int64_t k = full_rows; k < rows; ++k) {
        for (int m = 0; m < n; ++m) {
          const T v = to_float(src.data[(c + m) * src.col_stride + k]);
          dst[k * ld + c + m] = scale ? scale[k] * v : v;
        }
      }
    }
  }
  if (packed == cols) return;
  for (int64_t k = 0; k < rows; ++k) {
    const S* s = src.data + k * src.row_stride;
    for (int64_t c = packed; c < cols; ++c) {
      const T v = to_float(s[c * src.col_stride]);
      dst[k * ld + c] = scale ? scale[k] * v : v;
    }
  }
}

template <class T>
T weight_at(const GramArgs& args, int64_t row) {
  const int64_t at = row * args.weight_stride;
  if (args.weight_dtype == DType::kF64) return T(static_cast<const double*>(args.weight)[at]);
  return T(static_cast<const float*>(args.weight)[at]);
}

template <class S>
CFL_INLINE Source<S> x_source(const GramArgs& a, int64_t row, int64_t col) {
  return {static_cast<const S*>(a.x) + row * a.x_row_stride + col * a.x_col_stride, a.x_row_stride,
          a.x_col_stride};
}
template <class S>
CFL_INLINE Source<S> y_source(const GramArgs& a, int64_t row, int64_t col) {
  return {static_cast<const S*>(a.y) + row * a.y_row_stride + col * a.y_col_stride, a.y_row_stride,
          a.y_col_stride};
}

// A run of columns of x (with the bias) or of the dense targets.
struct Panel {
  bool is_x;
  int64_t first, width;
};

// A packed panel, or x itself: element (k, c) is data[k * stride + c].
template <class P>
struct Operand {
  const P* data;
  int64_t stride;
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// ---- the vector engine --------------------------------------------------------------------------

enum class Update { kStore, kAdd, kScaleAdd };

CFL_INLINE Update update_for(double beta) {
  return beta == 0 ? Update::kStore : beta == 1 ? Update::kAdd : Update::kScaleAdd;
}

// Input elements S, accumulation in T.
template <class T, class S>
struct VectorEngine {
  using Acc = T;
  using Packed = T;
  using In = S;
  static constexpr int kVectors = 3;
  static constexpr int kWidth = kVectors * kLanes<T>;  // NR
  // 8 x 3 (AVX-512), 4 x 3 (AVX2, SSE2) or 6 x 3 (NEON) accumulators.
#if defined(CFL_ISA_AMX) || defined(CFL_ISA_AVX512)
  static constexpr int kRows = 8;  // MR; divides NR
#elif defined(__aarch64__)
  static constexpr int kRows = 6;
#else
  static constexpr int kRows = kLanes<T> == 2 ? 2 : 4;
#endif
  static constexpr bool kSharedPacking = true;
  static constexpr bool kReadsInPlace = kSame<T, S>;
  static constexpr bool kTakesWhole = true;                        // see run_whole
  static constexpr int64_t kDepth = 36864 / (kWidth * sizeof(T));  // kc: a panel fits L1
  static constexpr int64_t kGroup = 24;                            // panels kept in L2
  static constexpr int64_t kDepthStep = 1;                         // row blocks are multiples of it
  static constexpr int64_t kOperandsAhead = 16, kOutputAhead = 32;  // prefetch, in rows
  static constexpr int64_t kFewRows = 144;

  static int64_t panel_size(int64_t depth) { return depth * kWidth; }
  static int64_t stride(int64_t width) { return ceil_div(width, kLanes<T>) * kLanes<T>; }

  // Packs rows [row, row + depth) of a panel (x, bias and zeros; or targets and zeros).
  static void pack(const Plan& plan, Panel panel, int64_t row, int64_t depth, const T* scale,
                   T* dst) {
    const GramArgs& a = plan.args;
    const int64_t ld = stride(panel.width);
    const int64_t present = min64(panel.width, (panel.is_x ? a.cols : a.targets) - panel.first);
    pack_columns<T, S>(
        panel.is_x ? x_source<S>(a, row, panel.first) : y_source<S>(a, row, panel.first), depth,
        present, scale, dst, ld);
    if (present == ld) return;
    for (int64_t k = 0; k < depth; ++k) {
      T* d = dst + k * ld + present;
      memset(d, 0, size_t(ld - present) * sizeof(T));
      if (present < panel.width) d[0] = scale ? scale[k] : T(1);  // the bias
    }
  }

  static void begin_part() {}
  static void end_part() {}

  // c[kRows][kN vectors] from kRows columns of strip a and kN vectors of panel b. Not inlined: the
  // accumulators and operands take every vector register. kFew: a product of few rows, whose
  // operands are in L1, so that asking for them would only cost instructions.
  template <int kN, bool kFew>
  static __attribute__((noinline)) void tile(int64_t depth, const T* a, int64_t lda, const T* b,
                                             int64_t ldb, T* c, int64_t ldc, Update update,
                                             T beta) {
    constexpr int n = kLanes<T>;
    Vec<T> acc[kRows][kN];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kN; ++v) acc[m][v] = Vec<T>{};
    }
    // In two pieces, with the output fetched into L1 shortly before it is needed. An output that is
    // only written is not fetched: whole lines are stored without being read first.
    T* at = c;
    int64_t k = 0;
    const int64_t ahead = kFew || update == Update::kStore ? 0 : kOutputAhead;
    for (int64_t stop = depth - ahead;; stop = depth) {
      for (; k < stop; ++k, a += lda, b += ldb) {
        Vec<T> bv[kN];
#pragma GCC unroll 8
        for (int v = 0; v < kN; ++v) {
          bv[v] = load_as<Vec<T>>(b + v * n);
          if constexpr (!kFew) __builtin_prefetch(b + kOperandsAhead * ldb + v * n);
        }
        if constexpr (!kFew) __builtin_prefetch(a + kOperandsAhead * lda);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          const Vec<T> av = a[m] - Vec<T>{};
#pragma GCC unroll 8
          for (int v = 0; v < kN; ++v) acc[m][v] += av * bv[v];
        }
      }
      if (k == depth) break;
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m, at = next_row(at, ldc)) {
#pragma GCC unroll 8
        for (int v = 0; v < kN; ++v) __builtin_prefetch(at + v * n, 1);
      }
    }
    at = c;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m, at = next_row(at, ldc)) {
#pragma GCC unroll 8
      for (int v = 0; v < kN; ++v) {
        Vec<T> r = acc[m][v];
        if (update == Update::kAdd) r += load_as<Vec<T>>(at + v * n);
        if (update == Update::kScaleAdd) r += beta * load_as<Vec<T>>(at + v * n);
        store_as(at + v * n, r);
      }
    }
  }

  static constexpr decltype(&tile<1, false>) kTiles[2][kVectors] = {
      {tile<1, false>, tile<2, false>, tile<3, false>},
      {tile<1, true>, tile<2, true>, tile<3, true>}};

  // Micro-rows [r0, r1) of the block (strip a, panel b) at c, which has rows x cols valid entries.
  // On the diagonal, vectors wholly under it are left alone.
  static void block(int64_t depth, Operand<T> a, Operand<T> b, int64_t r0, int64_t r1,
                    bool diagonal, T* c, int64_t ldc, int64_t rows, int64_t cols, double beta) {
    constexpr int n = kLanes<T>;
    const Update update = update_for(beta);
    const int last = int(ceil_div(cols, n));
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t m0 = r * kRows;
      const int first = diagonal ? int(m0 / n) : 0;
      const bool whole = m0 + kRows <= rows && last * n <= cols;
      alignas(64) T edge[kRows * kWidth];
      T* out = whole ? c + m0 * ldc + first * n : edge;
      const int64_t ld = whole ? ldc : kWidth;
      const Update how = whole ? update : Update::kStore;
      const T* left = a.data + m0;
      const T* right = b.data + first * n;
      if (first >= last) continue;
      const bool few = depth <= kFewRows && how == Update::kStore;
      kTiles[few][last - first - 1](depth, left, a.stride, right, b.stride, out, ld, how, T(beta));
      if (whole) continue;
      for (int64_t m = 0; m < min64(kRows, rows - m0); ++m) {
        T* to = c + (m0 + m) * ldc + first * n;
        const T* from = edge + m * kWidth;
        const int64_t count = cols - first * n;
        if (update == Update::kStore) {
          for (int64_t j = 0; j < count; ++j) to[j] = from[j];
        } else {
          for (int64_t j = 0; j < count; ++j) to[j] = T(beta) * to[j] + from[j];
        }
      }
    }
  }
};

#if defined(CFL_ISA_AMX)

// ---- the bfloat16 tile engine -------------------------------------------------------------------

// A panel is 32 columns; 32 rows of it are two tiles of 16 columns. On the right, tile row q holds
// rows 2q and 2q + 1 interleaved; on the left it is the transpose of that, as 32-bit numbers. The
// tile unit takes subnormal inputs for zero, as torch's bfloat16 matmul does where it uses it.
struct TileEngine {
  using Acc = float;
  using Packed = uint16_t;
  using In = BF16;
  static constexpr int kVectors = 2;
  static constexpr int kWidth = 32;
  static constexpr int kRows = 32;
  static constexpr bool kSharedPacking = false;
  static constexpr bool kReadsInPlace = false;
  static constexpr bool kTakesWhole = false;
  static constexpr int64_t kDepthStep = 32;
  static constexpr int64_t kDepth = 320;
  static constexpr int64_t kGroup = 24;
  static constexpr int64_t kTile = 512;  // elements

  static int64_t panel_size(int64_t depth) { return ceil_div(depth, 32) * 2 * kTile; }
  static int64_t stride(int64_t /*width*/) { return kWidth; }

  // The 16 columns from `col` of row `row` of a source of which `present` columns exist; then a
  // bias column of ones, if asked for, and zeros.
  static CFL_INLINE U32v columns(const Source<BF16>& src, int64_t row, int64_t col, int64_t present,
                                 bool bias) {
    const BF16* p = src.data + row * src.row_stride + col * src.col_stride;
    const int64_t count = present - col;
    if (src.col_stride == 1 && count >= 16) {
      __builtin_prefetch(p + kWidth);  // the next panel's part of this row
      return __builtin_convertvector(load_as<U16h>(p), U32v);
    }
    U32v v = {};
    for (int64_t c = 0; c < min64(count, 16); ++c) v[c] = p[c * src.col_stride].bits;
    if (bias && count >= 0 && count < 16) v[count] = 0x3f80;  // 1.0
    return v;
  }

  // The right packing; transposed inputs come as runs of 32 rows, that is in the left packing.
  static void pack(const Plan& plan, Panel panel, int64_t row, int64_t depth,
                   const float* /*scale*/, uint16_t* dst) {
    const GramArgs& a = plan.args;
    const int64_t present = (panel.is_x ? a.cols : a.targets) - panel.first;
    const bool bias = panel.is_x && a.bias;
    const Source<BF16> src =
        panel.is_x ? x_source<BF16>(a, row, panel.first) : y_source<BF16>(a, row, panel.first);
    for (int64_t k = 0; k < depth; k += 32) {
      for (int64_t col = 0; col < kWidth; col += 16, dst += kTile) {
        F32v r[16];
        const bool runs = src.row_stride == 1 && k + 32 <= depth && present - col >= 16;
#pragma GCC unroll 16
        for (int q = 0; q < 16; ++q) {
          if (runs) {
            r[q] = load_as<F32v>(src.data + k + (col + q) * src.col_stride);
            continue;
          }
          U32v pair = {};
          const int64_t at = k + 2 * q;
          if (at < depth) pair = columns(src, at, col, present, bias);
          if (at + 1 < depth) pair |= columns(src, at + 1, col, present, bias) << 16;
          r[q] = (F32v)pair;
        }
        if (runs) transpose<float>(r);
#pragma GCC unroll 16
        for (int q = 0; q < 16; ++q) store_as(dst + 32 * q, r[q]);
      }
    }
  }

  // The left packing of a panel from its right packing.
  static void flip(int64_t depth, const uint16_t* right, uint16_t* left) {
    for (int64_t at = 0; at < panel_size(depth); at += kTile) {
      F32v r[16];
#pragma GCC unroll 16
      for (int q = 0; q < 16; ++q) r[q] = load_as<F32v>(right + at + 32 * q);
      transpose<float>(r);
#pragma GCC unroll 16
      for (int q = 0; q < 16; ++q) store_as(left + at + 32 * q, r[q]);
    }
  }

  static void begin_part() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  static void end_part() { _tile_release(); }

  // c[32][32] += the product of packed panels; tiles 0..3 accumulate. The compiler is not told that
  // tile instructions touch memory, hence the fences.
  static void tile(int64_t depth, const uint16_t* a, const uint16_t* b, float* c, int64_t ldc,
                   bool add) {
    const int64_t row = ldc * int64_t(sizeof(float));
    asm volatile("" ::: "memory");
    if (add) {
      _tile_loadd(0, c, row);
      _tile_loadd(1, c + 16, row);
      _tile_loadd(2, c + 16 * ldc, row);
      _tile_loadd(3, c + 16 * ldc + 16, row);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32, a += 2 * kTile, b += 2 * kTile) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + 16, row);
    _tile_stored(2, c + 16 * ldc, row);
    _tile_stored(3, c + 16 * ldc + 16, row);
    asm volatile("" ::: "memory");
  }

  static void block(int64_t depth, Operand<uint16_t> a, Operand<uint16_t> b, int64_t /*r0*/,
                    int64_t /*r1*/, bool /*diagonal*/, float* c, int64_t ldc, int64_t rows,
                    int64_t cols, double beta) {
    const bool whole = rows == kWidth && cols == kWidth;
    if (whole && (beta == 0 || beta == 1)) {
      tile(depth, a.data, b.data, c, ldc, beta == 1);
      return;
    }
    alignas(64) float product[kWidth * kWidth];
    tile(depth, a.data, b.data, product, kWidth, false);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        float* to = c + i * ldc + j;
        *to = (beta == 0 ? 0.0f : float(beta) * *to) + product[i * kWidth + j];
      }
    }
  }
};

#endif  // CFL_ISA_AMX

// ---- cutting the work ---------------------------------------------------------------------------

template <class E>
struct Driver {
  using T = typename E::Acc;
  using P = typename E::Packed;
  using S = typename E::In;
  static constexpr int64_t kWidth = E::kWidth;
  static constexpr int64_t kLanesT = kLanes<T>;
  // Scratch of a thread: packed panels, the sums of a row group, and class sums in their turn.
  static constexpr size_t kPackBytes = 4 << 20;
  static constexpr size_t kPartialBytes = 4 << 20;
  static constexpr size_t kClassBytes = 1 << 20;
  static constexpr size_t kStreamBytes = 2 << 20;  // smaller outputs stay in the caches
  static constexpr int64_t kInPlaceBytes = 1024;

  static CFL_INLINE bool is_x(const Plan& plan, int64_t panel) { return panel < plan.x_panels; }

  static CFL_INLINE Panel panel_of(const Plan& plan, int64_t p) {
    const bool x = is_x(plan, p);
    const int64_t at = x ? p : p - plan.x_panels;
    const int64_t count = x ? plan.x_panels : plan.panels - plan.x_panels;
    const int64_t early = x ? plan.early : plan.early_targets;
    const int64_t first = at * kWidth - (at == count - 1 ? early : 0);
    const int64_t end = (at + 1) * kWidth - (at == count - 2 ? early : 0);
    return {x, first, min64(end, x ? plan.d1 : plan.args.targets) - first};
  }

  // The micro-rows above a panel's lower edge: all that it takes part in.
  static CFL_INLINE int64_t micro_rows(const Plan& plan, int64_t p) {
    const Panel panel = panel_of(plan, p);
    return ceil_div(panel.is_x ? panel.first + panel.width : plan.d1, E::kRows);
  }

  static int64_t dense_targets(const GramArgs& a) { return a.y ? a.targets : 0; }

  // Up to how many rows it is faster to compute both triangles, as measured: see run_whole. Mirror
  // images that cannot be streamed are costly once the output is far larger than the caches.
  static int64_t whole_rows(const Plan& plan) {
    const int64_t megabytes = int64_t(size_t(plan.d1) * size_t(plan.d1) * sizeof(T) >> 20);
    if (streams_output(plan)) return megabytes <= 32 ? 28 : 0;
    return megabytes < 2 ? 40 : megabytes <= 16 ? 56 : 144;
  }

  static void shape(Plan* plan, int64_t threads) {
    const GramArgs& a = plan->args;
    plan->d1 = a.cols + (a.bias ? 1 : 0);
    plan->x_panels = ceil_div(plan->d1, kWidth);
    plan->panels = plan->x_panels + ceil_div(dense_targets(a), kWidth);
    // A last panel of one vector would be slow: it takes another from the panel before.
    auto early = [](int64_t columns, int64_t panels) -> int64_t {
      const bool one_vector = ceil_div(columns, kLanesT) % E::kVectors == 1;
      return E::kVectors > 2 && kLanesT % E::kRows == 0 && one_vector && panels > 1 ? kLanesT : 0;
    };
    plan->early = early(plan->d1, plan->x_panels);
    plan->early_targets = early(dense_targets(a), plan->panels - plan->x_panels);
    plan->partial_bytes = size_t(plan->d1) * size_t(plan->d1 + a.targets) * sizeof(T);
    // Row groups share no packing work, but each costs a pass over the output; bands repeat part
    // of the packing. A band should stay a few panels wide.
    int64_t groups = 1;
    if (threads > 1 && plan->d1 * (plan->d1 + a.targets) <= int64_t(kPartialBytes / sizeof(T))) {
      groups = min64(threads, a.rows / max64(64, 2 * plan->d1));
      groups = max64(groups, 1);
      while (threads % groups) --groups;
    }
    plan->row_groups = groups;
    plan->bands = max64(1, threads / groups);
    plan->whole = E::kTakesWhole && a.beta == 0 && !a.weight && a.rows <= whole_rows(*plan);
  }

  // Cuts the sequence of micro-rows into bands of about equal length, never inside a diagonal
  // block, which its owner must mirror as a whole.
  static void cut(Plan* plan) {
    double total = 0;
    for (int64_t p = 0; p < plan->panels; ++p) total += double(micro_rows(*plan, p));
    int64_t band = 0;
    double before = 0;
    plan->band_begin[0] = {0, 0};
    for (int64_t p = 0; p < plan->panels; ++p) {
      const int64_t rows = micro_rows(*plan, p);
      while (band + 1 < plan->bands) {
        const double goal = total * double(band + 1) / double(plan->bands);
        if (goal >= before + double(rows)) break;
        // Whole vectors of rows, so that a cut never splits a vector of the transpose.
        constexpr int64_t kStep = max64(1, kLanesT / E::kRows);
        int64_t r = int64_t(goal - before) / kStep * kStep;
        const int64_t diagonal = panel_of(*plan, p).first / E::kRows;
        if (is_x(*plan, p) && r > diagonal) r = r - diagonal < rows - r ? diagonal : rows;
        ++band;
        plan->band_begin[band] = r < rows ? TilePos{p, r} : TilePos{p + 1, 0};
      }
      before += double(rows);
    }
    while (band < plan->bands) plan->band_begin[++band] = {plan->panels, 0};
  }

  // ---- one part ---------------------------------------------------------------------------------

  struct Rows {
    int64_t begin, end;
  };
  // The micro-rows of a panel that belong to a band.
  static CFL_INLINE Rows rows_of(const Plan& plan, int64_t band, int64_t panel) {
    const TilePos lo = plan.band_begin[band], hi = plan.band_begin[band + 1];
    Rows r = {0, micro_rows(plan, panel)};
    if (panel < lo.panel || panel > hi.panel) return {0, 0};
    if (panel == lo.panel) r.begin = lo.row;
    if (panel == hi.panel) r.end = min64(r.end, hi.row);
    return r;
  }

  struct Output {
    T* gram;
    T* cross;
    double beta;
  };
  static Output output_of(const Plan& plan, int64_t group) {
    const GramArgs& a = plan.args;
    if (group == 0) return {static_cast<T*>(a.gram), static_cast<T*>(a.cross), a.beta};
    T* base = reinterpret_cast<T*>(plan.partial + (group - 1) * plan.partial_bytes);
    return {base, base + plan.d1 * plan.d1, 0.0};
  }

  // Whether finished blocks go to memory past the caches: for a large output of aligned rows.
  static bool streams_output(const Plan& plan) {
    const size_t row_bytes = size_t(plan.d1) * sizeof(T);
    return kCanStream && plan.row_groups == 1 && row_bytes % 64 == 0 &&
           reinterpret_cast<uintptr_t>(plan.args.gram) % 64 == 0 &&
           row_bytes * size_t(plan.d1) >= kStreamBytes;
  }

  // A computed block whose mirror image, and whose own place if it was computed in a staging
  // buffer, are still to be written. The stores are issued a few at a time between the micro-rows
  // of the next block: the machine drains about one line in 10 cycles, and a burst would stop the
  // arithmetic.
  struct Pending {
    T* from;
    int64_t ld;  // of `from`
    Panel strip, panel;
    int64_t m0, m1;  // rows of the strip
    bool stream;
    int step, end;  // [0, kVectors) transposes a column of vectors, [kVectors, kSteps) copies rows
  };
  static constexpr int kSteps = 2 * E::kVectors;
  static constexpr int64_t kStepsPerRow = ceil_div(kSteps, kWidth / E::kRows);

  static void write_step(const Plan& plan, Pending* s) {
    constexpr int64_t n = kWidth / E::kVectors;
    T* g = static_cast<T*>(plan.args.gram);
    const int64_t ld = plan.d1, i0 = s->strip.first, j0 = s->panel.first;
    const int64_t cols = s->panel.width;
    const int step = s->step++;
    const int64_t at = step % E::kVectors * n, end = min64(at + n, cols);
    if (step >= E::kVectors) {  // only for whole vectors and streams
      for (int64_t m = max64(at, s->m0); m < min64(at + n, s->m1); ++m) {
        for (int64_t c = 0; c < cols; c += kLanes<T>) {
          stream(g + (i0 + m) * ld + j0 + c, load_as<Vec<T>>(s->from + m * s->ld + c));
        }
      }
    } else if (i0 == j0) {  // complete the block itself
      for (int64_t i = at; i < end; ++i) {
        for (int64_t j = 0; j < i; ++j) s->from[i * s->ld + j] = s->from[j * s->ld + i];
      }
    } else if (at < end) {
      const T* from = s->from + s->m0 * s->ld + at;
      T* to = g + (j0 + at) * ld + i0 + s->m0;
      if (s->stream) {
        transpose_block<T, true>(from, s->ld, to, ld, s->m1 - s->m0, end - at);
      } else {
        transpose_block<T, false>(from, s->ld, to, ld, s->m1 - s->m0, end - at);
      }
    }
  }
  // Asks for the lines that micro-row r will write in the next panel, and for a share of those that
  // this block's mirror image will.
  static CFL_INLINE void prefetch_output(const Plan& plan, const T* g, Panel strip, Panel panel,
                                         int64_t r, bool mirror) {
    constexpr int64_t line = 64 / int64_t(sizeof(T));
    const int64_t ld = plan.d1;
    for (int64_t m = r * E::kRows; m < (r + 1) * E::kRows; ++m) {
      const T* next = g + min64(strip.first + m, ld - 1) * ld + panel.first + panel.width;
      for (int64_t c = 0; c < kWidth; c += line) __builtin_prefetch(next + c, 1);
      if (!mirror) continue;
      const T* image = g + min64(panel.first + m, ld - 1) * ld + strip.first;
      for (int64_t c = 0; c < kWidth; c += line) __builtin_prefetch(image + c, 1);
      __builtin_prefetch(image + kWidth - 1, 1);
    }
  }

  static void write_rest(const Plan& plan, Pending* s) {
    while (s->step < s->end) write_step(plan, s);
  }

  static void target_stats(const Plan& plan, Panel panel, int64_t row, int64_t depth,
                           const T* weight, double* stats) {
    const GramArgs& a = plan.args;
    if (!a.target_sum && !a.target_sq) return;
    const int64_t first = panel.first, cols = panel.width;
    const Source<S> y = y_source<S>(a, row, first);
    T sum[kWidth] = {}, square[kWidth] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const T s = weight ? weight[k] : T(1);
      const S* v = y.data + k * y.row_stride;
      for (int64_t c = 0; c < cols; ++c) {
        const T t = to_float(v[c * y.col_stride]);
        sum[c] += s * t;
        square[c] += s * t * t;
      }
    }
    for (int64_t c = 0; c < cols; ++c) {
      stats[first + c] += double(sum[c]);
      stats[a.targets + first + c] += double(square[c]);
    }
  }

  // The operands of the current row block. Packed panels: all of them if they fit, else those of
  // the current group as right factors and one strip as the left factor.
  struct Packs {
    const Plan& plan;
    T* weight;  // of the row block; null without weights
    bool all;
    bool in_place;  // x is read where it lies
    int64_t row, depth;
    int64_t first, end;  // the panels that have a slot
    int64_t panel_bytes, flag_bytes;
    char *rights, *right_done, *lefts, *left_done;

    void forget() { memset(right_done, 0, size_t(flag_bytes)); }  // both sets of flags

    P* slot(char* base, int64_t at) const { return reinterpret_cast<P*>(base + at * panel_bytes); }

    Operand<P> right(int64_t p) {
      const Panel panel = panel_of(plan, p);
      if constexpr (E::kReadsInPlace) {
        if (in_place && panel.is_x) {
          const Source<S> x = x_source<S>(plan.args, row, panel.first);
          return {x.data, x.row_stride};
        }
      }
      P* at = slot(rights, p - first);
      if (!right_done[p - first]) {
        E::pack(plan, panel, row, depth, nullptr, at);
        right_done[p - first] = 1;
      }
      return {at, E::stride(panel.width)};
    }

    Operand<P> left(int64_t i) {
      const bool has_right = !weight && i >= first && i < end;
      if (has_right && E::kSharedPacking) return right(i);
      const Panel panel = panel_of(plan, i);
      P* at = slot(lefts, all ? i : 0);
      if (!all || !left_done[i]) {
        if (all) left_done[i] = 1;
        if (!has_right) E::pack(plan, panel, row, depth, weight, at);
        if constexpr (!E::kSharedPacking) E::flip(depth, has_right ? right(i).data : at, at);
      }
      return {at, E::stride(panel.width)};
    }
  };

  static Packs make_packs(const Plan& plan, int64_t panel_end, int64_t depth) {
    const GramArgs& a = plan.args;
    const int64_t panel_bytes = ceil_div(E::panel_size(depth) * int64_t(sizeof(P)), 64) * 64;
    const bool own_lefts = !E::kSharedPacking || a.weight;
    const int64_t fit = int64_t(kPackBytes) / max64(panel_bytes, 64);
    const bool all = panel_end * (own_lefts ? 2 : 1) <= fit;
    const int64_t rights = all ? panel_end : min64(E::kGroup, panel_end);
    const int64_t lefts = all ? (own_lefts ? panel_end : 0) : 1;
    const int64_t weight_bytes = ceil_div(depth * int64_t(sizeof(T)), 64) * 64;
    const int64_t flag_bytes = ceil_div(rights + lefts, 64) * 64;
    char* memory = static_cast<char*>(
        plan.scratch(size_t(weight_bytes + flag_bytes + (rights + lefts) * panel_bytes)));
    char* flags = memory + weight_bytes;
    char* panels = flags + flag_bytes;
    return {plan,
            a.weight ? reinterpret_cast<T*>(memory) : nullptr,
            all,
            false,
            0,
            0,
            0,
            panel_end,
            panel_bytes,
            flag_bytes,
            panels,
            flags,
            panels + rights * panel_bytes,
            flags + rights};
  }

  // Few columns in short rows need no packing. A vector that reaches past the end of its row reads
  // the next one, whose part of the product is dropped; after the last row there may be nothing.
  static bool reads_in_place(const Plan& plan) {
    const GramArgs& a = plan.args;
    return E::kReadsInPlace && !a.weight && !a.bias && a.x_col_stride == 1 &&
           a.x_row_stride >= max64(plan.d1, kLanesT) &&
           a.x_row_stride * int64_t(sizeof(T)) <= kInPlaceBytes;
  }

  // With very few rows the time is that of writing the output, which is fastest from left to right:
  // both triangles are computed. They agree to the last bit, as products commute.
  static void run_whole(const Plan& plan, int64_t band) {
    const GramArgs& a = plan.args;
    Packs packs = make_packs(plan, plan.panels, a.rows);
    packs.forget();
    packs.depth = a.rows;
    const int64_t rows = ceil_div(plan.d1, E::kRows);
    const int64_t begin = rows * band / plan.bands, end = rows * (band + 1) / plan.bands;
    for (int64_t i = 0; i < plan.x_panels; ++i) {
      const Panel strip = panel_of(plan, i);
      const int64_t above = strip.first / E::kRows;
      const int64_t r1 = min64(end - above, ceil_div(strip.width, E::kRows));
      // Three micro-rows at a time, so that a panel is fetched into L1 a third as often.
      for (int64_t r = max64(begin - above, 0); r < r1; r += 3) {
        for (int64_t p = 0; p < plan.panels; ++p) {
          const Panel panel = panel_of(plan, p);
          const int64_t ld = panel.is_x ? plan.d1 : a.targets;
          T* c = static_cast<T*>(panel.is_x ? a.gram : a.cross) + strip.first * ld + panel.first;
          E::block(a.rows, packs.left(i), packs.right(p), r, min64(r + 3, r1), false, c, ld,
                   strip.width, panel.width, 0.0);
        }
      }
    }
  }

  static void run(const Plan* plan_ptr, int64_t part) {
    const Plan& plan = *plan_ptr;
    const GramArgs& a = plan.args;
    const int64_t group = part / plan.bands, band = part % plan.bands;
    const int64_t row_begin =
        a.rows / plan.row_groups * group + min64(group, a.rows % plan.row_groups);
    const int64_t row_end =
        a.rows / plan.row_groups * (group + 1) + min64(group + 1, a.rows % plan.row_groups);
    const Output out = output_of(plan, group);
    const TilePos lo = plan.band_begin[band], hi = plan.band_begin[band + 1];
    const int64_t panel_end = hi.row > 0 ? hi.panel + 1 : hi.panel;
    const bool final_output = plan.row_groups == 1;
    double* stats = plan.target_stats + group * 2 * a.targets;
    if (plan.whole) {  // no row groups: bands share the rows of the output
      if constexpr (E::kTakesWhole) run_whole(plan, band);
      if (band == 0) {
        for (int64_t p = plan.x_panels; p < plan.panels; ++p) {
          target_stats(plan, panel_of(plan, p), 0, a.rows, nullptr, stats);
        }
      }
      if (a.labels) class_cross(plan, band, row_begin, row_end, out, stats);
      return;
    }

    const int64_t rows = row_end - row_begin;
    const int64_t even = ceil_div(rows, max64(ceil_div(rows, E::kDepth), 1));
    const int64_t depth_max = ceil_div(even, E::kDepthStep) * E::kDepthStep;
    const int64_t blocks = rows > 0 ? ceil_div(rows, depth_max) : 0;

    Packs packs = make_packs(plan, panel_end, depth_max);
    const bool in_place = reads_in_place(plan);

    // With one row block, each output is written once and never read: from a staging buffer.
    const bool streams = streams_output(plan);
    const bool staged = streams && blocks == 1 && a.beta == 0;
    alignas(64) T stages[2][kWidth * kWidth];
    T* stage = stages[0];
    Pending pending = {};
    E::begin_part();
    for (int64_t kb = 0; kb < blocks; ++kb) {
      const int64_t row = row_begin + kb * depth_max;
      const int64_t depth = min64(depth_max, row_end - row);
      if (depth <= 0) break;
      const bool last = row + depth == row_end;
      const double beta = kb == 0 ? out.beta : 1.0;
      if (packs.weight) {
        for (int64_t k = 0; k < depth; ++k) packs.weight[k] = weight_at<T>(a, row + k);
      }
      packs.forget();
      packs.row = row;
      packs.depth = depth;
      packs.in_place = in_place && (plan.d1 % kLanesT == 0 || row + depth < a.rows);

      for (int64_t g0 = lo.panel; g0 < panel_end; g0 += E::kGroup) {
        const int64_t g1 = min64(g0 + E::kGroup, panel_end);
        if (!packs.all) {
          packs.forget();
          packs.first = g0;
          packs.end = g1;
        }
        for (int64_t p = g0; p < g1; ++p) {
          packs.right(p);
          if (!is_x(plan, p) && rows_of(plan, band, p).end == micro_rows(plan, p)) {
            target_stats(plan, panel_of(plan, p), row, depth, packs.weight, stats);
          }
        }
        for (int64_t i = 0; i < min64(g1, plan.x_panels); ++i) {
          const Panel strip = panel_of(plan, i);
          const int64_t above = strip.first / E::kRows;
          Operand<P> left = {};
          for (int64_t p = g0; p < g1; ++p) {
            if (is_x(plan, p) && p < i) continue;
            const Rows mine = rows_of(plan, band, p);
            const int64_t r0 = max64(mine.begin - above, 0);
            const int64_t r1 = min64(mine.end - above, ceil_div(strip.width, E::kRows));
            if (r0 >= r1) continue;
            if (!left.data) left = packs.left(i);
            const Operand<P> right = packs.right(p);
            const Panel panel = panel_of(plan, p);
            if (!panel.is_x) {
              E::block(depth, left, right, r0, r1, false,
                       out.cross + strip.first * a.targets + panel.first, a.targets, strip.width,
                       panel.width, beta);
              continue;
            }
            T* c = staged ? stage : out.gram + strip.first * plan.d1 + panel.first;
            const int64_t ldc = staged ? kWidth : plan.d1;
            const bool finished = last && final_output;
            for (int64_t r = r0; r < r1; ++r) {
              if (!staged && beta != 0)
                prefetch_output(plan, out.gram, strip, panel, r, finished && !streams);
              E::block(depth, left, right, r, r + 1, p == i, c, ldc, strip.width, panel.width,
                       beta);
              for (int64_t k = 0; k < kStepsPerRow && pending.step < pending.end; ++k) {
                write_step(plan, &pending);
              }
            }
            if (!finished) continue;
            write_rest(plan, &pending);
            pending = {c,
                       ldc,
                       strip,
                       panel,
                       r0 * E::kRows,
                       min64(r1 * E::kRows, strip.width),
                       streams,
                       0,
                       staged ? kSteps : E::kVectors};
            if (staged) stage = stage == stages[0] ? stages[1] : stages[0];
          }
        }
      }
    }
    write_rest(plan, &pending);
    if (streams) stream_fence();
    E::end_part();
    if (a.labels) class_cross(plan, band, row_begin, row_end, out, stats);
    if (plan.row_groups > 1 &&
        __atomic_add_fetch(&plan.band_done[band], 1, __ATOMIC_ACQ_REL) == plan.row_groups) {
      merge(plan, band);
    }
  }

  // ---- class indices ----------------------------------------------------------------------------

  // cross[:, k] and the target statistics of one-hot targets, for this band's share of the rows of
  // `cross`, through a transposed accumulator whose rows are contiguous.
  static void class_cross(const Plan& plan, int64_t band, int64_t row_begin, int64_t row_end,
                          const Output& out, double* stats) {
    constexpr int64_t n = kLanes<T>;
    const GramArgs& a = plan.args;
    const int64_t classes = a.targets;
    const int64_t c_begin = plan.d1 * band / plan.bands, c_end = plan.d1 * (band + 1) / plan.bands;
    const int64_t fit = int64_t(kClassBytes / sizeof(T)) / classes / n * n;
    const int64_t width = min64(max64(fit, n), ceil_div(c_end - c_begin, n) * n);
    const int64_t block = max64(8192, 64 * classes);  // rows summed before they join the total
    T* sums = static_cast<T*>(plan.scratch(size_t(classes * width) * sizeof(T)));
    for (int64_t c0 = c_begin; c0 < c_end; c0 += width) {
      const int64_t cols = min64(width, c_end - c0);
      const int64_t x_cols = min64(cols, max64(a.cols - c0, 0));
      const int64_t full = a.x_col_stride == 1 ? x_cols / n * n : 0;
      T* c_out = out.cross + c0 * classes;
      for (int64_t first = row_begin; first < row_end; first += block) {
        const T beta = T(first == row_begin ? out.beta : 1.0);
        memset(sums, 0, size_t(classes * width) * sizeof(T));
        for (int64_t row = first; row < min64(first + block, row_end); ++row) {
          T* to = sums + a.labels[row * a.label_stride] * width;
          const T s = a.weight ? weight_at<T>(a, row) : T(1);
          const Source<S> x = x_source<S>(a, row, c0);
          for (int64_t c = 0; c < full; c += n) {
            store_as(to + c, load_as<Vec<T>>(to + c) + s * Convert<T>::load(x.data + c));
          }
          for (int64_t c = full; c < x_cols; ++c) {
            to[c] += s * T(to_float(x.data[c * x.col_stride]));
          }
          if (x_cols < cols) to[x_cols] += s;
        }
        if (beta == 0) {
          transpose_block<T, false>(sums, width, c_out, classes, classes, cols);
          continue;
        }
        for (int64_t c = 0; c < cols; ++c) {
          for (int64_t k = 0; k < classes; ++k) {
            T& at = c_out[c * classes + k];
            at = beta * at + sums[k * width + c];
          }
        }
      }
    }
    if (band != 0) return;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const double s = a.weight ? weight_at<double>(a, row) : 1.0;
      stats[a.labels[row * a.label_stride]] += s;
    }
    memcpy(stats + classes, stats, size_t(classes) * sizeof(double));
  }

  // ---- row groups -------------------------------------------------------------------------------

  // Adds the partial results of the other row groups in order, and mirrors. Run by the last part
  // of a band to finish.
  static void merge(const Plan& plan, int64_t band) {
    const GramArgs& a = plan.args;
    const TilePos lo = plan.band_begin[band], hi = plan.band_begin[band + 1];
    const Output total = output_of(plan, 0);
    for (int64_t p = lo.panel; p < plan.panels && p <= hi.panel; ++p) {
      const Rows mine = rows_of(plan, band, p);
      const int64_t first = mine.begin * E::kRows;
      const int64_t end = min64(mine.end * E::kRows, plan.d1);
      const Panel panel = panel_of(plan, p);
      const bool x = panel.is_x;
      const int64_t ld = x ? plan.d1 : a.targets, j0 = panel.first, cols = panel.width;
      for (int64_t g = 1; g < plan.row_groups; ++g) {
        const Output part = output_of(plan, g);
        const T* from = (x ? part.gram : part.cross) + j0;
        T* to = (x ? total.gram : total.cross) + j0;
        for (int64_t i = first; i < end; ++i) {
          for (int64_t c = x ? max64(0, i - j0) : 0; c < cols; ++c) {
            to[i * ld + c] += from[i * ld + c];
          }
        }
      }
      if (!x) continue;
      for (int64_t i = 0; i <= p; ++i) {
        const Panel strip = panel_of(plan, i);
        const int64_t m0 = max64(first - strip.first, 0),
                      m1 = min64(end - strip.first, strip.width);
        if (m0 >= m1) continue;
        Pending block = {
            total.gram + strip.first * ld + j0, ld, strip, panel, m0, m1, false, 0, E::kVectors};
        write_rest(plan, &block);
      }
    }
    if (!a.labels) return;
    const int64_t c_begin = plan.d1 * band / plan.bands, c_end = plan.d1 * (band + 1) / plan.bands;
    for (int64_t g = 1; g < plan.row_groups; ++g) {
      const T* from = output_of(plan, g).cross;
      for (int64_t at = c_begin * a.targets; at < c_end * a.targets; ++at) {
        total.cross[at] += from[at];
      }
    }
  }

  static constexpr Kernel kKernel = {shape, cut, run};
};

#if !defined(CFL_ISA_AMX)
template <class T, class S>
const Kernel* vector_kernel() {
  return &Driver<VectorEngine<T, S>>::kKernel;
}
#endif

}  // namespace

#if defined(CFL_ISA_AMX)

bool amx_compiled() { return true; }

// Weights would have to be rounded to bfloat16, so they are left to the vector engine.
const Kernel* CFL_ENTRY(const GramArgs& args) {
  const bool served =
      args.x_dtype == DType::kBF16 && args.acc_dtype == DType::kF32 && args.weight == nullptr;
  return served ? &Driver<TileEngine>::kKernel : nullptr;
}

#else

const Kernel* CFL_ENTRY(const GramArgs& args) {
  const bool wide = args.acc_dtype == DType::kF64;
  switch (args.x_dtype) {
    case DType::kF16:
      return wide ? vector_kernel<double, F16>() : vector_kernel<float, F16>();
    case DType::kBF16:
      return wide ? vector_kernel<double, BF16>() : vector_kernel<float, BF16>();
    case DType::kF32:
      return wide ? vector_kernel<double, float>() : vector_kernel<float, float>();
    case DType::kF64:
      return wide ? vector_kernel<double, double>() : nullptr;
  }
  return nullptr;
}

#endif

}  // namespace cfl::cpu::detail
