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
    default:
      return GramInput::kF64;
  }
}

// x (matrices, rows, cols) and weight (matrices, rows) float64 of any strides; parts (tiles,
// splits, 64 x 64) float64 and arrived (tiles) int32 of 0.
void exact_gram_op(const Tensor& x, const std::optional<Tensor>& weight, Tensor parts,
                   Tensor arrived, Tensor gram) {
  Checked check("cuda_exact_gram");
  Size batch{"matrices"}, B{"B"}, D{"D"}, held{"tiles"}, splits{"splits"},
      numbers{"numbers of a tile", gram_tile_numbers()};
  check.tensor("x", x, kFloats, {batch, B, D});
  check.tensor("weight", weight, kFloat64, {batch, B});
  check.tensor("workspace", parts, kFloat64, {held, splits, numbers});
  check.contiguous();
  check.tensor("arrived", arrived, kInt32, {held});
  check.contiguous();
  check.flat("gram", gram, kFloat64);
  check.contiguous();
  check.integer("splits", splits.value, 1, std::max<int64_t>(1, B.value));
  check.that(splits.value == 1 || held.value == batch.value * gram_tiles(D.value), "workspace",
             "must have a row for each tile where these are split, but has ", held.value);
  check.that(gram.numel() == batch.value * D.value * D.value, "gram", "must have ",
             batch.value * D.value * D.value, " elements, but got ", gram.numel());
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
    args.weight = pointer<double>(*weight);
    args.weight_batch_stride = weight->stride(0);
    args.weight_stride = weight->stride(1);
  }
  args.splits = static_cast<int>(parts.size(1));
  args.parts = pointer<double>(parts);
  args.arrived = pointer<unsigned>(arrived);
  args.gram = pointer<double>(gram);
  launched(exact_gram(args, device.stream()), "exact_gram");
}

}  // namespace
}  // namespace cfl::cuda

CFL_CUDA_KERNELS(m) { m.impl("cuda_exact_gram", TORCH_BOX(&cfl::cuda::exact_gram_op)); }
