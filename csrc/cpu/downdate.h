// Whether a downdated Cholesky factor has its digits. Semantics and reasons:
// python/cfl_ops/ops/cholesky/factor.py, downdate_digits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace cfl::cpu {

// Of `size` is 1 / sqrt(eigenvalue) here, and of `growth` |L'^-1 L|.
constexpr double kDigits = 10;

// Its lower triangle, at l[i * row + j * col].
template <class T>
struct Downdated {
  int64_t order, rank;
  const T* l;
  int64_t row, col;
  const T* v;
  int64_t v_row, v_col;
  T v_scale;  // V is to be taken times this

  // The order (from 1) of the pivot that has lost the most, or 0 where the factor has its digits.
  // growth is the product of the old pivots over the new ones: that of one vector is exact.
  int64_t lost(double growth) const {
    const double unit =
        kDigits * std::numeric_limits<T>::epsilon() * std::sqrt(static_cast<double>(order));
    const double clear = 100 * unit * growth;
    if (clear * clear < least_square()) return 0;
    std::vector<double> size(order);
    for (int64_t i = 0; i < order; ++i) size[i] = careful_size(i);
    int64_t at = 0;
    for (int64_t i = 1; i < order; ++i) {
      if (!(pivot(size, i) >= pivot(size, at))) at = i;
    }
    if (rank > 1) growth = growth_of(size);
    return unit * growth * inverse_size(size, at) < 1 ? 0 : at + 1;
  }

 private:
  // The least L'_ii^2 / A_ii, of the old matrix A = L' L'^T + V V^T; 0 where squares may leave the
  // range of T.
  double least_square() const {
    double least = 1;
    if (col == 1) {
      for (int64_t i = 0; i < order; ++i) {
        constexpr int kParts = 8;
        T parts[kParts] = {};
        const T* x = l + i * row;
        int64_t j = 0;
        for (; j + kParts <= i + 1; j += kParts) {
          for (int p = 0; p < kParts; ++p) parts[p] += x[j + p] * x[j + p];
        }
        for (int p = 0; j <= i; ++j, ++p) parts[p] += x[j] * x[j];
        T sum = 0;
        for (T part : parts) sum += part;
        least = std::min(least, square_of(i, sum));
      }
      return least;
    }
    std::vector<T> sums(order, T(0));
    for (int64_t j = 0; j < order; ++j) {
      const T* x = l + j * col;
      for (int64_t i = j; i < order; ++i) sums[i] += x[i * row] * x[i * row];
    }
    for (int64_t i = 0; i < order; ++i) least = std::min(least, square_of(i, sums[i]));
    return least;
  }

  double square_of(int64_t i, T sum) const {
    for (int64_t p = 0; p < rank; ++p) {
      const T x = v_scale * v[i * v_row + p * v_col];
      sum += x * x;
    }
    const T pivot = l[i * (row + col)];
    const bool plain =
        pivot * pivot > std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon() &&
        sum <= std::numeric_limits<T>::max();
    return plain ? static_cast<double>(pivot * pivot / sum) : 0;
  }

  double pivot(const std::vector<double>& size, int64_t i) const { return at(size, i, i); }

  // sqrt(A_ii), also where squares leave the range of T.
  double careful_size(int64_t i) const {
    double size = 0;
    for (int64_t j = 0; j <= i; ++j) size = std::hypot(size, double(l[i * row + j * col]));
    for (int64_t p = 0; p < rank; ++p) {
      size = std::hypot(size, double(v_scale) * double(v[i * v_row + p * v_col]));
    }
    return size;
  }

  double at(const std::vector<double>& size, int64_t i, int64_t j) const {
    return l[i * row + j * col] / size[i];
  }

  void solve(const std::vector<double>& size, std::vector<double>& x) const {
    for (int64_t i = 0; i < order; ++i) {
      for (int64_t j = 0; j < i; ++j) x[i] -= at(size, i, j) * x[j];
      x[i] /= at(size, i, i);
    }
  }
  void solve_transposed(const std::vector<double>& size, std::vector<double>& x) const {
    for (int64_t i = order - 1; i >= 0; --i) {
      x[i] /= at(size, i, i);
      for (int64_t j = 0; j < i; ++j) x[j] -= at(size, i, j) * x[i];
    }
  }

  // sqrt(1 + |L'^-1 V|^2), which is |L'^-1 L| or more.
  double growth_of(const std::vector<double>& size) const {
    double growth = 1;
    std::vector<double> x(order);
    for (int64_t p = 0; p < rank; ++p) {
      for (int64_t i = 0; i < order; ++i) {
        x[i] = double(v_scale) * double(v[i * v_row + p * v_col]) / size[i];
      }
      solve(size, x);
      for (double value : x) growth = std::hypot(growth, value);
    }
    return growth;
  }

  // |F^-1| of F = diag(size)^-1 L', by inverse iteration from two vectors.
  double inverse_size(const std::vector<double>& size, int64_t from) const {
    std::vector<double> pivot(order, 0.0), growing(order);
    pivot[from] = 1;
    double length = 0;
    for (int64_t i = 0; i < order; ++i) {
      growing[i] = (i % 2 ? -1 : 1) * (1 + static_cast<double>(i) / order);
      length += growing[i] * growing[i];
    }
    for (double& value : growing) value /= std::sqrt(length);
    return std::max(iterated(size, pivot), iterated(size, growing));
  }

  double iterated(const std::vector<double>& size, std::vector<double>& x) const {
    double norm = 0;
    for (int step = 0; step < 3; ++step) {
      solve(size, x);
      solve_transposed(size, x);
      norm = 0;
      for (double value : x) norm += value * value;
      norm = std::sqrt(norm);
      for (double& value : x) value /= norm;
    }
    return std::sqrt(norm);
  }
};

}  // namespace cfl::cpu
