// The one SIMD source of the Cholesky update, compiled once per instruction set. As in
// gram_kernel_isa.cpp: no C++ standard library, and everything but the entry points is unnamed.
//
// Scheme of update(): columns in panels of kPanel. The diagonal block of a panel is updated first
// and yields the reflectors; they are then applied to tiles of rows below, with the rows' part of W
// in registers. A tile is column-major, so that a vector holds one column of several rows: a
// column-major factor is worked on where it lies, a row-major one through transposition in
// registers.

#include <float.h>
#include <string.h>

#include "cholesky_kernel.h"
#include "vectors_isa.h"

#if defined(CFL_ISA_AVX512)
#define CFL_ENTRY cholesky_avx512
#elif defined(CFL_ISA_AVX2)
#define CFL_ENTRY cholesky_avx2
#else
#define CFL_ENTRY cholesky_generic
#endif

namespace cfl::cpu::detail {
namespace {

template <class T>
struct Of;
template <>
struct Of<float> {
  static constexpr float kEps = FLT_EPSILON;
  // Squares of numbers whose squares lie between these neither overflow nor lose digits.
  static constexpr float kTiny = 1e-30f, kHuge = 1e30f;
  // Up to this t, rotations of moderate numbers do not overflow either.
  static constexpr float kMostT = 1e12f;
  // About eps^-1/4: so many digits may a small pivot lose.
  static constexpr float kFarLonger = 64;
};
template <>
struct Of<double> {
  static constexpr double kEps = DBL_EPSILON;
  static constexpr double kTiny = 1e-280, kHuge = 1e280;
  static constexpr double kMostT = 1e100;
  static constexpr double kFarLonger = 8192;
};
template <class T>
using Mask = Index<T>;

template <class T>
CFL_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, kBytes);
  return v;
}
template <class T>
CFL_INLINE void store(T* p, Vec<T> v) {
  memcpy(p, &v, kBytes);
}
template <class T>
CFL_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
template <class T>
CFL_INLINE Mask<T> lane_numbers() {
  Mask<T> result;
  for (int i = 0; i < kLanes<T>; ++i) result[i] = i;
  return result;
}

CFL_INLINE float root(float x) { return __builtin_sqrtf(x); }
CFL_INLINE double root(double x) { return __builtin_sqrt(x); }
#if defined(CFL_ISA_AVX512)
CFL_INLINE F32v root(F32v x) { return (F32v)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)x); }
CFL_INLINE F64v root(F64v x) { return (F64v)_mm512_maskz_sqrt_pd(__mmask8(-1), (__m512d)x); }
#elif defined(CFL_ISA_AVX2)
CFL_INLINE F32v root(F32v x) { return (F32v)_mm256_sqrt_ps((__m256)x); }
CFL_INLINE F64v root(F64v x) { return (F64v)_mm256_sqrt_pd((__m256d)x); }
#else
CFL_INLINE F32v root(F32v x) {
  for (int i = 0; i < 4; ++i) x[i] = root(x[i]);
  return x;
}
CFL_INLINE F64v root(F64v x) {
  for (int i = 0; i < 2; ++i) x[i] = root(x[i]);
  return x;
}
#endif
template <class T>
CFL_INLINE T magnitude(T x) {
  return x < 0 ? -x : x;
}

// r = the transpose of n rows of n entries, row i at rows(i).
template <class T, class Rows>
CFL_INLINE void load_transposed(Rows rows, Vec<T> (&r)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
#if defined(CFL_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    // Rows i, i + 4, i + 8, i + 12 side by side: the loads do half of the exchanges.
#pragma GCC unroll 4
    for (int q = 0; q < n; q += 4) {
      __m512 a[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_castps128_ps512(_mm_loadu_ps(rows(i) + q));
        a[i] = _mm512_mask_broadcast_f32x4(a[i], 0x00f0, _mm_loadu_ps(rows(i + 4) + q));
        a[i] = _mm512_mask_broadcast_f32x4(a[i], 0x0f00, _mm_loadu_ps(rows(i + 8) + q));
        a[i] = _mm512_mask_broadcast_f32x4(a[i], 0xf000, _mm_loadu_ps(rows(i + 12) + q));
      }
      // _mm512_undefined_ps() inside the unmasked forms makes gcc warn: shuffle without intrinsics.
      constexpr I32v low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
      constexpr I32v high = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
      constexpr I32v first = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
      constexpr I32v second = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
      const F32v x = __builtin_shuffle((F32v)a[0], (F32v)a[1], low);
      const F32v y = __builtin_shuffle((F32v)a[2], (F32v)a[3], low);
      const F32v u = __builtin_shuffle((F32v)a[0], (F32v)a[1], high);
      const F32v v = __builtin_shuffle((F32v)a[2], (F32v)a[3], high);
      r[q] = __builtin_shuffle(x, y, first);
      r[q + 1] = __builtin_shuffle(x, y, second);
      r[q + 2] = __builtin_shuffle(u, v, first);
      r[q + 3] = __builtin_shuffle(u, v, second);
    }
    return;
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) r[i] = load(rows(i));
  transpose<T>(r);
}

// ---- reflectors
// ------------------------------------------------------------------------------------

