// The one SIMD source of the batched Cholesky solve, compiled once per instruction set.
//
// No C++ standard library here, and everything but the entry point in an unnamed namespace: see
// gram_kernel_isa.cpp.
//
// Scheme. The lanes of a vector belong to different systems ("interleaved"). A is kept as tile rows
// of four rows each; tile row t holds, for each column j < 4 (t + 1), its four entries side by
// side, so that the inner loop reads two streams forward. Right sides are stored the same way,
// transposed: four of them are one more tile row, and forward substitution is the same step as
// factoring a row below the diagonal. Left-looking: a 4 x 4 tile lives in registers while all
// columns to its left are subtracted.

#include <math.h>
#include <string.h>

#include "solve_kernel.h"
#include "vectors_isa.h"

#if defined(CFL_ISA_AVX512)
#define CFL_ENTRY solve_kernels_avx512
#elif defined(CFL_ISA_AVX2)
#define CFL_ENTRY solve_kernels_avx2
#else
#define CFL_ENTRY solve_kernels_generic
#endif

namespace cfl::cpu::detail {
namespace {

constexpr int kTile = 4;
constexpr int64_t kRightBytes = 256 << 10;  // right sides in work at a time

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

// b, where one is NaN.
#if defined(CFL_ISA_AVX512)
CFL_INLINE F32v larger(F32v a, F32v b) {
  return (F32v)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
}
CFL_INLINE F32v smaller(F32v a, F32v b) {
  return (F32v)_mm512_maskz_min_ps(__mmask16(-1), (__m512)a, (__m512)b);
}
CFL_INLINE F64v larger(F64v a, F64v b) {
  return (F64v)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
}
CFL_INLINE F64v smaller(F64v a, F64v b) {
  return (F64v)_mm512_maskz_min_pd(__mmask8(-1), (__m512d)a, (__m512d)b);
}
#else
template <class V>
CFL_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
CFL_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}
#endif

// 1 / sqrt(v) for v > 0 and finite.
CFL_INLINE F64v inverse_root(F64v v) { return 1.0 / root(v); }
CFL_INLINE F32v inverse_root(F32v v) {
#if defined(CFL_ISA_AVX512)
  // One Newton step doubles the estimate's 14 bits, to within two roundings, in half the time of a
  // root and a division: each column of the factor waits for the one before.
  const F32v y = (F32v)_mm512_rsqrt14_ps((__m512)v);
  return y + (y * 0.5f) * (1.0f - (v * y) * y);
#else
  return 1.0f / root(v);
#endif
}

// --- between one system's memory and the lanes
// ----------------------------------------------------

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

// Where each number of a system goes, in vectors: worked out once for all groups of a call.
struct Places {
  uint16_t*
      matrix;  // (n, n): below the diagonal its tile row's; the others to a place that no one reads
  uint16_t* right;  // (n, k), where all right sides are in work together; else null
};

void find_places(const SolveGroup& g, int64_t unused, bool right, int64_t height, Places places) {
  for (int64_t i = 0; i < g.n; ++i) {
    for (int64_t j = 0; j < g.n; ++j) {
      const int64_t row = g.upper ? j : i, col = g.upper ? i : j;
      const int64_t at = tile_row(row / kTile) + col * kTile + row % kTile;
      places.matrix[i * g.n + j] = uint16_t(col <= row ? at : unused);
    }
    for (int64_t r = 0; right && r < g.k; ++r) {
      places.right[i * g.k + r] = uint16_t((r / kTile * height + i) * kTile + r % kTile);
    }
  }
}

// Spreads a chunk of a memory row over the lanes' places.
template <class T>
CFL_INLINE void spread(const Vec<T> (&r)[kLanes<T>], const uint16_t* places, int64_t count, T* to) {
  constexpr int w = kLanes<T>;
  if (count >= w) {
#pragma GCC unroll 16
    for (int e = 0; e < w; ++e) store<T>(to + int64_t(places[e]) * w, r[e]);
  } else {
    for (int64_t e = 0; e < count; ++e) store<T>(to + int64_t(places[e]) * w, r[e]);
  }
}

// The lower triangle of A into tile rows, prefetching the next group's.
template <class T>
void load_matrix(const SolveGroup& g, int64_t tiles, const uint16_t* places, T* to) {
  constexpr int w = kLanes<T>;
  const int64_t n = g.n, size = n * n;
  const T* const* a = reinterpret_cast<const T* const*>(g.a);
  const T* const* next = reinterpret_cast<const T* const*>(g.next_a);
  int64_t i = 0, j = 0;  // memory row and column of the chunk's first number
  // The next group is asked for one system after the other, in the order of its memory.
  const int64_t lines = (size + w - 1) / w;
  int64_t system = 0, line = 0;
  for (int64_t at = 0; at < size; at += w) {
    // A chunk within one row and beyond the diagonal has nothing to give.
    const bool useful = j + w > n || (g.upper ? j + w > i : j <= i);
    for (int l = 0; next && l < w; ++l) {
      __builtin_prefetch(next[system] + line * w, 0, 2);
      if (++line == lines) line = 0, ++system;
    }
    if (useful) {
      Vec<T> r[w];
      gather<T>(a, at, size - at, r);
      spread<T>(r, places + at, size - at, to);
    }
    for (j += w; j >= n; j -= n) ++i;
  }
  // Rows beyond n are those of an identity.
  for (int64_t row = n; row < tiles * kTile; ++row) {
    T* base = to + tile_row(row / kTile) * w;
    for (int64_t col = 0; col < row; ++col)
      store<T>(base + (col * kTile + row % kTile) * w, Vec<T>{});
    store<T>(base + (row * kTile + row % kTile) * w, Vec<T>{} + T(1));
  }
}

// Columns [begin, begin + cols) of B into tile rows of four right sides each.
template <class T>
void load_right(const SolveGroup& g, int64_t tiles, int64_t begin, int64_t cols,
                const uint16_t* places, T* to) {
  constexpr int w = kLanes<T>;
  const T* const* b = reinterpret_cast<const T* const*>(g.b);
  const int64_t height = tiles * kTile, padded = (cols + kTile - 1) / kTile * kTile;
  auto place = [&](int64_t i, int64_t r) {
    return to + ((r / kTile) * height * kTile + i * kTile + r % kTile) * w;
  };
  const int64_t size = g.n * cols;
  for (int64_t at = 0; places && at < size; at += w) {
    Vec<T> v[w];
    gather<T>(b, at, size - at, v);
    spread<T>(v, places + at, size - at, to);
  }
  for (int64_t i = 0; !places && i < g.n; ++i) {
    for (int64_t at = 0; at < cols; at += w) {
      Vec<T> v[w];
      gather<T>(b, i * g.k + begin + at, cols - at, v);
      for (int64_t e = 0; e < min64(w, cols - at); ++e) store<T>(place(i, at + e), v[e]);
    }
  }
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t r = i < g.n ? cols : 0; r < padded; ++r) store<T>(place(i, r), Vec<T>{});
  }
}

