// Launchers of the CUDA Gram kernels: raw pointers only, so that nvcc sees no torch header.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cfl::cuda {

enum class DType : int { kF16, kBF16, kF32, kF64 };

// gram (D, D) = sum_b s_b x_b x_b^T in float64, exactly symmetric, for each of `batch` matrices.
// x has the element strides given; weight (rows) is float64 and may be null.
struct ExactGramArgs {
  const void* x;
  DType dtype;
  int64_t batch, rows, cols;
  int64_t x_batch_stride, x_row_stride, x_col_stride;
  const double* weight;
  int64_t weight_batch_stride, weight_stride;
  double* gram;
};

cudaError_t exact_gram(const ExactGramArgs& args, cudaStream_t stream);

}  // namespace cfl::cuda
