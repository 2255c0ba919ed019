// What the ops on Cholesky factors share: the kernel for this machine, and how a factor lies in
// memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/cholesky_kernel.h"
#include "cpu/gram_kernel.h"

namespace cfl::cpu {

template <class T>
const CholeskyKernel<T>& cholesky_kernel() {
  switch (isa()) {
#if defined(CFL_HAVE_X86_ISAS)
    case Isa::kAmx:
    case Isa::kAvx512:
      return detail::cholesky_avx512(T());
    case Isa::kAvx2:
      return detail::cholesky_avx2(T());
#endif
    default:
      return detail::cholesky_generic(T());
  }
}

// A factor with element strides.
template <class T>
struct FactorView {
  T* data;
  int64_t row_stride, col_stride;
  T& at(int64_t i, int64_t j) const { return data[i * row_stride + j * col_stride]; }
};

// The lower triangle of L as runs of consecutive entries: fn(pointer, length).
template <class T, class Fn>
void lower_runs(const FactorView<T>& l, int64_t order, Fn fn) {
  if (l.col_stride == 1) {
    for (int64_t i = 0; i < order; ++i) fn(l.data + i * l.row_stride, i + 1);
  } else {
    for (int64_t j = 0; j < order; ++j) fn(l.data + j * (l.col_stride + 1), order - j);
  }
}

template <class T>
bool lower_finite(const FactorView<T>& l, int64_t order) {
  bool finite = true;
  lower_runs(l, order, [&](const T* run, int64_t length) {
    for (int64_t i = 0; i < length; ++i) finite &= std::isfinite(run[i]);
  });
  return finite;
}

// With this times D vectors or more, forming and factoring the new matrix is faster, on BLAS.
constexpr double kRefactorRatio = 1.0;
constexpr int64_t kRefactorOrder = 64;
// Forming it squares the condition number, so its factor is kept only if no pivot lost more than
// this.
constexpr double kRefactorLoss = 64;

}  // namespace cfl::cpu
