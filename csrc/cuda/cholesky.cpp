// cholesky_update on CUDA: from tensors to the kernels of cholesky.cuh.
// python/cfl_ops/ops/cholesky/cuda.py is the only caller.
#include "cuda/cholesky.cuh"

#include "cuda/binding.h"

namespace cfl::cuda {
namespace {

bool is_wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// from (batch, n, n) and vectors (batch, n, rank) of any strides, to contiguous; reflectors (batch,
// panels, 32, size), flags (batch panels + 1) of 0.
void update_op(const Tensor& from, const Tensor& vectors, double scale_l, double scale_v,
               bool check_l, bool down, double lost, Tensor to, Tensor reflectors, Tensor flags,
               Tensor found) {
  Checked check("cuda_cholesky_update");
  Size batch{"matrices"}, n{"n"}, rank{"vectors"};
  check.tensor("matrices", from, kReals, {batch, n, n});
  const Dtypes dtype = dtype_of(from);
  check.tensor("vectors", vectors, dtype, {batch, n, rank});
  const int64_t panel = cholesky_panel(), size = cholesky_reflector(rank.value, is_wide(from));
  check.that(size > 0, "vectors", "must be no more than a pass takes, but got ", rank.value);
  Size panels{"panels", (n.value + panel - 1) / panel}, rows{"rows of a panel", panel},
      numbers{"numbers of a reflector"}, of_flags{"flags", batch.value * panels.value + 1};
  check.tensor("out", to, dtype, {batch, n, n});
  check.contiguous();
  check.tensor("reflectors", reflectors, dtype, {batch, panels, rows, numbers});
  check.contiguous();
  check.that(numbers.value >= size, "reflectors", "must have at least ", size,
             " numbers of a reflector, but got ", numbers.value);
  check.tensor("flags", flags, kInt32, {of_flags});
  check.contiguous();
  check.tensor("found", found, kInt32, {batch});
  check.contiguous();
  const OnDevice device(from);
  CholeskyUpdateArgs args = {};
  args.wide = is_wide(from);
  args.batch = from.size(0);
  args.n = from.size(1);
  args.rank = vectors.size(2);
  args.from = from.data_ptr();
  args.from_batch_stride = from.stride(0);
  args.from_row_stride = from.stride(1);
  args.from_col_stride = from.stride(2);
  args.to = to.data_ptr();
  args.vectors = vectors.data_ptr();
  args.vector_batch_stride = vectors.stride(0);
  args.vector_row_stride = vectors.stride(1);
  args.vector_stride = vectors.stride(2);
  args.scale_l = scale_l;
  args.scale_v = scale_v;
  args.check = check_l;
  args.down = down;
  args.lost = lost;
  args.reflectors = reflectors.data_ptr();
  args.flags = pointer<int>(flags);
  args.ticket = reinterpret_cast<unsigned*>(args.flags + flags.numel() - 1);
  args.found = pointer<int>(found);
  launched(cholesky_update(args, device.stream()), "cholesky_update");
}

void choose_op(const Tensor& from, const Tensor& found, bool failed, Tensor to, Tensor info) {
  Checked check("cuda_cholesky_choose");
  Size batch{"matrices"}, n{"n"}, passes{"passes"};
  check.tensor("matrices", from, kReals, {batch, n, n});
  check.tensor("found", found, kInt32, {passes, batch});
  check.contiguous();
  check.tensor("out", to, dtype_of(from), {batch, n, n});
  check.tensor("info", info, kInt32, {batch});
  check.contiguous();
  const OnDevice device(from);
  CholeskyChooseArgs args = {};
  args.wide = is_wide(from);
  args.batch = from.size(0);
  args.n = from.size(1);
  args.from = from.data_ptr();
  args.from_batch_stride = from.stride(0);
  args.from_row_stride = from.stride(1);
  args.from_col_stride = from.stride(2);
  args.to = to.data_ptr();
  args.to_batch_stride = to.stride(0);
  args.to_row_stride = to.stride(1);
  args.to_col_stride = to.stride(2);
  args.found = pointer<const int>(found);
  args.passes = static_cast<int>(found.size(0));
  args.failed = failed;
  args.info = pointer<int>(info);
  launched(cholesky_choose(args, device.stream()), "cholesky_update");
}

}  // namespace
}  // namespace cfl::cuda

CFL_CUDA_KERNELS(m) {
  m.impl("cuda_cholesky_update", TORCH_BOX(&cfl::cuda::update_op));
  m.impl("cuda_cholesky_choose", TORCH_BOX(&cfl::cuda::choose_op));
}
