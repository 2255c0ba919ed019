// ridge_solve on CUDA: from tensors to the kernels of solve.cuh. python/cfl_ops/ops/solve/cuda.py
// makes everything contiguous, and is the only caller.
#include "cuda/solve.cuh"

#include <optional>

#include "cuda/binding.h"

namespace cfl::cuda {
namespace {

SolveArgs arguments(const Tensor& matrices, const Tensor& rights, double lam,
                    const std::optional<Tensor>& shift, double tolerance, bool wide,
                    Tensor& solutions, Tensor& info) {
  const ScalarType dtype = matrices.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "cfl_ops.ridge_solve: expected float32 or float64");
  STD_TORCH_CHECK(rights.scalar_type() == dtype && solutions.scalar_type() == dtype &&
                      (!shift || shift->scalar_type() == ScalarType::Double) &&
                      info.scalar_type() == ScalarType::Int,
                  "cfl_ops.ridge_solve: the dtypes do not fit");
  SolveArgs args = {};
  args.matrices = matrices.data_ptr();
  args.rights = rights.data_ptr();
  args.lam = lam;
  args.shift = shift ? pointer<double>(*shift) : nullptr;
  args.dtype = dtype == ScalarType::Double ? Real::kF64 : Real::kF32;
  args.compute = wide ? Real::kF64 : args.dtype;
  args.batch = matrices.size(0);
  args.n = matrices.size(1);
  args.columns = rights.size(2);
  args.tolerance = tolerance;
  args.solutions = solutions.data_ptr();
  args.info = pointer<int>(info);
  return args;
}

void solve_small_op(const Tensor& matrices, const Tensor& rights, double lam,
                    std::optional<Tensor> shift, double tolerance, bool wide,
                    std::optional<Tensor> only, Tensor solutions, Tensor info,
                    std::optional<Tensor> again) {
  const OnDevice device(matrices);
  const SolveArgs args = arguments(matrices, rights, lam, shift, tolerance, wide, solutions, info);
  check(solve_small(args, only ? pointer<const int>(*only) : nullptr,
                    again ? pointer<int>(*again) : nullptr, device.stream()),
        "ridge_solve");
}

// flags: 2 batch (tiles + right tiles) tiles numbers and one more, all 0.
void solve_tiled_op(const Tensor& matrices, const Tensor& rights, double lam,
                    std::optional<Tensor> shift, double tolerance, Tensor work, Tensor inverse,
                    Tensor flags, Tensor solutions, std::optional<Tensor> factors, Tensor info) {
  const OnDevice device(matrices);
  const SolveArgs args = arguments(matrices, rights, lam, shift, tolerance, true, solutions, info);
  TiledMemory memory = {};
  memory.work = pointer<double>(work);
  memory.inverse = pointer<double>(inverse);
  memory.flags = pointer<int>(flags);
  memory.ticket = reinterpret_cast<unsigned*>(memory.flags + flags.numel() - 1);
  memory.factors = factors ? pointer<double>(*factors) : nullptr;
  check(solve_tiled(args, memory, device.stream()), "ridge_solve");
}

// a (batch, rows, cols) contiguous; the smaller of rows and cols is up to 32.
void small_pinv_op(const Tensor& a, double limit, double tolerance, Tensor results, Tensor info) {
  const OnDevice device(a);
  const ScalarType dtype = a.scalar_type();
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || dtype == ScalarType::Double) && results.scalar_type() == dtype,
      "cfl_ops.small_pinv: expected float32 or float64");
  SmallPinvArgs args = {};
  args.matrices = a.data_ptr();
  args.dtype = dtype == ScalarType::Double ? Real::kF64 : Real::kF32;
  args.batch = a.size(0);
  args.wide = a.size(1) < a.size(2);
  args.rows = a.size(args.wide ? 2 : 1);
  args.n = a.size(args.wide ? 1 : 2);
  args.limit = limit;
  args.tolerance = tolerance;
  args.results = results.data_ptr();
  args.info = pointer<int>(info);
  check(solve_pinv(args, device.stream()), "small_pinv");
}

}  // namespace
}  // namespace cfl::cuda

CFL_CUDA_KERNELS(m) {
  m.impl("cuda_solve_small", TORCH_BOX(&cfl::cuda::solve_small_op));
  m.impl("cuda_solve_tiled", TORCH_BOX(&cfl::cuda::solve_tiled_op));
  m.impl("cuda_small_pinv", TORCH_BOX(&cfl::cuda::small_pinv_op));
}
