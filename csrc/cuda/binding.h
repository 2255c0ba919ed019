// What the CUDA bindings share: from a tensor to its device's stream, and errors that name the op.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(CFL_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "checked.h"

// Registers the kernels of a file; those that are emulated are a CPU's.
#if defined(CFL_CUDA_ON_HOST)
#define CFL_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m)
#else
#define CFL_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CUDA, m)
#endif

namespace cfl::cuda {

using torch::headeronly::ScalarType;

// Makes the device of a tensor the current one, and knows torch's current stream there.
class OnDevice {
 public:
#if defined(CFL_CUDA_ON_HOST)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) {
    const int32_t index = tensor.get_device_index();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index, &guard_));
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
#endif
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  void* stream_ = nullptr;
#if !defined(CFL_CUDA_ON_HOST)
  CUDAGuardHandle guard_ = nullptr;
#endif
};

inline void launched(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, "cfl_ops.", op, ": ", cudaGetErrorString(error));
}

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace cfl::cuda
