// gram on the CPU: from tensors to the kernel of gram_kernel.h. Semantics: python/cfl_ops/gram.py.
#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/gram_kernel.h"
#include "cpu/tensor.h"

namespace cfl::cpu {
namespace {

enum Info : int32_t { kNotFinite = -1, kBadClass = -2, kBadWeight = -3 };

DType kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::Double:
      return DType::kF64;
    default:
      STD_TORCH_CHECK(false, "cfl_ops.gram: expected a floating-point tensor");
  }
}

template <class T>
bool scan_weights(int64_t stride, const T* w, int64_t rows, double* sum) {
  bool good = true;
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const double value = static_cast<double>(w[i * stride]);
    good &= value >= 0;
    total += value;
  }
  *sum = total;
  return good;
}

template <class T>
bool finite_diagonal(const T* gram, int64_t order) {
  for (int64_t i = 0; i < order; ++i) {
    if (!std::isfinite(gram[i * order + i])) return false;
  }
  return true;
}

using Moments = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Moments gram_op(const Tensor& x, const std::optional<Tensor>& y,
                std::optional<Tensor> sample_weight, bool bias_column, int64_t num_classes,
                ScalarType acc_dtype) {
  if (sample_weight && sample_weight->element_size() == 2) {  // the kernel takes no half weights
    sample_weight = torch::stable::to(*sample_weight, ScalarType::Float);
  }
  const int64_t rows = x.size(x.dim() - 2), cols = x.size(x.dim() - 1);
  const int64_t order = cols + bias_column;
  const int64_t targets = !y ? 0 : num_classes ? num_classes : y->size(y->dim() - 1);
  const auto batch = batch_shape(x, 2);
  const int64_t count_batch = product(batch);

  Tensor gram = empty_cpu(batch_shape(x, 2, {order, order}), acc_dtype);
  Tensor cross = empty_cpu(batch_shape(x, 2, {order, targets}), acc_dtype);
  Tensor target_sum = empty_cpu(batch_shape(x, 2, {targets}), acc_dtype);
  Tensor target_sq = empty_cpu(batch_shape(x, 2, {targets}), acc_dtype);
  Tensor count = empty_cpu(batch, ScalarType::Double);
  Tensor info = empty_cpu(batch, ScalarType::Int);
  const int64_t acc_size = static_cast<int64_t>(gram.element_size());
  const bool exact = acc_dtype == ScalarType::Double && x.scalar_type() != ScalarType::Double;

  GramArgs args;
  args.rows = rows;
  args.cols = cols;
  args.x_dtype = kernel_dtype(x.scalar_type());
  args.x_row_stride = x.stride(x.dim() - 2);
  args.x_col_stride = x.stride(x.dim() - 1);
  args.bias = bias_column;
  args.acc_dtype = kernel_dtype(acc_dtype);
  args.targets = targets;
  const Batched xs(x, 2);
  const Batched ys = !y ? Batched() : Batched(*y, num_classes ? 1 : 2);
  const Batched weights = sample_weight ? Batched(*sample_weight, 1) : Batched();
  if (y) {
    args.label_stride = args.y_col_stride = y->stride(y->dim() - 1);
    if (!num_classes) args.y_row_stride = y->stride(y->dim() - 2);
  }
  if (sample_weight) {
    args.weight_dtype = kernel_dtype(sample_weight->scalar_type());
    args.weight_stride = sample_weight->stride(sample_weight->dim() - 1);
  }

  auto one = [&](int64_t index, bool inner_parallel) {
    GramArgs a = args;
    a.x = xs.at(index);
    if (y && num_classes) a.labels = ys.at<int64_t>(index);
    if (y && !num_classes) a.y = ys.at(index);
    if (sample_weight) a.weight = weights.at(index);
    auto output = [&](const Tensor& t, int64_t size) {
      return static_cast<char*>(t.data_ptr()) + index * size * acc_size;
    };
    a.gram = output(gram, order * order);
    a.cross = output(cross, order * targets);
    a.target_sum = output(target_sum, targets);
    a.target_sq = output(target_sq, targets);
    int32_t code = 0;
    double total = static_cast<double>(rows);
    const int64_t bad_row =
        cfl::cpu::gram(a, inner_parallel ? &cfl::parallel_for : nullptr,
                       inner_parallel ? static_cast<int>(torch::stable::get_num_threads()) : 1);
    if (bad_row >= 0) {
      code = kBadClass;
      std::memset(a.gram, 0, order * order * acc_size);
      std::memset(a.cross, 0, order * targets * acc_size);
      std::memset(a.target_sum, 0, targets * acc_size);
      std::memset(a.target_sq, 0, targets * acc_size);
    } else if (exact && !finite_diagonal(static_cast<const double*>(a.gram), order)) {
      code = kNotFinite;
    }
    if (sample_weight) {
      bool good = true;
      if (args.weight_dtype == DType::kF32) {
        good = scan_weights(args.weight_stride, static_cast<const float*>(a.weight), rows, &total);
      } else {
        good = scan_weights(args.weight_stride, static_cast<const double*>(a.weight), rows, &total);
      }
      if (!good) code = kBadWeight;
    }
    static_cast<double*>(count.data_ptr())[index] = total;
    static_cast<int32_t*>(info.data_ptr())[index] = code;
  };

  if (count_batch == 1) {
    one(0, true);
  } else {
    // One region for the whole batch: a matrix to a thread.
    torch::stable::parallel_for(0, count_batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) one(i, false);
    });
  }
  return {gram, cross, target_sum, target_sq, count, info};
}

}  // namespace
}  // namespace cfl::cpu

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) { m.impl("gram", TORCH_BOX(&cfl::cpu::gram_op)); }
