// One way to launch a kernel, with the shared memory that it asks for.
#pragma once

#include "cuda/device.cuh"

namespace cfl::cuda {

#if defined(CFL_CUDA_ON_HOST)
template <class... P, class... A>
cudaError_t launch_threads(void (*kernel)(P...), int64_t blocks, int threads, size_t shared,
                           cudaStream_t, A... args) {
  on_host::launch(blocks, threads, shared, [=] { kernel(args...); });
  return cudaSuccess;
}
#else
template <class... P, class... A>
cudaError_t launch_threads(void (*kernel)(P...), int64_t blocks, int threads, size_t shared,
                           cudaStream_t stream, A... args) {
  if (shared > 24 << 10) {  // more than 48 KB, with the static part, must be asked for
    int device = 0, largest = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&largest, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    if (shared > static_cast<size_t>(largest)) return cudaErrorInvalidValue;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(args...);
  // clang-format on
  return cudaGetLastError();
}
#endif

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, size_t shared, cudaStream_t stream,
                   A... args) {
  return launch_threads(kernel, blocks, kThreads, shared, stream, args...);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cfl::cuda
