// Code lengths for counts, the code table of docs/format.md, and the tree of a code.
#include <algorithm>
#include <array>
#include <functional>

#include "cpu/codec_payload.h"

namespace cfl::codec {

// Nibbles, the low one of a byte first: 0..12 changes the length by that minus 6; 13 and two
// nibbles (low first) set it; 14 and two nibbles repeat it 3 to 258 times.
std::vector<uint8_t> pack_lengths(const std::vector<uint8_t>& lengths) {
  std::vector<uint8_t> bytes;
  bool half = false;
  auto nibble = [&](int v) {
    if (half) {
      bytes.back() |= static_cast<uint8_t>(v << 4);
    } else {
      bytes.push_back(static_cast<uint8_t>(v));
    }
    half = !half;
  };
  int previous = 8;
  for (size_t i = 0; i < lengths.size();) {
    size_t run = 0;
    while (i + run < lengths.size() && lengths[i + run] == previous && run < 258) ++run;
    if (run >= 3) {
      nibble(14);
      nibble(static_cast<int>(run - 3) & 15);
      nibble(static_cast<int>(run - 3) >> 4);
      i += run;
      continue;
    }
    const int length = lengths[i++], change = length - previous;
    if (-6 <= change && change <= 6) {
      nibble(change + 6);
    } else {
      nibble(13);
      nibble(length & 15);
      nibble(length >> 4);
    }
    previous = length;
  }
  return bytes;
}

bool unpack_lengths(const uint8_t* bytes, int64_t size, int64_t alphabet,
                    std::vector<uint8_t>* lengths) {
  int64_t at = 0;
  auto nibble = [&]() -> int {
    if (at >= 2 * size) return -1;
    const int v = bytes[at / 2] >> (4 * (at % 2)) & 15;
    ++at;
    return v;
  };
  lengths->assign(static_cast<size_t>(alphabet), 0);
  int previous = 8;
  for (int64_t i = 0; i < alphabet;) {
    const int op = nibble();
    if (op < 0 || op == 15) return false;
    int64_t run = 1;
    if (op <= 12) {
      previous += op - 6;
    } else {
      const int low = nibble(), high = nibble();
      if (low < 0 || high < 0) return false;
      if (op == 13) {
        previous = low | high << 4;
      } else {
        run = (low | high << 4) + 3;
      }
    }
    if (previous < 0 || previous > kMaxLength || run > alphabet - i) return false;
    for (; run > 0; --run) (*lengths)[static_cast<size_t>(i++)] = static_cast<uint8_t>(previous);
  }
  // All bytes are used, and the half that may be left is zero.
  if ((at + 1) / 2 != size) return false;
  return at % 2 == 0 || nibble() == 0;
}

bool CodeTree::build(const std::vector<uint8_t>& lengths) {
  std::array<int32_t, kMaxLength + 1> of_length = {};
  int32_t symbols = 0;
  longest_ = 0;
  for (uint8_t length : lengths) {
    if (length > kMaxLength) return false;
    if (length == 0) continue;
    ++of_length[length];
    ++symbols;
    longest_ = std::max<int>(longest_, length);
  }
  if (symbols == 0) return false;

  struct Leaf {
    int depth, length, bits;
  };
  std::vector<Leaf> leaves;
  if (symbols == 1) {
    if (longest_ != 1) return false;
    leaves.push_back({0, 1, 0});
    longest_ = 0;
  } else {
    uint64_t kraft = 0;  // in units of 2^-kMaxLength
    for (int length = 1; length <= kMaxLength; ++length) {
      const int room = kMaxLength - length;
      const uint64_t most = (uint64_t{1} << kMaxLength) >> room;
      if (static_cast<uint64_t>(of_length[length]) > most) return false;
      kraft += static_cast<uint64_t>(of_length[length]) << room;  // each term is at most 2^60
      if (kraft > uint64_t{1} << kMaxLength) return false;
      for (int bits = 16; bits >= 0; --bits) {
        if (of_length[length] >> bits & 1) leaves.push_back({length - bits, length, bits});
      }
    }
    if (kraft != uint64_t{1} << kMaxLength) return false;
  }
  // Within a length, the runs go from the largest to the smallest and take its symbols in order.
  std::vector<int32_t> start(leaves.size());
  std::array<int32_t, kMaxLength + 1> next = {};
  std::array<std::vector<uint16_t>, kMaxLength + 1> of;
  for (size_t s = 0; s < lengths.size(); ++s) {
    if (lengths[s]) of[lengths[s]].push_back(static_cast<uint16_t>(s));
  }
  for (size_t i = 0; i < leaves.size(); ++i) {
    start[i] = next[leaves[i].length];
    next[leaves[i].length] += 1 << leaves[i].bits;
  }
  std::vector<int32_t> order(leaves.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return leaves[a].depth < leaves[b].depth; });

