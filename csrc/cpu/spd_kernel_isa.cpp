// The one SIMD source of the kernel for one positive definite system, compiled once per
// instruction set.
//
// No C++ standard library here, and everything but the entry point in an unnamed namespace: see
// gram_kernel_isa.cpp.
//
// Scheme. Panels of kPanel rows of U = L^T, right-looking: the diagonal block row after row, then
// the panel's other columns a vector at a time with all of its rows in registers, then the rows
// beneath in tiles of registers. The right sides are further columns of the matrix, which the
// factorisation turns into U^-T Q; X follows from the last panel to the first.
//
// The products take a tile of as many inner products as a vector has lanes, each in a vector of its
// own, from rows where they lie: to pack them would cost a small system more than the products do.

#include <stdint.h>
#include <string.h>

#include "spd_kernel.h"
#include "vectors_isa.h"

#if defined(CFL_ISA_AVX512)
#define CFL_ENTRY spd_avx512
#elif defined(CFL_ISA_AVX2)
#define CFL_ENTRY spd_avx2
#else
#define CFL_ENTRY spd_generic
#endif

namespace cfl::cpu::detail {
namespace {

#if defined(CFL_ISA_AVX512)
constexpr int kTileRows = 8, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
constexpr int kPanel = 16;
static_assert(kPanel == kSpdColumns && kPanel % kTileRows == 0 && kPanel % kLanes<float> == 0);

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
CFL_INLINE float root(float x) { return __builtin_sqrtf(x); }
CFL_INLINE double root(double x) { return __builtin_sqrt(x); }

// Rows of the matrix from `row` on; the inverse pivots are kept beside them.
template <class T>
struct Panel {
  T* u;  // row `row` of the matrix
  int64_t stride, row, size;
  T inverse[kPanel];
};

// The diagonal block; returns 0 or the order of the pivot that failed.
template <class T>
int64_t factor_block(Panel<T>& p) {
  constexpr T kMost = sizeof(T) == 4 ? T(3e38) : T(1e308);
  const int64_t first = p.row, last = p.row + kPanel;
  for (int64_t j = 0; j < p.size; ++j) {
    T* pivot_row = p.u + j * p.stride;
    const T pivot = pivot_row[first + j];
    if (!(pivot > 0 && pivot < kMost)) return first + j + 1;
    const T scale = 1 / root(pivot);
    p.inverse[j] = scale;
    for (int64_t c = first; c < last; c += kLanes<T>) {
      store(pivot_row + c, load(pivot_row + c) * scale);
    }
    for (int64_t i = j + 1; i < p.size; ++i) {
      T* row = p.u + i * p.stride;
      const T factor = pivot_row[first + i];
      for (int64_t c = first; c < last; c += kLanes<T>) {
        store(row + c, load(row + c) - load(pivot_row + c) * factor);
      }
    }
  }
  return 0;
}

// The columns [begin, end) of the panel: U^-T of its block times them.
template <class T, bool Whole>
void solve_columns(const Panel<T>& p, int64_t begin, int64_t end) {
  const int64_t size = Whole ? kPanel : p.size;
  for (int64_t c = begin; c < end; c += kLanes<T>) {
    Vec<T> r[kPanel];
    if constexpr (Whole) {
#pragma GCC unroll 16
      for (int i = 0; i < kPanel; ++i) r[i] = load(p.u + i * p.stride + c);
#pragma GCC unroll 16
      for (int j = 0; j < kPanel; ++j) {
        r[j] *= p.inverse[j];
#pragma GCC unroll 16
        for (int i = j + 1; i < kPanel; ++i) r[i] -= r[j] * p.u[j * p.stride + p.row + i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < kPanel; ++i) store(p.u + i * p.stride + c, r[i]);
    } else {
      for (int64_t j = 0; j < size; ++j) {
        T* row = p.u + j * p.stride;
        const Vec<T> solved = load(row + c) * p.inverse[j];
        store(row + c, solved);
        for (int64_t i = j + 1; i < size; ++i) {
          T* other = p.u + i * p.stride + c;
          store(other, load(other) - solved * row[p.row + i]);
        }
      }
    }
  }
}

// `Rows` rows from `row` on, columns [begin, end), less what a whole panel takes from them.
template <class T, int Rows, int Vectors>
CFL_INLINE void update_tile(const Panel<T>& p, T* to, int64_t row, int64_t column) {
  Vec<T> sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      sum[i][v] = load(to + i * p.stride + column + v * kLanes<T>);
    }
  }
  const T* from = p.u;
  for (int j = 0; j < kPanel; ++j, from += p.stride) {
    Vec<T> right[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) right[v] = load(from + column + v * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const T left = from[row + i];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[i][v] -= right[v] * left;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      store(to + i * p.stride + column + v * kLanes<T>, sum[i][v]);
    }
  }
}

template <class T, int Rows>
void update_rows(const Panel<T>& p, T* to, int64_t row, int64_t end) {
  constexpr int64_t kStep = kTileVectors * kLanes<T>;
  int64_t c = row / kLanes<T> * kLanes<T>;
  for (; c + kStep <= end; c += kStep) update_tile<T, Rows, kTileVectors>(p, to, row, c);
  for (; c < end; c += kLanes<T>) update_tile<T, Rows, 1>(p, to, row, c);
}

// The panel's rows of X, from those of U^-T Q and the rows of X beneath.
template <class T, int Rows>
CFL_INLINE void substitute_rows(const T* u, T* to, const T* beneath, int64_t stride, int64_t first,
                                int64_t count) {
  Vec<T> sum[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) sum[i] = load(to + i * stride);
  for (int64_t j = 0; j < count; ++j) {
    const Vec<T> x = load(beneath + j * stride);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) sum[i] -= x * u[i * stride + first + j];
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) store(to + i * stride, sum[i]);
}

