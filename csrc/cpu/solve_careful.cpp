#include "cpu/solve_careful.h"

#include <cmath>
#include <limits>

#include "cpu/blas.h"
#include "cpu/kept_memory.h"

namespace cfl::cpu {
namespace {

// As in python/cfl_ops/ops/solve/codes.py.
constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kPivot = 4.0, kContraction = 0.25, kError = 0.02, kResidual = 0x1p-30;
constexpr int64_t kProbes = 4, kCorrections = 3;

// a + b; *error gets what rounding lost.
double two_sum(double a, double b, double* error) {
  const double total = a + b, of_b = total - a;
  *error = (a - (total - of_b)) + (b - of_b);
  return total;
}

int exponent(double value) {
  int result = 0;
  if (std::isfinite(value)) std::frexp(value, &result);
  return std::clamp(result, -1000, 1000);
}

// The largest of |m| in each of `columns`, NaN if it has one.
void largest(int64_t rows, int64_t columns, const double* m, const double* scale, double* to) {
  std::fill_n(to, columns, 0.0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      const double value = std::fabs(m[i * columns + c]) * (scale ? scale[i] : 1.0);
      if (!(value <= to[c])) to[c] = value + to[c] * 0.0;  // NaN stays
    }
  }
}

// r = right - (H + diag(lost)) z, in twice the precision. H is symmetric, all of it there.
void residual(int64_t n, int64_t columns, const double* h, const double* lost, const double* right,
              const double* z, double* rest, double* r) {
  for (int64_t i = 0; i < n; ++i) {
    double* total = r + i * columns;
    for (int64_t c = 0; c < columns; ++c) {
      total[c] = right[i * columns + c];
      rest[c] = -lost[i] * z[i * columns + c];
    }
    for (int64_t j = 0; j < n; ++j) {
      const double entry = -h[i * n + j];
      for (int64_t c = 0; c < columns; ++c) {
        double error;
        const double value = z[j * columns + c], product = entry * value;
        rest[c] += std::fma(entry, value, -product);
        total[c] = two_sum(total[c], product, &error);
        rest[c] += error;
      }
    }
    for (int64_t c = 0; c < columns; ++c) total[c] += rest[c];
  }
}

}  // namespace

template <class T>
int32_t solve_carefully(const CarefulSystem<T>& s) {
  const int64_t n = s.n, k = s.k, columns = k + kProbes;
  thread_local KeptMemory memory;
  double* h =
      memory.get<double>(static_cast<size_t>(2 * n * n + 3 * n * columns + 2 * n + 6 * columns));
  double *l = h + n * n, *right = l + n * n, *z = right + n * columns, *change = z + n * columns;
  double *scale = change + n * columns, *lost = scale + n, *level = lost + n;
  double *rest = level + columns, *of_z = rest + columns, *of_change = of_z + columns,
         *of_solution = of_change + columns, *finite = of_solution + columns;

  copy_lower(n, s.a, s.upper, h);
  double largest_scale = 0;
  for (int64_t i = 0; i < n; ++i) {
    double more, lost_first, lost_last;
    const double own = s.shift_diag ? static_cast<double>(s.shift_diag[i]) : 0.0;
    more = two_sum(s.shift, own, &lost_first);
    const double total = two_sum(h[i * n + i], more, &lost_last);
    if (!(total > 0) || !std::isfinite(total)) {
      scale[i] = 1.0;  // the factorisation finds it
    } else {
      // Powers of two bring the diagonal to [1/4, 1) and each right side to [1/2, 1): no rounding.
      int power;
      std::frexp(total, &power);
      scale[i] = std::ldexp(1.0, -((power + 1) >> 1));
    }
    lost[i] = (lost_first + lost_last) * scale[i] * scale[i];
    h[i * n + i] = total;
    largest_scale = std::max(largest_scale, scale[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      h[i * n + j] = h[i * n + j] * scale[i] * scale[j];
      l[i * n + j] = h[i * n + j];
    }
  }
  int64_t info = potrf_lower(n, l, n);
  const int64_t reached = info > 0 ? info - 1 : n;
  int64_t weakest = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < reached; ++i) {
    const double pivot = l[i * n + i] * l[i * n + i] / h[i * n + i];
    if (!(pivot > kPivot * kEps) || !std::isfinite(pivot)) return static_cast<int32_t>(i + 1);
    if (pivot < least) least = pivot, weakest = i;
  }
  if (info > 0) return static_cast<int32_t>(info);
  // What has no answer within rounding is named by its smallest pivot.
  const int32_t refused = static_cast<int32_t>(weakest + 1);

  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i + 1; j < n; ++j) h[i * n + j] = h[j * n + i];
  }
  std::fill_n(level, columns, 0.0);
  std::fill_n(finite, columns, 1.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < k; ++c) {
      const double value = std::fabs(static_cast<double>(s.b[i * k + c]));
      if (!std::isfinite(value)) finite[c] = 0.0;
      level[c] = std::max(level[c], value);
    }
  }
  for (int64_t c = 0; c < k; ++c) level[c] = std::ldexp(1.0, exponent(level[c]));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < k; ++c) {
      right[i * columns + c] = static_cast<double>(s.b[i * k + c]) / level[c] * scale[i];
    }
    for (int64_t p = 0; p < kProbes; ++p) {  // see solve_system
      right[i * columns + k + p] = std::cos(static_cast<double>((i + 1) * (i + 1) * (p + 1)));
    }
  }

  std::copy_n(right, n * columns, z);
  potrs_lower(n, columns, l, n, z, columns);
  double rate = kEps;
  bool good = false;
  for (int64_t step = 0; step < kCorrections && !good; ++step) {
    residual(n, columns, h, lost, right, z, rest, change);
    potrs_lower(n, columns, l, n, change, columns);
    largest(n, columns, change, nullptr, of_change);
    if (step == 0) {
      largest(n, columns, z, nullptr, of_z);
      for (int64_t p = k; p < columns; ++p) {
        const double share = of_change[p] / of_z[p] + kEps;
        if (!(share <= kContraction)) return refused;
        rate = std::max(rate, share);
      }
    }
    for (int64_t e = 0; e < n * columns; ++e) z[e] += change[e];
    largest(n, columns, z, nullptr, of_z);
    largest(n, columns, z, scale, of_solution);
    good = true;
    for (int64_t c = 0; c < k; ++c) {
      // A right side that is not finite has no solution to be wrong.
      if (finite[c] == 0.0 || !std::isfinite(of_solution[c])) continue;
      // The rate of the last change, and of what residuals do not see.
      const double error = rate * largest_scale * (of_change[c] + kResidual * of_z[c]);
      good = good && error <= kError * of_solution[c];
    }
  }
  if (!good) return refused;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < k; ++c) {
      s.x[i * k + c] = static_cast<T>(z[i * columns + c] * scale[i] * level[c]);
    }
  }
  return 0;
}

template int32_t solve_carefully<float>(const CarefulSystem<float>& s);
template int32_t solve_carefully<double>(const CarefulSystem<double>& s);

}  // namespace cfl::cpu
