// What the codec's bindings ask of their numbers (docs/format.md has the limits).
#pragma once

#include <vector>

#include "checked.h"
#include "cpu/codec_payload.h"

namespace cfl::codec {

inline void check_bytes(Checked& check, const char* name, const Tensor& value) {
  check.flat(name, value, kUInt8);
  check.that(value.dim() == 1, name, "must be 1-d, but has ", value.dim(), " dimensions");
}

inline void check_bits(const Checked& check, int64_t bits, int64_t least = 1) {
  check.integer("bits", bits, least, 16);
}

// The shape that a payload of n symbols remembers, the size of its chunks, and the bytes in front.
inline void check_payload_of(const Checked& check, int64_t n, const std::vector<int64_t>& shape,
                             int64_t chunk_log2, int64_t reserve) {
  check.that(n <= kMaxSymbols, "symbols", "must be at most 2^40, but got ", n);
  check.that(static_cast<int64_t>(shape.size()) <= kMaxDims, "shape", "must have at most ",
             kMaxDims, " dimensions, but got ", shape.size());
  int64_t numel = 1;
  bool empty = false, fits = true;
  for (int64_t size : shape) {
    check.that(size >= 0, "shape", "must have no negative size, but got ", size);
    empty |= size == 0;
    fits &= size == 0 || !__builtin_mul_overflow(numel, size, &numel);
  }
  check.that(empty ? n == 0 : fits && numel == n, "shape", "must be that of ", n,
             " elements, but has another number of them");
  check.integer("chunk_log2", chunk_log2, kMinChunkLog2, kMaxChunkLog2);
  // Before a payload stands the header of a blob: two ranges and an exception for each weight, at
  // most, of 32 bytes together.
  check.integer("reserve", reserve, 0, (int64_t{1} << 20) + 32 * n);
}

}  // namespace cfl::codec
