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

// ---- counts
// ----------------------------------------------------------------------------------------

int64_t largest16(const uint16_t* symbols, int64_t n, const Kernel* kernel, Threads threads) {
  const int64_t tasks = std::max<int64_t>(1, std::min(threads.count, n >> 17));
  std::vector<uint16_t> found(static_cast<size_t>(tasks));
  run_tasks(threads, tasks, [&](int64_t t) {
    const int64_t begin = n * t / tasks, end = n * (t + 1) / tasks;
    found[static_cast<size_t>(t)] = kernel->max16(symbols + begin, end - begin);
  });
  return *std::max_element(found.begin(), found.end());
}

// Counts of one block of symbols in `stride`.
std::vector<uint64_t> strided_counts(const Symbols& symbols, int64_t alphabet, int64_t stride,
                                     const Kernel* kernel, Threads threads) {
  constexpr int64_t kBlock = 4096;
  const int64_t n = symbols.n;
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
  return counts;
}

// Whether a code for what a sample has not met costs much: it lengthens the rarest symbol by a bit.
bool few_met(const std::vector<uint64_t>& counts) {
  constexpr uint64_t kSlight = 64;
  uint64_t total = 0, least = std::numeric_limits<uint64_t>::max();
  bool all = true;
  for (uint64_t count : counts) {
    total += count;
    if (count) least = std::min(least, count);
    all = all && count;
  }
  return !all && kSlight * least >= total;
}

}  // namespace

int64_t sample_stride(int64_t n, int64_t alphabet) {
  constexpr int64_t kPerSymbol = 1024;
  // About A / (2 n ln 2) bits a symbol are lost by a code made for n samples of A symbols.
  return alphabet == 0 ? 1 : std::max<int64_t>(1, n / (kPerSymbol * alphabet));
}

std::vector<uint64_t> sample_counts(const Symbols& symbols, const Kernel* kernel, Threads threads,
                                    bool* exact) {
  const int64_t n = symbols.n;
  int64_t alphabet = n == 0 ? 0 : 256;
  if (n > 0 && symbols.size == 2) {
    alphabet = 1 + (symbols.data ? largest16(reinterpret_cast<const uint16_t*>(symbols.data), n,
                                             kernel, threads)
                                 : symbols.largest);
  }
  const int64_t stride = sample_stride(n, alphabet);
  std::vector<uint64_t> counts = strided_counts(symbols, alphabet, stride, kernel, threads);
  *exact = stride == 1;
  if (!*exact && few_met(counts)) {
    counts = strided_counts(symbols, alphabet, 1, kernel, threads);
    *exact = true;
  }
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
