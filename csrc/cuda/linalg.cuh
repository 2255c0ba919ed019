// What the factorisations share: 16-byte vectors, roots, and the Cholesky factorisation of a matrix
// whose rows are in the registers of neighbouring lanes.
#pragma once

#include "cuda/device.cuh"

namespace cfl::cuda {

constexpr int kLaneCount = 32;  // of a warp

// As many numbers as one load of shared memory brings.
template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T value[kCount];
};

#if defined(CFL_CUDA_ON_HOST)
inline float inverse_root(float value) { return 1.0f / std::sqrt(value); }
inline double inverse_root(double value) { return 1.0 / std::sqrt(value); }
#else
__device__ inline float inverse_root(float value) { return rsqrtf(value); }
__device__ inline double inverse_root(double value) { return rsqrt(value); }
#endif

__device__ inline double not_a_number() { return __uint_as_float(0x7fc00000u); }

template <class T>
__device__ inline bool is_finite(T value) {
  return value * T(0) == T(0);  // value - value may be fused with a product: its rounding error
}

// A system of up to kOrder unknowns belongs to kLanes neighbouring lanes of a warp; lane l holds
// rows l and, beyond 32, l + 32.
template <int kOrder>
struct RowLayout {
  static constexpr int kLanes = kOrder < kLaneCount ? kOrder : kLaneCount;
  static constexpr int kRows = kOrder / kLanes;         // of each lane
  static constexpr int kSystems = kLaneCount / kLanes;  // of each warp
  static_assert(kOrder % kLanes == 0 && kLaneCount % kLanes == 0);
};

// The lower triangle of A becomes L of A = L L^T, column by column from the left; what lies above
// the diagonal is left undefined. `inverse` gets 1 / L_ii of the lane's rows. `column` is shared
// memory for 2 kOrder numbers of this system, `original` holds A's diagonal there. Returns the
// order of the first leading minor whose pivot is not above tolerance times its diagonal entry,
// else 0; such a pivot is taken for 1. All lanes of the warp call, each with its own system's n.
template <class T, int kOrder>
__device__ inline int factor_rows(T (&row)[RowLayout<kOrder>::kRows][kOrder],
                                  T (&inverse)[RowLayout<kOrder>::kRows], int lane, int n,
                                  T tolerance, const T* original, T* column) {
  using Layout = RowLayout<kOrder>;
  constexpr int kPack = Pack<T>::kCount;
  int failed = 0;
#pragma unroll
  for (int j = 0; j < kOrder; ++j) {
    if (j >= n) continue;                   // the same for all lanes
    T* buffer = column + (j & 1) * kOrder;  // while others still read the column before
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
      if (r < j / Layout::kLanes) continue;
      buffer[lane + r * Layout::kLanes] = row[r][j];
    }
    __syncwarp();
    T pivot = buffer[j];
    const bool good = pivot > tolerance * original[j] && is_finite(pivot);
    if (!good && failed == 0) failed = j + 1;
    pivot = good ? pivot : T(1);
    const T root = inverse_root(pivot);
    T below[Layout::kRows];
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
      if (r < j / Layout::kLanes) continue;
      const T scaled = row[r][j] * root;
      below[r] = scaled * root;
      const bool diagonal = lane + r * Layout::kLanes == j;
      row[r][j] = diagonal ? pivot * root : scaled;
      if (diagonal) inverse[r] = root;
    }
#pragma unroll
    for (int c = 0; c < kOrder; c += kPack) {
      if (c + kPack <= j + 1) continue;
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(buffer + c);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (c + e <= j) continue;
#pragma unroll
        for (int r = 0; r < Layout::kRows; ++r) {
          if (r < (c + e) / Layout::kLanes) continue;
          row[r][c + e] = fma(-below[r], pack.value[e], row[r][c + e]);
        }
      }
    }
  }
  return failed;
}

// The rows of L to shared memory: on the way back each lane needs a column.
template <class T, int kOrder>
__device__ inline void store_rows(const T (&row)[RowLayout<kOrder>::kRows][kOrder], int lane,
                                  int stride, T* tile) {
  using Layout = RowLayout<kOrder>;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < Layout::kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kOrder; ++c) {
      if (c < (r + 1) * Layout::kLanes) tile[(lane + r * Layout::kLanes) * stride + c] = row[r][c];
    }
  }
  __syncwarp();
}

// y <- L^-T L^-1 y for kColumns right sides, or the first alone: rows of y are in the lanes as
// those of L are; `tile` holds L, too (store_rows). All lanes of the warp call.
template <class T, int kOrder, int kColumns>
__device__ inline void substitute(const T (&row)[RowLayout<kOrder>::kRows][kOrder],
                                  const T (&inverse)[RowLayout<kOrder>::kRows], const T* tile,
                                  int stride, int lane, int n, bool only_one,
                                  T (&y)[RowLayout<kOrder>::kRows][kColumns]) {
  constexpr int kLanes = RowLayout<kOrder>::kLanes, kRows = RowLayout<kOrder>::kRows;
#pragma unroll
  for (int j = 0; j < kOrder; ++j) {
    if (j >= n) continue;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (k > 0 && only_one) continue;
      const T value = y[j / kLanes][k] * inverse[j / kLanes];
      const T known = __shfl_sync(kFull, value, j % kLanes, kLanes);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < j / kLanes) continue;
        const int i = lane + r * kLanes;
        if (i == j) y[r][k] = known;
        if (i > j) y[r][k] = fma(-row[r][j], known, y[r][k]);
      }
    }
  }
#pragma unroll
  for (int j = kOrder - 1; j >= 0; --j) {
    if (j >= n) continue;
    T of_row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r <= j / kLanes) of_row[r] = tile[j * stride + lane + r * kLanes];
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      if (k > 0 && only_one) continue;
      const T value = y[j / kLanes][k] * inverse[j / kLanes];
      const T known = __shfl_sync(kFull, value, j % kLanes, kLanes);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r > j / kLanes) continue;
        const int i = lane + r * kLanes;
        if (i == j) y[r][k] = known;
        if (i < j) y[r][k] = fma(-of_row[r], known, y[r][k]);
      }
    }
  }
}

// --- work that blocks take in turn --------------------------------------------------------------
//
// A ticket says what a block is to do, a flag that something is done. A block waits for tickets
// before its own only; their blocks run already, so that none waits for ever, however few blocks
// the card holds at a time.

#if defined(CFL_CUDA_ON_HOST)
inline void wait_for(const int* flag) {
  if (*flag) return;
  std::fprintf(stderr, "cuda_on_host: block %u waits for a later one\n", blockIdx.x);
  std::abort();
}
inline void set_flag(int* flag) { *flag = 1; }
#else
__device__ inline void wait_for(const int* flag) {
  int value;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  } while (value == 0);
}
// After a barrier: what the whole block wrote before it is seen by whoever sees the flag.
__device__ inline void set_flag(int* flag) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}
#endif

// The next ticket, to all threads of the block.
__device__ inline int64_t take_ticket(unsigned* counter) {
  __shared__ unsigned ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(counter, 1u);
  __syncthreads();
  return ticket;
}

}  // namespace cfl::cuda
