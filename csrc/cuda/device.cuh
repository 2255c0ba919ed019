// What the kernels need of a compiler, which may be
//   * nvcc;
//   * NVRTC, at run time (python/cfl_ops/_gpu/native.py): it has none of the standard headers;
//   * a C++ compiler on a machine without a GPU: tests/gpu/cuda_on_host.h runs a block's threads in
//   turn.
#pragma once

#if defined(CFL_CUDA_ON_HOST)
#include "cuda_on_host.h"
#elif defined(__CUDACC_RTC__)
namespace cfl::cuda {
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using intptr_t = long long;
}  // namespace cfl::cuda
#define CFL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint32_t name[]
#else
#include <cuda_runtime.h>

#include <cstdint>
#define CFL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint32_t name[]
#endif

namespace cfl::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFull = 0xffffffffu;

// Formats that NVRTC has no header for, as their bits.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

#if defined(CFL_CUDA_ON_HOST)
inline float half_to_float(uint16_t bits) { return on_host::half_to_float(bits); }
inline uint16_t float_to_half(float value) { return on_host::float_to_half(value); }
#else
__device__ inline float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ inline uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

#if !defined(CFL_CUDA_ON_HOST)
__device__ inline uint64_t double_bits(double value) {
  return static_cast<uint64_t>(__double_as_longlong(value));
}
__device__ inline double bits_double(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}
#endif

// To the type that a value is computed in: double for double, else float.
__device__ inline float widen(Half value) { return half_to_float(value.bits); }
__device__ inline float widen(BFloat value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }

// And back, to the nearest, ties to even.
__device__ inline void narrow(float value, Half* to) { to->bits = float_to_half(value); }
__device__ inline void narrow(float value, BFloat* to) {
  const uint32_t bits = __float_as_uint(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
__device__ inline void narrow(float value, float* to) { *to = value; }
__device__ inline void narrow(double value, double* to) { *to = value; }
__device__ inline void narrow(double value, float* to) { *to = static_cast<float>(value); }
__device__ inline void narrow(double value, Half* to) { narrow(static_cast<float>(value), to); }
__device__ inline void narrow(double value, BFloat* to) { narrow(static_cast<float>(value), to); }
__device__ inline void narrow(float value, double* to) { *to = value; }

template <class T>
__host__ __device__ inline T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__host__ __device__ inline T most(T a, T b) {
  return a < b ? b : a;
}

}  // namespace cfl::cuda
