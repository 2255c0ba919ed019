// recursive_ridge_ on the CPU. Semantics: python/cfl_ops/ops/cholesky/recursive_ridge.py (the
// fallback); the reflectors: cholesky_kernel.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/blas.h"
#include "cpu/cholesky.h"
#include "cpu/kept_memory.h"
#include "cpu/tensor.h"

namespace cfl::cpu {
namespace {

enum Info : int32_t {
  kNotFinite = -1,
  kUnknownRows = 1,
  kBadWeight = 2,
  kBadState = 3,
  kTooLarge = 4,
};

constexpr size_t kKept = 16 << 20;  // bytes of each that a thread keeps for its next call
struct Workspaces {
  KeptMemory x, y, w, coefficients, backup, system;
};
Workspaces& workspaces() {
  static thread_local Workspaces instance;
  return instance;
}

// One row of a matrix of any dtype.
struct RowSource {
  const char* data;
  ScalarType dtype;
  int64_t element, row_stride, col_stride;

  template <class T>
  void read(int64_t row, int64_t count, T* to) const {
    const char* from = data + row * row_stride * element;
    switch (dtype) {
      case ScalarType::Double:
        return convert<double>(from, count, to);
      case ScalarType::Float:
        return convert<float>(from, count, to);
      case ScalarType::Half:
        return convert<torch::headeronly::Half>(from, count, to);
      default:
        return convert<torch::headeronly::BFloat16>(from, count, to);
    }
  }

 private:
  template <class S, class T>
  void convert(const char* bytes, int64_t count, T* to) const {
    const S* from = reinterpret_cast<const S*>(bytes);
    if (col_stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i * col_stride]);
    }
  }
};

struct Options {
  double decay, floor;
  bool remove;
};

// The state and the rows of one problem.
template <class T>
struct Problem {
  int64_t features, targets, rows;  // D, K, B
  T *factor, *rotated;              // (D, D) and (K, D), row-major
  int64_t factor_stride, rotated_stride;
  RowSource x, y;
  std::optional<RowSource> weight;
  T* error;  // (B, K)
};

template <class T>
class Fold {
 public:
  Fold(const Problem<T>& problem, const Options& options)
      : p_(problem), o_(options), D_(problem.features), K_(problem.targets) {}

  // 0, or why nothing was changed.
  int32_t run() {
    ldx_ = (D_ + 15) / 16 * 16;
    ldy_ = (K_ + 15) / 16 * 16;
    x_ = work_.x.get<T>(p_.rows * ldx_);
    y_ = work_.y.get<T>(p_.rows * ldy_);
    std::fill(p_.error, p_.error + p_.rows * K_, T(0));
    int32_t info = read_rows();
    if (info == 0) info = look_at_state();
    if (info == 0) info = find_errors();
    if (info == 0) info = change();
    if (info != 0) {
      std::fill(p_.error, p_.error + p_.rows * K_, std::numeric_limits<T>::quiet_NaN());
    }
    work_.x.trim(kKept);
    work_.y.trim(kKept);
    work_.w.trim(kKept);
    work_.backup.trim(kKept);
    work_.system.trim(kKept);
    return info;
  }

 private:
  // Rows of weight 0 are left out, whatever they hold.
  int32_t read_rows() {
    std::vector<T>& roots = roots_;
    roots.resize(p_.rows);
    places_.resize(p_.rows);
    for (int64_t b = 0; b < p_.rows; ++b) {
      double weight = 1;
      if (p_.weight) {
        p_.weight->read(b, 1, &weight);
        if (!(weight >= 0 && std::isfinite(weight))) return kBadWeight;
      }
      const T root = static_cast<T>(std::sqrt(weight));
      if (!(root > 0)) continue;
      roots[count_] = root;
      places_[count_++] = b;
    }
    for (int64_t i = 0; i < count_; ++i) {
      p_.x.read(places_[i], D_, x_ + i * ldx_);
      p_.y.read(places_[i], K_, y_ + i * ldy_);
      const T x_size = k_.abs_sum(x_ + i * ldx_, D_), y_size = k_.abs_sum(y_ + i * ldy_, K_);
      if (!finite(x_ + i * ldx_, D_, x_size) || !finite(y_ + i * ldy_, K_, y_size)) {
        return kNotFinite;
      }
      size_ += roots[i] * (x_size + y_size);
    }
    return 0;
  }

  int32_t look_at_state() {
    for (int64_t i = 0; i < D_; ++i) {
      const T* row = p_.factor + i * p_.factor_stride;
      const T size = k_.abs_sum(row, i + 1);
      if (!finite(row, i + 1, size) || row[i] == 0) return kBadState;
      state_size_ += size;
    }
    for (int64_t i = 0; i < K_; ++i) {
      const T* row = p_.rotated + i * p_.rotated_stride;
      const T size = k_.abs_sum(row, D_);
      if (!finite(row, D_, size)) return kBadState;
      state_size_ += size;
    }
    return 0;
  }

