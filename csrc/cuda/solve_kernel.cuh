// Ridge systems (A + diag(shift)) X = B, A symmetric positive definite (its lower triangle is
// read).
//
// Up to 64 unknowns: some lanes of a warp for each system, a row or two in the registers of each
// lane, from load to answer. Beyond: 32 x 32 tiles, each a block's work in turn (linalg.cuh), in
// float64; the time is that of the chain of diagonal tiles.
//
// Device code only: launched by solve.cu, and through NVRTC by python/cfl_ops/_gpu/nvrtc.py.
#pragma once

#include "cuda/linalg.cuh"

namespace cfl::cuda {

constexpr int kColumnsPerWarp = 64;

// Bytes of a warp, and warps of a block so that a block's share fits any card.
template <class A, int kOrder>
struct SmallSolve {
  using Layout = RowLayout<kOrder>;
  static constexpr int kStride = kOrder + Pack<A>::kCount;  // no two lanes in one bank
  // Numbers of a system; those of a warp's others begin in other banks.
  static constexpr int kTile = kOrder * kStride + (Layout::kSystems > 1 ? kOrder : 0);
  static constexpr int kBytes = Layout::kSystems * kTile * static_cast<int>(sizeof(A));
  static constexpr int kWarps = kBytes > 32 << 10   ? 1
                                : kBytes > 16 << 10 ? 2
                                : kBytes > 8 << 10  ? 4
                                                    : 8;
  static constexpr int kShared = kWarps * kBytes;
  static constexpr int kColumns =
      kOrder * sizeof(A) > 256 ? 1 : 4;  // right sides in work at a time
  // solve_pinv_kernel passes rows from lane to lane besides.
  static constexpr int kPinvTile = kTile + 2 * kOrder;
  static constexpr int kPinvShared =
      kWarps * Layout::kSystems * kPinvTile * static_cast<int>(sizeof(A));
};

// --- what a factor proves: as csrc/cpu/solve_kernel.h says ---------------------------------------

template <class A>
struct Range;
template <>
struct Range<float> {
  static constexpr float kEps = 0x1p-23f, kSmallest = 1e-29f, kLargest = 1e24f;
};
template <>
struct Range<double> {
  static constexpr double kEps = 0x1p-52, kSmallest = 1e-290, kLargest = 1e276;
};

// About the norm of the inverse of the system with a diagonal of ones: |z|^2 / |y|^2 of L y = g and
// L^T z = y, with the signs of g chosen so that y grows. As substitute.
template <class A, int kOrder>
__device__ inline A inverse_norm(const A (&row)[RowLayout<kOrder>::kRows][kOrder],
                                 const A (&inverse)[RowLayout<kOrder>::kRows],
                                 const A (&diagonal)[RowLayout<kOrder>::kRows], const A* tile,
                                 int stride, int lane, int n) {
  constexpr int kLanes = RowLayout<kOrder>::kLanes, kRows = RowLayout<kOrder>::kRows;
  A y[kRows] = {}, own[kRows], before = 0, after = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) own[r] = diagonal[r] * inverse_root(diagonal[r]);
#pragma unroll
  for (int j = 0; j < kOrder; ++j) {
    if (j >= n) continue;
    const A sum = y[j / kLanes];
    const A value =
        (sum < A(0) ? sum - own[j / kLanes] : sum + own[j / kLanes]) * inverse[j / kLanes];
    const A known = __shfl_sync(kFull, value, j % kLanes, kLanes);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = lane + r * kLanes;
      if (i == j) y[r] = known;
      if (i > j) y[r] = fma(-row[r][j], known, y[r]);
    }
    before = fma(known, known, before);
  }
#pragma unroll
  for (int j = kOrder - 1; j >= 0; --j) {
    if (j >= n) continue;
    const A value = y[j / kLanes] * inverse[j / kLanes];
    const A known = __shfl_sync(kFull, value, j % kLanes, kLanes);
    const A weight = __shfl_sync(kFull, diagonal[j / kLanes], j % kLanes, kLanes);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = lane + r * kLanes;
      if (i < j) y[r] = fma(-tile[j * stride + i], known, y[r]);
    }
    after = fma(known * known, weight, after);
  }
  return after / before;
}

