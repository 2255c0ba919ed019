// CUDA's dialect for a C++ compiler: a block's threads are fibers that run in turn, so that the
// kernels of csrc/cuda can be tested where there is no GPU. A barrier that not all threads reach is
// an error, and the order in which threads run can be turned round (CFL_ON_HOST_ORDER=reverse),
// which shows many races. What this cannot show: memory ordering, bank conflicts, speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::cos;
using std::fabs;
using std::fma;
using std::frexp;
using std::ldexp;
using std::sqrt;

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "error" : "no error"; }

// The runtime keeps the error of a call that failed until it is asked for. CFL_ON_HOST_REFUSE has a
// card refuse shared memory.
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  return *value = 227 << 10, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) {
  return std::getenv("CFL_ON_HOST_REFUSE") ? last_error = cudaErrorInvalidValue : cudaSuccess;
}

namespace on_host {

enum class Wait { kNone, kWarp, kBlock, kDone };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::kNone;
};
constexpr size_t kStack = 64 << 10;

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int running = 0;
inline std::function<void()> body;
inline std::vector<uint32_t> shared;  // dynamic
inline uint64_t exchange[32][32];     // of each warp

inline void pause(Wait why) {
  Fiber& me = fibers[running];
  me.wait = why;
  swapcontext(&me.context, &scheduler);
}

inline void enter() {
  body();
  fibers[running].wait = Wait::kDone;
}

inline void run_block(int threads) {
  if (fibers.size() != static_cast<size_t>(threads)) fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, &enter, 0);
    fiber.wait = Wait::kNone;
  }
  const char* order = std::getenv("CFL_ON_HOST_ORDER");
  const bool reverse = order && std::strcmp(order, "reverse") == 0;
  auto all = [&](int first, int last, Wait why, bool* any) {
    for (int t = first; t < last; ++t) {
      if (fibers[t].wait == why) *any = true;
      if (fibers[t].wait != why && fibers[t].wait != Wait::kDone) return false;
    }
    return *any;
  };
  auto release = [&](int first, int last, Wait why) {
    bool any = false;
    if (!all(first, last, why, &any)) return false;
    for (int t = first; t < last; ++t) {
      if (fibers[t].wait == why) fibers[t].wait = Wait::kNone;
    }
    return true;
  };
  const int warps = (threads + 31) / 32;
  for (;;) {
    // Each warp runs as far as it can before the next one does: that shows a missing barrier of the
    // block, as the order within a warp shows one of the warp.
    for (int i = 0; i < warps; ++i) {
      const int first = 32 * (reverse ? warps - 1 - i : i);
      const int last = first + 32 < threads ? first + 32 : threads;
      do {
        for (int k = 0; k < last - first; ++k) {
          const int t = reverse ? last - 1 - k : first + k;
          if (fibers[t].wait != Wait::kNone) continue;
          running = t;
          threadIdx.x = t;
          swapcontext(&scheduler, &fibers[t].context);
        }
      } while (release(first, last, Wait::kWarp));
    }
    if (release(0, threads, Wait::kBlock)) continue;
    bool any = false;
    if (all(0, threads, Wait::kDone, &any)) return;
    std::fprintf(stderr, "cuda_on_host: a barrier that not all threads reach (block %u)\n",
                 blockIdx.x);
    std::abort();
  }
}

template <class Call>
void launch(int64_t blocks, int threads, size_t shared_bytes, Call call) {
  body = call;
  gridDim.x = static_cast<unsigned>(blocks);
  gridDim.y = gridDim.z = 1;
  blockDim.x = threads;
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    // Never zero by chance; and of this very size, so that AddressSanitizer sees what goes beyond.
    shared = std::vector<uint32_t>((shared_bytes + 3) / 4, 0xcdcdcdcdu);
    run_block(threads);
  }
}

// All 32 lanes call; `read` sees what each of them gave.
template <class T, class Read>
auto collective(T value, Read read) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  exchange[warp][lane] = bits;
  pause(Wait::kWarp);
  auto at = [&](int from) {
    T other;
    std::memcpy(&other, &exchange[warp][from], sizeof(T));
    return other;
  };
  auto result = read(at, lane);
  pause(Wait::kWarp);
  return result;
}

inline float half_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
inline uint16_t float_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

}  // namespace on_host

#define CFL_DYNAMIC_SHARED(name) uint32_t* const name = on_host::shared.data()

inline void __syncthreads() { on_host::pause(on_host::Wait::kBlock); }
inline void __syncwarp() { on_host::pause(on_host::Wait::kWarp); }
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  return on_host::collective(
      value, [&](auto at, int lane) { return at(lane < delta ? lane : lane - delta); });
}
template <class T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  return on_host::collective(
      value, [&](auto at, int lane) { return at(lane / width * width + from % width); });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return on_host::collective(value, [&](auto at, int lane) { return at(lane ^ mask); });
}
inline int __any_sync(unsigned, int value) {
  return on_host::collective(value, [&](auto at, int) {
    int any = 0;
    for (int i = 0; i < 32; ++i) any |= at(i) != 0;
    return any;
  });
}
inline unsigned __ballot_sync(unsigned, int value) {
  return on_host::collective(value, [&](auto at, int) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= static_cast<unsigned>(at(i) != 0) << i;
    return all;
  });
}
template <class T>
T atomicAdd(T* to, T value) {
  const T old = *to;
  *to += value;
  return old;
}
template <class T>
T atomicOr(T* to, T value) {
  const T old = *to;
  *to |= value;
  return old;
}
template <class T>
T atomicMax(T* to, T value) {
  const T old = *to;
  if (old < value) *to = value;
  return old;
}
template <class T>
T atomicCAS(T* to, T known, T value) {
  const T old = *to;
  if (old == known) *to = value;
  return old;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(value) : 32; }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned picks) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<unsigned>(bytes >> 8 * (picks >> 4 * i & 7) & 255) << 8 * i;
  }
  return out;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline uint64_t double_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}
inline double bits_double(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
inline void __threadfence() {}
// The float64 tensor cores of gram_kernel.cuh.
inline void multiply_8x8x4(double a, double b, double (&c)[2]) {
  const int row = (threadIdx.x & 31) / 4, col = (threadIdx.x & 3) * 2;
  double left[4], right[2][4];
  on_host::collective(a, [&](auto at, int) {
    for (int k = 0; k < 4; ++k) left[k] = at(row * 4 + k);
    return 0;
  });
  on_host::collective(b, [&](auto at, int) {
    for (int e = 0; e < 2; ++e) {
      for (int k = 0; k < 4; ++k) right[e][k] = at((col + e) * 4 + k);
    }
    return 0;
  });
  for (int e = 0; e < 2; ++e) {
    for (int k = 0; k < 4; ++k) c[e] = fma(left[k], right[e][k], c[e]);
  }
}
