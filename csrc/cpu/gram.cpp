// gram on the CPU: from tensors to the kernel of gram_kernel.h. Semantics:
// python/cfl_ops/ops/gram/gram.py.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

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
bool all_finite(const T* x, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x + i * row_stride;
    float bad = 0;  // x - x is 0, or NaN where x is NaN or Inf
    for (int64_t j = 0; j < cols; ++j) {
      const auto value = static_cast<float>(row[j * col_stride]);
      bad += value - value;
    }
    if (bad != 0) return false;  // NaN compares unequal, too
  }
  return true;
}

bool all_finite(const GramArgs& a) {
  switch (a.x_dtype) {
    case DType::kF32:
      return all_finite(static_cast<const float*>(a.x), a.rows, a.cols, a.x_row_stride,
                        a.x_col_stride);
    case DType::kF16:
      return all_finite(static_cast<const torch::headeronly::Half*>(a.x), a.rows, a.cols,
                        a.x_row_stride, a.x_col_stride);
    case DType::kBF16:
      return all_finite(static_cast<const torch::headeronly::BFloat16*>(a.x), a.rows, a.cols,
                        a.x_row_stride, a.x_col_stride);
    default:
      return true;  // float64 input: NaN and Inf propagate
  }
}

bool labels_in_range(const GramArgs& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const int64_t label = a.labels[i * a.label_stride];
    if (label < 0 || label >= a.targets) return false;
  }
  return true;
}

bool finite_diagonal(const double* gram, int64_t order) {
  for (int64_t i = 0; i < order; ++i) {
    if (!std::isfinite(gram[i * order + i])) return false;
  }
  return true;
}

struct Outputs {
  Tensor gram, cross, target_sum, target_sq, count;  // contiguous
};

// out <- beta out + the moments of x and y, for every element of the batch; returns info. Fresh
// memory is filled in any case, and set to zero where a class is out of range; in place nothing is
// written unless all of info is 0.
Tensor accumulate(const Tensor& x, const std::optional<Tensor>& y,
                  std::optional<Tensor> sample_weight, int64_t num_classes, const Outputs& out,
                  double beta, bool fresh) {
  if (sample_weight && sample_weight->element_size() == 2) {  // the kernel takes no half weights
    sample_weight = torch::stable::to(*sample_weight, ScalarType::Float);
  }
  const int64_t order = out.gram.size(out.gram.dim() - 1);
  const int64_t acc_size = static_cast<int64_t>(out.gram.element_size());
  const auto batch = batch_shape(x, 2);
  const int64_t matrices = product(batch);
  Tensor info = empty_cpu(batch, ScalarType::Int);
  const bool exact =
      out.gram.scalar_type() == ScalarType::Double && x.scalar_type() != ScalarType::Double;

  GramArgs args;
  args.rows = x.size(x.dim() - 2);
  args.cols = x.size(x.dim() - 1);
  args.x_dtype = kernel_dtype(x.scalar_type());
  args.x_row_stride = x.stride(x.dim() - 2);
  args.x_col_stride = x.stride(x.dim() - 1);
  args.bias = order > args.cols;
  args.acc_dtype = kernel_dtype(out.gram.scalar_type());
  args.targets = out.cross.size(out.cross.dim() - 1);
  args.beta = beta;
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

  auto arguments = [&](int64_t index) {
    GramArgs a = args;
    a.x = xs.at(index);
    if (y && num_classes) a.labels = ys.at<int64_t>(index);
    if (y && !num_classes) a.y = ys.at(index);
    if (sample_weight) a.weight = weights.at(index);
    auto output = [&](const Tensor& t, int64_t size) {
      return static_cast<char*>(t.data_ptr()) + index * size * acc_size;
    };
    a.gram = output(out.gram, order * order);
    a.cross = output(out.cross, order * a.targets);
    a.target_sum = output(out.target_sum, a.targets);
    a.target_sq = output(out.target_sq, a.targets);
    return a;
  };
  auto codes = static_cast<int32_t*>(info.data_ptr());
  auto check = [&](const GramArgs& a, int64_t index, double* total) {
    int32_t code = 0;
    *total = static_cast<double>(a.rows);
    if (sample_weight) {
      const bool good =
          a.weight_dtype == DType::kF32
              ? scan_weights(a.weight_stride, static_cast<const float*>(a.weight), a.rows, total)
              : scan_weights(a.weight_stride, static_cast<const double*>(a.weight), a.rows, total);
      if (!good) code = kBadWeight;
    }
    // Fresh results tell by themselves; in place a pass over x costs 1 / D of the work.
    if (code == 0 && !fresh && exact && !(std::isfinite(*total) && all_finite(a))) {
      code = kNotFinite;
    }
    if (a.labels && !labels_in_range(a)) code = kBadClass;
    codes[index] = code;
  };
  auto write = [&](const GramArgs& a, int64_t index, double total, bool inner_parallel) {
    double* count = static_cast<double*>(out.count.data_ptr()) + index;
    if (codes[index] == kBadClass) {
      std::memset(a.gram, 0, order * order * acc_size);
      std::memset(a.cross, 0, order * a.targets * acc_size);
      std::memset(a.target_sum, 0, a.targets * acc_size);
      std::memset(a.target_sq, 0, a.targets * acc_size);
      *count = 0;
      return;
    }
    cfl::cpu::gram(a, inner_parallel ? &cfl::parallel_for : nullptr,
                   inner_parallel ? static_cast<int>(torch::stable::get_num_threads()) : 1);
    *count = beta == 0 ? total : beta * *count + total;
    if (fresh && exact && codes[index] == 0 &&
        !finite_diagonal(static_cast<const double*>(a.gram), order)) {
      codes[index] = kNotFinite;
    }
  };

  // A region costs tens of microseconds on a loaded machine: less work than that stays on this
  // thread.
  constexpr int64_t kParallelWork = 4'000'000;  // multiply-adds
  const int64_t work = args.rows * order * (order / 2 + args.targets + 1) + 1;
  if (matrices == 1) {
    const GramArgs a = arguments(0);
    double total;
    check(a, 0, &total);
    if (fresh || codes[0] == 0) write(a, 0, total, work > kParallelWork);
    return info;
  }
  std::vector<double> totals(static_cast<size_t>(matrices));
  // One region for the whole batch: a matrix to a thread.
  auto for_each = [&](int64_t of_one, const auto& visit) {
    const int64_t grain = std::max<int64_t>(1, kParallelWork / of_one);
    torch::stable::parallel_for(0, matrices, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) visit(i);
    });
  };
  for_each(args.rows * args.cols + 1,
           [&](int64_t i) { check(arguments(i), i, &totals[static_cast<size_t>(i)]); });
  if (fresh || std::all_of(codes, codes + matrices, [](int32_t code) { return code == 0; })) {
    for_each(work,
             [&](int64_t i) { write(arguments(i), i, totals[static_cast<size_t>(i)], false); });
  }
  return info;
}

