// Raw CPU kernels of the rank-k update of a Cholesky factor. Plain C++17: no torch.
//
//   L <- factor of  scale^2 L L^T + W W^T   (or - W W^T),   one column after the other:
//
// for column j, with l = scale |L_jj|, v = row j of W and r = sqrt(l^2 +- |v|^2), the Householder
// (for a downdate: hyperbolic Householder) reflector that turns (l, v) into (r, 0) acts on the rows
// i > j as
//
//   L'_ij = (l / r) L_ij +- (v / r) . W_i,     W_i <- W_i - v (L_ij + L'_ij) / (l + r)
//
// which cancels nowhere, and is stable for updates and (relationally: Bojanczyk, Brent, Van Dooren,
// de Hoog 1987) for downdates. A rank-one update takes rotations instead, whose chain from column
// to column is shorter: with w not normalised but sqrt(t) times too long, p = w_j / l and t' = t +
// p^2,
//
//   r = l / c,  c = sqrt(t / t'),   L'_ij = c L_ij + (c p / t) w_i,     w_i <- w_i - p L_ij.
#pragma once

#include <cstdint>

namespace cfl::cpu {

// A downdate fails where it leaves less than this many eps of a squared pivot: what is left is
// rounding.
constexpr int kLostPivot = 10;

template <class T>
struct UpdateArgs {
  int64_t order = 0;                       // D
  int64_t rank = 0;                        // columns of w: 1, 2, or a multiple of 4
  T* l = nullptr;                          // (D, D), the lower triangle read and written
  int64_t row_stride = 0, col_stride = 0;  // one of them is 1
  T* w = nullptr;             // `rank` columns of ldw entries each, zero past D; overwritten
  int64_t ldw = 0;            // >= D + kTileRows
  T* coefficients = nullptr;  // kPanel (4 rank + 16) entries of scratch
  T scale = 1;                // sqrt(decay) >= 0
  bool down = false;
  bool moderate = false;  // all entries are below kModerate<T> in magnitude
  // Rows beneath the triangle, (beneath_rows, D) row-major, that the reflectors act on as well,
  // with their part of w: `rank` columns of ldw entries each, a vector of them past the last row.
  int64_t beneath_rows = 0, beneath_stride = 0;
  T *beneath = nullptr, *beneath_w = nullptr;
};

template <class T>
constexpr T kModerate = sizeof(T) == 4 ? T(1e20) : T(1e150);

// Matrices of one batch, as many as a vector has lanes, worked on side by side.
template <class T>
struct GroupArgs {
  int64_t order = 0, rank = 0;  // D, k <= kGroupRank
  T* const* l = nullptr;        // kernel.lanes pointers to dense matrices of either layout
  bool row_major = true;
  const T* const* v = nullptr;  // kernel.lanes pointers to (D, k)
  int64_t v_row_stride = 0, v_col_stride = 0;
  T* scratch = nullptr;  // lanes D (D + 1 + k) entries, 64-byte aligned
  T scale = 1, v_scale = 1;
  bool down = false;
};

constexpr int64_t kGroupRank = 4;
constexpr int64_t kPanel = 32;      // columns treated at a time
constexpr int64_t kTileRows = 128;  // rows of a tile, at most

template <class T>
struct CholeskyKernel {
  int lanes;
  // Returns 0, or the order (from 1) of the pivot that is not positive or not finite.
  int64_t (*update)(const UpdateArgs<T>& args);
  // Returns the lanes that were updated as a bit mask. The others were left as they are: they
  // failed, or their scale is out of the range that this kernel is good for; update() can tell.
  uint32_t (*update_group)(const GroupArgs<T>& args);
  // The sum of |x| over n entries, NaN or Inf if any is.
  T (*abs_sum)(const T* x, int64_t n);
  // x <- L^-1 x for each of `rows` rows of x (ldx apart); the rows of L are `stride` apart.
  void (*solve_lower)(const T* l, int64_t stride, int64_t order, T* x, int64_t ldx, int64_t rows);
  T (*dot)(const T* a, const T* b, int64_t n);
};

namespace detail {
const CholeskyKernel<float>& cholesky_generic(float);
const CholeskyKernel<double>& cholesky_generic(double);
const CholeskyKernel<float>& cholesky_avx2(float);
const CholeskyKernel<double>& cholesky_avx2(double);
const CholeskyKernel<float>& cholesky_avx512(float);
const CholeskyKernel<double>& cholesky_avx512(double);
}  // namespace detail

}  // namespace cfl::cpu
