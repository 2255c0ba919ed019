#include "cpu/codec_payload.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <thread>

#include "cpu/codec_work.h"

namespace cfl::codec {
namespace {

constexpr char kMagic[4] = {'C', 'F', 'L', 'H'};
constexpr uint8_t kVersion = 1, kPivotLayout = 1;

// Waiting for another thread for about the `turns`-th time: at first without giving the core away,
// which may cost milliseconds where other processes want it, a hundred times what a chunk takes.
void relax(int turns) {
  if (turns < 20000) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else {
    std::this_thread::yield();
  }
}

// ---- code table
// ------------------------------------------------------------------------------------

}  // namespace

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

namespace {

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

}  // namespace

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

int64_t sample_stride(int64_t n, int64_t alphabet) {
  constexpr int64_t kPerSymbol = 1024;
  // About A / (2 n ln 2) bits a symbol are lost by a code made for n samples of A symbols.
  return alphabet == 0 ? 1 : std::max<int64_t>(1, n / (kPerSymbol * alphabet));
}

namespace {

int64_t largest16(const uint16_t* symbols, int64_t n, const Kernel* kernel, Threads threads) {
  const int64_t tasks = std::max<int64_t>(1, std::min(threads.count, n >> 17));
  std::vector<uint16_t> found(static_cast<size_t>(tasks));
  run_tasks(threads, tasks, [&](int64_t t) {
    const int64_t begin = n * t / tasks, end = n * (t + 1) / tasks;
    found[static_cast<size_t>(t)] = kernel->max16(symbols + begin, end - begin);
  });
  return *std::max_element(found.begin(), found.end());
}

}  // namespace

std::vector<uint64_t> sample_counts(const Symbols& symbols, const Kernel* kernel, Threads threads,
                                    bool* exact) {
  constexpr int64_t kBlock = 4096;
  const int64_t n = symbols.n;
  int64_t alphabet = n == 0 ? 0 : 256;
  if (n > 0 && symbols.size == 2) {
    alphabet = 1 + (symbols.data ? largest16(reinterpret_cast<const uint16_t*>(symbols.data), n,
                                             kernel, threads)
                                 : symbols.largest);
  }
  const int64_t stride = sample_stride(n, alphabet);
  const int64_t step = kBlock * stride, blocks = (n + step - 1) / step;
  const int64_t tasks = std::max<int64_t>(1, std::min(threads.count, blocks / 32));
  std::vector<std::vector<uint64_t>> parts(static_cast<size_t>(tasks));
  run_tasks(threads, tasks, [&](int64_t t) {
    std::vector<uint64_t>& counts = parts[static_cast<size_t>(t)];
    counts.assign(static_cast<size_t>(alphabet), 0);
    std::vector<uint32_t> even, odd;
    if (symbols.size == 2) {
      even.assign(static_cast<size_t>(alphabet), 0);
      odd.assign(static_cast<size_t>(alphabet), 0);
    }
    alignas(64) uint8_t made[2 * kBlock];
    auto flush = [&] {
      for (size_t s = 0; s < even.size(); ++s) {
        counts[s] += uint64_t{even[s]} + odd[s];
        even[s] = odd[s] = 0;
      }
    };
    // Symbols that lie together are counted together, which pays for the tables once.
    const int64_t together = stride == 1 && symbols.data ? int64_t{1} << 12 : 1;
    const int64_t last = blocks * (t + 1) / tasks;
    for (int64_t block = blocks * t / tasks; block < last; block += together) {
      const int64_t begin = block * step;
      const int64_t count = std::min(std::min(together, last - block) * kBlock, n - begin);
      const uint8_t* data = symbols.data + begin * symbols.size;
      if (!symbols.data) {
        symbols.make(begin, count, made, false);
        data = made;
      }
      if (symbols.size == 1) {
        kernel->histogram8(data, count, counts.data());
      } else {
        kernel->histogram16(reinterpret_cast<const uint16_t*>(data), count, even.data(),
                            odd.data());
        if ((block & 0x3ffff) + together > 0x3ffff) flush();  // before 2^32 symbols are counted
      }
    }
    flush();
  });
  std::vector<uint64_t> counts(static_cast<size_t>(alphabet), 0);
  for (const auto& part : parts) {
    for (size_t s = 0; s < counts.size(); ++s) counts[s] += part[s];
  }
  *exact = stride == 1;
  if (!*exact) {
    for (uint64_t& count : counts) count = count ? count * static_cast<uint64_t>(stride) : 1;
  }
  while (!counts.empty() && counts.back() == 0) counts.pop_back();
  return counts;
}

// ---- header
// ----------------------------------------------------------------------------------------

int64_t parse(const uint8_t* payload, int64_t size, int64_t available, Header* header,
              const Kernel* kernel) {
  if (size < kHeaderBytes) return kTooShort;
  if (std::memcmp(payload, kMagic, 4) != 0) return kBadMagic;
  if (payload[4] != kVersion || payload[5] != kPivotLayout) return kBadVersion;
  const int symbol_size = payload[6], chunk_log2 = payload[7];
  const uint64_t numel = load<uint64_t>(payload + 8), total = load<uint64_t>(payload + 16);
  const uint32_t alphabet = load<uint32_t>(payload + 24), ndim = load<uint32_t>(payload + 28);
  const uint32_t table_bytes = load<uint32_t>(payload + 32);
  if (total != static_cast<uint64_t>(size)) return kBadLength;
  if ((symbol_size != 1 && symbol_size != 2) || chunk_log2 < kMinChunkLog2 ||
      chunk_log2 > kMaxChunkLog2 || numel > static_cast<uint64_t>(kMaxSymbols) || ndim > kMaxDims ||
      alphabet > max_alphabet(symbol_size) || (numel == 0) != (alphabet == 0)) {
    return kBadHeader;
  }
  const int64_t chunks =
      (static_cast<int64_t>(numel) + (int64_t{1} << chunk_log2) - 1) >> chunk_log2;
  const int64_t head = kHeaderBytes + 8 * static_cast<int64_t>(ndim) + table_bytes + 8 * chunks;
  if (head > size) return kBadHeader;
  if (head > available) return -head;
  uint32_t crc = kernel->crc32(0, payload, kHeaderBytes - 4);
  crc = kernel->crc32(crc, payload + kHeaderBytes, head - kHeaderBytes);
  if (crc != load<uint32_t>(payload + kHeaderBytes - 4)) return kBadHeaderChecksum;

  uint64_t product = 1;
  bool empty = false;
  for (uint32_t d = 0; d < ndim; ++d) {
    const uint64_t extent = load<uint64_t>(payload + kHeaderBytes + 8 * d);
    if (extent > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return kBadHeader;
    header->shape[d] = static_cast<int64_t>(extent);
    empty |= extent == 0;
    if (extent != 0 && product > static_cast<uint64_t>(kMaxSymbols) / extent) {
      product = static_cast<uint64_t>(kMaxSymbols) + 1;  // too many, unless another extent is zero
    } else if (extent != 0) {
      product *= extent;
    }
  }
  if (numel != (empty ? 0 : product)) return kBadHeader;

  header->symbol_size = symbol_size;
  header->chunk_log2 = chunk_log2;
  header->numel = static_cast<int64_t>(numel);
  header->ndim = ndim;
  header->chunks = chunks;
  const uint8_t* table = payload + kHeaderBytes + 8 * ndim;
  header->chunk_table = table + table_bytes;
  header->data = payload + head;
  header->end = payload + size;
  uint64_t sum = 0;
  for (int64_t c = 0; c < chunks; ++c) sum += load<uint32_t>(header->chunk_table + 8 * c);
  if (sum != static_cast<uint64_t>(size - head)) return kBadChunkSizes;
  std::vector<uint8_t> lengths;
  if (!unpack_lengths(table, table_bytes, alphabet, &lengths)) return kBadCodeTable;
  if (numel > 0 && !header->code.build(lengths)) return kBadCodeTable;
  return kGood;
}

void write_fixed(uint8_t* payload, const Fixed& fixed, int64_t head, const Kernel* kernel) {
  std::memcpy(payload, kMagic, 4);
  payload[4] = kVersion;
  payload[5] = kPivotLayout;
  payload[6] = static_cast<uint8_t>(fixed.symbol_size);
  payload[7] = static_cast<uint8_t>(fixed.chunk_log2);
  store<uint64_t>(payload + 8, fixed.numel);
  store<uint64_t>(payload + 16, fixed.size);
  store<uint32_t>(payload + 24, static_cast<uint32_t>(fixed.alphabet));
  store<uint32_t>(payload + 28, static_cast<uint32_t>(fixed.ndim));
  store<uint32_t>(payload + 32, static_cast<uint32_t>(fixed.table_bytes));
  uint32_t crc = kernel->crc32(0, payload, kHeaderBytes - 4);
  crc = kernel->crc32(crc, payload + kHeaderBytes, head - kHeaderBytes);
  store<uint32_t>(payload + kHeaderBytes - 4, crc);
}

// ---- encoding
// --------------------------------------------------------------------------------------

int64_t encode_payload(const Symbols& symbols, const int64_t* shape, int64_t ndim, int chunk_log2,
                       const Kernel* kernel, Threads threads,
                       const std::function<uint8_t*(int64_t)>& allocate) {
  const int64_t n = symbols.n;
  bool exact = true;
  const std::vector<uint64_t> counts = sample_counts(symbols, kernel, threads, &exact);
  const std::vector<uint8_t> lengths = code_lengths(counts);
  const std::vector<uint8_t> table = pack_lengths(lengths);
  CodeTree code;
  if (n > 0 && !code.build(lengths)) return -1;  // cannot happen
  const int64_t chunk = int64_t{1} << chunk_log2, chunks = (n + chunk - 1) >> chunk_log2;
  const int64_t head = kHeaderBytes + 8 * ndim + static_cast<int64_t>(table.size()) + 8 * chunks;

  uint64_t weight = 0, bits = 0;
  for (size_t s = 0; s < counts.size(); ++s) {
    weight += counts[s];
    bits += counts[s] * (code.longest() ? lengths[s] : 0);
  }
  const double per_symbol = weight ? static_cast<double>(bits) / static_cast<double>(weight) : 0;
  const double likely = static_cast<double>(n) * per_symbol / 8;
  const int64_t tasks = std::max<int64_t>(1, std::min(threads.count, chunks / 2));
  const int64_t slot = round_up(chunk * code.longest() / 8 + 2 * kReadPad);
  const int64_t arena = round_up(arena_size(code.tree(), chunk) * symbols.size);
  const int64_t made = symbols.data ? 0 : round_up((chunk + kPad) * symbols.size);
  constexpr int64_t kQueue = 8;  // chunks that a thread keeps until it is their turn
  uint8_t* out = nullptr;
  int64_t size = 0;
  for (int attempt = 0;; ++attempt) {
    // First what the counts promise; if the sample erred too much for that, the worst case.
    const int64_t room = exact          ? static_cast<int64_t>(bits / 8) + chunks + 8
                         : attempt == 0 ? static_cast<int64_t>(likely * 1.01) + 2 * chunks + 65536
                                        : chunks * (chunk * code.longest() / 8 + 8);
    out = allocate(head + room);
    uint8_t* const limit = out + head + room;
    // Chunks are taken in order, and a chunk has its place when those before it have theirs. Until
    // then it waits in its thread's queue, while that thread goes on with another.
    std::atomic<int64_t> next = 0, placed = 0;
    std::atomic<uint8_t*> end = out + head;
    std::atomic<bool> full = false;
    run_tasks(threads, tasks, [&](int64_t) {
      struct Coded {
        int64_t chunk, bytes;
        const uint8_t* data;
        uint32_t crc;
      };
      const int64_t most = tasks == 1 ? 1 : kQueue;
      Coded queue[kQueue];
      int64_t first = 0, last = 0;  // of the queue, modulo `most`
      Scratch scratch(most * slot + arena + made);
      uint8_t* const work = scratch.data() + most * slot;
      auto place = [&](const Coded& coded) {
        uint8_t* const at = end.load();
        const bool fits = coded.bytes <= limit - at;
        if (fits) {
          end.store(at + coded.bytes);
        } else {
          full = true;
        }
        placed.store(coded.chunk + 1, std::memory_order_release);
        if (!fits) return;
        if (coded.data != at) std::memcpy(at, coded.data, coded.bytes);
        uint8_t* entry = out + head - 8 * (chunks - coded.chunk);
        store<uint32_t>(entry, static_cast<uint32_t>(coded.bytes));
        store<uint32_t>(entry + 4, coded.crc);
      };
      for (int turns = 0;;) {
        while (first < last &&
               placed.load(std::memory_order_acquire) == queue[first % most].chunk) {
          place(queue[first++ % most]);
          turns = 0;
        }
        if (last - first == most) {
          relax(turns++);
          continue;
        }
        const int64_t c = next.load() < chunks ? next++ : chunks;
        if (c >= chunks) {
          if (first == last) break;
          relax(turns++);
          continue;
        }
        const int64_t count = std::min(chunk, n - c * chunk);
        const uint8_t* from = symbols.data + c * chunk * symbols.size;
        if (!symbols.data) {
          symbols.make(c * chunk, count, work + arena, true);
          from = work + arena;
        }
        // One thread alone writes in place, but for the last chunks, whose longest code words
        // might not fit.
        const bool direct = tasks == 1 && limit - end >= slot;
        uint8_t* const buffer = direct ? end.load() : scratch.data() + last % most * slot;
        Ahead ahead = {};
        if (symbols.ahead && (c + tasks) * chunk < n) ahead = symbols.ahead((c + tasks) * chunk);
        const int64_t length =
            symbols.size == 1
                ? kernel->encode8(&code.tree(), from, count, buffer, work, ahead)
                : kernel->encode16(&code.tree(), reinterpret_cast<const uint16_t*>(from), count,
                                   buffer, reinterpret_cast<uint16_t*>(work), ahead);
        const int64_t bytes = (length + 7) / 8;
        queue[last++ % most] = {c, bytes, buffer, kernel->crc32(0, buffer, bytes)};
      }
    });
    size = end - out;
    if (!full) break;
  }

  for (int64_t d = 0; d < ndim; ++d) store<uint64_t>(out + kHeaderBytes + 8 * d, shape[d]);
  if (!table.empty()) std::memcpy(out + kHeaderBytes + 8 * ndim, table.data(), table.size());
  write_fixed(out,
              {symbols.size, chunk_log2, n, size, static_cast<int64_t>(counts.size()), ndim,
               static_cast<int64_t>(table.size())},
              head, kernel);
  return size;
}

// ---- decoding
// --------------------------------------------------------------------------------------

int64_t decode_payload(const uint8_t* payload, int64_t size, int64_t start, int64_t count,
                       void* out, int out_symbol_size, const Weights* weights, const Kernel* kernel,
                       Threads threads) {
  Header header;
  const int64_t error = parse(payload, size, &header, kernel);
  if (error != kGood) return error;
  if (start < 0 || count < 0 || start > header.numel || count > header.numel - start ||
      (!weights && out_symbol_size != header.symbol_size)) {
    return kOutOfRange;
  }
  if (count == 0) return kGood;

  const int64_t chunk = int64_t{1} << header.chunk_log2;
  const int64_t first = start >> header.chunk_log2, last = (start + count - 1) >> header.chunk_log2;
  const Tree& tree = header.code.tree();
  const int64_t tasks = std::max<int64_t>(1, std::min(threads.count, last - first + 1));
  auto first_chunk = [&](int64_t task) { return first + (last + 1 - first) * task / tasks; };
  std::vector<int64_t> offset(tasks + 1, 0);
  {
    int64_t at = 0;
    for (int64_t c = 0, t = 0; t < tasks; ++c) {
      while (t < tasks && c == first_chunk(t)) offset[t++] = at;
      if (c < header.chunks) at += load<uint32_t>(header.chunk_table + 8 * c);
    }
  }

  const int64_t symbols_bytes = round_up((chunk + kPad) * header.symbol_size);
  const int64_t arena = round_up(arena_size(tree, chunk) * header.symbol_size);
  const int64_t element = weights ? kFloatSize[static_cast<int>(weights->dtype)] : 0;
  std::atomic<int64_t> worst = kGood;  // of several bad chunks, report the first
  run_tasks(threads, tasks, [&](int64_t t) {
    Scratch scratch((weights ? 2 : 1) * symbols_bytes + arena);
    uint8_t* block = scratch.data() + arena;
    uint8_t* other = block + (weights ? symbols_bytes : 0);
    uint8_t* const work = scratch.data();
    std::vector<uint8_t> tail;
    const uint8_t* at = header.data + offset[t];
    // A chunk's weights are written during the decoding of the next one.
    Pending pending = {};
    if (weights) pending.dtype = weights->dtype;
    pending.stream = count * element > kCached;
    for (int64_t c = first_chunk(t); c < first_chunk(t + 1); ++c) {
      const uint8_t* entry = header.chunk_table + 8 * c;
      const int64_t bytes = load<uint32_t>(entry);
      const uint8_t* bits = at;
      at += bytes;
      auto fail = [&] {
        int64_t known = worst.load();
        while ((known == kGood || known > kBadChunk + c) &&
               !worst.compare_exchange_weak(known, kBadChunk + c)) {
        }
      };
      if (kernel->crc32(0, bits, bytes) != load<uint32_t>(entry + 4)) return fail();
      if (header.end - at < kReadPad) {  // the loops read past the end
        tail.assign(bytes + kReadPad, 0);
        std::memcpy(tail.data(), bits, bytes);
        bits = tail.data();
      }
      const int64_t begin = c * chunk, symbols = std::min(chunk, header.numel - begin);
      const int64_t lo = std::max(begin, start), hi = std::min(begin + symbols, start + count);
      const bool direct = !weights && hi - lo == symbols;
      uint8_t* to =
          direct ? static_cast<uint8_t*>(out) + (begin - start) * header.symbol_size : block;
      Pending* before = weights ? &pending : nullptr;
      const int64_t read =
          header.symbol_size == 1
              ? kernel->decode8(&tree, bits, 8 * bytes, symbols, to, work, before)
              : kernel->decode16(&tree, bits, 8 * bytes, symbols, reinterpret_cast<uint16_t*>(to),
                                 reinterpret_cast<uint16_t*>(work), before);
      if (read < 0 || (read + 7) / 8 != bytes) return fail();
      if (direct) continue;
      if (!weights) {
        std::memcpy(static_cast<uint8_t*>(out) + (lo - start) * header.symbol_size,
                    block + (lo - begin) * header.symbol_size, (hi - lo) * header.symbol_size);
        continue;
      }
      for (int64_t i = lo; i < hi;) {
        // All groups but the last of a chunk are written at once.
        if (pending.n > 0) kernel->dequantize(&pending, header.symbol_size);
        const int64_t group = i / weights->group_size;
        const int64_t stop =
            group >= hi / weights->group_size ? hi : (group + 1) * weights->group_size;
        pending.symbols = block + (i - begin) * header.symbol_size;
        pending.n = stop - i;
        pending.out = static_cast<uint8_t*>(out) + (i - start) * element;
        pending.affine = weights->affine(group, &pending.wide);
        i = stop;
      }
      std::swap(block, other);
    }
    if (weights) kernel->dequantize(&pending, header.symbol_size);
  });
  return worst;
}

// ---- choice of the instruction set
// -------------------------------------------------------------------

const Kernel* kernel_at_most(int level) {
#if defined(CFL_HAVE_X86_ISAS)
  __builtin_cpu_init();
  if (level >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("bmi2") && kernel_avx512()) {
    return kernel_avx512();
  }
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("fma") && kernel_avx2()) {
    return kernel_avx2();
  }
#endif
  (void)level;
  return kernel_generic();
}

const Kernel* best_kernel() {
  static const Kernel* const best = kernel_at_most(2);
  return best;
}

}  // namespace cfl::codec
