// The one SIMD source of the batched Cholesky solve, compiled once per instruction set.
//
// No C++ standard library here, and everything but the entry point in an unnamed namespace: see
// gram_kernel_isa.cpp.
//
// Scheme. The lanes of a vector belong to different systems ("interleaved"). A is kept as tile rows of
// four rows each; tile row t holds, for each column j < 4 (t + 1), its four entries side by side, so
// that the inner loop reads two streams forward. Right sides are stored the same way, transposed: four
// of them are one more tile row, and forward substitution is the same step as factoring a row below the
// diagonal. Left-looking: a 4 x 4 tile lives in registers while all columns to its left are subtracted.

#include <math.h>
#include <string.h>

#include "solve_kernel.h"

#if defined(CFL_ISA_AVX512)
#include <immintrin.h>
#define CFL_VECTOR_BYTES 64
#define CFL_ENTRY solve_kernels_avx512
#elif defined(CFL_ISA_AVX2)
#include <immintrin.h>
#define CFL_VECTOR_BYTES 32
#define CFL_ENTRY solve_kernels_avx2
#else
#define CFL_VECTOR_BYTES 16
#define CFL_ENTRY solve_kernels_generic
#endif

#define CFL_INLINE inline __attribute__((always_inline))

namespace cfl::cpu::detail {
namespace {

constexpr int kBytes = CFL_VECTOR_BYTES;
constexpr int kTile = 4;
constexpr int64_t kRightBytes = 256 << 10;  // right sides in work at a time

typedef float F32v __attribute__((vector_size(kBytes)));
typedef double F64v __attribute__((vector_size(kBytes)));
typedef int32_t I32v __attribute__((vector_size(kBytes)));
typedef int64_t I64v __attribute__((vector_size(kBytes)));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef F32v type;
  typedef I32v index;
};
template <>
struct VecOf<double> {
  typedef F64v type;
  typedef I64v index;
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Index = typename VecOf<T>::index;
template <class T>
constexpr int kLanes = kBytes / int(sizeof(T));

template <class T>
CFL_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
CFL_INLINE void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof(v));
}
CFL_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CFL_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

CFL_INLINE F32v root(F32v v) {
#if defined(CFL_ISA_AVX512)
  return (F32v)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)v);
#elif defined(CFL_ISA_AVX2)
  return (F32v)_mm256_sqrt_ps((__m256)v);
#else
  for (int l = 0; l < kLanes<float>; ++l) v[l] = sqrtf(v[l]);
  return v;
#endif
}
CFL_INLINE F64v root(F64v v) {
#if defined(CFL_ISA_AVX512)
  return (F64v)_mm512_maskz_sqrt_pd(__mmask8(-1), (__m512d)v);
#elif defined(CFL_ISA_AVX2)
  return (F64v)_mm256_sqrt_pd((__m256d)v);
#else
  for (int l = 0; l < kLanes<double>; ++l) v[l] = sqrt(v[l]);
  return v;
#endif
}

// --- between one system's memory and the lanes ----------------------------------------------------

template <class T, int S>
CFL_INLINE void transpose_step(Vec<T> (&r)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  Index<T> low, high;
  for (int l = 0; l < n; ++l) {
    low[l] = (l & S) ? n + l - S : l;
    high[l] = (l & S) ? n + l : l + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & S) continue;
    const Vec<T> a = r[i], b = r[i + S];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + S] = __builtin_shuffle(a, b, high);
  }
}

template <class T>
CFL_INLINE void transpose(Vec<T> (&r)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  transpose_step<T, 1>(r);
  if constexpr (n > 2) transpose_step<T, 2>(r);
  if constexpr (n > 4) transpose_step<T, 4>(r);
  if constexpr (n > 8) transpose_step<T, 8>(r);
}

// Numbers [at, at + count) of every lane, as vectors across the lanes.
template <class T>
CFL_INLINE void gather(const T* const* from, int64_t at, int64_t count, Vec<T> (&r)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  if (count >= n) {
#pragma GCC unroll 16
    for (int l = 0; l < n; ++l) r[l] = load<T>(from[l] + at);
  } else {
    for (int l = 0; l < n; ++l) {
      T part[n] = {};
      memcpy(part, from[l] + at, size_t(count) * sizeof(T));
      r[l] = load<T>(part);
    }
  }
  transpose<T>(r);
}

// The start of tile row t, in vectors.
CFL_INLINE int64_t tile_row(int64_t t) { return 8 * t * (t + 1); }