  nodes_.clear();
  symbol_.clear();
  size_t taken = 0;
  int deepest = 0;
  bool good = true;
  std::function<void(int)> grow = [&](int depth) {
    if (taken >= order.size() || leaves[order[taken]].depth < depth) {
      good = false;
      return;
    }
    const Leaf& leaf = leaves[order[taken]];
    const int32_t index = static_cast<int32_t>(nodes_.size());
    if (leaf.depth == depth) {
      const uint16_t* first = of[leaf.length].data() + start[order[taken]];
      const int32_t count = 1 << leaf.bits;
      const bool run = first[count - 1] - first[0] == count - 1;
      nodes_.push_back({0, static_cast<int32_t>(symbol_.size()), leaf.bits, first[0], run});
      symbol_.insert(symbol_.end(), first, first + count);
      ++taken;
      return;
    }
    deepest = std::max(deepest, depth + 1);
    nodes_.push_back({});
    grow(depth + 1);
    if (!good) return;
    nodes_[index].right = static_cast<int32_t>(nodes_.size());
    nodes_[index].first = static_cast<int32_t>(symbol_.size());
    grow(depth + 1);
  };
  grow(0);
  if (!good || taken != leaves.size()) return false;

  const bool bytes = lengths.size() <= 256;
  rank_.assign(lengths.size(), 0);
  rank8_.fill(0);
  for (size_t r = 0; r < symbol_.size(); ++r) {
    rank_[symbol_[r]] = static_cast<uint16_t>(r);
    if (bytes) rank8_[symbol_[r]] = static_cast<uint8_t>(r);
  }
  symbol_.resize(symbol_.size() + 2 * kPad, 0);
  symbol8_.assign(symbol_.begin(), symbol_.end());
  tree_ = {nodes_.data(),  static_cast<int32_t>(nodes_.size()),
           deepest,        symbols,
           symbol_.data(), symbol8_.data(),
           rank_.data(),   rank8_.data()};
  return true;
}

std::vector<uint8_t> code_lengths(const std::vector<uint64_t>& counts) {
  std::vector<uint8_t> lengths(counts.size(), 0);
  std::vector<int32_t> order;
  for (size_t s = 0; s < counts.size(); ++s) {
    if (counts[s]) order.push_back(static_cast<int32_t>(s));
  }
  const int32_t n = static_cast<int32_t>(order.size());
  if (n == 0) return lengths;
  if (n == 1) {
    lengths[order[0]] = 1;
    return lengths;
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return counts[a] < counts[b]; });
  // Huffman with two queues: leaves by count, and joined nodes, which come out in order by
  // themselves.
  std::vector<uint64_t> weight(2 * n - 1);
  std::vector<int32_t> parent(2 * n - 1, 0);
  for (int32_t i = 0; i < n; ++i) weight[i] = counts[order[i]];
  int32_t leaf = 0, joined = n;
  for (int32_t node = n; node < 2 * n - 1; ++node) {
    weight[node] = 0;
    for (int twice = 0; twice < 2; ++twice) {
      const bool take_leaf = leaf < n && (joined >= node || weight[leaf] <= weight[joined]);
      const int32_t child = take_leaf ? leaf++ : joined++;
      weight[node] += weight[child];
      parent[child] = node;
    }
  }
  std::vector<uint8_t> depth(2 * n - 1, 0);
  for (int32_t node = 2 * n - 3; node >= 0; --node) depth[node] = depth[parent[node]] + 1;
  for (int32_t i = 0; i < n; ++i) lengths[order[i]] = depth[i];
  return lengths;
}

}  // namespace cfl::codec
