// Which chunks of a plane of bytes are coded, and with which code tables: as
// python/cfl_ops/ops/codec/reference/tables.py, integer for integer.
#pragma once

#include <cstdint>
#include <vector>

namespace cfl::codec {

constexpr int64_t kLosslessChunk = int64_t{1} << 15;
constexpr int64_t kLookEvery = 512, kLookRun = 64;  // symbols of a chunk that are looked at
constexpr int kMaxTables = 16;                      // of a plane

struct TableOf {
  std::vector<int64_t> chunks;  // rising
  int64_t bytes = 0;            // about what their payload will take
};

// counts: 256 for each chunk of a plane of n symbols. What is in no table is stored.
std::vector<TableOf> choose_tables(const std::vector<uint32_t>& counts, int64_t n);

}  // namespace cfl::codec