// Whether the factor proves the solutions of the lanes' system, to a share of the usual limit.
template <class A, int kOrder>
__device__ inline bool proves(const A (&row)[RowLayout<kOrder>::kRows][kOrder],
                              const A (&inverse)[RowLayout<kOrder>::kRows],
                              const A (&diagonal)[RowLayout<kOrder>::kRows], const A* tile,
                              int stride, int lane, int n, A share) {
  constexpr int kLanes = RowLayout<kOrder>::kLanes, kRows = RowLayout<kOrder>::kRows;
  A spread = A(1), low = Range<A>::kLargest, high = A(0);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (lane + r * kLanes >= n) continue;
    spread *= inverse[r] * inverse[r] * diagonal[r];
    low = least(low, diagonal[r]);
    high = most(high, diagonal[r]);
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    spread *= __shfl_xor_sync(kFull, spread, step);
    low = least(low, __shfl_xor_sync(kFull, low, step));
    high = most(high, __shfl_xor_sync(kFull, high, step));
  }
  // The square of share 0.025 / (sqrt(n) eps).
  const A limit =
      share * share * A(0.000625) / (static_cast<A>(n) * Range<A>::kEps * Range<A>::kEps);
  auto good = [&](A norm) { return norm * norm * high <= low * limit; };  // false for NaN
  bool proven = good(spread * A(2.7183));
  if (__any_sync(kFull, !proven)) {
    proven = good(inverse_norm<A, kOrder>(row, inverse, diagonal, tile, stride, lane, n));
  }
  return proven && low >= Range<A>::kSmallest && high < Range<A>::kLargest;
}

// One system and up to 64 right sides for each group of lanes of block `block`. A (n, n), B and X
// (n, k) dense and row-major, computed in type A. `lam` and, if not null, shift (batch, n) are
// added to the diagonal. With `only`, the systems that have a number other than 0 there. X of a
// system that fails (see factor_rows) or of which the factor proves nothing (info n + 1) is NaN;
// `again` gets a copy of info, or is null.
template <class T, class A, int kOrder>
__device__ inline void solve_block(int64_t block, const T* matrices, const T* rights, double lam,
                                   const double* shift, int64_t batch, int n, int64_t columns,
                                   double tolerance, const int* only, T* solutions, int* info,
                                   int* again) {
  using Small = SmallSolve<A, kOrder>;
  using Layout = RowLayout<kOrder>;
  constexpr int kLanes = Layout::kLanes, kRows = Layout::kRows, kStride = Small::kStride,
                kColumns = Small::kColumns;
  CFL_DYNAMIC_SHARED(memory);
  const int warp = threadIdx.x / kLaneCount, lane = threadIdx.x % kLanes;
  const int group = threadIdx.x % kLaneCount / kLanes;
  const int64_t pieces = most<int64_t>(1, (columns + kColumnsPerWarp - 1) / kColumnsPerWarp);
  const int64_t work = (block * Small::kWarps + warp) * Layout::kSystems + group;
  const int64_t system = work / pieces, first = work % pieces * kColumnsPerWarp;
  bool mine = system < batch;
  if (only) {
    mine = mine && only[system] != 0;
    if (!__any_sync(kFull, mine)) return;
  }
  A* tile = reinterpret_cast<A*>(memory) + (warp * Layout::kSystems + group) * Small::kTile;

  // Row by row, as memory has it; what lies above the diagonal is not read.
  const T* matrix = matrices + (mine ? system : 0) * n * n;
#pragma unroll 8
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int c = lane + r * kLanes;
      if (mine && c <= i) tile[i * kStride + c] = static_cast<A>(matrix[i * n + c]);
    }
  }
  __syncwarp();
  A row[kRows][kOrder], inverse[kRows], diagonal[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = lane + r * kLanes;
#pragma unroll
    for (int c = 0; c < kOrder; c += Pack<A>::kCount) {
      if (c >= (r + 1) * kLanes) continue;
      const auto pack = *reinterpret_cast<const Pack<A>*>(tile + i * kStride + c);
#pragma unroll
      for (int e = 0; e < Pack<A>::kCount; ++e) {
        row[r][c + e] = mine && i < n && c + e <= i ? pack.value[e] : A(c + e == i);
      }
    }
    const double more = mine && i < n ? lam + (shift ? shift[system * n + i] : 0.0) : 0.0;
    diagonal[r] = A(1);
#pragma unroll
    for (int c = 0; c < kOrder; ++c) {
      if (c / kLanes == r && c == i) diagonal[r] = row[r][c] += static_cast<A>(more);
    }
    inverse[r] = A(1);
  }
  __syncwarp();
  A* original = tile + 2 * kOrder;  // the tile is free until the factor is there