// What one column's reflector does to a row: with the change C = dl L + s . W,
//   L' = L + C,   W <- W - g (dw L + C).
// The signs of a negative diagonal entry and the decay ride in dl and dw.
//
// It is the change that is computed, not the new entry from a cosine near 1: roundings of that one
// all go the same way, and n updates by small vectors would be n eps off. Changes of a pivot below
// its rounding are lost more often than not all the same. So what its rounding added to a pivot, as
// a share of it, is added to its whole column, which is then consistent: a factor of a column makes
// no difference to L^-T times what is beneath.
//
// Where a single v is longer than l, W less what is nearly W would leave only rounding of what L
// had to say. There W' = (l / r) W - (v / r) L, as a rotation has it: with keep = l / r and no C.
template <class T, int K>
struct Reflector {
  T dl, dw, s[K], g[K];
};
template <class T>
struct Reflector<T, 1> {
  T dl, dw, s[1], g[1], keep, of_change;
};

// W' of one column, after the change C.
template <class T, class V>
CFL_INLINE V turned(const Reflector<T, 1>& h, V w, V old, V change) {
  return h.keep * w - h.g[0] * (h.dw * old + h.of_change * change);
}

// r = sqrt(l^2 + sign |v|^2) and the like where squares leave the range of T.
CFL_INLINE float scaled_root(float l, const float* v, int k, bool down) {
  double sum = 0;
  for (int p = 0; p < k; ++p) sum += double(v[p]) * v[p];
  const double square = double(l) * l + (down ? -sum : sum);
  if (down && !(square > double(kLostPivot) * FLT_EPSILON * l * l)) return -1;
  return float(__builtin_sqrt(square));
}
CFL_INLINE double scaled_root(double l, const double* v, int k, bool down) {
  double most = l;
  for (int p = 0; p < k; ++p) most = magnitude(v[p]) > most ? magnitude(v[p]) : most;
  if (most == 0) return down ? -1 : 0;
  const double unit = l / most;
  double sum = 0;
  for (int p = 0; p < k; ++p) sum += v[p] / most * (v[p] / most);
  const double square = unit * unit + (down ? -sum : sum);
  if (down && !(square > kLostPivot * DBL_EPSILON * unit * unit)) return -1;
  return most * __builtin_sqrt(square);
}

template <class T>
CFL_INLINE void rotate_instead(Reflector<T, 1>& h, T cosine, T sine, T sign) {
  h.keep = cosine;
  h.g[0] = sine;
  h.dw = sign;
  h.of_change = 0;
}

// Fills `h` from the diagonal entry and row of W, and returns the new diagonal entry; not a finite
// number
// >= 0 if there is none.
template <class T, int K>
CFL_INLINE T reflect(T diagonal, const T* v, T scale, bool down, Reflector<T, K>& h) {
  const T sign = diagonal < 0 ? -scale : scale;
  const T l = sign * diagonal;
  if constexpr (K == 1) h.keep = h.of_change = 1;
  T sum = v[0] * v[0];
  for (int p = 1; p < K; ++p) sum += v[p] * v[p];
  T square = l * l + (down ? -sum : sum), r;
  const bool plain = square > Of<T>::kTiny && square + sum < Of<T>::kHuge &&
                     (!down || square > T(kLostPivot) * Of<T>::kEps * l * l);
  if (__builtin_expect(plain, 1)) {
    r = root(square);
    const T inverse = T(1) / (r * (l + r));
    const T over_r = inverse * (l + r), over_sum = inverse * r;
    for (int p = 0; p < K; ++p) {
      h.s[p] = down ? -v[p] * over_r : v[p] * over_r;
      h.g[p] = v[p] * over_sum;
    }
    h.dw = sign + 1;
    const T less = sum * inverse;  // 1 - l / r
    h.dl = (down ? sign * less : -(sign * less)) + (sign - 1);
    const T change = down ? -less * r : less * r, pivot = l + change;
    h.dl += sign * (l * over_r) * (((pivot - l) - change) * over_r);
    if constexpr (K == 1) {
      if (!down && sum > l * l) rotate_instead(h, l * over_r, v[0] * over_r, sign);
    }
    return pivot;
  }
  r = scaled_root(l, v, K, down);
  h.dw = sign + 1;
  h.dl = sign - 1;
  for (int p = 0; p < K; ++p) h.s[p] = h.g[p] = 0;
  if (!(r > 0)) return r;  // 0: a zero column of a semi-definite factor stays one
  for (int p = 0; p < K; ++p) {
    const T ratio = v[p] / r;
    h.s[p] = down ? -ratio : ratio;
    h.g[p] = ratio / (l / r + 1);
  }
  h.dl = sign * (l / r) - 1;
  if constexpr (K == 1) {
    if (!down && magnitude(v[0]) > l) rotate_instead(h, l / r, v[0] / r, sign);
  }
  return r;
}

// The rotations of one panel: L' = L + (e L + d w), w <- w - p L, and after the panel w is made of
// its true length.
template <class T>
struct Rotations {
  T e[kPanel], d[kPanel], p[kPanel], sign[kPanel], normalise;
};

// ---- one matrix
// ------------------------------------------------------------------------------------

