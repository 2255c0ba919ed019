// What the coders of payloads and of lossless blobs share: bytes, scratch memory, threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#include "cpu/codec_payload.h"
#include "cpu/kept_memory.h"

namespace cfl::codec {

template <class T>
T load(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}
template <class T>
void store(uint8_t* p, T v) {
  std::memcpy(p, &v, sizeof(T));
}

// Memory for a call, of which a thread keeps up to kKept bytes for its next one.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) { kept().get<uint8_t>(static_cast<size_t>(bytes)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { kept().trim(kKept); }
  uint8_t* data() const { return static_cast<uint8_t*>(kept().data()); }

 private:
  static constexpr size_t kKept = 32 << 20;
  static cpu::KeptMemory& kept() {
    static thread_local cpu::KeptMemory memory;
    return memory;
  }
};

inline int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Calls task(t) for t in [0, count), on as many threads.
inline void run_tasks(Threads threads, int64_t count, const std::function<void(int64_t)>& task) {
  if (count <= 1 || !threads.parallel_for) {
    for (int64_t t = 0; t < count; ++t) task(t);
    return;
  }
  auto run = [](int64_t begin, int64_t end, void* context) {
    const auto& call = *static_cast<const std::function<void(int64_t)>*>(context);
    for (int64_t t = begin; t < end; ++t) call(t);
  };
  threads.parallel_for(0, count, 1, run, const_cast<std::function<void(int64_t)>*>(&task));
}

}  // namespace cfl::codec