#pragma unroll
  for (int r = 0; r < kRows; ++r) original[lane + r * kLanes] = diagonal[r];
  __syncwarp();
  int failed =
      factor_rows<A, kOrder>(row, inverse, lane, n, static_cast<A>(tolerance), original, tile);
  store_rows<A, kOrder>(row, lane, kStride, tile);
  // What float32 did not prove is to be right to float32.
  const A share = sizeof(T) == sizeof(A) ? A(1) : A(1e-5);
  const bool proven = proves<A, kOrder>(row, inverse, diagonal, tile, kStride, lane, n, share);
  if (!failed && !proven) failed = n + 1;

  const T* right = rights + (mine ? system : 0) * n * columns;
  T* solution = solutions + (mine ? system : 0) * n * columns;
  const int64_t last = least(columns, first + kColumnsPerWarp);
  // Groups of a warp can have different pieces: all walk as far as the longest.
  for (int64_t begin = first; __any_sync(kFull, begin < last); begin += kColumns) {
    A y[kRows][kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = lane + r * kLanes;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const bool there = mine && i < n && begin + k < last;
        y[r][k] = there ? static_cast<A>(right[i * columns + begin + k]) : A(0);
      }
    }
    substitute<A, kOrder, kColumns>(row, inverse, tile, kStride, lane, n, columns == 1, y);
    const T nan = static_cast<T>(not_a_number());
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = lane + r * kLanes;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if (mine && i < n && begin + k < last) {
          solution[i * columns + begin + k] = failed ? nan : static_cast<T>(y[r][k]);
        }
      }
    }
  }
  if (mine && lane == 0 && first == 0) {
    info[system] = failed;
    if (again) again[system] = failed;
  }
}

// A second look at float systems in double has few of them to solve: a block walks over many.
constexpr int kSecondLookBlocks = 2048;

template <class T, class A, int kOrder>
__global__ void __launch_bounds__(SmallSolve<A, kOrder>::kWarps* kLaneCount)
    solve_small_kernel(const T* matrices, const T* rights, double lam, const double* shift,
                       int64_t batch, int n, int64_t columns, double tolerance, const int* only,
                       T* solutions, int* info, int* again) {
  auto solve = [&](int64_t block) {
    solve_block<T, A, kOrder>(block, matrices, rights, lam, shift, batch, n, columns, tolerance,
                              only, solutions, info, again);
  };
  if constexpr (sizeof(T) == sizeof(A)) {
    solve(blockIdx.x);
  } else {
    using Small = SmallSolve<A, kOrder>;
    constexpr int kSystems = Small::kWarps * Small::Layout::kSystems;
    const int64_t pieces = most<int64_t>(1, (columns + kColumnsPerWarp - 1) / kColumnsPerWarp);
    for (int64_t block = blockIdx.x; block * kSystems < batch * pieces; block += gridDim.x) {
      solve(block);
      __syncwarp();
    }
  }
}

// --- systems whose factor proves nothing ---------------------------------------------------------

// As in python/cfl_ops/ops/solve/codes.py.
constexpr int kProbes = 4, kCorrections = 3;
constexpr double kPivot = 4.0, kContraction = 0.25, kSmallError = 0.02, kResidual = 0x1p-30;

constexpr int kCareful = 64;  // the largest order, and a thread for each row

#if defined(CFL_CUDA_ON_HOST)
inline double rounded_product(double a, double b) { return a * b; }
#else
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#endif

// a + b; *error gets what rounding lost.
__device__ inline double two_sum(double a, double b, double* error) {
  const double total = a + b, of_b = total - a;
  *error = (a - (total - of_b)) + (b - of_b);
  return total;
}

// 2^e <= |value| < 2^(e + 1) of a normal number, and within what a power of two can be.
__device__ inline int exponent_of(double value) {
  int exponent = 0;
  if (is_finite(value) && value != 0.0) frexp(value, &exponent);
  return least(1000, most(-1000, exponent));
}

