#include "cpu/codec_delta.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/kept_memory.h"

namespace cfl::codec {
namespace {

// Calls task(begin, end) for parts of [0, count), on several threads where `grain` leaves parts.
template <class Task>
void in_parts(Threads threads, int64_t count, int64_t grain, const Task& task) {
  if (!threads.parallel_for || threads.count <= 1 || count <= grain) {
    if (count > 0) task(int64_t{0}, count);
    return;
  }
  auto run = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Task*>(context))(begin, end);
  };
  threads.parallel_for(0, count, grain, run, const_cast<Task*>(&task));
}

constexpr int64_t kGrain = 4;               // blocks that are worth a thread
constexpr int64_t kCompareBlock = 1 << 16;  // units

int64_t blocks_of(int64_t n) { return (n + kDeltaBlock - 1) / kDeltaBlock; }

// Calls task(b, first, count) for the blocks of n numbers.
template <class Task>
void in_blocks(Threads threads, int64_t n, const Task& task) {
  in_parts(threads, blocks_of(n), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kDeltaBlock;
      task(static_cast<size_t>(b), first, std::min(kDeltaBlock, n - first));
    }
  });
}

// From the bytes of each block, one place late, where each begins.
void add_up(std::vector<int64_t>* starts) {
  for (size_t b = 1; b < starts->size(); ++b) (*starts)[b] += (*starts)[b - 1];
}

// symbols(first, count) writes those and returns their raw bits; bits(first, count, raw, bytes)
// writes these.
template <class WriteSymbols, class WriteBits>
void write_numbers(int64_t n, Threads threads, const Allocate& allocate,
                   const WriteSymbols& symbols, const WriteBits& bits) {
  std::vector<int64_t> starts(static_cast<size_t>(blocks_of(n)) + 1, 0);
  in_blocks(threads, n, [&](size_t b, int64_t first, int64_t count) {
    starts[b + 1] = (symbols(first, count) + 7) / 8;
  });
  add_up(&starts);
  uint8_t* const raw = allocate(starts.back());
  in_blocks(threads, n, [&](size_t b, int64_t first, int64_t count) {
    bits(first, count, raw + starts[b], starts[b + 1] - starts[b]);
  });
}

// read(first, count, raw) for each block; false unless there are as many bytes as symbols stand
// for, and all blocks were read.
template <class Read>
bool read_numbers(const DeltaKernel* kernel, int kept, const uint8_t* symbols, int64_t n,
                  const uint8_t* raw, int64_t raw_bytes, Threads threads, const Read& read) {
  std::vector<int64_t> starts(static_cast<size_t>(blocks_of(n)) + 1, 0);
  std::atomic<bool> good = true;
  in_blocks(threads, n, [&](size_t b, int64_t first, int64_t count) {
    const int64_t bits = kernel->count_bits(kept, symbols + first, count);
    if (bits < 0) good = false;
    starts[b + 1] = (bits + 7) / 8;
  });
  add_up(&starts);
  if (!good || starts.back() != raw_bytes) return false;
  in_blocks(threads, n, [&](size_t b, int64_t first, int64_t count) {
    const uint8_t* from = raw + starts[b];
    std::vector<uint8_t> padded;
    if (raw_bytes - starts[b + 1] < 16) {  // the loop reads past the end
      padded.assign(static_cast<size_t>(starts[b + 1] - starts[b]) + 16, 0);
      std::copy(from, raw + starts[b + 1], padded.data());
      from = padded.data();
    }
    if (!read(first, count, from)) good = false;
  });
  return good;
}

// The changes of a part of two tensors, found while the part is in the cache. Where they are many
// they are left for later, when memory of their size is there.
struct Found {
  uint8_t *positions = nullptr, *new_values = nullptr, *old_values = nullptr;
  int64_t count = 0, room = 0;
  bool late = false;

  Found() = default;
  Found(const Found&) = delete;
  Found& operator=(const Found&) = delete;
  ~Found() {
    std::free(positions);
    std::free(new_values);
    std::free(old_values);
  }
  // Makes room for so many more (and for what is written behind them).
  void reserve(int64_t more, int unit) {
    if (count + more + 64 <= room) return;
    room = 2 * (count + more) + 64;
    grow(&positions, room * 8);
    grow(&new_values, room * unit);
    grow(&old_values, room * unit);
  }
  Changes next(int unit) const {
    return {reinterpret_cast<int64_t*>(positions) + count, new_values + count * unit,
            old_values + count * unit};
  }

 private:
  static void grow(uint8_t** data, int64_t bytes) {
    void* const larger = std::realloc(*data, static_cast<size_t>(bytes));
    if (!larger) throw std::bad_alloc();
    *data = static_cast<uint8_t*>(larger);
  }
};

}  // namespace

const DeltaKernel* delta_kernel(const Kernel* kernel) {
  if (kernel == kernel_avx512()) return delta_avx512();
  if (kernel == kernel_avx2()) return delta_avx2();
  return delta_generic();
}