template <class T, int K>
struct Single {
  static constexpr int n = kLanes<T>;
  // Enough rows in flight to hide the latency of a column's chain, few enough for the registers.
  static constexpr int kVecs = kBytes == 64 ? 4 : 2;
  static constexpr int64_t kRows = kVecs * n;

  static CFL_INLINE void load_block(const UpdateArgs<T>& a, int64_t j0, int64_t cols, T* block) {
    const T* from = a.l + j0 * (a.row_stride + a.col_stride);
    if (a.col_stride == 1 && cols == kPanel) {
      for (int64_t i0 = 0; i0 < kPanel; i0 += n) {
        for (int64_t c = 0; c < i0 + n; c += n) {
          Vec<T> r[n];
          for (int i = 0; i < n; ++i) r[i] = load(from + (i0 + i) * a.row_stride + c);
          transpose<T>(r);
          for (int i = 0; i < n; ++i) store(block + (c + i) * kPanel + i0, r[i]);
        }
      }
    } else if (cols == kPanel) {
      for (int64_t c = 0; c < kPanel; ++c) {
        for (int64_t i0 = c / n * n; i0 < kPanel; i0 += n) {
          store(block + c * kPanel + i0, load(from + c * a.col_stride + i0));
        }
      }
    } else {
      for (int64_t c = 0; c < cols; ++c) {
        for (int64_t i = c; i < cols; ++i) {
          block[c * kPanel + i] = from[i * a.row_stride + c * a.col_stride];
        }
      }
    }
  }

  // Writes the lower triangle only.
  static CFL_INLINE void store_block(const UpdateArgs<T>& a, int64_t j0, int64_t cols,
                                     const T* block) {
    T* to = a.l + j0 * (a.row_stride + a.col_stride);
    const Mask<T> lane = lane_numbers<T>();
    if (a.col_stride == 1 && cols == kPanel) {
      for (int64_t i0 = 0; i0 < kPanel; i0 += n) {
        for (int64_t c = 0; c <= i0; c += n) {
          Vec<T> r[n];
          for (int i = 0; i < n; ++i) r[i] = load(block + (c + i) * kPanel + i0);
          transpose<T>(r);
          for (int i = 0; i < n; ++i) {
            T* at = to + (i0 + i) * a.row_stride + c;
            const Mask<T> lower = lane <= typename VecOf<T>::lane(c == i0 ? i : n);
            store(at, lower ? r[i] : load(at));
          }
        }
      }
    } else if (cols == kPanel) {
      for (int64_t c = 0; c < kPanel; ++c) {
        const int64_t first = c / n * n;
        for (int64_t i0 = first; i0 < kPanel; i0 += n) {
          T* at = to + c * a.col_stride + i0;
          const Vec<T> value = load(block + c * kPanel + i0);
          const Mask<T> lower = lane >= typename VecOf<T>::lane(i0 == first ? c - first : 0);
          store(at, lower ? value : load(at));
        }
      }
    } else {
      for (int64_t c = 0; c < cols; ++c) {
        for (int64_t i = c; i < cols; ++i) {
          to[i * a.row_stride + c * a.col_stride] = block[c * kPanel + i];
        }
      }
    }
  }

  // The triangle of one panel: finds the reflectors and applies them within. Returns as update()
  // does.
  static int64_t diagonal(const UpdateArgs<T>& a, int64_t j0, int64_t cols,
                          Reflector<T, K>* reflectors) {
    alignas(64) T block[kPanel * kPanel];
    alignas(64) T w[K * kPanel];
    memset(block, 0, sizeof(block));  // what lies above the diagonal takes part, and is thrown away
    load_block(a, j0, cols, block);
    for (int64_t chunk = 0; chunk < a.rank; chunk += K) {
      for (int p = 0; p < K; ++p) {
        memcpy(w + p * kPanel, a.w + (chunk + p) * a.ldw + j0, sizeof(T) * kPanel);
      }
      const T scale = chunk == 0 ? a.scale : T(1);
      Reflector<T, K>* of_chunk = reflectors + chunk / K * kPanel;
      T row[K], diagonal_entry = block[0];
      for (int p = 0; p < K; ++p) row[p] = w[p * kPanel];
      for (int64_t j = 0; j < cols; ++j) {
        Reflector<T, K>& h = of_chunk[j];
        const T r = reflect<T, K>(diagonal_entry, row, scale, a.down, h);
        if (!(r >= 0) || r * T(0) != T(0)) return j0 + j + 1;
        T* column = block + j * kPanel;
        if (j + 1 < cols) {
          // The next pivot's row ahead of the vectors: it is what the next reflector waits for.
          const T old = column[j + 1];
          T change = h.dl * old;
          for (int p = 0; p < K; ++p) {
            row[p] = w[p * kPanel + j + 1];
            change += h.s[p] * row[p];
          }
          if constexpr (K == 1) {
            row[0] = turned(h, row[0], old, change);
          } else {
            const T both = h.dw * old + change;
            for (int p = 0; p < K; ++p) row[p] -= h.g[p] * both;
          }
          diagonal_entry = column[kPanel + j + 1];
        }
        for (int64_t x = j / n * n; x < kPanel; x += n) {
          const Vec<T> old = load(column + x);
          Vec<T> change = h.dl * old;
          for (int p = 0; p < K; ++p) change += h.s[p] * load(w + p * kPanel + x);
          if constexpr (K == 1) {
            store(w + x, turned(h, load(w + x), old, change));
          } else {
            const Vec<T> both = h.dw * old + change;
            for (int p = 0; p < K; ++p) {
              store(w + p * kPanel + x, load(w + p * kPanel + x) - h.g[p] * both);
            }
          }
          store(column + x, old + change);
        }
        column[j] = r;
      }
    }
    store_block(a, j0, cols, block);
    return 0;
  }