// The systems with info other than 0 once more: corrected with residuals in twice the precision,
// which tell the error. As solve_system in python/cfl_ops/ops/solve/system.py: a block walks over
// the systems, a thread has a row.
template <class T>
__global__ void __launch_bounds__(kCareful)
    solve_careful_kernel(const T* matrices, const T* rights, double lam, const double* shift,
                         int64_t batch, int n, int64_t columns, T* solutions, int* info) {
  constexpr int kStride = kCareful + 1;
  __shared__ double l[kCareful * kStride], ones[kCareful], scales[kCareful], numbers[kCareful],
      vector[kCareful], z[kCareful];
  const int i = threadIdx.x;
  const bool inside = i < n;
  for (int64_t system = blockIdx.x; system < batch; system += gridDim.x) {
    if (info[system] == 0) continue;
    const T* matrix = matrices + system * n * n;
    // The largest of all rows' values, NaN if there is one.
    auto largest = [&](double value) {
      __syncthreads();
      numbers[i] = value;
      __syncthreads();
      double found = 0.0;
      for (int r = 0; r < n; ++r) found = numbers[r] <= found ? found : numbers[r] + found * 0.0;
      return found;
    };
    // Powers of two bring the diagonal to [1/4, 1): no rounding.
    double lost = 0.0, scale = 1.0;
    __syncthreads();
    if (inside) {
      const double total = two_sum(static_cast<double>(matrix[i * n + i]),
                                   lam + (shift ? shift[system * n + i] : 0.0), &lost);
      if (total > 0.0 && is_finite(total)) {
        int exponent;
        frexp(total, &exponent);
        scale = ldexp(1.0, -((exponent + 1) >> 1));
      }
      lost = lost * scale * scale;
      ones[i] = total * scale * scale;
      scales[i] = scale;
    }
    __syncthreads();
    auto entry = [&](int r, int c) {
      if (r == c) return ones[r];
      return static_cast<double>(r > c ? matrix[r * n + c] : matrix[c * n + r]) * scales[r] *
             scales[c];
    };
    for (int c = 0; inside && c <= i; ++c) l[i * kStride + c] = entry(i, c);

    int failed = 0, weakest = 0;
    double smallest = 2.0;
    for (int j = 0; j < n && !failed; ++j) {
      __syncthreads();
      const double pivot = l[j * kStride + j], share = pivot / fabs(ones[j]);
      if (!(share > kPivot * Range<double>::kEps && is_finite(share))) failed = j + 1;
      if (share < smallest) smallest = share, weakest = j + 1;
      const double root = inverse_root(failed ? 1.0 : pivot);
      __syncthreads();
      if (inside && i >= j) l[i * kStride + j] *= root;  // of the pivot itself its root
      __syncthreads();
      for (int c = j + 1; inside && c <= i; ++c) {
        l[i * kStride + c] = fma(-l[i * kStride + j], l[c * kStride + j], l[i * kStride + c]);
      }
    }
    // vector <- L^-T L^-1 vector
    auto substitute_vector = [&] {
      for (int step = 0; step < 2 * n; ++step) {
        const bool back = step >= n;
        const int j = back ? 2 * n - 1 - step : step;
        __syncthreads();
        const double known = vector[j] / l[j * kStride + j];
        __syncthreads();
        if (i == j) vector[j] = known;
        if (inside && (back ? i < j : i > j)) {
          vector[i] = fma(-l[back ? j * kStride + i : i * kStride + j], known, vector[i]);
        }
      }
      __syncthreads();
    };
    // vector <- right - (H + diag(lost)) z, for the thread's own right
    auto residual = [&](double right) {
      double total = right, rest = inside ? -lost * z[i] : 0.0;
      for (int c = 0; inside && c < n; ++c) {
        double error;
        const double own = -entry(i, c), product = rounded_product(own, z[c]);
        rest += fma(own, z[c], -product);
        total = two_sum(total, product, &error);
        rest += error;
      }
      if (inside) vector[i] = total + rest;
    };

    double rate = Range<double>::kEps;
    for (int p = 1; p <= kProbes && !failed; ++p) {
      const double right = cos(static_cast<double>((i + 1) * (i + 1) * p));
      if (inside) vector[i] = right;
      substitute_vector();
      const double mine = inside ? vector[i] : 0.0;
      if (inside) z[i] = mine;
      const double of_z = largest(fabs(mine));
      residual(right);
      substitute_vector();
      const double share = largest(inside ? fabs(vector[i]) : 0.0) / of_z + Range<double>::kEps;
      if (!(share <= kContraction)) failed = weakest;
      rate = most(rate, share);
    }
    const double largest_scale = largest(inside ? scale : 0.0);
    for (int64_t k = 0; k < columns && !failed; ++k) {
      const int64_t at = (system * n + i) * columns + k;
      const double given = inside ? static_cast<double>(rights[at]) : 0.0;
      const double highest = largest(fabs(given));
      const double level = ldexp(1.0, exponent_of(highest)), right = given / level * scale;
      if (inside) vector[i] = right;
      substitute_vector();
      double mine = inside ? vector[i] : 0.0;
      bool good = false;
      for (int step = 0; step < kCorrections && !good; ++step) {
        if (inside) z[i] = mine;
        __syncthreads();
        residual(right);
        substitute_vector();
        const double change = inside ? vector[i] : 0.0;
        mine += change;
        const double of_change = largest(fabs(change)), of_z = largest(fabs(mine));
        const double of_solution = largest(fabs(mine) * scale);
        // The rate of the last change, and of what residuals do not see. A right side that is not
        // finite has no solution to be wrong.
        good = rate * largest_scale * (of_change + kResidual * of_z) <= kSmallError * of_solution ||
               !is_finite(highest) || !is_finite(of_solution);
      }
      if (!good) failed = weakest;
      if (inside) solutions[at] = static_cast<T>(mine * scale * level);
    }
    for (int64_t k = 0; k < columns && failed; ++k) {
      if (inside) solutions[(system * n + i) * columns + k] = static_cast<T>(not_a_number());
    }
    __syncthreads();  // all have read info
    if (i == 0) info[system] = failed;
  }
}

