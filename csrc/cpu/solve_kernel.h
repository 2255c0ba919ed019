// Raw CPU kernel for batches of small symmetric positive definite systems. Plain data only: an
// inline function here would be compiled for several instruction sets under one name.
//
// A group is as many systems as a vector register has lanes; every number of the algorithm is a
// vector that holds one number of each system, so the systems are solved side by side without any
// shuffling.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cfl::cpu::detail {

// (A_l + diag(shift)) X_l = B_l for each lane l. All pointers are to the kernel's own type T, float
// or double. A (n x n) and B, X (n x k) are dense and row-major. Of A the lower triangle is used.
struct SolveGroup {
  int64_t n = 0, k = 0;
  int64_t valid = 0;                    // how many lanes have an output of their own
  bool first = true;                    // of a run with the same n, k, upper and scratch
  const void* const* a = nullptr;       // one pointer per lane
  const void* const* next_a = nullptr;  // the next group's, to prefetch; or null
  const void* const* b = nullptr;
  const void* const* next_b = nullptr;  // likewise
  void* const* x = nullptr;
  bool upper = false;                       // the lower triangle of A^T is the one to use
  const void* shift = nullptr;              // (lanes)
  const void* const* shift_diag = nullptr;  // one pointer to n numbers per lane, or null
  double tolerance = 0;  // a pivot up to tolerance * (its diagonal entry) is lost
  // A factor proves its solutions if the square of (the inverse's norm) times (the ratio of scales)
  // is up to the limit, see below, and the diagonal in the range in which nothing over- or
  // underflows.
  double limit = 0, smallest = 0, largest = 0;
  // (lanes): 0; the order of the first leading minor lost; or n + 1, where the limit is passed.
  int32_t* info = nullptr;
  void* scratch = nullptr;  // 64-byte aligned
};

// The error of a solution is at most that of the factor, times the norm of H^-1, H the system with
// a diagonal of ones, times the ratio of scales: the roots of the largest and the smallest diagonal
// entry, for a right side that has its weight where the solution has not. The product of H's pivots
// bounds the norm: 1 / (its smallest eigenvalue) <= e / det(H), by the mean of the other
// eigenvalues. Where that is too much, a step of inverse iteration estimates it.

struct SolveKernel {
  int lanes;
  size_t (*scratch_bytes)(int64_t n, int64_t k);
  // X of a lane whose info is not 0 is NaN.
  void (*run)(const SolveGroup* group);
};

// P_l = (T_l^T T_l)^-1 T_l^T for each lane l, in double, of tall T (m x s, m >= s) of type float or
// double.
struct PinvGroup {
  int64_t m = 0, s = 0;
  bool wide = false;  // memory holds T^T and takes P^T
  int64_t valid = 0;
  const void* const* t = nullptr;  // one pointer per lane, dense
  void* const* p = nullptr;
  double limit = 0;         // on the trace of the inverse Gram with columns of length 1
  double tolerance = 0;     // as for SolveGroup
  bool refine = false;      // one Newton step
  int32_t* info = nullptr;  // (lanes): 0, or 1 where P is not to be used
  void* scratch = nullptr;  // 64-byte aligned
};

struct PinvKernel {
  int lanes;
  size_t (*scratch_bytes)(int64_t m, int64_t s);
  void (*run)(const PinvGroup* group);
};

struct SolveKernels {
  const SolveKernel *f32, *f64;
  const PinvKernel *pinv_f32, *pinv_f64;
};

SolveKernels solve_kernels_generic();
SolveKernels solve_kernels_avx2();
SolveKernels solve_kernels_avx512();

}  // namespace cfl::cpu::detail
