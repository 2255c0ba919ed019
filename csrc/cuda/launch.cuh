// One way to launch a kernel, with the shared memory that it asks for.
#pragma once

#include "cuda/device.cuh"

namespace cfl::cuda {

// A call that failed leaves its error behind, and the next good launch would report it: take it
// away.
inline cudaError_t taken(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// More than 48 KB of shared memory, with the static part, must be asked for.
inline cudaError_t allow_shared(const void* kernel, size_t shared) {
  int device = 0, largest = 0;
  cudaError_t error = taken(cudaGetDevice(&device));
  if (error != cudaSuccess) return error;
  error = taken(cudaDeviceGetAttribute(&largest, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (error != cudaSuccess) return error;
  if (shared > static_cast<size_t>(largest)) return cudaErrorInvalidValue;
  return taken(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)));
}

template <class... P, class... A>
cudaError_t launch_threads(void (*kernel)(P...), int64_t blocks, int threads, size_t shared,
                           cudaStream_t stream, A... args) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  if (shared > 24 << 10) {
    const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), shared);
    if (error != cudaSuccess) return error;
  }
#if defined(CFL_CUDA_ON_HOST)
  static_cast<void>(stream);
  on_host::launch(blocks, threads, shared, [=] { kernel(args...); });
#else
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(args...);
  // clang-format on
#endif
  return cudaGetLastError();
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, size_t shared, cudaStream_t stream,
                   A... args) {
  return launch_threads(kernel, blocks, kThreads, shared, stream, args...);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cfl::cuda