// The lower triangle of A into tile rows, prefetching the next group's.
template <class T>
void load_matrix(const SolveGroup& g, int64_t tiles, T* to) {
  constexpr int w = kLanes<T>;
  const int64_t n = g.n, size = n * n;
  const T* const* a = reinterpret_cast<const T* const*>(g.a);
  const T* const* next = reinterpret_cast<const T* const*>(g.next_a);
  int64_t i = 0, j = 0;  // memory row and column of the chunk's first number
  for (int64_t at = 0; at < size; at += w) {
    const int64_t end = min64(at + w, size), last = (end - 1) / n;
    // A chunk within one row and beyond the diagonal has nothing to give.
    const bool useful = i != last || (g.upper ? j + w > i : j <= i);
    if (useful) {
      Vec<T> r[w];
      gather<T>(a, at, size - at, r);
      if (next) {
#pragma GCC unroll 16
        for (int l = 0; l < w; ++l) __builtin_prefetch(next[l] + at, 0, 2);
      }
      for (int64_t e = at; e < end; ++e) {
        const int64_t row = g.upper ? j : i, col = g.upper ? i : j;
        if (col <= row) {
          store<T>(to + (tile_row(row / kTile) + col * kTile + row % kTile) * w, r[e - at]);
        }
        if (++j == n) j = 0, ++i;
      }
    } else {
      j += end - at;
      if (j >= n) j -= n, ++i;
    }
  }
  // Rows beyond n are those of an identity.
  for (int64_t row = n; row < tiles * kTile; ++row) {
    T* base = to + tile_row(row / kTile) * w;
    for (int64_t col = 0; col < row; ++col) store<T>(base + (col * kTile + row % kTile) * w, Vec<T>{});
    store<T>(base + (row * kTile + row % kTile) * w, Vec<T>{} + T(1));
  }
}

// Columns [begin, begin + cols) of B into tile rows of four right sides each.
template <class T>
void load_right(const SolveGroup& g, int64_t tiles, int64_t begin, int64_t cols, T* to) {
  constexpr int w = kLanes<T>;
  const T* const* b = reinterpret_cast<const T* const*>(g.b);
  const int64_t height = tiles * kTile, padded = (cols + kTile - 1) / kTile * kTile;
  auto place = [&](int64_t i, int64_t r) {
    return to + ((r / kTile) * height * kTile + i * kTile + r % kTile) * w;
  };
  const bool whole = cols == g.k;  // then the rows follow one another without a gap
  const int64_t runs = whole ? 1 : g.n, length = whole ? g.n * cols : cols;
  for (int64_t run = 0; run < runs; ++run) {
    int64_t i = run, r = 0;
    for (int64_t at = 0; at < length; at += w) {
      Vec<T> v[w];
      gather<T>(b, run * g.k + begin + at, length - at, v);
      for (int64_t e = at; e < min64(at + w, length); ++e) {
        store<T>(place(i, r), v[e - at]);
        if (++r == cols) r = 0, ++i;
      }
    }
  }
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t r = i < g.n ? cols : 0; r < padded; ++r) store<T>(place(i, r), Vec<T>{});
  }
}

template <class T>
void store_right(const SolveGroup& g, int64_t tiles, int64_t begin, int64_t cols, const T* from,
                 Index<T> failed) {
  constexpr int w = kLanes<T>;
  T* const* x = reinterpret_cast<T* const*>(g.x);
  const int64_t height = tiles * kTile;
  auto place = [&](int64_t i, int64_t r) {
    return from + ((r / kTile) * height * kTile + i * kTile + r % kTile) * w;
  };
  const Vec<T> nan = Vec<T>{} + T(__builtin_nan(""));
  const bool whole = cols == g.k;
  const int64_t runs = whole ? 1 : g.n, length = whole ? g.n * cols : cols;
  for (int64_t run = 0; run < runs; ++run) {
    int64_t i = run, r = 0;
    for (int64_t at = 0; at < length; at += w) {
      Vec<T> v[w];
      const int64_t count = min64(w, length - at);
      for (int64_t e = 0; e < w; ++e) {
        v[e] = e < count ? (failed ? nan : load<T>(place(i, r))) : nan;
        if (e < count && ++r == cols) r = 0, ++i;
      }
      transpose<T>(v);
      const int64_t offset = run * g.k + begin + at;
      if (count == w && g.valid == w) {
#pragma GCC unroll 16
        for (int l = 0; l < w; ++l) store<T>(x[l] + offset, v[l]);
      } else {
        for (int64_t l = 0; l < g.valid; ++l) {
          T part[w];
          store<T>(part, v[l]);
          memcpy(x[l] + offset, part, size_t(count) * sizeof(T));
        }
      }
    }
  }
}