// --- pseudoinverses of small matrices ------------------------------------------------------------

// P = (T^T T)^-1 T^T of T (m, s), m >= s, for each matrix of a batch, in double: T's columns are
// brought to length 1, and the squared length of what solves that is the trace of the inverse Gram.
// info is 1 where P is not to be used: that trace is above `limit`, a pivot is lost or a square
// over- or underflows. T is dense and row-major, and P (s, m) as well; with `wide` memory holds T^T
// and takes P^T. double gets a Newton step P + (I - P T) P.
template <class T, int kOrder>
__global__ void __launch_bounds__(SmallSolve<double, kOrder>::kWarps* kLaneCount)
    solve_pinv_kernel(const T* matrices, int64_t batch, int m, int n, int wide, double limit,
                      double tolerance, T* results, int* info) {
  using Small = SmallSolve<double, kOrder>;
  using Layout = RowLayout<kOrder>;
  static_assert(Layout::kRows == 1);
  constexpr int kLanes = Layout::kLanes, kStride = Small::kStride, kColumns = Small::kColumns;
  CFL_DYNAMIC_SHARED(memory);
  const int warp = threadIdx.x / kLaneCount, lane = threadIdx.x % kLanes;
  const int group = threadIdx.x % kLaneCount / kLanes;
  const int64_t system =
      (static_cast<int64_t>(blockIdx.x) * Small::kWarps + warp) * Layout::kSystems + group;
  const bool mine = system < batch, inside = mine && lane < n;
  double* tile =
      reinterpret_cast<double*>(memory) + (warp * Layout::kSystems + group) * Small::kPinvTile;
  const T* matrix = matrices + (mine ? system : 0) * m * n;
  T* result = results + (mine ? system : 0) * m * n;
  auto entry = [&](int r) {
    return inside && r < m ? static_cast<double>(matrix[wide ? lane * m + r : r * n + lane]) : 0.0;
  };
  // to[c] += mine * (that of lane c), through shared memory that changes from call to call.
  int turn = 0;
  auto add_outer = [&](double own, double factor, double (&to)[kOrder]) {
    double* buffer = tile + Small::kTile + (turn ^= 1) * kOrder;
    buffer[lane] = own;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kOrder; c += 2) {
      const auto pack = *reinterpret_cast<const Pack<double>*>(buffer + c);
      to[c] = fma(factor, pack.value[0], to[c]);
      to[c + 1] = fma(factor, pack.value[1], to[c + 1]);
    }
  };

  double row[1][kOrder] = {}, inverse[1] = {1.0};
  for (int begin = 0; begin < m; begin += 4) {  // four loads at a time under way
    double own[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) own[e] = entry(begin + e);
#pragma unroll
    for (int e = 0; e < 4; ++e) add_outer(own[e], own[e], row[0]);
  }
  double square = 1.0;
#pragma unroll
  for (int c = 0; c < kOrder; ++c) {
    if (inside && c == lane) square = row[0][c];
  }
  bool good = square > 1e-250 && square < 1e250;
  const double scale = inverse_root(good ? square : 1.0);
  tile[lane] = scale;
  tile[3 * kOrder + lane] = 1.0;
  __syncwarp();
#pragma unroll
  for (int c = 0; c < kOrder; ++c) {
    row[0][c] = c == lane ? 1.0 : row[0][c] * (scale * tile[c]);
  }
  __syncwarp();
  if (factor_rows<double, kOrder>(row, inverse, lane, n, tolerance, tile + 3 * kOrder, tile)) {
    good = false;
  }
  store_rows<double, kOrder>(row, lane, kStride, tile);
  double squares = 0.0, correction[kOrder] = {};
  for (int begin = 0; begin < m; begin += kColumns) {
    double y[1][kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) y[0][k] = entry(begin + k) * scale;
    substitute<double, kOrder, kColumns>(row, inverse, tile, kStride, lane, n, false, y);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      squares = fma(y[0][k], y[0][k], squares);
      const double value = y[0][k] * scale;
      if constexpr (sizeof(T) == 8) add_outer(entry(begin + k), -value, correction);
      const int r = begin + k;
      if (inside && r < m) result[wide ? r * n + lane : lane * m + r] = static_cast<T>(value);
    }
  }
  if constexpr (sizeof(T) == 8) {
#pragma unroll
    for (int c = 0; c < kOrder; ++c) correction[c] += c == lane ? 1.0 : 0.0;
    for (int r = 0; r < m; ++r) {
      const int at = wide ? r * n + lane : lane * m + r;
      const double value = inside ? static_cast<double>(result[at]) : 0.0;
      double change[2] = {};
      double* buffer = tile + Small::kTile + (turn ^= 1) * kOrder;
      buffer[lane] = value;
      __syncwarp();
#pragma unroll
      for (int c = 0; c < kOrder; ++c) change[c % 2] = fma(correction[c], buffer[c], change[c % 2]);
      if (inside) result[at] = static_cast<T>(value + (change[0] + change[1]));
    }
  }
  // Together, the lanes of the group know.
  unsigned bad = good ? 0 : 1;
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    squares += __shfl_xor_sync(kFull, squares, step);
    bad |= __shfl_xor_sync(kFull, bad, step);
  }
  if (mine && lane == 0) info[system] = bad || !(squares <= limit);
}