  // The same for a rank-one update by rotations. False, with nothing changed, if they could
  // overflow.
  static CFL_INLINE bool diagonal_by_rotations(const UpdateArgs<T>& a, int64_t j0, int64_t cols,
                                               Rotations<T>& out) {
    constexpr int kBlockVecs = kPanel / n;
    if (!a.moderate) return false;
    alignas(64) T block[kPanel * kPanel];
    alignas(64) T length[kPanel], inverse[kPanel];
    if (cols < kPanel) memset(block, 0, sizeof(block));
    load_block(a, j0, cols, block);
    for (int64_t j = 0; j < kPanel; ++j) {
      const T entry = j < cols ? block[j * kPanel + j] : T(1);
      out.sign[j] = entry < 0 ? -a.scale : a.scale;
      length[j] = out.sign[j] * entry;
      if (!(length[j] * length[j] > Of<T>::kTiny)) return false;
      inverse[j] = T(1) / length[j];
    }
    Vec<T> w[kBlockVecs];
    for (int x = 0; x < kBlockVecs; ++x) w[x] = load(a.w + j0 + x * n);
    T t = 1, inverse_t = 1;
#pragma GCC unroll 4
    for (int x0 = 0; x0 < kBlockVecs; ++x0) {
      for (int lane = 0; lane < n; ++lane) {
        const int64_t j = x0 * n + lane;
        if (j >= cols) break;
        const Mask<T> pick = Mask<T>{} + typename VecOf<T>::lane(lane);
        const T p = __builtin_shuffle(w[x0], pick)[0] * inverse[j];
        const T next_t = t + p * p, mean = root(t * next_t), sum = next_t + mean;
        const T shared = T(1) / (next_t * sum),
                inverse_next = shared * sum;  // one division for two
        const T c = mean * inverse_next;
        const T d = p * c * inverse_t;
        const T less = p * p * (shared * next_t);  // 1 - c
        const T over_c = next_t * inverse_t * c;
        const T change = length[j] * (less * over_c), pivot = length[j] + change;
        const T rounded = ((pivot - length[j]) - change) * (c * inverse[j]);
        out.e[j] = (out.sign[j] - 1) - out.sign[j] * (less - c * rounded);
        out.d[j] = d;
        out.p[j] = p * out.sign[j];
        T* column = block + j * kPanel;
#pragma GCC unroll 16
        for (int x = x0; x < kBlockVecs; ++x) {
          const Vec<T> old = load(column + x * n);
          store(column + x * n, old + (out.e[j] * old + d * w[x]));
          w[x] -= out.p[j] * old;
        }
        column[j] = pivot;
        t = next_t;
        inverse_t = inverse_next;
      }
    }
    if (!(t < Of<T>::kMostT)) return false;
    out.normalise = root(inverse_t);
    store_block(a, j0, cols, block);
    return true;
  }

  template <int kVecs>
  static CFL_INLINE void rotate(const Rotations<T>& h, int64_t cols, T* tile, int64_t ld, T* w) {
    Vec<T> held[kVecs];
#pragma GCC unroll 8
    for (int x = 0; x < kVecs; ++x) held[x] = load(w + x * n);
    for (int64_t j = 0; j < cols; ++j) {
      T* column = tile + j * ld;
#pragma GCC unroll 8
      for (int x = 0; x < kVecs; ++x) {
        const Vec<T> old = load(column + x * n);
        store(column + x * n, old + (h.e[j] * old + h.d[j] * held[x]));
        held[x] -= h.p[j] * old;
      }
    }
#pragma GCC unroll 8
    for (int x = 0; x < kVecs; ++x) store(w + x * n, h.normalise * held[x]);
  }