template <class T>
void substitute(const Panel<T>& p, int64_t n, int64_t begin, int64_t end) {
  const int64_t first = p.row + p.size;
  for (int64_t c = begin; c < end; c += kLanes<T>) {
    T* x = p.u + c;
    const T* beneath = x + p.size * p.stride;
    int64_t i = 0;
    for (; first < n && i + kTileRows <= p.size; i += kTileRows) {
      substitute_rows<T, kTileRows>(p.u + i * p.stride, x + i * p.stride, beneath, p.stride, first,
                                    n - first);
    }
    for (; first < n && i < p.size; ++i) {
      substitute_rows<T, 1>(p.u + i * p.stride, x + i * p.stride, beneath, p.stride, first,
                            n - first);
    }
    for (int64_t j = p.size - 1; j >= 0; --j) {
      const Vec<T> solved = load(x + j * p.stride) / p.u[j * p.stride + p.row + j];
      store(x + j * p.stride, solved);
      for (int64_t above = 0; above < j; ++above) {
        T* other = x + above * p.stride;
        store(other, load(other) - solved * p.u[above * p.stride + p.row + j]);
      }
    }
  }
}

template <class T>
int64_t factor_and_solve(const SpdSystem* system) {
  const int64_t n = system->n;
  const int64_t right = (n + kSpdColumns - 1) / kSpdColumns * kSpdColumns;
  const int64_t stride = right + (system->k + kSpdColumns - 1) / kSpdColumns * kSpdColumns;
  // Of the last columns only vectors that hold some are worked on.
  const int64_t end = right + (system->k + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  T* matrix = static_cast<T*>(system->matrix);
  Panel<T> p;
  p.stride = stride;
  for (int64_t row = 0; row < n; row += kPanel) {
    p.u = matrix + row * stride;
    p.row = row;
    p.size = min64(kPanel, n - row);
    if (const int64_t failed = factor_block(p)) return failed;
    if (p.size < kPanel) {
      solve_columns<T, false>(p, right, end);
      break;
    }
    solve_columns<T, true>(p, row + kPanel, end);
    int64_t i = row + kPanel;
    for (; i + kTileRows <= n; i += kTileRows) {
      update_rows<T, kTileRows>(p, matrix + i * stride, i, end);
    }
    for (; i < n; ++i) update_rows<T, 1>(p, matrix + i * stride, i, end);
  }
  for (int64_t row = (n - 1) / kPanel * kPanel; row >= 0; row -= kPanel) {
    p.u = matrix + row * stride;
    p.row = row;
    p.size = min64(kPanel, n - row);
    substitute(p, n, right, end);
  }
  return 0;
}

// (lane l) = the sum of r[l]
template <class T, int S>
CFL_INLINE void add_step(Vec<T> (&r)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  if constexpr (S < n) {
    Index<T> low, high;
    for (int l = 0; l < n; ++l) {
      low[l] = (l & S) ? n + l - S : l;
      high[l] = (l & S) ? n + l : l + S;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; i += 2 * S) {
      r[i] = __builtin_shuffle(r[i], r[i + S], low) + __builtin_shuffle(r[i], r[i + S], high);
    }
    add_step<T, 2 * S>(r);
  }
}

template <class T>
constexpr int kDotRows = kLanes<T> == 16  ? 4
                         : kLanes<T> == 2 ? 1
                                          : 2;
template <class T>
constexpr int kDotColumns = kLanes<T> / kDotRows<T>;

// What one accumulator adds up before its sum goes to another: so the errors of long rows stay
// those of a short one.
template <class T>
constexpr int64_t kDotDepth = 64 * kLanes<T>;

// sum += the products of rows a and rows b from column d to column end.
template <class T>
CFL_INLINE void dot_block(const T* const* a, const T* const* b, int64_t d, int64_t end,
                          Vec<T> (&sum)[kLanes<T>]) {
  constexpr int R = kDotRows<T>, C = kDotColumns<T>, n = kLanes<T>;
  for (; d + n <= end; d += n) {
    Vec<T> right[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) right[c] = load(b[c] + d);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> left = load(a[r] + d);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r * C + c] += left * right[c];
    }
  }
  if (d < end) {
    const size_t bytes = size_t(end - d) * sizeof(T);
    Vec<T> right[C] = {};
    for (int c = 0; c < C; ++c) memcpy(&right[c], b[c] + d, bytes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec<T> left = {};
      memcpy(&left, a[r] + d, bytes);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r * C + c] += left * right[c];
    }
  }
}

