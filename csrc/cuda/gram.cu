// The exact Gram matrix: any floating-point input, float64 products and sums.
//
// One block owns one tile of the lower triangle and mirrors it, so nothing is computed twice. A
// rank-one update of a 4 x 4 register tile per thread and row reads 8 values of shared memory for
// 16 FMAs, which keeps datacenter cards at their float64 rate; on cards with slow float64 that rate
// is the limit anyway.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/gram.cuh"

namespace cfl::cuda {
namespace {

constexpr int kTile = 64;      // of the result, a side
constexpr int kDepth = 16;     // rows of x staged at a time
constexpr int kPerThread = 4;  // a side of a thread's register tile
constexpr int kSide = kTile / kPerThread;

__device__ double widen(__half value) { return static_cast<double>(__half2float(value)); }
__device__ double widen(__nv_bfloat16 value) {
  return static_cast<double>(__bfloat162float(value));
}
__device__ double widen(float value) { return static_cast<double>(value); }
__device__ double widen(double value) { return value; }

template <class T>
__global__ void __launch_bounds__(kSide* kSide) exact_gram_kernel(ExactGramArgs args) {
  // blockIdx.x numbers the tiles of the lower triangle row by row: tile_row (tile_row + 1) / 2 +
  // tile_col.
  const int64_t tile = blockIdx.x;
  int64_t tile_row =
      static_cast<int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1.0) - 1.0) / 2.0);
  while (tile_row * (tile_row + 1) / 2 > tile) --tile_row;
  while ((tile_row + 1) * (tile_row + 2) / 2 <= tile) ++tile_row;
  const int64_t tile_col = tile - tile_row * (tile_row + 1) / 2;

  __shared__ double left[kDepth][kTile + 1];
  __shared__ double right[kDepth][kTile + 1];
  const int thread = threadIdx.x, ty = thread / kSide, tx = thread % kSide;
  for (int64_t matrix = blockIdx.y; matrix < args.batch; matrix += gridDim.y) {
    const T* x = static_cast<const T*>(args.x) + matrix * args.x_batch_stride;
    const double* weight = args.weight ? args.weight + matrix * args.weight_batch_stride : nullptr;
    double sum[kPerThread][kPerThread] = {};
    for (int64_t begin = 0; begin < args.rows; begin += kDepth) {
      for (int i = thread; i < kDepth * kTile; i += kSide * kSide) {
        const int depth = i / kTile, column = i % kTile;
        const int64_t row = begin + depth;
        const int64_t of_left = tile_row * kTile + column, of_right = tile_col * kTile + column;
        const bool inside = row < args.rows;
        const double s = inside && weight ? weight[row * args.weight_stride] : 1.0;
        left[depth][column] =
            inside && of_left < args.cols
                ? s * widen(x[row * args.x_row_stride + of_left * args.x_col_stride])
                : 0.0;
        right[depth][column] =
            inside && of_right < args.cols
                ? widen(x[row * args.x_row_stride + of_right * args.x_col_stride])
                : 0.0;
      }
      __syncthreads();
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth) {
        double a[kPerThread], b[kPerThread];
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          a[i] = left[depth][ty + i * kSide];
          b[i] = right[depth][tx + i * kSide];
        }
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
          for (int j = 0; j < kPerThread; ++j) sum[i][j] = fma(a[i], b[j], sum[i][j]);
        }
      }
      __syncthreads();
    }
    double* gram = args.gram + matrix * args.cols * args.cols;
    for (int i = 0; i < kPerThread; ++i) {
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t row = tile_row * kTile + ty + i * kSide;
        const int64_t col = tile_col * kTile + tx + j * kSide;
        if (row < args.cols && col <= row) {
          gram[row * args.cols + col] = sum[i][j];
          gram[col * args.cols + row] = sum[i][j];
        }
      }
    }
  }
}

template <class T>
cudaError_t launch(const ExactGramArgs& args, cudaStream_t stream) {
  const int64_t tiles = (args.cols + kTile - 1) / kTile;
  const int64_t triangle = tiles * (tiles + 1) / 2;
  if (triangle == 0 || args.batch == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(triangle),
                  static_cast<unsigned>(args.batch < 65535 ? args.batch : 65535));
  exact_gram_kernel<T><<<grid, kSide * kSide, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t exact_gram(const ExactGramArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kF16:
      return launch<__half>(args, stream);
    case DType::kBF16:
      return launch<__nv_bfloat16>(args, stream);
    case DType::kF32:
      return launch<float>(args, stream);
    default:
      return launch<double>(args, stream);
  }
}

}  // namespace cfl::cuda