  // Applies all reflectors of a panel to kVecs * n rows, whose part of W starts at w.
  template <int kVecs>
  static CFL_INLINE void apply(const UpdateArgs<T>& a, const Reflector<T, K>* reflectors,
                               int64_t cols, T* tile, int64_t ld, T* w) {
    for (int64_t chunk = 0; chunk < a.rank; chunk += K) {
      Vec<T> held[K][kVecs];
#pragma GCC unroll 4
      for (int p = 0; p < K; ++p) {
#pragma GCC unroll 8
        for (int x = 0; x < kVecs; ++x) held[p][x] = load(w + (chunk + p) * a.ldw + x * n);
      }
      const Reflector<T, K>* h = reflectors + chunk / K * kPanel;
      for (int64_t j = 0; j < cols; ++j, ++h) {
        T* column = tile + j * ld;
#pragma GCC unroll 8
        for (int x = 0; x < kVecs; ++x) {
          const Vec<T> old = load(column + x * n);
          Vec<T> change = h->dl * old + h->s[0] * held[0][x];
          if constexpr (K == 2) change += h->s[1] * held[1][x];
          if constexpr (K == 4) {  // two chains are shorter than one
            Vec<T> other = h->s[1] * held[1][x];
            change += h->s[2] * held[2][x];
            other += h->s[3] * held[3][x];
            change += other;
          }
          if constexpr (K == 1) {
            held[0][x] = turned(*h, held[0][x], old, change);
          } else {
            const Vec<T> both = h->dw * old + change;
#pragma GCC unroll 4
            for (int p = 0; p < K; ++p) held[p][x] -= h->g[p] * both;
          }
          store(column + x * n, old + change);
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < K; ++p) {
#pragma GCC unroll 8
        for (int x = 0; x < kVecs; ++x) store(w + (chunk + p) * a.ldw + x * n, held[p][x]);
      }
    }
  }

  // A tile of rows of a row-major factor to or from a column-major buffer.
  template <int kVecs>
  static CFL_INLINE void gather(const T* from, int64_t stride, int64_t rows, T* tile) {
    for (int64_t i0 = 0; i0 < kVecs * n; i0 += n) {
      for (int64_t c = 0; c < kPanel; c += n) {
        Vec<T> r[n];
        if (rows == kVecs * n) {
          load_transposed<T>([&](int i) { return from + (i0 + i) * stride + c; }, r);
        } else {
          for (int i = 0; i < n; ++i) r[i] = i < rows ? load(from + i * stride + c) : Vec<T>{};
          transpose<T>(r);
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) store(tile + (c + i) * kVecs * n + i0, r[i]);
      }
    }
  }
  template <int kVecs>
  static CFL_INLINE void scatter(const T* tile, T* to, int64_t stride, int64_t rows) {
    for (int64_t i0 = 0; i0 < kVecs * n; i0 += n) {
      for (int64_t c = 0; c < kPanel; c += n) {
        Vec<T> r[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) r[i] = load(tile + (c + i) * kVecs * n + i0);
        transpose<T>(r);
        if (rows == kVecs * n) {
#pragma GCC unroll 16
          for (int i = 0; i < n; ++i) store(to + (i0 + i) * stride + c, r[i]);
        } else {
          for (int i = 0; i < rows; ++i) store(to + i * stride + c, r[i]);
        }
      }
    }
  }

  // The panel's columns in rows i0 .. i0 + rows; rows = kVecs * n, or fewer with kVecs = 1.
  template <int kVecs>
  static void rows_below(const UpdateArgs<T>& a, int64_t i0, int64_t j0, int64_t rows,
                         const Rotations<T>* rotations, const Reflector<T, K>* reflectors) {
    constexpr int64_t ld = kVecs * n;
    T* at = a.l + i0 * a.row_stride + j0 * a.col_stride;
    auto act = [&](T* columns, int64_t stride) {
      if (K == 1 && rotations) {
        rotate<kVecs>(*rotations, kPanel, columns, stride, a.w + i0);
      } else {
        apply<kVecs>(a, reflectors, kPanel, columns, stride, a.w + i0);
      }
    };
    if (a.col_stride != 1 && rows == ld) return act(at, a.col_stride);
    alignas(64) T tile[kPanel * ld];
    if (a.col_stride == 1) {
      gather<kVecs>(at, a.row_stride, rows, tile);
      act(tile, ld);
      scatter<kVecs>(tile, at, a.row_stride, rows);
      return;
    }
    for (int64_t c = 0; c < kPanel; ++c) {
      for (int64_t i = 0; i < ld; ++i)
        tile[c * ld + i] = i < rows ? at[c * a.col_stride + i] : T(0);
    }
    act(tile, ld);
    for (int64_t c = 0; c < kPanel; ++c) {
      for (int64_t i = 0; i < rows; ++i) at[c * a.col_stride + i] = tile[c * ld + i];
    }
  }

  // The panel's columns in the rows beneath the triangle.
  static void beneath(const UpdateArgs<T>& a, int64_t j0, int64_t cols,
                      const Rotations<T>* rotations, const Reflector<T, K>* reflectors) {
    alignas(64) T tile[kPanel * n];
    for (int64_t i0 = 0; i0 < a.beneath_rows; i0 += n) {
      const int64_t rows = min64(n, a.beneath_rows - i0);
      T* at = a.beneath + i0 * a.beneath_stride + j0;
      if (cols == kPanel) {
        gather<1>(at, a.beneath_stride, rows, tile);
      } else {
        memset(tile, 0, sizeof(T) * cols * n);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t c = 0; c < cols; ++c) tile[c * n + i] = at[i * a.beneath_stride + c];
        }
      }
      if (K == 1 && rotations) {
        rotate<1>(*rotations, cols, tile, n, a.beneath_w + i0);
      } else {
        apply<1>(a, reflectors, cols, tile, n, a.beneath_w + i0);
      }
      if (cols == kPanel) {
        scatter<1>(tile, at, a.beneath_stride, rows);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t c = 0; c < cols; ++c) at[i * a.beneath_stride + c] = tile[c * n + i];
        }
      }
    }
  }

  static int64_t update(const UpdateArgs<T>& a) {
    Reflector<T, K>* reflectors = reinterpret_cast<Reflector<T, K>*>(a.coefficients);
    Rotations<T> rotations;
    for (int64_t j0 = 0; j0 < a.order; j0 += kPanel) {
      const int64_t cols = min64(kPanel, a.order - j0);
      const bool rotated = K == 1 && !a.down && diagonal_by_rotations(a, j0, cols, rotations);
      if (!rotated) {
        const int64_t failed = diagonal(a, j0, cols, reflectors);
        if (failed) return failed;
      }
      int64_t i0 = j0 + kPanel;
      for (; i0 + kRows <= a.order; i0 += kRows) {
        rows_below<kVecs>(a, i0, j0, kRows, rotated ? &rotations : nullptr, reflectors);
      }
      for (; i0 < a.order; i0 += n) {
        rows_below<1>(a, i0, j0, min64(n, a.order - i0), rotated ? &rotations : nullptr,
                      reflectors);
      }
      if (a.beneath_rows) beneath(a, j0, cols, rotated ? &rotations : nullptr, reflectors);
    }
    return 0;
  }
};

