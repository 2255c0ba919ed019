// The exact Gram matrix: any floating-point input, float64 products and sums.
//
// One block owns a 64 x 64 tile of the lower triangle over some of the rows, and mirrors it. Its
// warps multiply on the float64 tensor cores (twice the rate of plain FMAs on datacenter cards, and
// the same fused multiply-adds): four quadrants, each by two warps that share the rows. A triangle
// of few tiles would leave most of a card idle, so the rows are split, too; the last block of a
// tile to finish adds up the parts, in their order, so that the result does not depend on which one
// that is.
//
// Device code only: launched by gram.cu, and through NVRTC by python/cfl_ops/_gpu/nvrtc.py.
#pragma once

#include "cuda/device.cuh"

namespace cfl::cuda {

constexpr int kGramTile = 64;      // of the result, a side
constexpr int kGramDepth = 16;     // rows of x staged at a time
constexpr int kGramStride = 68;    // of a staged row: 4 x 8 pieces of it lie in different banks
constexpr int kGramQuadrant = 32;  // of a warp, a side
constexpr int kGramSums = kGramQuadrant * kGramQuadrant / 32;  // of each lane
constexpr int kGramLoads = kGramDepth * kGramTile / kThreads;  // of each thread and side
static_assert(kThreads % kGramTile == 0 && kWarps == 8);

#if !defined(CFL_CUDA_ON_HOST)
// c (8 x 8) += a (8 x 4) b (4 x 8). Lane l holds a(l / 4, l % 4), b(l % 4, l / 4) and c(l / 4, 2 (l
// % 4)) with its neighbour to the right.
__device__ inline void multiply_8x8x4(double a, double b, double (&c)[2]) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}
#endif

// gram (cols, cols) = sum_b s_b x_b x_b^T, exactly symmetric, for each matrix of a batch; x has the
// element strides given, weight (s) may be null. Tiles are numbered matrix by matrix, and within
// one row by row of the triangle; blockIdx.x numbers the parts of a tile, `splits` of them, of
// `rows_each` rows. With more than one, `parts` (tiles, splits, 64 x 64) holds them, and `arrived`
// (tiles) is 0 at first.
template <class T>
__global__ void __launch_bounds__(kThreads)
    exact_gram_kernel(const T* x, int64_t rows, int64_t cols, int64_t batch_stride,
                      int64_t row_stride, int64_t col_stride, const double* weight,
                      int64_t weight_batch_stride, int64_t weight_stride, int splits,
                      int64_t rows_each, double* parts, unsigned* arrived, double* gram) {
  const int64_t tiles = (cols + kGramTile - 1) / kGramTile, triangle = tiles * (tiles + 1) / 2;
  const int64_t tile = blockIdx.x / splits, matrix = tile / triangle, place = tile % triangle;
  const int split = static_cast<int>(blockIdx.x % splits);
  int64_t tile_row =
      static_cast<int64_t>((sqrt(8.0 * static_cast<double>(place) + 1.0) - 1.0) / 2.0);
  while (tile_row * (tile_row + 1) / 2 > place) --tile_row;
  while ((tile_row + 1) * (tile_row + 2) / 2 <= place) ++tile_row;
  const int64_t tile_col = place - tile_row * (tile_row + 1) / 2;
  const bool diagonal = tile_row == tile_col;

  __shared__ double staged[2][2][kGramDepth][kGramStride];  // buffer, side
  __shared__ bool last;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int quadrant = warp % 4, half = warp / 4;
  const int first_row = quadrant / 2 * kGramQuadrant, first_col = quadrant % 2 * kGramQuadrant;
  x += matrix * batch_stride;
  if (weight) weight += matrix * weight_batch_stride;
  gram += matrix * cols * cols;

  // A thread stages one column of each side, every few rows; the next stage waits in registers.
  const int64_t begin = split * rows_each, end = least(rows, begin + rows_each);
  const int column = thread % kGramTile, first_depth = thread / kGramTile;
  const int64_t left_col = tile_row * kGramTile + column, right_col = tile_col * kGramTile + column;
  const T* left_from = x + least(left_col, cols - 1) * col_stride;
  const T* right_from = x + least(right_col, cols - 1) * col_stride;
  double left[kGramLoads], right[kGramLoads];
  auto load = [&](int64_t from) {
#pragma unroll
    for (int e = 0; e < kGramLoads; ++e) {
      const int64_t row = from + first_depth + e * (kThreads / kGramTile);
      const bool inside = row < end;
      const bool of_left = inside && left_col < cols, of_right = inside && right_col < cols;
      left[e] = of_left ? static_cast<double>(widen(left_from[row * row_stride])) : 0.0;
      right[e] = of_right && !diagonal ? static_cast<double>(widen(right_from[row * row_stride]))
                                       : left[e];
      if (weight && inside) left[e] *= weight[row * weight_stride];
    }
  };
  auto stage = [&](int buffer) {
#pragma unroll
    for (int e = 0; e < kGramLoads; ++e) {
      const int depth = first_depth + e * (kThreads / kGramTile);
      staged[buffer][0][depth][column] = left[e];
      staged[buffer][1][depth][column] = right[e];
    }
  };
  // Of a lane's 32 sums number 8 i + 2 j + e is entry e of the 8 x 8 products (i, j).
  double sum[kGramSums / 2][2] = {};
  load(begin);
  stage(0);
  __syncthreads();
  int buffer = 0;
  for (int64_t from = begin; from < end; from += kGramDepth) {
    const bool more = from + kGramDepth < end;
    if (more) load(from + kGramDepth);
#pragma unroll
    for (int step = 0; step < kGramDepth / 8; ++step) {
      const int depth = (half * (kGramDepth / 8) + step) * 4 + lane % 4;
      double a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = staged[buffer][0][depth][first_row + 8 * i + lane / 4];
        b[i] = staged[buffer][1][depth][first_col + 8 * i + lane / 4];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_8x8x4(a[i], b[j], sum[4 * i + j]);
      }
    }
    buffer ^= 1;
    if (more) stage(buffer);
    __syncthreads();
  }

  // The second warp of a quadrant hands its sums to the first, through the memory of the stages.
  auto* handed = &staged[0][0][0][0];
  static_assert(sizeof(staged) >= kGramTile * kGramTile * sizeof(double));
  const int holder = quadrant * 32 + lane;
  auto number = [&](int u) { return holder * kGramSums + (u ^ lane); };