template <class T>
void store_right(const SolveGroup& g, int64_t tiles, int64_t begin, int64_t cols,
                 const uint16_t* places, const T* from, Index<T> failed) {
  constexpr int w = kLanes<T>;
  T* const* x = reinterpret_cast<T* const*>(g.x);
  const int64_t height = tiles * kTile;
  auto place = [&](int64_t i, int64_t r) {
    return from + ((r / kTile) * height * kTile + i * kTile + r % kTile) * w;
  };
  const Vec<T> nan = Vec<T>{} + T(__builtin_nan(""));
  auto put = [&](int64_t offset, int64_t count, Vec<T>(&v)[w]) {
    transpose<T>(v);
    if (count >= w && g.valid == w) {
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l) store<T>(x[l] + offset, v[l]);
    } else {
      for (int64_t l = 0; l < g.valid; ++l) {
        T part[w];
        store<T>(part, v[l]);
        memcpy(x[l] + offset, part, size_t(min64(w, count)) * sizeof(T));
      }
    }
  };
  const int64_t size = g.n * cols;
  for (int64_t at = 0; places && at < size; at += w) {
    Vec<T> v[w];
    if (size - at >= w) {
#pragma GCC unroll 16
      for (int e = 0; e < w; ++e) {
        const Vec<T> value = load<T>(from + int64_t(places[at + e]) * w);
        v[e] = failed ? nan : value;
      }
    } else {
      for (int64_t e = 0; e < w; ++e) {
        v[e] = nan;
        if (e < size - at) v[e] = failed ? nan : load<T>(from + int64_t(places[at + e]) * w);
      }
    }
    put(at, size - at, v);
  }
  for (int64_t i = 0; !places && i < g.n; ++i) {
    for (int64_t at = 0; at < cols; at += w) {
      Vec<T> v[w];
      for (int64_t e = 0; e < w; ++e) {
        v[e] = nan;
        if (e < cols - at) v[e] = failed ? nan : load<T>(place(i, at + e));
      }
      put(i * g.k + begin + at, cols - at, v);
    }
  }
}