uint64_t fingerprint(const DeltaKernel* kernel, const uint8_t* data, int64_t bytes,
                     Threads threads) {
  constexpr int64_t kBlock = 1 << 18;
  std::atomic<uint64_t> sum = 0;
  in_parts(threads, (bytes + kBlock - 1) / kBlock, kGrain, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kBlock, end = std::min(bytes, last * kBlock);
    sum += kernel->fingerprint(data + begin, end - begin, begin / 8);
  });
  return sum;
}

int64_t find_changes(const DeltaKernel* kernel, int unit, const uint8_t* new_data,
                     const uint8_t* old_data, int64_t n, int64_t most, uint64_t* sums,
                     Threads threads, const std::function<Changes(int64_t)>& allocate) {
  const int64_t blocks = (n + kCompareBlock - 1) / kCompareBlock;
  constexpr int64_t kWords = kCompareBlock / 64;
  const int64_t tasks = std::max<int64_t>(1, std::min(threads.count, blocks / kGrain));
  cpu::KeptMemory memory;
  uint64_t* const mask = memory.get<uint64_t>(static_cast<size_t>((n + 63) / 64));
  std::vector<Found> parts(static_cast<size_t>(tasks));
  std::atomic<uint64_t> sum_new = 0, sum_old = 0, other = 0;
  auto first_block = [&](int64_t t) { return blocks * t / tasks; };
  in_parts(threads, tasks, 1, [&](int64_t begin_task, int64_t end_task) {
    for (int64_t t = begin_task; t < end_task; ++t) {
      Found& found = parts[static_cast<size_t>(t)];
      uint64_t both[3] = {0, 0, 0};
      for (int64_t b = first_block(t); b < first_block(t + 1); ++b) {
        const int64_t begin = b * kCompareBlock, count = std::min(kCompareBlock, n - begin);
        uint64_t* const here = mask + b * kWords;
        found.late |= found.count > (first_block(t + 1) - first_block(t)) * kCompareBlock / 8;
        if (!found.late) found.reserve(count, unit);
        const int64_t changes = kernel->compare(
            unit, new_data + begin * unit, old_data + begin * unit, count * unit, begin * unit / 8,
            here, both, found.late ? Changes() : found.next(unit));
        found.count += changes;
      }
      sum_new += both[0];
      sum_old += both[1];
      other |= both[2];
    }
  });
  sums[0] = sum_new;
  sums[1] = sum_old;
  sums[2] = other;
  std::vector<int64_t> starts(static_cast<size_t>(tasks) + 1, 0);
  for (size_t t = 0; t < parts.size(); ++t) starts[t + 1] = parts[t].count;
  add_up(&starts);
  const int64_t total = starts.back();
  const Changes out = allocate(total <= most ? total : 0);
  if (total > most || total == 0) return total;
  in_parts(threads, tasks, 1, [&](int64_t begin_task, int64_t end_task) {
    for (int64_t t = begin_task; t < end_task; ++t) {
      const Found& found = parts[static_cast<size_t>(t)];
      if (found.count == 0) continue;
      const int64_t at = starts[static_cast<size_t>(t)];
      int64_t* const places = out.positions + at;
      if (!found.late) {
        const auto bytes = static_cast<size_t>(found.count * unit);
        std::memcpy(places, found.positions, static_cast<size_t>(found.count) * 8);
        std::memcpy(out.new_values + at * unit, found.new_values, bytes);
        std::memcpy(out.old_values + at * unit, found.old_values, bytes);
        continue;
      }
      const int64_t first = first_block(t) * kCompareBlock;
      const int64_t units = std::min(n, first_block(t + 1) * kCompareBlock) - first;
      const uint64_t* const here = mask + first / 64;
      kernel->list_ones(here, (units + 63) / 64, first, places, places + found.count);
      auto take = [&](const uint8_t* from, uint8_t* to) {
        kernel->take(unit, from + first * unit, first, units, here, places, found.count,
                     to + at * unit);
      };
      take(new_data, out.new_values);
      take(old_data, out.old_values);
    }
  });
  return total;
}

void write_gaps(const DeltaKernel* kernel, const int64_t* positions, int64_t n, uint8_t* symbols,
                Threads threads, const Allocate& allocate) {
  auto before = [&](int64_t first) { return first ? positions[first - 1] : -1; };
  write_numbers(
      n, threads, allocate,
      [&](int64_t first, int64_t count) {
        return kernel->gap_symbols(positions + first, before(first), count, symbols + first);
      },
      [&](int64_t first, int64_t count, uint8_t* raw, int64_t bytes) {
        kernel->gap_bits(positions + first, before(first), count, raw, bytes);
      });
}