#pragma unroll
  for (int u = 0; u < kGramSums; ++u) {
    if (half == 1) handed[number(u)] = sum[u / 2][u % 2];
  }
  __syncthreads();
  double* part = parts + (tile * splits + split) * (kGramTile * kGramTile);
  auto store = [&](int u, double value) {
    const int64_t row = tile_row * kGramTile + first_row + u / 8 * 8 + lane / 4;
    const int64_t col = tile_col * kGramTile + first_col + u / 2 % 4 * 8 + lane % 4 * 2 + u % 2;
    if (row < cols && col <= row) {
      gram[row * cols + col] = value;
      gram[col * cols + row] = value;
    }
  };
  // A part lies in the order of the threads that hold it.
  auto at = [&](int u) { return u * (kGramTile * kGramTile / kGramSums) + holder; };
  if (half == 0) {
#pragma unroll
    for (int u = 0; u < kGramSums; ++u) {
      const double value = sum[u / 2][u % 2] + handed[number(u)];
      if (splits == 1) {
        store(u, value);
      } else {
        part[at(u)] = value;
      }
    }
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    last = atomicAdd(arrived + tile, 1u) + 1 == static_cast<unsigned>(splits);
    __threadfence();
  }
  __syncthreads();
  if (!last || half != 0) return;
  part = parts + tile * splits * (kGramTile * kGramTile);
#pragma unroll 1
  for (int s = 0; s < splits; ++s) {
#pragma unroll
    for (int u = 0; u < kGramSums; ++u) {
      const double value = part[s * (kGramTile * kGramTile) + at(u)];
      sum[u / 2][u % 2] = s == 0 ? value : sum[u / 2][u % 2] + value;
    }
  }
#pragma unroll
  for (int u = 0; u < kGramSums; ++u) store(u, sum[u / 2][u % 2]);
}

}  // namespace cfl::cuda
