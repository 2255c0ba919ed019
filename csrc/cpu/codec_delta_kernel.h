// The inner loops of deltas, one table of functions per instruction set. Plain pointers, no C++
// library, as codec_kernel.h.
#pragma once

#include <stdint.h>

namespace cfl::codec {

constexpr int kMaxClasses = 16;
constexpr uint64_t kFingerprintKey = 0x9e3779b97f4a7c15u;

// One table of functions per instruction set, as Kernel. A unit is 1, 2, 4 or 8 bytes.
struct DeltaKernel {
  // The fingerprint's sum over the bytes; the first 8 of them are word `first` of the tensor.
  uint64_t (*fingerprint)(const uint8_t* data, int64_t bytes, int64_t first);
  // Sets in `mask` the bit of each unit in which a and b differ and returns how many do; adds the
  // fingerprint of a to sums[0], of b to sums[1]. A multiple of 8 bytes, but at the tensor's end.
  int64_t (*compare)(int unit, const uint8_t* a, const uint8_t* b, int64_t bytes, int64_t first,
                     uint64_t* mask, uint64_t* sums);
  // For each 64 units, one mask for each of the classes: which units have it. map: of a context.
  void (*class_masks)(int unit, const uint8_t* data, int64_t words, const uint8_t* map, int classes,
                      uint64_t* masks);
};
const DeltaKernel* delta_generic();
const DeltaKernel* delta_avx2();  // null where the build has not got the instructions
const DeltaKernel* delta_avx512();

// The context of a unit: of floats the exponent (as much of it as fits with its highest bits).
inline __attribute__((always_inline)) int context_of(int unit, const uint8_t* p) {
  switch (unit) {
    case 1:
      return (p[0] << 1 | p[0] >> 7) & 255;
    case 2:
      return (p[1] << 1 | p[0] >> 7) & 255;
    case 4:
      return (p[3] << 1 | p[2] >> 7) & 255;
    default:  // 11 bits, of which those of weights fit in 8 (1023 becomes 192)
      return ((p[7] << 4 | p[6] >> 4) - 831) & 255;
  }
}

}  // namespace cfl::codec