  // Sums may overflow where no entry does.
  static bool finite(const T* values, int64_t count, T size) {
    return std::isfinite(size) ||
           std::all_of(values, values + count, [](T v) { return std::isfinite(v); });
  }

  // y - z^T L^-1 x.
  int32_t find_errors() {
    const int64_t ld = ldx_;
    T* solved = work_.w.get<T>(count_ * ld);
    for (int64_t i = 0; i < count_; ++i) std::copy_n(x_ + i * ld, D_, solved + i * ld);
    k_.solve_lower(p_.factor, p_.factor_stride, D_, solved, ld, count_);
    bool good = true;
    for (int64_t i = 0; i < count_; ++i) {
      for (int64_t t = 0; t < K_; ++t) {
        const T mean = k_.dot(solved + i * ld, p_.rotated + t * p_.rotated_stride, D_);
        const T error = y_[i * ldy_ + t] - mean;
        good &= std::isfinite(error);
        p_.error[places_[i] * K_ + t] = error;
      }
    }
    return good ? 0 : kTooLarge;
  }

  int32_t change() {
    if (D_ == 0) return 0;
    T scale = static_cast<T>(std::sqrt(o_.decay));
    const T bound = std::numeric_limits<T>::max() / 4, moderate = kModerate<T>;
    const T largest = std::max(size_, state_size_ * std::max(scale, T(1)));
    const T least = static_cast<T>(std::sqrt(o_.floor));
    bool low = false;
    for (int64_t i = 0; i < D_; ++i) {
      low |= scale * std::abs(p_.factor[i * (p_.factor_stride + 1)]) < least;
    }
    // An update of moderate numbers cannot fail, for no row grows past the sum of sizes.
    const bool safe = !o_.remove && size_ < bound && largest < bound;
    if (!safe) save();
    if (low) {
      raise_pivots(scale, least);
      scale = 1;
    }
    UpdateArgs<T> args;
    args.order = D_;
    args.rank = count_ <= 2 ? std::max<int64_t>(count_, 1) : (count_ + 3) / 4 * 4;
    const int64_t rows = (D_ + kTileRows + 15) / 16 * 16;
    args.ldw = rows + (K_ + 2 * k_.lanes - 1) / 16 * 16 + 16;
    args.w = work_.w.get<T>(args.rank * args.ldw);
    args.beneath_w = args.w + rows;
    for (int64_t i = 0; i < args.rank; ++i) {
      T* column = args.w + i * args.ldw;
      std::fill(column, column + args.ldw, T(0));
      if (i >= count_) continue;
      for (int64_t j = 0; j < D_; ++j) column[j] = roots_[i] * x_[i * ldx_ + j];
      for (int64_t j = 0; j < K_; ++j) column[rows + j] = roots_[i] * y_[i * ldy_ + j];
    }
    args.l = p_.factor;
    args.row_stride = p_.factor_stride;
    args.col_stride = 1;
    args.beneath = p_.rotated;
    args.beneath_rows = K_;
    args.beneath_stride = p_.rotated_stride;
    args.coefficients = work_.coefficients.get<T>(kPanel * (4 * args.rank + 16));
    args.scale = scale;
    args.down = o_.remove;
    args.moderate = size_ < moderate && largest < moderate;
    if (args.moderate && !o_.remove && D_ >= kRefactorOrder && count_ >= kRefactorRatio * D_ &&
        blas_available() && refactor(args)) {
      return 0;
    }
    const bool failed = k_.update(args) != 0;
    if (safe) return 0;
    if (!failed && state_finite()) return 0;
    restore();
    return failed && o_.remove ? kUnknownRows : kTooLarge;
  }

  bool state_finite() const {
    bool good = true;
    for (int64_t i = 0; i < D_; ++i) {
      const T* row = p_.factor + i * p_.factor_stride;
      good &= finite(row, i + 1, k_.abs_sum(row, i + 1));
    }
    for (int64_t i = 0; i < K_; ++i) {
      const T* row = p_.rotated + i * p_.rotated_stride;
      good &= finite(row, D_, k_.abs_sum(row, D_));
    }
    return good;
  }

  // What entries of the state come to a copy, or back from it: step(pointer, length).
  template <class Step>
  void entries(Step step) {
    for (int64_t i = 0; i < D_; ++i) step(p_.factor + i * p_.factor_stride, i + 1);
    for (int64_t i = 0; i < K_; ++i) step(p_.rotated + i * p_.rotated_stride, D_);
  }
  void save() {
    T* to = work_.backup.get<T>(D_ * (D_ + 1) / 2 + K_ * D_);
    entries([&](T* from, int64_t length) { to = std::copy_n(from, length, to); });
  }
  void restore() {
    const T* from = static_cast<const T*>(work_.backup.data());
    entries([&](T* to, int64_t length) {
      std::copy_n(from, length, to);
      from += length;
    });
  }