// Whether a column of w is far longer than a pivot.
template <class T>
bool far_longer(const UpdateArgs<T>& args) {
  constexpr int64_t kSome = 128;
  T limit[kSome];
  for (int64_t begin = 0; begin < args.order; begin += kSome) {
    const int64_t count = min64(kSome, args.order - begin);
    const T* diagonal = args.l + begin * (args.row_stride + args.col_stride);
    for (int64_t j = 0; j < count; ++j) {
      const T pivot = args.scale * magnitude(diagonal[j * (args.row_stride + args.col_stride)]);
      limit[j] = pivot > 0 ? Of<T>::kFarLonger * pivot : Of<T>::kHuge;
    }
    Mask<T> found{};
    for (int64_t p = 0; p < args.rank; ++p) {
      const T* w = args.w + p * args.ldw + begin;
      int64_t j = 0;
      for (; j + kLanes<T> <= count; j += kLanes<T>) {
        const Vec<T> x = load(w + j);
        found |= (x < 0 ? -x : x) > load(limit + j);
      }
      for (; j < count; ++j) {
        if (magnitude(w[j]) > limit[j]) return true;
      }
    }
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      if (found[lane]) return true;
    }
  }
  return false;
}

template <class T>
int64_t update(const UpdateArgs<T>& args) {
  if (args.rank == 1) return Single<T, 1>::update(args);
  if (!args.down && far_longer(args)) {
    // Of several columns at once the small differences of large ones would be rounding, and they
    // are all that is left beside small pivots.
    UpdateArgs<T> one = args;
    one.rank = 1;
    for (int64_t p = 0; p < args.rank; ++p) {
      const int64_t failed = Single<T, 1>::update(one);
      if (failed) return failed;
      one.scale = 1;
      one.w += args.ldw;
      if (one.beneath_rows) one.beneath_w += args.ldw;
    }
    return 0;
  }
  if (args.rank == 2) return Single<T, 2>::update(args);
  return Single<T, 4>::update(args);
}

// ---- a group of matrices
// ---------------------------------------------------------------------------

template <class T>
struct Group {
  static constexpr int n = kLanes<T>;
  typedef Vec<T> V;

  // Calls fn(chunk offset, function to the buffer positions of its n entries) for all chunks of n
  // consecutive entries of a dense (major, minor) matrix, the last one overlapping its neighbour,
  // except those that `skip` says.
  template <class Skip, class Place, class Fn>
  static CFL_INLINE void chunks(int64_t total, int64_t minor, Skip skip, Place place, Fn fn) {
    int64_t major = 0, at = 0;  // of the chunk's first entry
    for (int64_t f = 0; f < total; f += n) {
      if (f + n > total) {
        f = total - n;
        major = f / minor;
        at = f % minor;
      }
      if (at + n <= minor) {
        const int64_t first = place(major, at), step = place(0, 1) - place(0, 0);
        if (!skip(major, at)) fn(f, [first, step](int t) { return first + t * step; });
      } else {
        int64_t where[n];
        int64_t a = major, b = at;
        for (int t = 0; t < n; ++t) {
          where[t] = place(a, b);
          if (++b == minor) {
            b = 0;
            ++a;
          }
        }
        fn(f, [&where](int t) { return where[t]; });
      }
      at += n;
      while (at >= minor) {
        at -= minor;
        ++major;
      }
    }
  }

  template <class Where>
  static CFL_INLINE void load_chunk(const T* const* from, int64_t f, Where where, V* buffer) {
    V r[n];
    load_transposed<T>([&](int m) { return from[m] + f; }, r);
#pragma GCC unroll 16
    for (int t = 0; t < n; ++t) buffer[where(t)] = r[t];
  }

  static CFL_INLINE uint32_t bits(Mask<T> good) {
    uint32_t result = 0;
    for (int m = 0; m < n; ++m) result |= good[m] ? uint32_t(1) << m : 0;
    return result;
  }

