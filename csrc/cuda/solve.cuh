// The launchers of solve_kernel.cuh: raw pointers only, so that nvcc sees no torch header.
#pragma once

#if defined(CFL_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace cfl::cuda {

enum class Real : int { kF32, kF64 };

// (A + lam I + diag(shift)) X = B for `batch` systems, A (n, n), B and X (n, columns) dense and
// row-major.
struct SolveArgs {
  const void *matrices, *rights;
  double lam;
  const double* shift;  // (batch, n), or null
  Real dtype, compute;  // compute: kF64, or that of dtype
  int64_t batch, n, columns;
  double tolerance;  // a pivot up to tolerance times its diagonal entry fails
  void* solutions;
  // (batch): 0, or the order of the first leading minor that failed; of solve_small also n + 1,
  // where the factor proves nothing.
  int* info;
};

// n up to 64; `only`: (batch) which systems, or null for all; `again`: a copy of info, or null.
cudaError_t solve_small(const SolveArgs& args, const int* only, int* again, cudaStream_t stream);

// The systems with info other than 0 once more, with residuals in twice the precision; n up to 64.
cudaError_t solve_careful(const SolveArgs& args, cudaStream_t stream);

int64_t solve_side();  // of a tile
// In float64, whatever `compute` says, with memory as TiledSolve has it (solve_kernel.cuh).
struct TiledMemory {
  double *work, *inverse;
  int* flags;
  unsigned* ticket;
  double* factors;  // (batch, n, n), or null
};
cudaError_t solve_tiled(const SolveArgs& args, const TiledMemory& memory, cudaStream_t stream);

// Pseudoinverses of T (rows, n), rows >= n <= 32; see solve_pinv_kernel.
struct SmallPinvArgs {
  const void* matrices;
  Real dtype;
  int64_t batch, rows, n;
  bool wide;
  double limit, tolerance;
  void* results;
  int* info;
};
cudaError_t solve_pinv(const SmallPinvArgs& args, cudaStream_t stream);

}  // namespace cfl::cuda
