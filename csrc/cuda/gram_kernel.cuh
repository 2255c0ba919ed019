// The exact Gram matrix: any floating-point input, float64 products and sums.
//
// One block owns one tile of the lower triangle and mirrors it, so nothing is computed twice. A
// rank-one update of a 4 x 4 register tile per thread and row reads 8 values of shared memory for
// 16 FMAs, which keeps datacenter cards at their float64 rate; on cards with slow float64 that rate
// is the limit anyway.
//
// Device code only: launched by gram.cpp, and through NVRTC by python/cfl_ops/_nvrtc.py.
#pragma once

#include "cuda/device.cuh"

namespace cfl::cuda {

constexpr int kGramTile = 64;   // of the result, a side
constexpr int kGramDepth = 16;  // rows of x staged at a time
constexpr int kGramEach = 4;    // a side of a thread's register tile
constexpr int kGramSide = kGramTile / kGramEach;
static_assert(kGramSide * kGramSide == kThreads);

// gram (cols, cols) = sum_b s_b x_b x_b^T, exactly symmetric, for each matrix of a batch; x has the
// element strides given, weight (s) may be null. blockIdx.x numbers the tiles of one matrix after
// the other, and within it those of the lower triangle row by row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    exact_gram_kernel(const T* x, int64_t rows, int64_t cols, int64_t batch_stride,
                      int64_t row_stride, int64_t col_stride, const double* weight,
                      int64_t weight_batch_stride, int64_t weight_stride, double* gram) {
  const int64_t tiles = (cols + kGramTile - 1) / kGramTile, triangle = tiles * (tiles + 1) / 2;
  const int64_t matrix = blockIdx.x / triangle, tile = blockIdx.x % triangle;
  int64_t tile_row =
      static_cast<int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1.0) - 1.0) / 2.0);
  while (tile_row * (tile_row + 1) / 2 > tile) --tile_row;
  while ((tile_row + 1) * (tile_row + 2) / 2 <= tile) ++tile_row;
  const int64_t tile_col = tile - tile_row * (tile_row + 1) / 2;

  __shared__ double left[kGramDepth][kGramTile + 1];
  __shared__ double right[kGramDepth][kGramTile + 1];
  const int thread = threadIdx.x, ty = thread / kGramSide, tx = thread % kGramSide;
  x += matrix * batch_stride;
  if (weight) weight += matrix * weight_batch_stride;
  gram += matrix * cols * cols;
  double sum[kGramEach][kGramEach] = {};
  for (int64_t begin = 0; begin < rows; begin += kGramDepth) {
    for (int i = thread; i < kGramDepth * kGramTile; i += kThreads) {
      const int depth = i / kGramTile, column = i % kGramTile;
      const int64_t row = begin + depth;
      const int64_t of_left = tile_row * kGramTile + column,
                    of_right = tile_col * kGramTile + column;
      const bool inside = row < rows;
      const double s = inside && weight ? weight[row * weight_stride] : 1.0;
      auto load = [&](int64_t col) {
        return inside && col < cols
                   ? static_cast<double>(widen(x[row * row_stride + col * col_stride]))
                   : 0.0;
      };
      left[depth][column] = s * load(of_left);
      right[depth][column] = load(of_right);
    }
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kGramDepth; ++depth) {
      double a[kGramEach], b[kGramEach];
#pragma unroll
      for (int i = 0; i < kGramEach; ++i) {
        a[i] = left[depth][ty + i * kGramSide];
        b[i] = right[depth][tx + i * kGramSide];
      }
#pragma unroll
      for (int i = 0; i < kGramEach; ++i) {
#pragma unroll
        for (int j = 0; j < kGramEach; ++j) sum[i][j] = fma(a[i], b[j], sum[i][j]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < kGramEach; ++i) {
    for (int j = 0; j < kGramEach; ++j) {
      const int64_t row = tile_row * kGramTile + ty + i * kGramSide;
      const int64_t col = tile_col * kGramTile + tx + j * kGramSide;
      if (row < cols && col <= row) {
        gram[row * cols + col] = sum[i][j];
        gram[col * cols + row] = sum[i][j];
      }
    }
  }
}

}  // namespace cfl::cuda