  template <class Skip, class Place>
  static CFL_INLINE void write(const GroupArgs<T>& a, int64_t D, Skip skip, Place place, const V* x,
                               Mask<T> good) {
    const uint32_t done = bits(good), all = uint32_t((uint64_t(1) << n) - 1);
    chunks(D * D, D, skip, place, [&](int64_t f, auto where) {
      V r[n];
#pragma GCC unroll 16
      for (int t = 0; t < n; ++t) r[t] = x[where(t)];
      transpose<T>(r);
      if (done == all) {
#pragma GCC unroll 16
        for (int m = 0; m < n; ++m) store(a.l[m] + f, r[m]);
      } else {
        for (int m = 0; m < n; ++m) {
          if (done >> m & 1) store(a.l[m] + f, r[m]);
        }
      }
    });
  }

  // The rank-one update by rotations, in the buffers.
  static CFL_INLINE Mask<T> rotations(const GroupArgs<T>& a, V* x, int64_t ld, V* w) {
    const int64_t D = a.order;
    Mask<T> good = lane_numbers<T>() >= 0;
    V t = splat<T>(1), inverse_t = t, next_w = w[0];
    for (int64_t j = 0; j < D; ++j) {
      V* column = x + j * ld;
      const V sign = column[j] < 0 ? splat<T>(-a.scale) : splat<T>(a.scale);
      const V l = sign * column[j], inverse = T(1) / l;
      good &= (l * l > Of<T>::kTiny) & (l * l < Of<T>::kHuge);
      const V p = next_w * inverse;
      const V next_t = t + p * p, mean = root(t * next_t), sum = next_t + mean;
      const V shared = T(1) / (next_t * sum), inverse_next = shared * sum;  // one division for two
      const V c = mean * inverse_next, d = p * c * inverse_t, pl = p * sign;
      const V less = p * p * (shared * next_t);  // 1 - c
      const V change = l * (less * (next_t * inverse_t * c)), pivot = l + change;
      const V rounded = ((pivot - l) - change) * (c * inverse);
      const V e = (sign - T(1)) - sign * (less - c * rounded);
      column[j] = pivot;
      for (int64_t i = j + 1; i < D; ++i) {
        const V old = column[i], before = w[i];
        column[i] = old + (e * old + d * before);
        w[i] = before - pl * old;
        if (i == j + 1) next_w = w[i];
      }
      t = next_t;
      inverse_t = inverse_next;
    }
    return good & (t < Of<T>::kMostT);
  }

  template <int K>
  static uint32_t run(const GroupArgs<T>& a) {
    const int64_t D = a.order, ld = D + 1;  // odd strides spread over the cache's sets
    V* x = reinterpret_cast<V*>(a.scratch);
    V* w = x + D * ld;
    const bool row_major = a.row_major;
    auto skip = [row_major](int64_t major, int64_t minor) {
      // Wholly above the diagonal: nothing to read, nothing to write.
      return row_major ? minor > major : minor + n <= major;
    };
    auto place = [row_major, ld](int64_t major, int64_t minor) {
      return row_major ? minor * ld + major : major * ld + minor;
    };
    chunks(D * D, D, skip, place, [&](int64_t f, auto where) { load_chunk(a.l, f, where, x); });
    if (D * K >= n && a.v_col_stride == 1 && a.v_row_stride == K) {
      chunks(
          D * K, K, [](int64_t, int64_t) { return false; },
          [D](int64_t i, int64_t p) { return p * D + i; },
          [&](int64_t f, auto where) { load_chunk(a.v, f, where, w); });
      if (a.v_scale != 1) {
        for (int64_t i = 0; i < D * K; ++i) w[i] *= a.v_scale;
      }
    } else {
      for (int64_t i = 0; i < D; ++i) {
        for (int p = 0; p < K; ++p) {
          T* to = reinterpret_cast<T*>(w + p * D + i);
          for (int m = 0; m < n; ++m)
            to[m] = a.v_scale * a.v[m][i * a.v_row_stride + p * a.v_col_stride];
        }
      }
    }

    Mask<T> good = lane_numbers<T>() >= 0;
    if constexpr (K == 1) {
      if (!a.down) {
        good = rotations(a, x, ld, w);
        write(a, D, skip, place, x, good);
        return bits(good);
      }
    }
    const T lost = T(kLostPivot) * Of<T>::kEps;
    for (int64_t j = 0; j < D; ++j) {
      V* column = x + j * ld;
      const V sign = column[j] < 0 ? splat<T>(-a.scale) : splat<T>(a.scale);
      const V l = sign * column[j];
      V v[K], sum{};
      for (int p = 0; p < K; ++p) {
        v[p] = w[p * D + j];
        sum += v[p] * v[p];
      }
      const V square = a.down ? l * l - sum : l * l + sum;
      good &= (square > Of<T>::kTiny) & (square + sum < Of<T>::kHuge);
      good &=
          a.down ? square > lost * l * l : square < (Of<T>::kFarLonger * Of<T>::kFarLonger) * l * l;
      const V r = root(square);
      const V inverse = T(1) / (r * (l + r));
      const V over_r = inverse * (l + r), over_sum = inverse * r;
      V s[K], g[K];
      for (int p = 0; p < K; ++p) {
        s[p] = a.down ? -v[p] * over_r : v[p] * over_r;
        g[p] = v[p] * over_sum;
      }
      const V less = sum * inverse, signed_less = sign * less;  // 1 - l / r
      const V change = a.down ? -less * r : less * r, pivot = l + change;
      const V rounded = ((pivot - l) - change) * over_r;
      const V dl =
          (a.down ? signed_less : -signed_less) + (sign - T(1)) + sign * (l * over_r) * rounded;
      const V dw = sign + T(1);
      column[j] = pivot;
      for (int64_t i = j + 1; i < D; ++i) {
        const V old = column[i];
        V more = dl * old;
        V held[K];
        for (int p = 0; p < K; ++p) {
          held[p] = w[p * D + i];
          more += s[p] * held[p];
        }
        const V both = dw * old + more;
        for (int p = 0; p < K; ++p) w[p * D + i] = held[p] - g[p] * both;
        column[i] = old + more;
      }
    }

    write(a, D, skip, place, x, good);
    return bits(good);
  }