// --- one large system, or a few ------------------------------------------------------------------

constexpr int kSide = 32;  // of a tile
constexpr int kTileSize = kSide * kSide;

// What the blocks of solve_tiled_kernel share; all in global memory, flags and the ticket 0 at
// first.
struct TiledSolve {
  int64_t batch, n, columns;
  int64_t tiles, right_tiles;  // 32-wide pieces of n and of the columns
  double lam;                  // added to the diagonal, as is
  const double* shift;         // (batch, n), or null
  double tolerance;
  double* work;  // (batch, tiles + right_tiles, tiles) tiles of L, below them of Y^T and later X^T
  double* inverse;  // (batch, 32 tiles): 1 / L_ii
  int* flags;       // (batch, tiles + right_tiles, tiles), twice: of L and Y^T, and of X^T
  int* info;        // (batch): 0, or the order of the first leading minor that failed
};

// The tile of a row and a column of tiles, in flags and (times its size) in work.
__device__ inline int64_t tile_at(const TiledSolve& s, int64_t matrix, int64_t i, int64_t j) {
  return (matrix * (s.tiles + s.right_tiles) + i) * s.tiles + j;
}

// A tile lies column by column: element (r, c) at 32 c + r. Transposed (`across`) in shared memory
// it lies row by row, with columns mixed so that neither side meets in one bank.
template <bool kAcross>
__device__ inline int place(int r, int c) {
  return kAcross ? r * kSide + (c ^ r) : c * kSide + r;
}

template <bool kAcross>
__device__ inline void fetch_tile(const TiledSolve& s, int64_t at, double* to) {
  const double* from = s.work + at * kTileSize;
#pragma unroll
  for (int e = threadIdx.x; e < kTileSize; e += kThreads) {
    to[place<kAcross>(e % kSide, e / kSide)] = from[e];
  }
}

// A 4 x 4 piece for each thread of a quarter of the block, over a quarter of the 32 products.
struct Piece {
  int part, row, col;
  __device__ Piece()
      : part(threadIdx.x / 64), row(threadIdx.x % 64 / 8 * 4), col(threadIdx.x % 8 * 2) {}
  // Its columns are two and two, 16 apart.
  __device__ int column(int j) const { return col + (j & 1) + (j >> 1) * (kSide / 2); }
};

// sum(r, c) += left(r, k) right(c, k), or with kAcross right(k, c).
template <bool kAcross>
__device__ inline void multiply_tiles(const double* left, const double* right, const Piece& piece,
                                      double (&sum)[4][4]) {
  using Two = Pack<double>;
#pragma unroll
  for (int e = 0; e < kSide / 4; ++e) {
    const int k = piece.part * (kSide / 4) + e;
    double a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const Two two = *reinterpret_cast<const Two*>(left + k * kSide + piece.row + i);
      a[i] = two.value[0], a[i + 1] = two.value[1];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      b[j] = right[kAcross ? place<true>(k, piece.column(j)) : k * kSide + piece.column(j)];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = fma(a[i], b[j], sum[i][j]);
    }
  }
}

// Mixes the rows of a column, so that the 16 lanes that store at a time meet 16 pairs of banks.
__device__ inline int spread(int c) { return (c >> 1 & 3) | (c >> 3 & 1) << 3; }

// start - sum, gathered from the four quarters, into tiles[0]. `start` is that of fetch_tile's e.
constexpr int kEach = kTileSize / kThreads;
__device__ inline void gather_tile(const double (&start)[kEach], const Piece& piece,
                                   const double (&sum)[4][4], double (*tiles)[kTileSize]) {
  __syncthreads();  // the last products have been read
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      tiles[piece.part][place<false>((piece.row + i) ^ spread(piece.col), piece.column(j))] =
          sum[i][j];
    }
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int at = threadIdx.x + e * kThreads;
    const int from = at ^ spread(at / kSide);
    const double all = (tiles[0][from] + tiles[1][from]) + (tiles[2][from] + tiles[3][from]);
    __syncwarp();  // the 32 numbers of a column are a warp's
    tiles[0][at] = start[e] - all;
  }
  __syncthreads();
}