void write_values(const DeltaKernel* kernel, int unit, const uint8_t* new_values,
                  const uint8_t* old_values, int64_t n, bool use_xor, int shift, uint8_t* symbols,
                  Threads threads, const Allocate& allocate) {
  write_numbers(
      n, threads, allocate,
      [&](int64_t first, int64_t count) {
        return kernel->value_symbols(unit, use_xor, shift, new_values + first * unit,
                                     old_values + first * unit, count, symbols + first);
      },
      [&](int64_t first, int64_t count, uint8_t* raw, int64_t bytes) {
        kernel->value_bits(unit, use_xor, shift, new_values + first * unit,
                           old_values + first * unit, count, raw, bytes);
      });
}

bool read_gaps(const DeltaKernel* kernel, const uint8_t* symbols, int64_t n, const uint8_t* raw,
               int64_t raw_bytes, int64_t limit, int64_t* positions, Threads threads) {
  auto read = [&](int64_t first, int64_t count, const uint8_t* from) {
    return kernel->read_gaps(symbols + first, count, from, positions + first);
  };
  if (!read_numbers(kernel, kGapBits, symbols, n, raw, raw_bytes, threads, read)) return false;
  // Each block begins at 0 so far.
  const int64_t blocks = blocks_of(n);
  std::vector<int64_t> base(static_cast<size_t>(blocks) + 1, 0);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t last = positions[std::min(n, (b + 1) * kDeltaBlock) - 1];
    const int64_t before = base[static_cast<size_t>(b)];
    if (last >= limit - before) return false;
    base[static_cast<size_t>(b) + 1] = before + last + 1;
  }
  in_blocks(threads, n, [&](size_t b, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) positions[i] += base[b];
  });
  return true;
}

bool read_values(const DeltaKernel* kernel, int unit, const uint8_t* old_data,
                 const int64_t* positions, const uint8_t* symbols, int64_t n, const uint8_t* raw,
                 int64_t raw_bytes, bool use_xor, int shift, uint8_t* values, Threads threads) {
  auto read = [&](int64_t first, int64_t count, const uint8_t* from) {
    return kernel->read_values(unit, use_xor, shift, positions ? old_data : old_data + first * unit,
                               positions ? positions + first : nullptr, symbols + first, count,
                               from, values + first * unit);
  };
  return read_numbers(kernel, kValueBits, symbols, n, raw, raw_bytes, threads, read);
}

bool find_ranks(const DeltaKernel* kernel, int unit, const uint8_t* data, int64_t n,
                const uint8_t* map, const int64_t* positions, int64_t count, int64_t* ranks,
                int64_t* order, int64_t* counts) {
  // First how many each class has, then each class's ranks go behind those of the class before.
  std::vector<uint8_t> of(static_cast<size_t>(count));
  std::fill(counts, counts + kMaxClasses, 0);
  int classes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t c = map[context_of(unit, data + positions[i] * unit)];
    if (c >= kMaxClasses) return false;
    of[static_cast<size_t>(i)] = c;
    ++counts[c];
    classes = std::max<int>(classes, c + 1);
  }
  int64_t next[kMaxClasses];
  for (int64_t c = 0, at = 0; c < kMaxClasses; at += counts[c++]) next[c] = at;
  kernel->ranks(unit, data, n, map, classes, of.data(), positions, count, next, ranks, order);
  return true;
}

void sort_by_class(int unit, const uint8_t* old_data, int64_t n, const uint8_t* map,
                   const uint8_t* values, bool back, uint8_t* out, int64_t* counts) {
  // Sixteen classes, and what has none.
  int64_t next[kMaxClasses + 1] = {};
  std::vector<uint8_t> of(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    of[static_cast<size_t>(i)] =
        std::min<uint8_t>(map[context_of(unit, old_data + i * unit)], kMaxClasses);
    ++next[of[static_cast<size_t>(i)]];
  }
  int64_t at = 0;
  for (int c = 0; c <= kMaxClasses; ++c) {
    if (c < kMaxClasses) counts[c] = next[c];
    at += next[c];
    next[c] = at - next[c];
  }
  auto move = [&](auto zero) {
    using T = decltype(zero);
    constexpr auto kUnit = static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = next[of[static_cast<size_t>(i)]]++;
      std::memcpy(out + (back ? i : place) * kUnit, values + (back ? place : i) * kUnit, sizeof(T));
    }
  };
  switch (unit) {
    case 1:
      return move(uint8_t{0});
    case 2:
      return move(uint16_t{0});
    case 4:
      return move(uint32_t{0});
    default:
      return move(uint64_t{0});
  }
}

bool find_places(const DeltaKernel* kernel, int unit, const uint8_t* data, int64_t n,
                 const uint8_t* map, int classes, const int64_t* counts, const int64_t* ranks,
                 int64_t* positions, int64_t* order) {
  int64_t sum = 0;
  for (int c = 0; c < classes; ++c) sum += counts[c];
  return sum == kernel->places(unit, data, n, map, classes, counts, ranks, positions, order);
}

}  // namespace cfl::codec
