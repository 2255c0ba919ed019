// The one SIMD source of the tall Gram kernel, compiled once per instruction set.
//
// No C++ standard library here, and everything but the entry point in an unnamed namespace: see
// gram_kernel_isa.cpp.
//
// Scheme. The lanes of a vector are rows of T. A block of rows is converted to float64 and laid out
// column after column; its rotation by W and its products are then 4 x 4 tiles of vectors in
// registers. The products stay vectors (one sum per lane) until the last row.

#include <string.h>

#include "tall_gram.h"
#include "vectors_isa.h"

#if defined(CFL_ISA_AVX512)
#define CFL_ENTRY tall_gram_avx512
#elif defined(CFL_ISA_AVX2)
#define CFL_ENTRY tall_gram_avx2
#else
#define CFL_ENTRY tall_gram_generic
#endif

namespace cfl::cpu::detail {
namespace {

constexpr int kWide = kLanes<double>;
constexpr int kDepth = 16;             // vectors of rows in a block
constexpr int kRows = kDepth * kWide;  // rows in a block
constexpr int kTile = 4;

typedef float Half __attribute__((vector_size(kBytes / 2)));

CFL_INLINE int64_t padded(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

CFL_INLINE F64v load(const double* p) {
  F64v v;
  memcpy(&v, p, sizeof(v));
  return v;
}
CFL_INLINE F64v load(const float* p) {
  Half h;
  memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, F64v);
}
CFL_INLINE void store(double* p, F64v v) { memcpy(p, &v, sizeof(v)); }

// Rows [0, rows) of `cols` columns into columns of kRows numbers each; missing rows and columns are
// zero.
template <class S>
void load_block(const S* from, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols,
                double* to) {
  if (rows < kRows) memset(to, 0, size_t(padded(cols) * kRows) * sizeof(double));
  const int64_t whole = rows / kWide * kWide;
  int64_t fast_rows = 0, fast_cols = 0;
  if (row_stride == 1) {
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t i = 0; i < whole; i += kWide) {
        store(to + j * kRows + i, load(from + j * col_stride + i));
      }
    }
    fast_rows = whole, fast_cols = cols;
  } else if (col_stride == 1) {
    fast_rows = whole, fast_cols = cols / kWide * kWide;
    for (int64_t i = 0; i < fast_rows; i += kWide) {
      for (int64_t j = 0; j < fast_cols; j += kWide) {
        F64v r[kWide];
#pragma GCC unroll 8
        for (int l = 0; l < kWide; ++l) r[l] = load(from + (i + l) * row_stride + j);
        transpose<double>(r);
#pragma GCC unroll 8
        for (int l = 0; l < kWide; ++l) store(to + (j + l) * kRows + i, r[l]);
      }
    }
  }
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = j < fast_cols ? fast_rows : 0; i < rows; ++i) {
      to[j * kRows + i] = double(from[i * row_stride + j * col_stride]);
    }
  }
  if (rows == kRows)
    memset(to + cols * kRows, 0, size_t((padded(cols) - cols) * kRows) * sizeof(double));
}

// q_j = sum_i w_ij x_i for the columns of a block; w (s, ld) with zero columns up to ld.
void rotate(const double* x, const double* w, int64_t s, int64_t ld, double* q) {
  for (int64_t j = 0; j < ld; j += kTile) {
    int64_t depth = s;  // an upper triangular W ends at its diagonal
    while (depth > 0 && w[(depth - 1) * ld + j] == 0 && w[(depth - 1) * ld + j + 1] == 0 &&
           w[(depth - 1) * ld + j + 2] == 0 && w[(depth - 1) * ld + j + 3] == 0) {
      --depth;
    }
    for (int v = 0; v < kRows; v += kTile * kWide) {
      F64v c[kTile][kTile] = {};
      for (int64_t i = 0; i < depth; ++i) {
        F64v a[kTile];
#pragma GCC unroll 4
        for (int u = 0; u < kTile; ++u) a[u] = load(x + i * kRows + v + u * kWide);
#pragma GCC unroll 4
        for (int jj = 0; jj < kTile; ++jj) {
          const double factor = w[i * ld + j + jj];
#pragma GCC unroll 4
          for (int u = 0; u < kTile; ++u) c[jj][u] += a[u] * factor;
        }
      }
#pragma GCC unroll 4
      for (int jj = 0; jj < kTile; ++jj) {
#pragma GCC unroll 4
        for (int u = 0; u < kTile; ++u) store(q + (j + jj) * kRows + v + u * kWide, c[jj][u]);
      }
    }
  }
}