  // The decay, where it would leave pivots below `least`: they are kept at it, and z with them, so
  // that W = L^-T z stays. What lies below their rounding is cut off: it would end as denormal
  // numbers.
  void raise_pivots(T scale, T least) {
    const T tiny = least * std::numeric_limits<T>::epsilon();
    std::vector<double> weight(K_ * D_);
    for (int64_t t = 0; t < K_; ++t) {
      double* w = weight.data() + t * D_;
      std::copy_n(p_.rotated + t * p_.rotated_stride, D_, w);
      for (int64_t i = D_ - 1; i >= 0; --i) {
        const T* row = p_.factor + i * p_.factor_stride;
        w[i] /= row[i];
        for (int64_t j = 0; j < i; ++j) w[j] -= row[j] * w[i];
      }
    }
    for (int64_t i = 0; i < D_; ++i) {
      T* row = p_.factor + i * p_.factor_stride;
      for (int64_t j = 0; j < i; ++j) {
        row[j] *= scale;
        if (std::abs(row[j]) < tiny) row[j] = 0;
      }
      row[i] = std::copysign(std::max(scale * std::abs(row[i]), least), row[i]);
    }
    std::vector<double> sums(D_);
    for (int64_t t = 0; t < K_; ++t) {
      const double* w = weight.data() + t * D_;
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t i = 0; i < D_; ++i) {
        const T* row = p_.factor + i * p_.factor_stride;
        for (int64_t j = 0; j <= i; ++j) sums[j] += row[j] * w[i];
      }
      for (int64_t j = 0; j < D_; ++j)
        p_.rotated[t * p_.rotated_stride + j] = static_cast<T>(sums[j]);
    }
  }

  // Many rows at once on BLAS; false, with nothing changed, where that is not as accurate.
  bool refactor(const UpdateArgs<T>& a) {
    T* system = work_.system.get<T>((2 * D_ + K_) * D_);
    T *lower = system + D_ * D_, *cross = lower + D_ * D_;
    for (int64_t i = 0; i < D_; ++i) {
      const T* row = p_.factor + i * p_.factor_stride;
      for (int64_t j = 0; j < D_; ++j) lower[i * D_ + j] = j <= i ? a.scale * row[j] : T(0);
    }
    gemm(false, true, D_, D_, D_, T(1), lower, D_, lower, D_, T(0), system, D_);
    gemm(true, false, D_, D_, a.rank, T(1), a.w, a.ldw, a.w, a.ldw, T(1), system, D_);
    if (K_ > 0) {
      gemm(false, true, K_, D_, D_, a.scale, p_.rotated, p_.rotated_stride, lower, D_, T(0), cross,
           D_);
      gemm(true, false, K_, D_, a.rank, T(1), a.beneath_w, a.ldw, a.w, a.ldw, T(1), cross, D_);
    }
    T* diagonal = lower;
    for (int64_t i = 0; i < D_; ++i) diagonal[i] = system[i * (D_ + 1)];
    if (potrf_lower(D_, system, D_) != 0) return false;
    for (int64_t i = 0; i < D_; ++i) {
      const T pivot = system[i * (D_ + 1)];
      if (!(pivot * pivot * T(kRefactorLoss) > diagonal[i])) return false;
    }
    k_.solve_lower(system, D_, D_, cross, D_, K_);
    for (int64_t i = 0; i < D_; ++i) {
      std::copy_n(system + i * D_, i + 1, p_.factor + i * p_.factor_stride);
    }
    for (int64_t t = 0; t < K_; ++t) {
      std::copy_n(cross + t * D_, D_, p_.rotated + t * p_.rotated_stride);
    }
    return true;
  }

  const Problem<T>& p_;
  const Options& o_;
  const CholeskyKernel<T>& k_ = cholesky_kernel<T>();
  Workspaces& work_ = workspaces();
  const int64_t D_, K_;
  int64_t ldx_ = 0, ldy_ = 0, count_ = 0;
  T *x_ = nullptr, *y_ = nullptr;
  std::vector<T> roots_;         // of the weights of the rows that count
  std::vector<int64_t> places_;  // their numbers
  T size_ = 0, state_size_ = 0;  // sums of magnitudes
};

RowSource rows_of(const Tensor& tensor, const Batched& batch, int64_t index, bool column = false) {
  const int64_t dims = tensor.dim();
  const auto element = static_cast<int64_t>(tensor.element_size());
  if (column) return {batch.at<>(index), tensor.scalar_type(), element, tensor.stride(dims - 1), 0};
  return {batch.at<>(index), tensor.scalar_type(), element, tensor.stride(dims - 2),
          tensor.stride(dims - 1)};
}

