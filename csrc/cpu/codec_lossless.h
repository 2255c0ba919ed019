// Writing and reading of a lossless blob (docs/format.md): a tensor's bytes as planes, coded where
// that pays. No torch here, so that the fuzzer can feed it bytes alone.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/codec_payload.h"
#include "cpu/codec_tables.h"

namespace cfl::codec {

constexpr int kDtypes = 18;  // of blobs, by their numbers

// An element of a dtype: `per` lanes.
struct Element {
  Lanes lanes;
  int per = 1;
  int64_t size() const { return int64_t{lanes.width} * per; }
};
Element element_of(int dtype);

// A checked head, and what it points to within the blob.
struct Lossless {
  int dtype = 0;
  Element element;
  std::vector<int64_t> shape;
  int64_t numel = 0, n = 0, chunks = 0;  // n: lanes
  // Of each plane, for each chunk 0 or the number of its table; null where all are stored.
  const uint8_t* map[kMaxPlanes] = {};
  std::vector<Header> payloads[kMaxPlanes];  // of each table
  const uint8_t* checksums = nullptr;        // of each chunk, 4 bytes
  const uint8_t* stored = nullptr;
  const uint8_t* end = nullptr;  // of the blob
};

// Checks everything but the chunks themselves; kGood, or what is wrong.
int64_t parse_lossless(const uint8_t* blob, int64_t size, Lossless* found, const Kernel* kernel);

// The blob of numel elements at `data`. `allocate(bytes, kept)` gives memory to write to, larger
// than before, with the first `kept` bytes of what it gave last. Returns the bytes used; 0 where
// the tensor's own bytes are no more.
int64_t encode_lossless(const uint8_t* data, int dtype, const std::vector<int64_t>& shape,
                        const Kernel* kernel, Threads threads,
                        const std::function<uint8_t*(int64_t bytes, int64_t kept)>& allocate);

// Writes elements [start, start + count) to `out`. kGood, or what is wrong.
int64_t decode_lossless(const uint8_t* blob, int64_t size, int64_t start, int64_t count,
                        uint8_t* out, const Kernel* kernel, Threads threads);

}  // namespace cfl::codec
