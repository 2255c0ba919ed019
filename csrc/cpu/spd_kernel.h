// Raw CPU kernel: one symmetric positive definite system of moderate order, factored and solved in
// one go. Plain data only.
//
// (LAPACK serves orders up to some hundred without blocks, at a tenth of what the machine can do.)
#pragma once

#include <cstdint>

namespace cfl::cpu::detail {

// S X = Q for S (n x n) and Q (n x k). With N and K the next multiples of kSpdColumns, `matrix` is
// (n, N + K): row i holds row i of S from its diagonal on, and row i of Q from column N on. Left of
// the diagonal and in the columns between there may be anything that is finite. On exit the upper
// triangle is U, S = U^T U, and the columns of Q are X.
struct SpdSystem {
  int64_t n = 0, k = 0;
  void* matrix = nullptr;  // of the kernel's own type, 64-byte aligned
};

constexpr int64_t kSpdColumns = 16;

// The same matrix with S = P P^T and Q = P W^T, for P (n, width) and W (k, width) whose rows are
// contiguous within themselves.
struct SpdProducts {
  int64_t n = 0, k = 0, width = 0;
  const void* p = nullptr;
  int64_t p_stride = 0;
  const void* w = nullptr;
  int64_t w_stride = 0;
  void* matrix = nullptr;
};

struct SpdKernel {
  void (*products_f32)(const SpdProducts* products);
  void (*products_f64)(const SpdProducts* products);
  // Return 0, or the order (from 1) of the first pivot that is not positive and finite.
  int64_t (*f32)(const SpdSystem* system);
  int64_t (*f64)(const SpdSystem* system);
};

const SpdKernel* spd_generic();
const SpdKernel* spd_avx2();
const SpdKernel* spd_avx512();

}  // namespace cfl::cpu::detail