template <class T>
void fold_batch(const Tensor& factor, const Tensor& rotated, const Tensor& x, const Tensor& y,
                const std::optional<Tensor>& weight, const Options& options, const Tensor& error,
                const Tensor& info) {
  const int64_t dims = factor.dim(), count = product(batch_shape(factor, 2));
  const Batched factors(factor, 2), sides(rotated, 2), xs(x, 2), ys(y, 2);
  const Batched weights = weight ? Batched(*weight, 1) : Batched();
  const int64_t D = factor.size(dims - 1), K = y.size(dims - 1), B = x.size(dims - 2);
  T* errors = static_cast<T*>(error.data_ptr());
  int32_t* codes = static_cast<int32_t*>(info.data_ptr());
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Problem<T> problem{D,
                         K,
                         B,
                         factors.at<T>(i),
                         sides.at<T>(i),
                         factor.stride(dims - 2),
                         K > 1 ? rotated.stride(dims - 2) : D,
                         rows_of(x, xs, i),
                         rows_of(y, ys, i),
                         std::nullopt,
                         errors + i * B * K};
      if (weight) problem.weight = rows_of(*weight, weights, i, true);
      codes[i] = Fold<T>(problem, options).run();
    }
  };
  if (count == 1) {
    run(0, 1);
  } else {
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, 200000 / (D * D * (B + 2) + 1)),
                                run);
  }
}

// Rows one after the other, each of consecutive entries.
bool row_major(const Tensor& t) {
  const int64_t dims = t.dim(), cols = t.size(dims - 1);
  return (cols <= 1 || t.stride(dims - 1) == 1) &&
         (t.size(dims - 2) <= 1 || t.stride(dims - 2) >= cols);
}

// What was worked on in a copy comes to where it belongs: all of it, or the lower triangle.
template <class T>
void copy_entries(const Tensor& from, const Tensor& to, bool triangle) {
  const int64_t dims = to.dim(), rows = to.size(dims - 2), cols = to.size(dims - 1);
  const int64_t row_stride = to.stride(dims - 2), col_stride = to.stride(dims - 1);
  const T* source = static_cast<const T*>(from.data_ptr());
  const Batched batch(to, 2);
  const int64_t count = product(batch_shape(to, 2));
  for (int64_t b = 0; b < count; ++b) {
    T* at = batch.at<T>(b);
    for (int64_t i = 0; i < rows; ++i, source += cols) {
      const int64_t end = triangle ? i + 1 : cols;
      for (int64_t j = 0; j < end; ++j) at[i * row_stride + j * col_stride] = source[j];
    }
  }
}
void copy_back(const Tensor& from, const Tensor& to, bool triangle) {
  if (to.scalar_type() == ScalarType::Double) {
    copy_entries<double>(from, to, triangle);
  } else {
    copy_entries<float>(from, to, triangle);
  }
}

std::tuple<Tensor, Tensor> recursive_ridge_(const Tensor& factor, const Tensor& rotated,
                                            const Tensor& x, const Tensor& y,
                                            const std::optional<Tensor>& sample_weight,
                                            double decay, double floor, bool remove) {
  Checked check("recursive_ridge_");
  Size D{"D"}, K{"K"}, B{"B"};
  check.written("factor", factor, kReals, {D, D});
  check.written("rotated", rotated, dtype_of(factor), {K, D});
  check.tensor("x", x, kFloats, {B, D});
  check.tensor("y", y, kFloats, {B, K});
  check.tensor("sample_weight", sample_weight, kFloats, {B});
  check.number("decay", decay, 0);
  check.number("floor", floor, 0);
  check.apart();
  const Options options{decay, floor, remove};
  Tensor error = empty_cpu(batch_shape(y, 0), factor.scalar_type());
  Tensor info = empty_cpu(batch_shape(factor, 2), ScalarType::Int);
  const Tensor lower = row_major(factor) ? factor : torch::stable::contiguous(factor);
  const Tensor side = row_major(rotated) ? rotated : torch::stable::contiguous(rotated);
  if (factor.scalar_type() == ScalarType::Double) {
    fold_batch<double>(lower, side, x, y, sample_weight, options, error, info);
  } else {
    fold_batch<float>(lower, side, x, y, sample_weight, options, error, info);
  }
  if (!row_major(factor)) copy_back(lower, factor, true);
  if (!row_major(rotated)) copy_back(side, rotated, false);
  return {error, info};
}

}  // namespace
}  // namespace cfl::cpu

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) {
  m.impl("recursive_ridge_", TORCH_BOX(&cfl::cpu::recursive_ridge_));
}
