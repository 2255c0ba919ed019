// The inner loops of deltas, one table of functions per instruction set. Plain pointers, no C++
// library, as codec_kernel.h.
#pragma once

#include <stdint.h>

namespace cfl::codec {

constexpr int64_t kDeltaBlock = int64_t{1} << 15;  // numbers whose raw bits begin at a byte
constexpr int kGapBits = 3, kValueBits = 2;        // of a number, below its highest, in its symbol
constexpr int kMaxClasses = 16;
constexpr uint64_t kFingerprintKey = 0x9e3779b97f4a7c15u;

// Memory for changes: their positions, and what is there in two tensors. Up to 64 more than there
// are may be written.
struct Changes {
  int64_t* positions = nullptr;
  uint8_t *new_values = nullptr, *old_values = nullptr;
};

// One table of functions per instruction set, as Kernel. A unit is 1, 2, 4 or 8 bytes.
struct DeltaKernel {
  // The fingerprint's sum over the bytes; the first 8 of them are word `first` of the tensor.
  uint64_t (*fingerprint)(const uint8_t* data, int64_t bytes, int64_t first);
  // Sets in `mask` the bit of each unit in which a and b differ and returns how many do; adds the
  // fingerprint of a to sums[0], of b to sums[1], and to sums[2] the bits that differ anywhere. A
  // multiple of 8 bytes, but at the tensor's end. With positions also writes what it finds.
  int64_t (*compare)(int unit, const uint8_t* a, const uint8_t* b, int64_t bytes, int64_t first,
                     uint64_t* mask, uint64_t* sums, Changes found);
  // The places of the ones of a mask, whose first bit stands for `first`, and how many. Some places
  // behind them are written, too, where there are 64 before `end`.
  int64_t (*list_ones)(const uint64_t* mask, int64_t words, int64_t first, int64_t* out,
                       const int64_t* end);
  // Those of n units whose bits are set; `positions` has the places, counted from that of the first
  // unit, `first`.
  void (*take)(int unit, const uint8_t* data, int64_t first, int64_t n, const uint64_t* mask,
               const int64_t* positions, int64_t count, uint8_t* out);
  // Numbers in buckets, of up to kDeltaBlock (values are multiples of 2^shift, and those divided by
  // it are coded): writes their symbols and returns how many raw bits
  // there are beside them; then writes those, in so many bytes. `positions` follow one that is
  // `before`.
  int64_t (*gap_symbols)(const int64_t* positions, int64_t before, int64_t n, uint8_t* symbols);
  void (*gap_bits)(const int64_t* positions, int64_t before, int64_t n, uint8_t* raw,
                   int64_t bytes);
  int64_t (*value_symbols)(int unit, int use_xor, int shift, const uint8_t* new_values,
                           const uint8_t* old_values, int64_t n, uint8_t* symbols);
  void (*value_bits)(int unit, int use_xor, int shift, const uint8_t* new_values,
                     const uint8_t* old_values, int64_t n, uint8_t* raw, int64_t bytes);
  // And back. 16 bytes past the raw bits may be read. The first returns how many raw bits symbols
  // stand for, or -1 where one is too large; the others false where spare bits are not 0 or a
  // number does not fit. The first position is the first gap; values are changed from old ones,
  // the n there or (with positions) those there.
  int64_t (*count_bits)(int kept, const uint8_t* symbols, int64_t n);
  int (*read_gaps)(const uint8_t* symbols, int64_t n, const uint8_t* raw, int64_t* positions);
  int (*read_values)(int unit, int use_xor, int shift, const uint8_t* old_data,
                     const int64_t* positions, const uint8_t* symbols, int64_t n,
                     const uint8_t* raw, uint8_t* values);
  // By how much the fingerprint's sum changes where values are put at (rising) positions.
  uint64_t (*change)(int unit, const uint8_t* data, int64_t bytes, const int64_t* positions,
                     const uint8_t* values, int64_t count);
  // Ranks of (rising) positions within their classes, from `next` of each class on; next and
  // `order` as in codec_delta.h. map: of a context.
  void (*ranks)(int unit, const uint8_t* data, int64_t n, const uint8_t* map, int classes,
                const uint8_t* of, const int64_t* positions, int64_t count, int64_t* next,
                int64_t* ranks, int64_t* order);
  // And back; how many were found.
  int64_t (*places)(int unit, const uint8_t* data, int64_t n, const uint8_t* map, int classes,
                    const int64_t* counts, const int64_t* ranks, int64_t* positions,
                    int64_t* order);
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