  static uint32_t update(const GroupArgs<T>& a) {
    switch (a.rank) {
      case 1:
        return run<1>(a);
      case 2:
        return run<2>(a);
      case 3:
        return run<3>(a);
      case 4:
        return run<4>(a);
    }
    return 0;
  }
};

// ---- finite or not
// ---------------------------------------------------------------------------------

template <class T>
T abs_sum(const T* x, int64_t count) {
  constexpr int n = kLanes<T>;
  T total = 0;
  if (count < n) {
    for (int64_t i = 0; i < count; ++i) total += magnitude(x[i]);
    return total;
  }
  typedef Mask<T> M;
  const M clear = ~((M{} + 1) << (8 * int(sizeof(T)) - 1));
  auto positive = [&](Vec<T> v) { return (Vec<T>)((M)v & clear); };
  Vec<T> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * n <= count; i += 4 * n) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sums[u] += positive(load(x + i + u * n));
  }
  for (; i + n <= count; i += n) sums[0] += positive(load(x + i));
  if (i < count) {  // the last vector again, without what was counted
    const M fresh = lane_numbers<T>() >= typename VecOf<T>::lane(n - (count - i));
    const Vec<T> v = load(x + count - n);
    sums[1] += positive((Vec<T>)((M)v & fresh));
  }
  const Vec<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int l = 0; l < n; ++l) total += sum[l];
  return total;
}

// ---- triangular solves
// ----------------------------------------------------------------------------

// The sum of a vector's lanes, halves first.
template <class T, int S = kLanes<T> / 2>
CFL_INLINE T lane_sum(Vec<T> v) {
  if constexpr (S == 0) {
    return v[0];
  } else {
    return lane_sum<T, S / 2>(v + __builtin_shuffle(v, lane_numbers<T>() ^ S));
  }
}

// R rows of x at a time: they share what is read of l.
template <class T, int R>
CFL_INLINE void solve_rows(const T* l, int64_t stride, int64_t order, T* x, int64_t ldx) {
  constexpr int n = kLanes<T>;
  for (int64_t i = 0; i < order; ++i, l += stride) {
    Vec<T> sums[R] = {};
    int64_t c = 0;
    for (; c + n <= i; c += n) {
      const Vec<T> v = load(l + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r] += v * load(x + r * ldx + c);
    }
    T total[R] = {};
    if (c < i && i >= n) {  // the last vector again, without what was counted
      const Mask<T> fresh = lane_numbers<T>() >= typename VecOf<T>::lane(n - (i - c));
      const Vec<T> v = fresh ? load(l + i - n) : Vec<T>{};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r] += v * load(x + r * ldx + i - n);
    } else {
      for (; c < i; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r] += l[c] * x[r * ldx + c];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (i >= n) total[r] += lane_sum<T>(sums[r]);
      x[r * ldx + i] = (x[r * ldx + i] - total[r]) / l[i];
    }
  }
}

template <class T>
void solve_lower(const T* l, int64_t stride, int64_t order, T* x, int64_t ldx, int64_t rows) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) solve_rows<T, 4>(l, stride, order, x + r * ldx, ldx);
  for (; r < rows; ++r) solve_rows<T, 1>(l, stride, order, x + r * ldx, ldx);
}

template <class T>
T dot(const T* a, const T* b, int64_t count) {
  constexpr int n = kLanes<T>;
  Vec<T> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * n <= count; i += 2 * n) {
    sums[0] += load(a + i) * load(b + i);
    sums[1] += load(a + i + n) * load(b + i + n);
  }
  T total = lane_sum<T>(sums[0] + sums[1]);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

template <class T>
constexpr CholeskyKernel<T> kKernel = {kLanes<T>,  update<T>,      Group<T>::update,
                                       abs_sum<T>, solve_lower<T>, dot<T>};

}  // namespace

const CholeskyKernel<float>& CFL_ENTRY(float) { return kKernel<float>; }
const CholeskyKernel<double>& CFL_ENTRY(double) { return kKernel<double>; }

}  // namespace cfl::cpu::detail
