// One system of ridge_solve whose float64 factor proves nothing: corrected with residuals in twice
// the precision, which tell the error. The same as solve_system in
// python/cfl_ops/ops/solve/system.py.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cfl::cpu {

// (A + (shift + diag(shift_diag))) X = B, all dense and row-major.
template <class T>
struct CarefulSystem {
  int64_t n = 0, k = 0;
  const T* a = nullptr;
  bool upper = false;  // the lower triangle of A^T is the one to use
  double shift = 0;
  const T* shift_diag = nullptr;  // (n), or null
  const T* b = nullptr;
  T* x = nullptr;
};

// 0, or the order of the leading minor that is not positive definite or only within rounding; x may
// be written in any case.
template <class T>
int32_t solve_carefully(const CarefulSystem<T>& s);

// The lower triangle of A, or of A^T where `upper`, row by row.
template <class T, class Acc>
void copy_lower(int64_t n, const T* a, bool upper, Acc* to) {
  if (!upper) {
    for (int64_t i = 0; i < n; ++i) std::copy_n(a + i * n, i + 1, to + i * n);
    return;
  }
  constexpr int64_t kTile = 32;  // so that neither side is walked across its rows for long
  for (int64_t i0 = 0; i0 < n; i0 += kTile) {
    for (int64_t j0 = 0; j0 <= i0; j0 += kTile) {
      for (int64_t i = i0; i < std::min(n, i0 + kTile); ++i) {
        for (int64_t j = j0; j < std::min(i + 1, j0 + kTile); ++j) to[i * n + j] = a[j * n + i];
      }
    }
  }
}

}  // namespace cfl::cpu