// --- the algorithm ----------------------------------------------------------------------------------

template <class T>
using Tile = Vec<T>[kTile][kTile];

// c[i][j] -= sum_k left[k][i] right[k][j]
template <class T>
CFL_INLINE void subtract_product(Tile<T>& c, const T* left, const T* right, int64_t depth) {
  constexpr int w = kLanes<T>;
#if defined(CFL_ISA_AVX512)
  constexpr int kCols = 4;  // of the tile at a time: what the register file holds
#else
  constexpr int kCols = 2;
#endif
  for (int j0 = 0; j0 < kTile; j0 += kCols) {
    Vec<T> s[kTile][kCols];
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) s[i][j] = c[i][j0 + j];
    }
    for (int64_t k = 0; k < depth; ++k) {
      const T* l = left + k * kTile * w;
      const T* r = right + (k * kTile + j0) * w;
      Vec<T> a[kTile];
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) a[i] = load<T>(l + i * w);
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) {
        const Vec<T> b = load<T>(r + j * w);
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) s[i][j] -= a[i] * b;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) c[i][j0 + j] = s[i][j];
    }
  }
}

// One tile below the diagonal (or of right sides): subtract what is to its left, then divide by the
// diagonal tile, whose diagonal holds reciprocals. tile = the row's start, diagonal likewise.
template <class T>
CFL_INLINE void below_diagonal(T* tile, const T* diagonal, int64_t column) {
  constexpr int w = kLanes<T>;
  Tile<T> c;
  T* at = tile + column * kTile * w;
  const T* d = diagonal + column * kTile * w;
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) c[i][j] = load<T>(at + (j * kTile + i) * w);
  }
  subtract_product<T>(c, tile, diagonal, column);
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
    const Vec<T> inverse = load<T>(d + (j * kTile + j) * w);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) c[i][j] *= inverse;
#pragma GCC unroll 4
    for (int jj = j + 1; jj < kTile; ++jj) {
      const Vec<T> l = load<T>(d + (j * kTile + jj) * w);
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) c[i][jj] -= c[i][j] * l;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) store<T>(at + (j * kTile + i) * w, c[i][j]);
  }
}

// The diagonal tile: a 4 x 4 Cholesky in registers.
template <class T>
CFL_INLINE void on_diagonal(T* tile, int64_t column, Vec<T> tolerance, Index<T>* info) {
  constexpr int w = kLanes<T>;
  Tile<T> c;
  T* at = tile + column * kTile * w;
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
      c[i][j] = i < j ? Vec<T>{} : load<T>(at + (j * kTile + i) * w);
    }
  }
  Vec<T> original[kTile];
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) original[j] = c[j][j];
  subtract_product<T>(c, tile, tile, column);
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
    const Vec<T> pivot = c[j][j];
    // False for NaN. The second half refuses Inf, for which x - x is NaN.
    const Index<T> good = (pivot > tolerance * original[j]) & (pivot - pivot == Vec<T>{});
    const Index<T> fresh = ~good & (*info == Index<T>{});
    Index<T> order;
    for (int lane = 0; lane < w; ++lane) order[lane] = int32_t(column + j + 1);
    *info = fresh ? order : *info;
    const Vec<T> inverse = T(1) / root(good ? pivot : Vec<T>{} + T(1));
    store<T>(at + (j * kTile + j) * w, inverse);
#pragma GCC unroll 4
    for (int i = j + 1; i < kTile; ++i) {
      c[i][j] *= inverse;
      store<T>(at + (j * kTile + i) * w, c[i][j]);
    }
#pragma GCC unroll 4
    for (int jj = j + 1; jj < kTile; ++jj) {
#pragma GCC unroll 4
      for (int i = jj; i < kTile; ++i) c[i][jj] -= c[i][j] * c[jj][j];
    }
  }
}