// The rows that gram and gram_ take; K is the width of the targets, 0 without them.
void check_rows(Checked& check, const Tensor& x, const std::optional<Tensor>& y,
                const std::optional<Tensor>& sample_weight, int64_t num_classes, Dtypes acc,
                Size& D, Size& K) {
  Size B{"B"};
  check.tensor("x", x, kFloats, {B, D});
  if (num_classes) {
    check.that(y.has_value(), "y",
               "must be class indices where num_classes is not 0, but got None");
    check.tensor("y", y, kInt64, {B});
  } else {
    check.tensor("y", y, dtype_of(x), {B, K});
  }
  check.tensor("sample_weight", sample_weight, kFloats, {B});
  check.that(acc.codes == kFloat64.codes || dtype_of(x).codes != kFloat64.codes, "x",
             "must not be wider than the moments (float32), but got float64");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gram_op(
    const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& sample_weight,
    bool bias_column, int64_t num_classes, ScalarType acc_dtype) {
  Checked check("gram");
  Size D{"D"}, K{"K"};
  check.integer("num_classes", num_classes, 0);
  check_rows(check, x, y, sample_weight, num_classes, check.dtype("acc_dtype", acc_dtype, kReals),
             D, K);
  const int64_t order = x.size(x.dim() - 1) + bias_column;
  const int64_t targets = !y ? 0 : num_classes ? num_classes : y->size(y->dim() - 1);
  const Outputs out{empty_cpu(batch_shape(x, 2, {order, order}), acc_dtype),
                    empty_cpu(batch_shape(x, 2, {order, targets}), acc_dtype),
                    empty_cpu(batch_shape(x, 2, {targets}), acc_dtype),
                    empty_cpu(batch_shape(x, 2, {targets}), acc_dtype),
                    empty_cpu(batch_shape(x, 2), ScalarType::Double)};
  Tensor info = accumulate(x, y, sample_weight, num_classes, out, 0.0, /*fresh=*/true);
  return {out.gram, out.cross, out.target_sum, out.target_sq, out.count, info};
}

Tensor gram_op_(const Tensor& gram, const Tensor& cross, const Tensor& target_sum,
                const Tensor& target_sq, const Tensor& count, const Tensor& x,
                const std::optional<Tensor>& y, const std::optional<Tensor>& sample_weight,
                int64_t num_classes, double decay) {
  Checked check("gram_");
  Size E{"D'"}, D{"D"}, K{"K"};
  check.written("gram", gram, kReals, {E, E});
  const Dtypes acc = dtype_of(gram);
  check.written("cross", cross, acc, {E, K});
  check.written("target_sum", target_sum, acc, {K});
  check.written("target_sq", target_sq, acc, {K});
  check.written("count", count, kFloat64, {});
  check.integer("num_classes", num_classes, 0);
  check_rows(check, x, y, sample_weight, num_classes, acc, D, K);
  check.that(E.value == D.value || E.value == D.value + 1, "x", "must have width ", E.value,
             " (or ", E.value - 1, " where the moments have a bias column), but got ", D.value);
  const int64_t targets = !y ? 0 : num_classes ? num_classes : K.value;
  check.that(K.value == targets, "cross", "must have ", targets,
             " columns, as many as there are targets, but got ", K.value);
  check.number("decay", decay, 0);
  check.apart();
  const Tensor given[] = {gram, cross, target_sum, target_sq, count};
  Tensor dense[5];
  for (int i = 0; i < 5; ++i) {
    dense[i] = given[i].is_contiguous() ? given[i] : torch::stable::contiguous(given[i]);
  }
  const Outputs out{dense[0], dense[1], dense[2], dense[3], dense[4]};
  Tensor info = accumulate(x, y, sample_weight, num_classes, out, decay, /*fresh=*/false);
  for (int i = 0; i < 5; ++i) {  // what was refused came back as it was
    if (!given[i].is_contiguous()) {
      Tensor target = given[i];
      torch::stable::copy_(target, dense[i]);
    }
  }
  return info;
}

}  // namespace
}  // namespace cfl::cpu

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) {
  m.impl("gram", TORCH_BOX(&cfl::cpu::gram_op));
  m.impl("gram_", TORCH_BOX(&cfl::cpu::gram_op_));
}
