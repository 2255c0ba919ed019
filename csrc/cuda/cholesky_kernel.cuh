// Rank-k updates of Cholesky factors: L' L'^T = decay L L^T +- V V^T.
//
// A column's reflector turns (L_jj, row j of V) into (r, 0) and acts on the rows below, which need
// nothing else of each other. So 32 rows are one warp's work, a row's part of V in the registers of
// a lane; the warp applies the reflectors of the rows above as they become known, makes its own 32
// and publishes them (linalg.cuh). The chain of these is what the time is made of, not the n^2 k
// sums.
//
// Device code only: launched by cholesky.cu, and through NVRTC by python/cfl_ops/_gpu/nvrtc.py.
#pragma once

#include "cuda/linalg.cuh"

namespace cfl::cuda {

constexpr int kPanel = 32;
// What a pass finds wrong with a matrix: the largest number counts, and 0 is nothing. Before kBadL
// come the pivots that fail, the first of them last.
constexpr int kBadV = 0x7fffffff;
constexpr int kBadL = kBadV - 1;

// A reflector: its vector, scaled, and c, +-1 / r, 1 / (l + r) of the scaled numbers; c has the
// sign of the old pivot, for the column changes sign with it.
template <int kRank>
constexpr int kReflector = (kRank + 3 + 3) / 4 * 4;

// A power of two near 1 / value for value > 0, so that scaling rounds nothing.
__device__ inline float reciprocal_scale(float value) {
  const int exponent = static_cast<int>(__float_as_uint(value) >> 23 & 0xff);
  return __uint_as_float(static_cast<uint32_t>(least(253, most(1, 254 - exponent))) << 23);
}
__device__ inline double reciprocal_scale(double value) {
  const int exponent = static_cast<int>(double_bits(value) >> 52 & 0x7ff);
  return bits_double(static_cast<uint64_t>(least(2045, most(1, 2046 - exponent))) << 52);
}

__device__ inline bool is_negative(float value) { return __float_as_uint(value) >> 31; }
__device__ inline bool is_negative(double value) { return double_bits(value) >> 63; }

#if defined(CFL_CUDA_ON_HOST)
template <class T>
T quick_reciprocal(T value) {
  return T(1) / value;
}
#else
// Of a number that is far from the ends of the range.
__device__ inline float quick_reciprocal(float value) { return __fdividef(1.0f, value); }
__device__ inline double quick_reciprocal(double value) { return 1.0 / value; }
#endif

// w (a row's part of V) and l (its entry in the column) through a reflector.
template <class T, int kRank>
__device__ inline T reflect(const T* reflector, T l, T (&w)[kRank]) {
  T v[kRank], partial[4] = {};
#pragma unroll
  for (int k = 0; k < kRank; ++k) {
    v[k] = reflector[k];
    partial[k % 4] = fma(w[k], v[k], partial[k % 4]);
  }
  const T c = reflector[kRank], inverse_r = reflector[kRank + 1],
          inverse_sum = reflector[kRank + 2];
  const T product = (partial[0] + partial[1]) + (partial[2] + partial[3]);
  const T fresh = fma(c, l, product * inverse_r);
  const T step = ((is_negative(c) ? -l : l) + fresh) * inverse_sum;
#pragma unroll
  for (int k = 0; k < kRank; ++k) w[k] = fma(-step, v[k], w[k]);
  return fresh;
}

// One warp for 32 rows of a matrix. from (batch, n, n) and vectors (batch, n, rank <= kRank) have
// any strides, `to` (batch, n, n) is row-major and may be `from`. scale_l and scale_v are
// sqrt(decay) and sqrt(|alpha|); a downdate fails that leaves no more than `lost` of a squared
// pivot; `check` says that L can hold NaN or Inf. reflectors (batch, panels, 32, kReflector); flags
// (batch, panels) and the ticket are 0 at first, as is `found` (batch).
template <class T, int kRank>
__global__ void __launch_bounds__(kPanel)
    cholesky_update_kernel(int64_t n, int64_t rank, const T* from, int64_t from_batch_stride,
                           int64_t from_row_stride, int64_t from_col_stride, const T* vectors,
                           int64_t vector_batch_stride, int64_t vector_row_stride,
                           int64_t vector_stride, T scale_l, T scale_v, int check, int down, T lost,
                           T* to, T* all_reflectors, int* flags, unsigned* next_ticket,
                           int* found) {
  constexpr int kSize = kReflector<kRank>;
  __shared__ T tile[kPanel][kPanel + 1];
  __shared__ Pack<T> memory[kPanel * kSize / Pack<T>::kCount];
  T* const reflectors = reinterpret_cast<T*>(memory);
  const int64_t panels = (n + kPanel - 1) / kPanel;
  const int64_t ticket = take_ticket(next_ticket), batch = gridDim.x / panels;
  const int64_t matrix = ticket % batch, panel = ticket / batch;
  const int lane = threadIdx.x;
  const int64_t first = panel * kPanel, mine = first + lane;
  from += matrix * from_batch_stride;
  to += matrix * n * n;
  flags += matrix * panels;
  found += matrix;
  T* published = all_reflectors + matrix * panels * kPanel * kSize;
  bool bad_v = false, bad_l = false;

  T w[kRank];
  vectors += matrix * vector_batch_stride + mine * vector_row_stride;
#pragma unroll
  for (int k = 0; k < kRank; ++k) {
    w[k] = T(0);
    if (mine < n && k < rank) w[k] = vectors[k * vector_stride];
  }
#pragma unroll
  for (int k = 0; k < kRank; ++k) {
    bad_v = bad_v || !is_finite(w[k]);
    w[k] *= scale_v;
  }
  // Each lane holds a column of the next tile while the warp waits for the reflectors of this one.
  const bool by_rows = from_col_stride <= from_row_stride;
  T next[kPanel];
  const int64_t step = by_rows ? from_row_stride : from_col_stride;
  auto prefetch = [&](int64_t p) {
    if (p < panel && first + kPanel <= n) {  // a whole tile, for all lanes: nothing to test
      const T* corner = from + (first + (by_rows ? 0 : lane)) * from_row_stride +
                        (p * kPanel + (by_rows ? lane : 0)) * from_col_stride;
#pragma unroll
      for (int e = 0; e < kPanel; ++e) next[e] = corner[e * step];
      return;
    }
#pragma unroll
    for (int e = 0; e < kPanel; ++e) {
      const int64_t row = first + (by_rows ? e : lane), col = p * kPanel + (by_rows ? lane : e);
      next[e] = T(0);
      if (row < n && col <= row) next[e] = from[row * from_row_stride + col * from_col_stride];
    }
  };
  prefetch(0);
  for (int64_t p = 0; p <= panel; ++p) {
#pragma unroll
    for (int e = 0; e < kPanel; ++e) {
      bad_l = bad_l || !is_finite(next[e]);
      tile[by_rows ? e : lane][by_rows ? lane : e] = next[e] * scale_l;
    }
    __syncwarp();
    if (p < panel) {
      prefetch(p + 1);
      if (lane == 0) wait_for(flags + p);
      __syncwarp();
      const T* theirs = published + p * kPanel * kSize;
      for (int e = lane; e < kPanel * kSize; e += kPanel) reflectors[e] = theirs[e];
      __syncwarp();
#pragma unroll 4
      for (int c = 0; c < kPanel; ++c) {
        tile[lane][c] = reflect<T, kRank>(reflectors + c * kSize, tile[lane][c], w);
      }
    } else {
      int failed = 0;
      for (int c = 0; c < kPanel && first + c < n; ++c) {
        T* const reflector = reflectors + c * kSize;
        const T l = tile[lane][c];
        if (lane == c) {
          // Scaled by a power of two near the largest entry: squares neither overflow nor vanish.
          T largest[4] = {l < T(0) ? -l : l};
#pragma unroll
          for (int k = 0; k < kRank; ++k) {
            largest[k % 4] = most(largest[k % 4], w[k] < T(0) ? -w[k] : w[k]);
          }
          const T length = l < T(0) ? -l : l;
          const T unit = most(most(largest[0], largest[1]), most(largest[2], largest[3]));
          const T scale = reciprocal_scale(unit), l1 = length * scale;
          T partial[4] = {};
#pragma unroll
          for (int k = 0; k < kRank; ++k) {
            const T v = w[k] * scale;
            reflector[k] = v;
            partial[k % 4] = fma(v, v, partial[k % 4]);
          }
          const T total = (partial[0] + partial[1]) + (partial[2] + partial[3]);
          const T square = fma(l1, l1, down ? -total : total);
          const bool good = down ? square > lost * l1 * l1 : square >= T(0);
          const bool still = square == T(0);  // a zero column of a semi-definite factor stays one
          // What is not zero is far from the ends of the range: no root or quotient needs care.
          const T inverse_r = still ? T(0) : inverse_root(good ? square : T(1));
          const T r1 = (good ? square : T(1)) * inverse_r;
          const T r = r1 * reciprocal_scale(scale);  // exact
          if ((!good || !is_finite(r)) && !failed) failed = static_cast<int>(first) + c + 1;
          const T cosine = still ? T(1) : l1 * inverse_r;
          reflector[kRank] = l < T(0) ? -cosine : cosine;
          reflector[kRank + 1] = down ? -inverse_r : inverse_r;
          reflector[kRank + 2] = still ? T(0) : quick_reciprocal(l1 + r1);
          tile[lane][c] = r;
        }
        __syncwarp();
        if (lane > c) tile[lane][c] = reflect<T, kRank>(reflector, l, w);
      }
      if (failed) atomicMax(found, kBadL - failed);
      __syncwarp();
      if (panel + 1 < panels) {
        for (int e = lane; e < kPanel * kSize; e += kPanel) {
          published[p * kPanel * kSize + e] = reflectors[e];
        }
        __syncwarp();
        if (lane == 0) set_flag(flags + p);
      }
    }
    __syncwarp();
#pragma unroll 4
    for (int e = 0; e < kPanel; ++e) {
      const int64_t row = first + e, col = p * kPanel + lane;
      if (row < n && col <= row) to[row * n + col] = tile[e][lane];
    }
    __syncwarp();
  }
  if (bad_l && check) atomicMax(found, kBadL);
  if (bad_v) atomicMax(found, kBadV);
}

// The lower triangles of `from` to `to` (both of any strides) for the matrices that succeeded in
// all passes, or for those that failed; and info: 0, the first pivot that failed, -1 for a V and -2
// for an L that is not finite, as python/cfl_ops/ops/cholesky/update.py has it. found (passes,
// batch).
template <class T>
__global__ void __launch_bounds__(kThreads)
    cholesky_choose_kernel(int64_t blocks_each, int64_t n, const T* from, int64_t from_batch_stride,
                           int64_t from_row_stride, int64_t from_col_stride, T* to,
                           int64_t to_batch_stride, int64_t to_row_stride, int64_t to_col_stride,
                           const int* found, int passes, int64_t batch, int failed, int* info) {
  const int64_t matrix = blockIdx.x / blocks_each;
  int worst = 0;
  for (int pass = 0; pass < passes; ++pass) worst = most(worst, found[pass * batch + matrix]);
  const int code = worst == kBadV ? -1 : worst == kBadL ? -2 : worst ? kBadL - worst : 0;
  if (threadIdx.x == 0 && blockIdx.x % blocks_each == 0) info[matrix] = code;
  if ((code != 0) != (failed != 0)) return;
  from += matrix * from_batch_stride;
  to += matrix * to_batch_stride;
  // A warp for each row.
  const int64_t first = blockIdx.x % blocks_each * kWarps + threadIdx.x / kLaneCount;
  for (int64_t row = first; row < n; row += blocks_each * kWarps) {
    for (int64_t col = threadIdx.x % kLaneCount; col <= row; col += kLaneCount) {
      to[row * to_row_stride + col * to_col_stride] =
          from[row * from_row_stride + col * from_col_stride];
    }
  }
}

}  // namespace cfl::cuda
