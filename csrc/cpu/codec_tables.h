// Which chunks of a plane of bytes are coded, and with which code tables: as
// python/cfl_ops/ops/codec/reference/tables.py, integer for integer.
#pragma once

#include <cstdint>
#include <vector>

namespace cfl::codec {

constexpr int64_t kLosslessChunk = int64_t{1} << 15;
constexpr int64_t kLookEvery = 512, kLookRun = 64;  // symbols of a chunk that are looked at
constexpr int64_t kGlance = 4;                      // one run in so many is looked at first
constexpr uint64_t kGlanceLimit = 136, kLookLimit = 140;
constexpr int kMaxTables = 16;  // of a plane

// Whether Renyi's entropy of the counts, without the bias of a sample, is so close to 8 bits that
// nothing is to be won: 128 is a uniform distribution, and 140 has 7.87 bits.
template <class T>
bool nearly_uniform(const T* counts, uint64_t limit) {
  uint64_t seen = 0, squares = 0;
  for (int s = 0; s < 256; ++s) {
    seen += counts[s];
    squares += uint64_t{counts[s]} * counts[s];
  }
  return seen == 0 || 256 * 128 * (squares - seen) < limit * seen * seen;
}

struct TableOf {
  std::vector<int64_t> chunks;  // rising
  int64_t bytes = 0;            // about what their payload will take
};

// counts: 256 for each chunk of a plane of n symbols, none of what is to be stored. What is in no
// table is stored.
std::vector<TableOf> choose_tables(const std::vector<uint32_t>& counts, int64_t n);

}  // namespace cfl::codec
