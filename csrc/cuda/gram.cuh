// The launcher of gram_kernel.cuh: raw pointers only, so that nvcc sees no torch header.
#pragma once

#if defined(CFL_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace cfl::cuda {

enum class GramInput : int { kF16, kBF16, kF32, kF64 };

// For each of `batch` matrices; see exact_gram_kernel.
struct ExactGramArgs {
  const void* x;
  GramInput dtype;
  int64_t batch, rows, cols;
  int64_t x_batch_stride, x_row_stride, x_col_stride;
  const double* weight;
  int64_t weight_batch_stride, weight_stride;
  int splits;         // of the rows, for each tile of the triangle
  double* parts;      // (tiles, splits, 64, 64); may be null where splits is 1
  unsigned* arrived;  // (tiles), 0 at first; likewise
  double* gram;
};

// Tiles of a triangle, and numbers of a tile.
int64_t gram_tiles(int64_t cols);
int64_t gram_tile_numbers();
cudaError_t exact_gram(const ExactGramArgs& args, cudaStream_t stream);

}  // namespace cfl::cuda
