// Memory that a thread keeps for its next call: the same sizes come back, and new pages cost more
// than many a kernel.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>

namespace cfl::cpu {

// A block at 64-byte boundaries that grows when more is asked of it, and forgets what it held then.
class KeptMemory {
 public:
  KeptMemory() = default;
  KeptMemory(KeptMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  KeptMemory& operator=(KeptMemory&&) = delete;
  ~KeptMemory() { std::free(data_); }

  // Never null, even of no numbers; 64 bytes beyond them may be read.
  template <class T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_) {
      release();
      data_ = std::aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  void* data() const { return data_; }
  size_t size() const { return size_; }
  // Gives back a block of more than `most` bytes.
  void trim(size_t most) {
    if (size_ > most) release();
  }
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace cfl::cpu