// --- the algorithm
// ----------------------------------------------------------------------------------

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

// The diagonal tile: a 4 x 4 Cholesky in registers. `spread`, a vector in memory, is multiplied by
// the diagonal entries over their pivots.
template <class T>
CFL_INLINE void on_diagonal(T* tile, int64_t column, Vec<T> tolerance, Index<T>* info, T* spread) {
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
  Vec<T> total = load<T>(spread);
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
    const Vec<T> pivot = c[j][j];
    // False for NaN. The second half refuses Inf, for which x * 0 is NaN (x - x may be fused with a
    // product).
    const Index<T> good = (pivot > tolerance * original[j]) & (pivot * Vec<T>{} == Vec<T>{});
    const Index<T> fresh = ~good & (*info == Index<T>{});
    Index<T> order;
    for (int lane = 0; lane < w; ++lane) order[lane] = int32_t(column + j + 1);
    *info = fresh ? order : *info;
    const Vec<T> inverse = inverse_root(good ? pivot : Vec<T>{} + T(1));
    store<T>(at + (j * kTile + j) * w, inverse);
    total *= (inverse * inverse) * original[j];
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
  store<T>(spread, total);
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

// Of what is kept apart: the diagonal, a solution, and three vectors of what is known of the
// factor.
size_t apart_bytes(int64_t n) { return size_t((n + kTile - 1) / kTile * kTile * 2 + 3) * kBytes; }

template <class T>
size_t scratch_bytes(int64_t n, int64_t k) {
  const int64_t tiles = (n + kTile - 1) / kTile;
  const int64_t rights = (right_columns<T>(tiles, k) + kTile - 1) / kTile;
  const size_t vectors = size_t(tile_row(tiles) + rights * tiles * kTile * kTile + 1);
  return vectors * kBytes + size_t(n * n + n * k) * sizeof(uint16_t) + apart_bytes(n);
}

// Asks for this group's results and the next one's right sides, where they are so small that the
// arithmetic would wait for them.
template <class T>
void prefetch_right(const SolveGroup& g) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  const int64_t size = g.n * g.k;
  if (size > 16 * line) return;
  const T* const* next = reinterpret_cast<const T* const*>(g.next_b);
  for (int l = 0; l < kLanes<T>; ++l) {
    for (int64_t at = 0; at < size; at += line) {
      __builtin_prefetch(static_cast<const T*>(g.x[l]) + at, 1);
      if (next) __builtin_prefetch(next[l] + at, 0, 2);
    }
  }
}

CFL_INLINE bool any(I32v v) {
#if defined(CFL_ISA_AVX512)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(CFL_ISA_AVX2)
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  int32_t all = 0;
  for (int l = 0; l < kLanes<float>; ++l) all |= v[l];
  return all != 0;
#endif
}
CFL_INLINE bool any(I64v v) { return any((I32v)v); }

