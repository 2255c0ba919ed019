// Small helpers between torch::stable::Tensor and raw pointers, shared by the CPU bindings.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "checked.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cfl {

using torch::headeronly::ScalarType;

// Tests set this: fresh outputs are filled with NaN (all bits one), so that an element which no
// kernel wrote shows.
inline bool poison_fresh_memory = false;

// Asks for huge pages for fresh memory so large that malloc has mapped it for this tensor alone:
// the first writes then fault 512 times less often. Only advice; a kernel without huge pages
// ignores it.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kAlwaysMapped = size_t(32) << 20;  // the most that glibc's threshold grows to
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  if (bytes < kAlwaysMapped) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// A contiguous CPU tensor, not initialised. (The C shim costs a fraction of a trip through
// aten::empty.)
inline Tensor empty_cpu(const int64_t* sizes, int64_t ndim, ScalarType dtype) {
  std::array<int64_t, 64> strides;
  int64_t numel = 1;
  for (int64_t i = ndim - 1; i >= 0; --i) {
    strides[i] = numel;
    numel = times(numel, sizes[i] > 0 ? sizes[i] : 1);
  }
  AtenTensorHandle handle = nullptr;
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const AOTITorchError error = aoti_torch_empty_strided(ndim, sizes, strides.data(), shim_dtype,
                                                        aoti_torch_device_type_cpu(), 0, &handle);
  if (error) {
    throw std::runtime_error("cfl_ops: no memory for a result of " + std::to_string(numel) +
                             " elements");
  }
  Tensor result(handle);
  advise_huge_pages(result.data_ptr(), result.numel() * result.element_size());
  if (poison_fresh_memory && result.numel() > 0) {
    std::memset(result.data_ptr(), 0xff, result.numel() * result.element_size());
  }
  return result;
}

// The sizes of a result; csrc/checked.h lets no more than 64 dimensions through.
class Shape {
 public:
  void add(int64_t size) { sizes_[ndim_++] = size; }
  const int64_t* begin() const { return sizes_.data(); }
  const int64_t* end() const { return sizes_.data() + ndim_; }
  int64_t ndim() const { return ndim_; }

 private:
  std::array<int64_t, 64> sizes_;
  int64_t ndim_ = 0;
};
inline Tensor empty_cpu(const Shape& shape, ScalarType dtype) {
  return empty_cpu(shape.begin(), shape.ndim(), dtype);
}
inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

// The batch shape of `tensor` (all but its last `core` dimensions) followed by `tail`.
inline Shape batch_shape(const Tensor& tensor, int64_t core,
                         std::initializer_list<int64_t> tail = {}) {
  const auto sizes = tensor.sizes();
  Shape shape;
  for (auto size = sizes.begin(); size != sizes.end() - core; ++size) shape.add(*size);
  for (int64_t size : tail) shape.add(size);
  return shape;
}

// A pointer to one matrix or vector of a batch, walked in step with the batches of other tensors.
class Batched {
 public:
  Batched() = default;
  // `core` trailing dimensions belong to one element of the batch; a 0-d tensor serves all of them.
  Batched(const Tensor& tensor, int64_t core)
      : data_(static_cast<char*>(tensor.data_ptr())), element_size_(tensor.element_size()) {
    const int64_t dims = tensor.dim() - core;
    for (int64_t i = 0; i < dims; ++i) {
      sizes_.push_back(tensor.size(i));
      strides_.push_back(tensor.stride(i));
    }
  }
  template <class T = char>
  T* at(int64_t index) const {
    int64_t offset = 0;
    for (int64_t i = static_cast<int64_t>(sizes_.size()) - 1; i >= 0; --i) {
      offset += index % sizes_[i] * strides_[i];
      index /= sizes_[i];
    }
    return reinterpret_cast<T*>(data_ + offset * element_size_);
  }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  char* data_ = nullptr;
  int64_t element_size_ = 1;
  std::vector<int64_t> sizes_, strides_;
};

inline int64_t product(const Shape& shape) {
  int64_t result = 1;
  for (int64_t size : shape) result = times(result, size);
  return result;
}

// torch's parallel_for as a plain function, for kernels that know no torch.
inline void parallel_for(int64_t begin, int64_t end, int64_t grain,
                         void (*fn)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, fn, context));
}

}  // namespace cfl
