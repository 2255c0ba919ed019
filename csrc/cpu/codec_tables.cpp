#include "cpu/codec_tables.h"

#include <algorithm>
#include <array>
#include <utility>

#include "cpu/codec_payload.h"

namespace cfl::codec {
namespace {

constexpr size_t kBands = 64;
constexpr int kSlight = 11;       // less than 2^-11 bits a symbol are no reason for a table
constexpr int kNoCode = 40;       // bits that a symbol without a code counts for
constexpr int64_t kPayload = 64;  // bytes beside code table and chunks

// Chunks that share a code table.
struct Band {
  std::vector<int64_t> chunks;
  std::vector<uint64_t> counts = std::vector<uint64_t>(256, 0);
  int64_t symbols = 0, cost = 0;
  std::vector<uint8_t> lengths;
  bool alone = false;  // one symbol, which takes no bits

  void measure() {
    lengths = code_lengths(counts);
    uint64_t bits = 0, seen = 0, used = 0;
    size_t last = 0;
    for (size_t s = 0; s < 256; ++s) {
      bits += counts[s] * lengths[s];
      seen += counts[s];
      used += counts[s] > 0;
      if (lengths[s]) last = s + 1;
    }
    alone = used == 1;
    if (alone) bits = 0;
    std::vector<uint8_t> table(lengths.begin(), lengths.begin() + static_cast<int64_t>(last));
    const auto scaled =
        static_cast<unsigned __int128>(bits) * static_cast<uint64_t>(symbols) / seen;
    cost = static_cast<int64_t>(scaled) +
           8 * (kPayload + static_cast<int64_t>(pack_lengths(table).size()));
  }
  bool pays() const {
    const int64_t coded = cost / 8 + 8 * static_cast<int64_t>(chunks.size());
    return coded + symbols / 64 <= symbols;
  }
};

Band joined(const Band& a, const Band& b) {
  Band both;
  both.chunks = a.chunks;
  both.chunks.insert(both.chunks.end(), b.chunks.begin(), b.chunks.end());
  for (size_t s = 0; s < 256; ++s) both.counts[s] = a.counts[s] + b.counts[s];
  both.symbols = a.symbols + b.symbols;
  both.measure();
  return both;
}

// Joins neighbours, those first that lose least by it, while a table costs more than it saves.
void merge(std::vector<Band>& bands) {
  std::vector<Band> both;
  for (size_t i = 0; i + 1 < bands.size(); ++i) both.push_back(joined(bands[i], bands[i + 1]));
  while (!both.empty()) {
    auto gain = [&](size_t i) { return bands[i].cost + bands[i + 1].cost - both[i].cost; };
    size_t best = 0;
    for (size_t i = 1; i < both.size(); ++i) {
      if (gain(i) > gain(best)) best = i;
    }
    if (gain(best) + (both[best].symbols >> kSlight) < 0 && bands.size() <= kMaxTables) break;
    bands[best] = std::move(both[best]);
    bands.erase(bands.begin() + static_cast<int64_t>(best) + 1);
    both.erase(both.begin() + static_cast<int64_t>(best));
    if (best > 0) both[best - 1] = joined(bands[best - 1], bands[best]);
    if (best < both.size()) both[best] = joined(bands[best], bands[best + 1]);
  }
}

}  // namespace

std::vector<TableOf> choose_tables(const std::vector<uint32_t>& counts, int64_t n) {
  const int64_t chunks = static_cast<int64_t>(counts.size() / 256);
  std::vector<std::pair<uint64_t, int64_t>> order;  // (mean, chunk)
  for (int64_t c = 0; c < chunks; ++c) {
    const uint32_t* of = counts.data() + 256 * c;
    if (nearly_uniform(of, kLookLimit)) continue;
    uint64_t seen = 0, first = 0;
    for (uint64_t s = 0; s < 256; ++s) {
      seen += of[s];
      first += s * of[s];
    }
    order.push_back({first * 65536 / seen, c});
  }
  std::vector<TableOf> tables;
  if (order.empty()) return tables;
  std::vector<int64_t> candidates;
  for (const auto& [mean, c] : order) candidates.push_back(c);
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  auto add = [&](Band& band, int64_t c) {
    band.chunks.push_back(c);
    for (size_t s = 0; s < 256; ++s) band.counts[s] += counts[256 * static_cast<size_t>(c) + s];
    band.symbols += std::min(kLosslessChunk, n - c * kLosslessChunk);
  };
  const size_t parts = std::min(order.size(), kBands);
  std::vector<Band> bands(parts);
  for (size_t b = 0; b < parts; ++b) {
    for (size_t i = order.size() * b / parts; i < order.size() * (b + 1) / parts; ++i) {
      add(bands[b], order[i].second);
    }
    bands[b].measure();
  }
  merge(bands);
  if (bands.size() > 1) {  // each chunk to the table that codes it in the fewest bits
    // What is looked at of a chunk is at most 2^12 symbols where there are several.
    std::vector<std::array<int16_t, 256>> lengths(bands.size());
    for (size_t t = 0; t < bands.size(); ++t) {
      for (size_t s = 0; s < 256; ++s) {
        const int length = bands[t].lengths[s] - bands[t].alone;
        lengths[t][s] = static_cast<int16_t>(bands[t].lengths[s] ? length : kNoCode);
      }
    }
    std::vector<Band> found(bands.size());
    for (const int64_t c : candidates) {
      const uint32_t* of = counts.data() + 256 * c;
      size_t best = 0;
      int32_t least = 0;
      std::array<int16_t, 256> few;
      for (size_t s = 0; s < 256; ++s) few[s] = static_cast<int16_t>(of[s]);
      for (size_t t = 0; t < bands.size(); ++t) {
        int32_t bits = 0;
        for (size_t s = 0; s < 256; ++s) bits += few[s] * lengths[t][s];
        if (t == 0 || bits < least) {
          best = t;
          least = bits;
        }
      }
      add(found[best], c);
    }
    bands.clear();
    for (Band& band : found) {
      if (band.chunks.empty()) continue;
      band.measure();
      bands.push_back(std::move(band));
    }
  }
  for (Band& band : bands) {
    if (!band.pays()) continue;
    std::sort(band.chunks.begin(), band.chunks.end());
    tables.push_back({std::move(band.chunks), band.cost / 8});
    tables.back().bytes += 8 * static_cast<int64_t>(tables.back().chunks.size());
  }
  return tables;
}

}  // namespace cfl::codec