// About |H^-1|: |z|^2 / |y|^2 of L y = g and L^T z = y, with the signs of g chosen so that y grows.
// `diag` is that of the system, y room for as many numbers.
template <class T>
__attribute__((noinline)) Vec<T> inverse_norm(const T* l, const T* diag, int64_t tiles, T* y) {
  constexpr int w = kLanes<T>;
  Vec<T> before{}, after{};
  for (int64_t t = 0; t < tiles; ++t) {
    const T* row = l + tile_row(t) * w;
    Vec<T> s[2][kTile] = {};
    for (int64_t j = 0; j < t * kTile; j += 2) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const Vec<T> known = load<T>(y + (j + odd) * w);
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i)
          s[odd][i] -= load<T>(row + ((j + odd) * kTile + i) * w) * known;
      }
    }
    const T* d = row + t * kTile * kTile * w;
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) {
      const Vec<T> sum = s[0][j] + s[1][j], own = root(load<T>(diag + (t * kTile + j) * w));
      const Vec<T> chosen = sum < Vec<T>{} ? sum - own : sum + own;
      const Vec<T> known = chosen * load<T>(d + (j * kTile + j) * w);
      before += known * known;
      store<T>(y + (t * kTile + j) * w, known);
#pragma GCC unroll 4
      for (int i = j + 1; i < kTile; ++i) s[0][i] -= load<T>(d + (j * kTile + i) * w) * known;
    }
  }
  for (int64_t t = tiles - 1; t >= 0; --t) {
    const T *row = l + tile_row(t) * w, *d = row + t * kTile * kTile * w;
    Vec<T> z[kTile];
#pragma GCC unroll 4
    for (int j = kTile - 1; j >= 0; --j) {
      z[j] = load<T>(y + (t * kTile + j) * w);
#pragma GCC unroll 4
      for (int i = j + 1; i < kTile; ++i) z[j] -= load<T>(d + (j * kTile + i) * w) * z[i];
      z[j] *= load<T>(d + (j * kTile + j) * w);
      after += (z[j] * z[j]) * load<T>(diag + (t * kTile + j) * w);
    }
    for (int64_t j = 0; j < t * kTile; ++j) {
      Vec<T> rest = load<T>(y + j * w);
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) rest -= load<T>(row + (j * kTile + i) * w) * z[i];
      store<T>(y + j * w, rest);
    }
  }
  return after / before;
}

template <class T>
void run(const SolveGroup* group) {
  constexpr int w = kLanes<T>;
  const SolveGroup& g = *group;
  const int64_t tiles = (g.n + kTile - 1) / kTile;
  T* original = static_cast<T*>(g.scratch);
  T* y = original + tiles * kTile * w;
  // In memory, for the loops need all registers.
  T *spread = y + tiles * kTile * w, *bounds = spread + w;
  T* l = original + apart_bytes(g.n) / sizeof(T);
  T* right = l + tile_row(tiles) * w;
  const int64_t chunk = right_columns<T>(tiles, g.k);
  const int64_t unused =
      tile_row(tiles) + (chunk + kTile - 1) / kTile * tiles * kTile * kTile;  // the last vector
  Places places;
  places.matrix = reinterpret_cast<uint16_t*>(l + (unused + 1) * w);
  places.right = chunk >= g.k ? places.matrix + g.n * g.n : nullptr;
  if (g.first) find_places(g, unused, places.right != nullptr, tiles * kTile, places);
  prefetch_right<T>(g);
  load_matrix<T>(g, tiles, places.matrix, l);

  const Vec<T> shift = load<T>(static_cast<const T*>(g.shift));
  const T* const* diag = reinterpret_cast<const T* const*>(g.shift_diag);
  Vec<T> largest{}, smallest = Vec<T>{} + T(__builtin_inff());
  for (int64_t i = 0; i < g.n; ++i) {
    T* at = l + (tile_row(i / kTile) + i * kTile + i % kTile) * w;
    Vec<T> total = load<T>(at) + shift;
    if (diag) {
      Vec<T> own;
      for (int lane = 0; lane < w; ++lane) own[lane] = diag[lane][i];
      total += own;
    }
    store<T>(at, total);
    store<T>(original + i * w, total);
    largest = larger(total, largest);
    smallest = smaller(total, smallest);
  }
  for (int64_t i = g.n; i < tiles * kTile; ++i) store<T>(original + i * w, Vec<T>{});
  store<T>(spread, Vec<T>{} + T(2.7183));
  store<T>(bounds, smallest);
  store<T>(bounds + w, largest);

  const Vec<T> tolerance = Vec<T>{} + T(g.tolerance);
  Index<T> info{};
  bool factored = false;
  for (int64_t begin = 0; begin < g.k || !factored; begin += chunk) {
    const int64_t cols = min64(chunk, g.k - begin), rights = (cols + kTile - 1) / kTile;
    if (cols > 0) load_right<T>(g, tiles, begin, cols, places.right, right);
    for (int64_t t = 0; t < tiles; ++t) {
      T* diagonal = l + tile_row(t) * w;
      if (!factored) {
        on_diagonal<T>(diagonal, t * kTile, tolerance, &info, spread);
        for (int64_t below = t + 1; below < tiles; ++below) {
          below_diagonal<T>(l + tile_row(below) * w, diagonal, t * kTile);
        }
      }
      for (int64_t r = 0; r < rights; ++r) {
        below_diagonal<T>(right + r * tiles * kTile * kTile * w, diagonal, t * kTile);
      }
    }
    if (!factored) {
      const Vec<T> low = load<T>(bounds), high = load<T>(bounds + w);
      const Vec<T> room = low * T(g.limit);
      auto proven = [&](Vec<T> norm) { return norm * norm * high <= room; };
      const Index<T> in_range = (low >= T(g.smallest)) & (high <= T(g.largest));
      Index<T> doubt = ~(proven(load<T>(spread)) & in_range);
      if (any(doubt & (info == Index<T>{}))) {
        doubt = ~(proven(inverse_norm<T>(l, original, tiles, y)) & in_range);
      }
      const Index<T> code = Index<T>{} + typename VecOf<T>::lane(g.n + 1);
      info = doubt & (info == Index<T>{}) ? code : info;
    }
    factored = true;
    for (int64_t t = tiles - 1; t >= 0; --t) {
      for (int64_t r = 0; r < rights; ++r) {
        backward<T>(l, right + r * tiles * kTile * kTile * w, t, tiles);
      }
    }
    if (cols > 0) store_right<T>(g, tiles, begin, cols, places.right, right, info != Index<T>{});
  }
  for (int lane = 0; lane < w; ++lane) g.info[lane] = int32_t(info[lane]);
}

