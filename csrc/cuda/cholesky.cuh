// The launchers of cholesky_kernel.cuh: raw pointers only, so that nvcc sees no torch header.
#pragma once

#if defined(CFL_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace cfl::cuda {

// See cholesky_update_kernel; for float or double (`wide`), rank up to 32 or, wide, 16.
struct CholeskyUpdateArgs {
  bool wide;
  int64_t batch, n, rank;
  const void* from;
  int64_t from_batch_stride, from_row_stride, from_col_stride;
  void* to;
  const void* vectors;
  int64_t vector_batch_stride, vector_row_stride, vector_stride;
  double scale_l, scale_v;
  bool check, down;
  double lost;
  void* reflectors;
  int* flags;
  unsigned* ticket;
  int* found;
};
int64_t cholesky_panel();                             // rows of a panel
int64_t cholesky_reflector(int64_t rank, bool wide);  // numbers of a reflector; 0: too many vectors
cudaError_t cholesky_update(const CholeskyUpdateArgs& args, cudaStream_t stream);

struct CholeskyChooseArgs {
  bool wide;
  int64_t batch, n;
  const void* from;
  int64_t from_batch_stride, from_row_stride, from_col_stride;
  void* to;
  int64_t to_batch_stride, to_row_stride, to_col_stride;
  const int* found;
  int passes;
  bool failed;
  int* info;
};
cudaError_t cholesky_choose(const CholeskyChooseArgs& args, cudaStream_t stream);

}  // namespace cfl::cuda
