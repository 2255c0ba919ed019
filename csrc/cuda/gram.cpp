// exact_gram on CUDA: from tensors to the kernel of gram.cuh. Semantics:
// python/cfl_ops/ops/gram/gram.py.
#include "cuda/gram.cuh"

#include <optional>

#include "cuda/binding.h"

namespace cfl::cuda {
namespace {

GramInput kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return GramInput::kF16;
    case ScalarType::BFloat16:
      return GramInput::kBF16;
    case ScalarType::Float:
      return GramInput::kF32;
    case ScalarType::Double:
      return GramInput::kF64;
    default:
      STD_TORCH_CHECK(false, "cfl_ops.exact_gram: expected a floating-point tensor");
  }
}

// x (matrices, rows, cols) and weight (matrices, rows) float64 of any strides; parts (tiles,
// splits, 64 x 64) float64 and arrived (tiles) int32 of 0.
void exact_gram_op(const Tensor& x, const std::optional<Tensor>& weight, Tensor parts,
                   Tensor arrived, Tensor gram) {
  const OnDevice device(x);
  ExactGramArgs args = {};
  args.x = x.data_ptr();
  args.dtype = kernel_dtype(x.scalar_type());
  args.batch = x.size(0);
  args.rows = x.size(1);
  args.cols = x.size(2);
  args.x_batch_stride = x.stride(0);
  args.x_row_stride = x.stride(1);
  args.x_col_stride = x.stride(2);
  if (weight) {
    STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Double,
                    "cfl_ops.exact_gram: sample_weight must be float64");
    args.weight = pointer<double>(*weight);
    args.weight_batch_stride = weight->stride(0);
    args.weight_stride = weight->stride(1);
  }
  args.splits = static_cast<int>(parts.size(1));
  args.parts = pointer<double>(parts);
  args.arrived = pointer<unsigned>(arrived);
  args.gram = pointer<double>(gram);
  check(exact_gram(args, device.stream()), "exact_gram");
}

}  // namespace
}  // namespace cfl::cuda

CFL_CUDA_KERNELS(m) { m.impl("cuda_exact_gram", TORCH_BOX(&cfl::cuda::exact_gram_op)); }