// --- pseudoinverses
// ---------------------------------------------------------------------------------

typedef float F32h __attribute__((vector_size(kBytes / 2)));

CFL_INLINE F64v load_wide(const double* p) { return load<double>(p); }
CFL_INLINE F64v load_wide(const float* p) {
  F32h v;
  memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, F64v);
}
CFL_INLINE void store_narrow(double* p, F64v v) { store<double>(p, v); }
CFL_INLINE void store_narrow(float* p, F64v v) {
  const F32h narrow = __builtin_convertvector(v, F32h);
  memcpy(p, &narrow, sizeof(narrow));
}

constexpr int kWide = kLanes<double>;

// Where the number (i, r) of P, or (r, i) of T, is kept: four rows r of T to a tile row, as right
// sides.
struct PinvLayout {
  int64_t tiles, rows, height;                                   // of the Gram; of T; the padded s
  int64_t gram, columns, right, scale, correction, spare, size;  // in vectors
  PinvLayout(int64_t m, int64_t s) {
    tiles = (s + kTile - 1) / kTile;
    rows = (m + kTile - 1) / kTile;
    height = tiles * kTile;
    gram = 0;
    columns = gram + tile_row(tiles);  // T by tiles of four columns, for its Gram matrix
    right = columns + tiles * rows * kTile * kTile;  // T^T, then P
    scale = right + rows * height * kTile;
    correction = scale + height;           // I - P T
    spare = correction + height * height;  // a tile row of P
    size = spare + height * kTile;
  }
  int64_t column_at(int64_t r, int64_t i) const {
    return columns + ((i / kTile) * rows * kTile + r) * kTile + i % kTile;
  }
  int64_t right_at(int64_t r, int64_t i) const {
    return right + ((r / kTile) * height + i) * kTile + r % kTile;
  }
};

size_t pinv_scratch_bytes(int64_t m, int64_t s) { return size_t(PinvLayout(m, s).size) * kBytes; }

template <class S>
void load_tall(const PinvGroup& g, const PinvLayout& at, double* memory) {
  memset(memory + at.columns * kWide, 0, size_t(at.scale - at.columns) * kBytes);
  const S* const* t = reinterpret_cast<const S* const*>(g.t);
  const int64_t size = g.m * g.s, inner = g.wide ? g.m : g.s;
  int64_t outer_index = 0, inner_index = 0;
  for (int64_t e = 0; e < size; e += kWide) {
    const int64_t count = min64(kWide, size - e);
    F64v v[kWide];
    for (int l = 0; l < kWide; ++l) {
      if (count == kWide) {
        v[l] = load_wide(t[l] + e);
      } else {
        S part[kWide] = {};
        memcpy(part, t[l] + e, size_t(count) * sizeof(S));
        v[l] = load_wide(part);
      }
    }
    transpose<double>(v);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t r = g.wide ? inner_index : outer_index, i = g.wide ? outer_index : inner_index;
      store<double>(memory + at.column_at(r, i) * kWide, v[c]);
      store<double>(memory + at.right_at(r, i) * kWide, v[c]);
      if (++inner_index == inner) inner_index = 0, ++outer_index;
    }
  }
}