// A tile of L, or of Y^T = B^T L^-T.
template <class T>
__device__ inline void factor_tile(const TiledSolve& s, int64_t matrix, int64_t i, int64_t j,
                                   const T* matrices, const T* rights, double* factors,
                                   double (*tiles)[kTileSize], double* diagonal) {
  const bool right = i >= s.tiles;
  const int64_t target = tile_at(s, matrix, i, j);
  double start[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int at = threadIdx.x + e * kThreads, r = at % kSide, c = at / kSide;
    const int64_t col = j * kSide + c, row = (right ? i - s.tiles : i) * kSide + r;
    start[e] = !right && row == col ? 1.0 : 0.0;
    if (right) {
      if (row < s.columns && col < s.n) {
        start[e] = static_cast<double>(rights[(matrix * s.n + col) * s.columns + row]);
      }
    } else if (row < s.n && col <= row) {
      start[e] = static_cast<double>(matrices[(matrix * s.n + row) * s.n + col]);
      if (row == col) start[e] += s.lam + (s.shift ? s.shift[matrix * s.n + row] : 0.0);
    }
    if (i == j && r == c) diagonal[r] = start[e];
  }

  const Piece piece;
  double sum[4][4] = {};
  for (int64_t k = 0; k < j; ++k) {
    const int64_t left = tile_at(s, matrix, i, k), other = tile_at(s, matrix, j, k);
    if (threadIdx.x < 2) wait_for(s.flags + (threadIdx.x == 0 ? left : other));
    __syncthreads();
    fetch_tile<false>(s, left, tiles[0]);
    if (i != j) fetch_tile<false>(s, other, tiles[1]);
    __syncthreads();
    multiply_tiles<false>(tiles[0], tiles[i == j ? 0 : 1], piece, sum);
  }
  gather_tile(start, piece, sum, tiles);

  const int lane = threadIdx.x;
  if (i == j) {
    if (lane < kSide) {
      double row[1][kSide], inverse[1] = {1.0};
#pragma unroll
      for (int c = 0; c < kSide; ++c) row[0][c] = tiles[0][place<false>(lane, c)];
      const int n = static_cast<int>(least<int64_t>(kSide, s.n - j * kSide));
      const int failed =
          factor_rows<double, kSide>(row, inverse, lane, n, s.tolerance, diagonal, tiles[1]);
      if (lane == 0) {  // the diagonal tiles are done one after the other
        const int before = j > 0 ? s.info[matrix] : 0;
        s.info[matrix] = before || !failed ? before : static_cast<int>(j * kSide) + failed;
      }
#pragma unroll
      for (int c = 0; c < kSide; ++c) tiles[0][place<false>(lane, c)] = c <= lane ? row[0][c] : 0.0;
      s.inverse[(matrix * s.tiles + j) * kSide + lane] = inverse[0];
    }
  } else {
    const int64_t corner = tile_at(s, matrix, j, j);
    if (threadIdx.x == 0) wait_for(s.flags + corner);
    __syncthreads();
    fetch_tile<false>(s, corner, tiles[1]);
    if (lane < kSide) diagonal[lane] = s.inverse[(matrix * s.tiles + j) * kSide + lane];
    __syncthreads();
    if (lane < kSide) {
      double x[kSide];
#pragma unroll
      for (int c = 0; c < kSide; ++c) x[c] = tiles[0][place<false>(lane, c)];
#pragma unroll
      for (int c = 0; c < kSide; ++c) {
        x[c] *= diagonal[c];
#pragma unroll
        for (int d = c + 1; d < kSide; ++d) x[d] = fma(-x[c], tiles[1][place<false>(d, c)], x[d]);
      }
#pragma unroll
      for (int c = 0; c < kSide; ++c) tiles[0][place<false>(lane, c)] = x[c];
    }
  }
  __syncthreads();
#pragma unroll
  for (int e = threadIdx.x; e < kTileSize; e += kThreads)
    s.work[target * kTileSize + e] = tiles[0][e];
  if (factors && !right) {
    double* factor = factors + matrix * s.n * s.n;
    for (int e = threadIdx.x; e < kTileSize; e += kThreads) {
      const int r = e / kSide, c = e % kSide;
      const int64_t row = i * kSide + r, col = j * kSide + c;
      if (row < s.n && col < s.n) factor[row * s.n + col] = tiles[0][place<false>(r, c)];
      if (i != j && j * kSide + r < s.n && i * kSide + c < s.n) {
        factor[(j * kSide + r) * s.n + i * kSide + c] = 0.0;
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) set_flag(s.flags + target);
}

// A tile of X^T = Y^T L^-1, from the last one back.
template <class T>
__device__ inline void solution_tile(const TiledSolve& s, int64_t matrix, int64_t q, int64_t j,
                                     T* solutions, double (*tiles)[kTileSize], double* diagonal) {
  const int64_t target = tile_at(s, matrix, s.tiles + q, j), corner = tile_at(s, matrix, j, j);
  int* done = s.flags + s.batch * (s.tiles + s.right_tiles) * s.tiles;  // tiles of X^T
  const Piece piece;
  double sum[4][4] = {}, start[kEach];
  if (threadIdx.x == 0) wait_for(s.flags + target);
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kEach; ++e)
    start[e] = s.work[target * kTileSize + threadIdx.x + e * kThreads];
  for (int64_t i = s.tiles - 1; i > j; --i) {
    const int64_t known = tile_at(s, matrix, s.tiles + q, i), of_factor = tile_at(s, matrix, i, j);
    if (threadIdx.x < 2) wait_for(threadIdx.x == 0 ? done + known : s.flags + of_factor);
    __syncthreads();
    fetch_tile<false>(s, known, tiles[0]);
    fetch_tile<true>(s, of_factor, tiles[1]);
    __syncthreads();
    multiply_tiles<true>(tiles[0], tiles[1], piece, sum);
  }
  gather_tile(start, piece, sum, tiles);
  fetch_tile<false>(s, corner, tiles[1]);
  const int lane = threadIdx.x;
  if (lane < kSide) diagonal[lane] = s.inverse[(matrix * s.tiles + j) * kSide + lane];
  __syncthreads();
  if (lane < kSide) {
    double x[kSide];
#pragma unroll
    for (int c = 0; c < kSide; ++c) x[c] = tiles[0][place<false>(lane, c)];
#pragma unroll
    for (int c = kSide - 1; c >= 0; --c) {
      x[c] *= diagonal[c];
#pragma unroll
      for (int d = 0; d < c; ++d) x[d] = fma(-x[c], tiles[1][place<false>(c, d)], x[d]);
    }
#pragma unroll
    for (int c = 0; c < kSide; ++c) tiles[0][place<false>(lane, c)] = x[c];
  }
  __syncthreads();
  const bool failed = s.info[matrix] != 0;
#pragma unroll
  for (int e = threadIdx.x; e < kTileSize; e += kThreads) {
    s.work[target * kTileSize + e] = tiles[0][e];
    const int64_t right = q * kSide + e % kSide, row = j * kSide + e / kSide;
    if (right < s.columns && row < s.n) {
      solutions[(matrix * s.n + row) * s.columns + right] =
          static_cast<T>(failed ? not_a_number() : tiles[0][e]);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) set_flag(done + target);
}

// One tile for each block. The order of tickets: column by column of L from its diagonal down and
// on through Y^T, then X^T from its last column back; the matrices of a batch side by side.
// `factors` (batch, n, n) gets L, or is null; there may be no right sides.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    solve_tiled_kernel(const T* matrices, const T* rights, double lam, const double* shift,
                       int64_t batch, int64_t n, int64_t columns, double tolerance, double* work,
                       double* inverse, int* flags, unsigned* next_ticket, T* solutions,
                       double* factors, int* info) {
  TiledSolve s = {};
  s.batch = batch;
  s.n = n;
  s.columns = columns;
  s.tiles = (n + kSide - 1) / kSide;
  s.right_tiles = (columns + kSide - 1) / kSide;
  s.lam = lam;
  s.shift = shift;
  s.tolerance = tolerance;
  s.work = work;
  s.inverse = inverse;
  s.flags = flags;
  s.info = info;
  __shared__ Pack<double> memory[4][kTileSize / 2];
  __shared__ double diagonal[kSide];
  auto* tiles = reinterpret_cast<double (*)[kTileSize]>(memory);
  const int64_t ticket = take_ticket(next_ticket), matrix = ticket % s.batch;
  const int64_t rows = s.tiles + s.right_tiles;
  int64_t task = ticket / s.batch, j = 0;
  for (; j < s.tiles && task >= rows - j; ++j) task -= rows - j;
  if (j < s.tiles) {
    factor_tile(s, matrix, j + task, j, matrices, rights, factors, tiles, diagonal);
  } else {
    solution_tile(s, matrix, task % s.right_tiles, s.tiles - 1 - task / s.right_tiles, solutions,
                  tiles, diagonal);
  }
}

}  // namespace cfl::cuda