// X <- L^-T X for one tile row of right sides, one tile of it.
template <class T>
CFL_INLINE void backward(const T* l, T* right, int64_t t, int64_t tiles) {
  constexpr int w = kLanes<T>;
  const int64_t column = t * kTile;
  Tile<T> c;  // c[j][r]
  T* at = right + column * kTile * w;
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) c[j][r] = load<T>(at + (j * kTile + r) * w);
  }
  for (int64_t below = t + 1; below < tiles; ++below) {
    const T* tile = l + (tile_row(below) + column * kTile) * w;
    const T* x = right + below * kTile * kTile * w;
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
        const Vec<T> entry = load<T>(tile + (j * kTile + i) * w);
#pragma GCC unroll 4
        for (int r = 0; r < kTile; ++r) c[j][r] -= entry * load<T>(x + (i * kTile + r) * w);
      }
    }
  }
  const T* d = l + (tile_row(t) + column * kTile) * w;
#pragma GCC unroll 4
  for (int j = kTile - 1; j >= 0; --j) {
    const Vec<T> inverse = load<T>(d + (j * kTile + j) * w);
#pragma GCC unroll 4
    for (int i = j + 1; i < kTile; ++i) {
      const Vec<T> entry = load<T>(d + (j * kTile + i) * w);
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) c[j][r] -= entry * c[i][r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
      c[j][r] *= inverse;
      store<T>(at + (j * kTile + r) * w, c[j][r]);
    }
  }
}

template <class T>
int64_t right_columns(int64_t tiles, int64_t k) {
  const int64_t one = tiles * kTile * kTile * kBytes;  // a tile row of right sides
  return min64(max64(kRightBytes / one, 1) * kTile, max64(k, 1));
}

template <class T>
size_t scratch_bytes(int64_t n, int64_t k) {
  const int64_t tiles = (n + kTile - 1) / kTile;
  const int64_t rights = (right_columns<T>(tiles, k) + kTile - 1) / kTile;
  return size_t(tile_row(tiles) + rights * tiles * kTile * kTile) * kBytes;
}

template <class T>
void run(const SolveGroup* group) {
  constexpr int w = kLanes<T>;
  const SolveGroup& g = *group;
  const int64_t tiles = (g.n + kTile - 1) / kTile;
  T* l = static_cast<T*>(g.scratch);
  T* right = l + tile_row(tiles) * w;
  load_matrix<T>(g, tiles, l);

  const Vec<T> shift = load<T>(static_cast<const T*>(g.shift));
  const T* const* diag = reinterpret_cast<const T* const*>(g.shift_diag);
  for (int64_t i = 0; i < g.n; ++i) {
    T* at = l + (tile_row(i / kTile) + i * kTile + i % kTile) * w;
    Vec<T> total = load<T>(at) + shift;
    if (diag) {
      Vec<T> own;
      for (int lane = 0; lane < w; ++lane) own[lane] = diag[lane][i];
      total += own;
    }
    store<T>(at, total);
  }

  const int64_t chunk = right_columns<T>(tiles, g.k);
  const Vec<T> tolerance = Vec<T>{} + T(g.tolerance);
  Index<T> info{};
  bool factored = false;
  for (int64_t begin = 0; begin < g.k || !factored; begin += chunk) {
    const int64_t cols = min64(chunk, g.k - begin), rights = (cols + kTile - 1) / kTile;
    if (cols > 0) load_right<T>(g, tiles, begin, cols, right);
    for (int64_t t = 0; t < tiles; ++t) {
      T* diagonal = l + tile_row(t) * w;
      if (!factored) {
        on_diagonal<T>(diagonal, t * kTile, tolerance, &info);
        for (int64_t below = t + 1; below < tiles; ++below) {
          below_diagonal<T>(l + tile_row(below) * w, diagonal, t * kTile);
        }
      }
      for (int64_t r = 0; r < rights; ++r) {
        below_diagonal<T>(right + r * tiles * kTile * kTile * w, diagonal, t * kTile);
      }
    }
    factored = true;
    for (int64_t t = tiles - 1; t >= 0; --t) {
      for (int64_t r = 0; r < rights; ++r) {
        backward<T>(l, right + r * tiles * kTile * kTile * w, t, tiles);
      }
    }
    if (cols > 0) store_right<T>(g, tiles, begin, cols, right, info != Index<T>{});
  }
  for (int lane = 0; lane < w; ++lane) g.info[lane] = int32_t(info[lane]);
}

template <class T>
constexpr SolveKernel kKernel = {kLanes<T>, scratch_bytes<T>, run<T>};

}  // namespace

SolveKernels CFL_ENTRY() { return {&kKernel<float>, &kKernel<double>}; }

}  // namespace cfl::cpu::detail