template <class S>
void store_pinv(const PinvGroup& g, const PinvLayout& at, const double* memory) {
  S* const* p = reinterpret_cast<S* const*>(g.p);
  const int64_t size = g.m * g.s, inner = g.wide ? g.s : g.m;
  int64_t outer_index = 0, inner_index = 0;
  for (int64_t e = 0; e < size; e += kWide) {
    const int64_t count = min64(kWide, size - e);
    F64v v[kWide] = {};
    for (int64_t c = 0; c < count; ++c) {
      const int64_t r = g.wide ? outer_index : inner_index, i = g.wide ? inner_index : outer_index;
      v[c] = load<double>(memory + at.right_at(r, i) * kWide);
      if (++inner_index == inner) inner_index = 0, ++outer_index;
    }
    transpose<double>(v);
    for (int64_t l = 0; l < g.valid; ++l) {
      if (count == kWide) {
        store_narrow(p[l] + e, v[l]);
      } else {
        S part[kWide];
        store_narrow(part, v[l]);
        memcpy(p[l] + e, part, size_t(count) * sizeof(S));
      }
    }
  }
}

// P <- P + (I - P T) P, with T in its tiles of columns.
void newton_step(const PinvLayout& at, int64_t m, double* memory) {
  for (int64_t i = 0; i < at.height; i += kTile) {
    for (int64_t j = 0; j < at.height; j += kTile) {
      Tile<double> c = {};
      const double* t = memory + at.column_at(0, j) * kWide;
      for (int64_t r = 0; r < m; ++r) {
        F64v b[kTile];
#pragma GCC unroll 4
        for (int jj = 0; jj < kTile; ++jj) b[jj] = load<double>(t + (r * kTile + jj) * kWide);
#pragma GCC unroll 4
        for (int ii = 0; ii < kTile; ++ii) {
          const F64v a = load<double>(memory + at.right_at(r, i + ii) * kWide);
#pragma GCC unroll 4
          for (int jj = 0; jj < kTile; ++jj) c[ii][jj] -= a * b[jj];
        }
      }
#pragma GCC unroll 4
      for (int ii = 0; ii < kTile; ++ii) {
#pragma GCC unroll 4
        for (int jj = 0; jj < kTile; ++jj) {
          const F64v one = F64v{} + (i + ii == j + jj ? 1.0 : 0.0);
          store<double>(memory + (at.correction + (i + ii) * at.height + j + jj) * kWide,
                        c[ii][jj] + one);
        }
      }
    }
  }
  double* spare = memory + at.spare * kWide;
  for (int64_t r = 0; r < at.rows; ++r) {
    double* p = memory + at.right_at(r * kTile, 0) * kWide;
    for (int64_t i = 0; i < at.height; i += kTile) {
      Tile<double> c = {};
      for (int64_t j = 0; j < at.height; ++j) {
        F64v b[kTile];
#pragma GCC unroll 4
        for (int u = 0; u < kTile; ++u) b[u] = load<double>(p + (j * kTile + u) * kWide);
#pragma GCC unroll 4
        for (int ii = 0; ii < kTile; ++ii) {
          const F64v a = load<double>(memory + (at.correction + (i + ii) * at.height + j) * kWide);
#pragma GCC unroll 4
          for (int u = 0; u < kTile; ++u) c[ii][u] += a * b[u];
        }
      }
#pragma GCC unroll 4
      for (int ii = 0; ii < kTile; ++ii) {
#pragma GCC unroll 4
        for (int u = 0; u < kTile; ++u)
          store<double>(spare + ((i + ii) * kTile + u) * kWide, c[ii][u]);
      }
    }
    for (int64_t e = 0; e < at.height * kTile; ++e) {
      store<double>(p + e * kWide, load<double>(p + e * kWide) + load<double>(spare + e * kWide));
    }
  }
}