// A tile of inner products of rows a and rows b, to `rows` rows of `to`.
template <class T>
CFL_INLINE void dot_tile(const T* const* a, const T* const* b, int64_t width, T* to, int64_t stride,
                         int64_t rows) {
  constexpr int C = kDotColumns<T>, n = kLanes<T>;
  Vec<T> sum[n] = {};
  dot_block<T>(a, b, 0, min64(width, kDotDepth<T>), sum);
  for (int64_t d = kDotDepth<T>; d < width; d += kDotDepth<T>) {
    Vec<T> more[n] = {};
    dot_block<T>(a, b, d, min64(width, d + kDotDepth<T>), more);
    for (int i = 0; i < n; ++i) sum[i] += more[i];
  }
  add_step<T, 1>(sum);
  T sums[n];
  store(sums, sum[0]);
  for (int64_t r = 0; r < rows; ++r) memcpy(to + r * stride, sums + r * C, C * sizeof(T));
}

template <class T>
void products(const SpdProducts* args) {
  constexpr int R = kDotRows<T>, C = kDotColumns<T>;
  static_assert(C % R == 0 && kSpdColumns % C == 0);
  const int64_t right = (args->n + kSpdColumns - 1) / kSpdColumns * kSpdColumns;
  const int64_t stride = right + (args->k + kSpdColumns - 1) / kSpdColumns * kSpdColumns;
  const T* p = static_cast<const T*>(args->p);
  const T* w = static_cast<const T*>(args->w);
  T* matrix = static_cast<T*>(args->matrix);
  for (int64_t i = 0; i < args->n; i += R) {
    const int64_t rows = min64(R, args->n - i);
    const T *a[R], *b[C];
    for (int r = 0; r < R; ++r) a[r] = p + min64(i + r, args->n - 1) * args->p_stride;
    T* to = matrix + i * stride;
    for (int64_t j = i / C * C; j < args->n; j += C) {
      for (int c = 0; c < C; ++c) b[c] = p + min64(j + c, args->n - 1) * args->p_stride;
      dot_tile(a, b, args->width, to + j, stride, rows);
    }
    for (int64_t j = 0; j < args->k; j += C) {
      for (int c = 0; c < C; ++c) b[c] = w + min64(j + c, args->k - 1) * args->w_stride;
      dot_tile(a, b, args->width, to + right + j, stride, rows);
    }
  }
}

constexpr SpdKernel kKernel = {products<float>, products<double>, factor_and_solve<float>,
                               factor_and_solve<double>};

}  // namespace

const SpdKernel* CFL_ENTRY() { return &kKernel; }

}  // namespace cfl::cpu::detail
