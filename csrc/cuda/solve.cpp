// ridge_solve on CUDA: from tensors to the kernels of solve.cuh. python/cfl_ops/ops/solve/cuda.py
// makes everything contiguous, and is the only caller.
#include "cuda/solve.cuh"

#include <optional>

#include "cuda/binding.h"

namespace cfl::cuda {
namespace {

struct Sizes {
  Size batch{"systems"}, n{"n"}, columns{"columns"};
};

SolveArgs arguments(Checked& check, Sizes& sizes, const Tensor& matrices, const Tensor& rights,
                    double lam, const std::optional<Tensor>& shift, double tolerance, bool wide,
                    Tensor& solutions, Tensor& info) {
  auto& [batch, n, columns] = sizes;
  check.tensor("matrices", matrices, kReals, {batch, n, n});
  check.tensor("rights", rights, dtype_of(matrices), {batch, n, columns});
  check.tensor("shift", shift, kFloat64, {batch, n});
  check.tensor("solutions", solutions, dtype_of(matrices), {batch, n, columns});
  check.tensor("info", info, kInt32, {batch});
  check.number("lam", lam, 0);
  check.number("tolerance", tolerance, 0);
  const ScalarType dtype = matrices.scalar_type();
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
  Checked check("cuda_solve_small");
  Sizes sizes;
  const SolveArgs args =
      arguments(check, sizes, matrices, rights, lam, shift, tolerance, wide, solutions, info);
  check.tensor("only", only, kInt32, {sizes.batch});
  check.tensor("again", again, kInt32, {sizes.batch});
  check.all_contiguous();
  const OnDevice device(matrices);
  launched(solve_small(args, only ? pointer<const int>(*only) : nullptr,
                       again ? pointer<int>(*again) : nullptr, device.stream()),
           "ridge_solve");
}

void solve_careful_op(const Tensor& matrices, const Tensor& rights, double lam,
                      std::optional<Tensor> shift, Tensor solutions, Tensor info) {
  Checked check("cuda_solve_careful");
  Sizes sizes;
  const SolveArgs args =
      arguments(check, sizes, matrices, rights, lam, shift, 0.0, true, solutions, info);
  check.all_contiguous();
  const OnDevice device(matrices);
  launched(solve_careful(args, device.stream()), "ridge_solve");
}

// flags: 2 batch (tiles + right tiles) tiles numbers and one more, all 0.
void solve_tiled_op(const Tensor& matrices, const Tensor& rights, double lam,
                    std::optional<Tensor> shift, double tolerance, Tensor work, Tensor inverse,
                    Tensor flags, Tensor solutions, std::optional<Tensor> factors, Tensor info) {
  Checked check("cuda_solve_tiled");
  Sizes sizes;
  const SolveArgs args =
      arguments(check, sizes, matrices, rights, lam, shift, tolerance, true, solutions, info);
  const int64_t side = solve_side();
  const int64_t tiles = (args.n + side - 1) / side, right_tiles = (args.columns + side - 1) / side;
  const int64_t held = args.batch * (tiles + right_tiles) * tiles;
  Size of_work{"numbers of the tiles", held * side * side}, of_flags{"flags", 2 * held + 1},
      of_inverse{"numbers of the pivots", args.batch * tiles * side};
  check.tensor("work", work, kFloat64, {of_work});
  check.tensor("inverse", inverse, kFloat64, {of_inverse});
  check.tensor("flags", flags, kInt32, {of_flags});
  check.tensor("factors", factors, kFloat64, {sizes.batch, sizes.n, sizes.n});
  check.all_contiguous();
  const OnDevice device(matrices);
  TiledMemory memory = {};
  memory.work = pointer<double>(work);
  memory.inverse = pointer<double>(inverse);
  memory.flags = pointer<int>(flags);
  memory.ticket = reinterpret_cast<unsigned*>(memory.flags + flags.numel() - 1);
  memory.factors = factors ? pointer<double>(*factors) : nullptr;
  launched(solve_tiled(args, memory, device.stream()), "ridge_solve");
}

// a (batch, rows, cols) contiguous; the smaller of rows and cols is up to 32.
void small_pinv_op(const Tensor& a, double limit, double tolerance, Tensor results, Tensor info) {
  Checked check("cuda_small_pinv");
  Size batch{"matrices"}, m{"m"}, n{"n"};
  check.tensor("a", a, kReals, {batch, m, n});
  check.tensor("results", results, dtype_of(a), {batch, n, m});
  check.tensor("info", info, kInt32, {batch});
  check.that(limit > 0, "limit", "must be positive, but got ", limit);
  check.number("tolerance", tolerance, 0);
  check.all_contiguous();
  const OnDevice device(a);
  const ScalarType dtype = a.scalar_type();
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
  launched(solve_pinv(args, device.stream()), "small_pinv");
}

}  // namespace
}  // namespace cfl::cuda

CFL_CUDA_KERNELS(m) {
  m.impl("cuda_solve_small", TORCH_BOX(&cfl::cuda::solve_small_op));
  m.impl("cuda_solve_careful", TORCH_BOX(&cfl::cuda::solve_careful_op));
  m.impl("cuda_solve_tiled", TORCH_BOX(&cfl::cuda::solve_tiled_op));
  m.impl("cuda_small_pinv", TORCH_BOX(&cfl::cuda::small_pinv_op));
}