template <class S>
void run_pinv(const PinvGroup* group) {
  const PinvGroup& g = *group;
  const PinvLayout at(g.m, g.s);
  double* memory = static_cast<double*>(g.scratch);
  load_tall<S>(g, at, memory);
  double *l = memory + at.gram * kWide, *scale = memory + at.scale * kWide;

  const int64_t column = at.rows * kTile * kTile * kWide;  // numbers in a tile of columns
  for (int64_t t = 0; t < at.tiles; ++t) {
    for (int64_t u = 0; u <= t; ++u) {
      Tile<double> c = {};
      const double* base = memory + at.columns * kWide;
      subtract_product<double>(c, base + t * column, base + u * column, g.m);
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) {
          store<double>(l + (tile_row(t) + (u * kTile + j) * kTile + i) * kWide, -c[i][j]);
        }
      }
    }
  }
  // Columns of length 1. Where a square over- or underflowed another path has to do it.
  Index<double> good = Index<double>{} - 1;
  for (int64_t i = 0; i < at.height; ++i) {
    F64v square = load<double>(l + (tile_row(i / kTile) + i * kTile + i % kTile) * kWide);
    if (i < g.s) good &= (square > 1e-250) & (square < 1e250);
    const F64v one = F64v{} + 1.0;
    square = i < g.s ? ((square > 1e-250) & (square < 1e250) ? square : one) : one;
    store<double>(scale + i * kWide, 1.0 / root(square));
  }
  for (int64_t i = 0; i < at.height; ++i) {
    const F64v mine = load<double>(scale + i * kWide);
    for (int64_t j = 0; j < i; ++j) {
      double* entry = l + (tile_row(i / kTile) + j * kTile + i % kTile) * kWide;
      store<double>(entry, load<double>(entry) * mine * load<double>(scale + j * kWide));
    }
    store<double>(l + (tile_row(i / kTile) + i * kTile + i % kTile) * kWide, F64v{} + 1.0);
    for (int64_t r = 0; r < at.rows; ++r) {
      double* x = memory + at.right_at(r * kTile, i) * kWide;
#pragma GCC unroll 4
      for (int u = 0; u < kTile; ++u)
        store<double>(x + u * kWide, load<double>(x + u * kWide) * mine);
    }
  }

  Index<double> info{};
  double unused[kWide] = {};
  const F64v tolerance = F64v{} + g.tolerance;
  auto right = [&](int64_t r) { return memory + at.right_at(r * kTile, 0) * kWide; };
  for (int64_t t = 0; t < at.tiles; ++t) {
    double* diagonal = l + tile_row(t) * kWide;
    on_diagonal<double>(diagonal, t * kTile, tolerance, &info, unused);
    for (int64_t below = t + 1; below < at.tiles; ++below) {
      below_diagonal<double>(l + tile_row(below) * kWide, diagonal, t * kTile);
    }
    for (int64_t r = 0; r < at.rows; ++r) below_diagonal<double>(right(r), diagonal, t * kTile);
  }
  for (int64_t t = at.tiles - 1; t >= 0; --t) {
    for (int64_t r = 0; r < at.rows; ++r) backward<double>(l, right(r), t, at.tiles);
  }

  // The squared length of this P is the trace of the inverse Gram.
  F64v trace{};
  for (int64_t r = 0; r < at.rows; ++r) {
    for (int64_t i = 0; i < at.height; ++i) {
      const F64v mine = load<double>(scale + i * kWide);
      double* x = right(r) + i * kTile * kWide;
#pragma GCC unroll 4
      for (int u = 0; u < kTile; ++u) {
        const F64v value = load<double>(x + u * kWide);
        trace += value * value;
        store<double>(x + u * kWide, value * mine);
      }
    }
  }
  good &= (info == Index<double>{}) & (trace <= g.limit);
  if (g.refine) newton_step(at, g.m, memory);
  store_pinv<S>(g, at, memory);
  for (int lane = 0; lane < kWide; ++lane) g.info[lane] = good[lane] == 0;
}

template <class S>
constexpr PinvKernel kPinvKernel = {kWide, pinv_scratch_bytes, run_pinv<S>};

template <class T>
constexpr SolveKernel kKernel = {kLanes<T>, scratch_bytes<T>, run<T>};

}  // namespace

SolveKernels CFL_ENTRY() {
  return {&kKernel<float>, &kKernel<double>, &kPinvKernel<float>, &kPinvKernel<double>};
}

}  // namespace cfl::cpu::detail