// to[i][j] += x_i y_j, lane by lane, for one 4 x 4 tile.
CFL_INLINE void multiply(const double* x, const double* y, double* to) {
  F64v c[kTile][kTile];
#pragma GCC unroll 4
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) c[i][j] = load(to + (i * kTile + j) * kWide);
  }
  for (int v = 0; v < kRows; v += kWide) {
    F64v a[kTile];
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) a[i] = load(x + i * kRows + v);
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) {
      const F64v b = load(y + j * kRows + v);
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) c[i][j] += a[i] * b;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) store(to + (i * kTile + j) * kWide, c[i][j]);
  }
}

CFL_INLINE double total(const double* lanes) {
  double sum = 0;
  for (int l = 0; l < kWide; ++l) sum += lanes[l];
  return sum;
}

struct Layout {
  int64_t ls, lk;                  // s and k, padded
  int64_t pairs, other;            // tiles of the triangle, tiles of the cross products
  int64_t x, q, b, w, sums, size;  // offsets and size, in numbers
  Layout(int64_t s, int64_t k) : ls(padded(s)), lk(padded(k)) {
    const int64_t t = ls / kTile, tile = kTile * kTile * kWide;
    pairs = t * (t + 1) / 2;
    other = t * (lk / kTile);
    x = 0;
    q = x + ls * kRows;
    b = q + ls * kRows;
    w = b + lk * kRows;
    sums = w + (ls * ls + 7) / 8 * 8;
    size = sums + (pairs + other) * tile;
  }
};

size_t scratch_bytes(int64_t s, int64_t k) { return size_t(Layout(s, k).size) * sizeof(double); }

template <class S>
void accumulate(const TallGram& g, const Layout& at, int64_t begin, int64_t end, double* memory) {
  constexpr int64_t tile = kTile * kTile * kWide;
  const S* t = static_cast<const S*>(g.t);
  const S* right = static_cast<const S*>(g.b);
  double *x = memory + at.x, *q = memory + at.q, *b = memory + at.b;
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t rows = min64(kRows, end - row);
    load_block<S>(t + row * g.t_row_stride, g.t_row_stride, g.t_col_stride, rows, g.s, x);
    if (g.w) rotate(x, memory + at.w, g.s, at.ls, q);
    const double* p = g.w ? q : x;
    double* to = memory + at.sums;
    for (int64_t i = 0; i < at.ls; i += kTile) {
      for (int64_t j = 0; j <= i; j += kTile, to += tile)
        multiply(p + i * kRows, p + j * kRows, to);
    }
    if (g.k == 0) continue;
    load_block<S>(right + row * g.b_row_stride, g.b_row_stride, g.b_col_stride, rows, g.k, b);
    for (int64_t i = 0; i < at.ls; i += kTile) {
      for (int64_t j = 0; j < at.lk; j += kTile, to += tile)
        multiply(p + i * kRows, b + j * kRows, to);
    }
  }
}

void run(const TallGram* args, int64_t begin, int64_t end, void* scratch) {
  const TallGram& g = *args;
  const Layout at(g.s, g.k);
  double* memory = static_cast<double*>(scratch);
  constexpr int64_t tile = kTile * kTile * kWide;
  memset(memory + at.sums, 0, size_t((at.pairs + at.other) * tile) * sizeof(double));
  if (g.w) {
    memset(memory + at.w, 0, size_t(at.ls * at.ls) * sizeof(double));
    for (int64_t i = 0; i < g.s; ++i)
      memcpy(memory + at.w + i * at.ls, g.w + i * g.s, size_t(g.s) * 8);
  }
  g.wide ? accumulate<double>(g, at, begin, end, memory)
         : accumulate<float>(g, at, begin, end, memory);
  const double* sums = memory + at.sums;
  for (int64_t i0 = 0; i0 < at.ls; i0 += kTile) {
    for (int64_t j0 = 0; j0 <= i0; j0 += kTile, sums += tile) {
      for (int64_t i = i0; i < min64(i0 + kTile, g.s); ++i) {
        for (int64_t j = j0; j < min64(j0 + kTile, i + 1); ++j) {
          const double value = total(sums + ((i - i0) * kTile + j - j0) * kWide);
          g.gram[i * g.s + j] = g.gram[j * g.s + i] = value;
        }
      }
    }
  }
  for (int64_t i0 = 0; i0 < at.ls; i0 += kTile) {
    for (int64_t j0 = 0; j0 < at.lk; j0 += kTile, sums += tile) {
      for (int64_t i = i0; i < min64(i0 + kTile, g.s); ++i) {
        for (int64_t j = j0; j < min64(j0 + kTile, g.k); ++j) {
          g.cross[i * g.k + j] = total(sums + ((i - i0) * kTile + j - j0) * kWide);
        }
      }
    }
  }
}

constexpr TallGramKernel kKernel = {scratch_bytes, run};

}  // namespace

const TallGramKernel* CFL_ENTRY() { return &kKernel; }

}  // namespace cfl::cpu::detail
