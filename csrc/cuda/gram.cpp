// exact_gram on CUDA: from tensors to the kernel of gram.cuh. Semantics: python/cfl_ops/gram.py.
#include "cuda/gram.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace cfl::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::Double:
      return DType::kF64;
    default:
      STD_TORCH_CHECK(false, "cfl_ops.exact_gram: expected a floating-point tensor");
  }
}

// x (..., B, D), sample_weight (..., B) float64 -> (..., D, D) float64.
Tensor exact_gram_op(const Tensor& x, const std::optional<Tensor>& sample_weight) {
  const int64_t ndim = x.dim(), rows = x.size(ndim - 2), cols = x.size(ndim - 1);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 2);
  int64_t batch = 1;
  for (int64_t size : shape) batch *= size;
  shape.insert(shape.end(), {cols, cols});
  Tensor out = torch::stable::new_empty(x, shape, ScalarType::Double);
  const Tensor flat = torch::stable::reshape(x, {batch, rows, cols});
  Tensor weight;
  ExactGramArgs args{};
  args.x = flat.data_ptr();
  args.dtype = kernel_dtype(x.scalar_type());
  args.batch = batch;
  args.rows = rows;
  args.cols = cols;
  args.x_batch_stride = flat.stride(0);
  args.x_row_stride = flat.stride(1);
  args.x_col_stride = flat.stride(2);
  if (sample_weight) {
    STD_TORCH_CHECK(sample_weight->scalar_type() == ScalarType::Double,
                    "cfl_ops.exact_gram: sample_weight must be float64");
    weight = torch::stable::reshape(*sample_weight, {batch, rows});
    args.weight = static_cast<const double*>(weight.data_ptr());
    args.weight_batch_stride = weight.stride(0);
    args.weight_stride = weight.stride(1);
  }
  args.gram = static_cast<double*>(out.data_ptr());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  CUDAGuardHandle guard = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(x.get_device_index(), &guard));
  const cudaError_t error = exact_gram(args, static_cast<cudaStream_t>(stream));
  TORCH_ERROR_CODE_CHECK(aoti_torch_delete_cuda_guard(guard));
  STD_TORCH_CHECK(error == cudaSuccess, "cfl_ops.exact_gram: ", cudaGetErrorString(error));
  return out;
}

}  // namespace
}  // namespace cfl::cuda

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CUDA, m) {
  m.impl("exact_gram", TORCH_BOX(&cfl::cuda::exact_gram_op));
}
