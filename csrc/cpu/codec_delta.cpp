#include "cpu/codec_delta.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace cfl::codec {
namespace {

template <class T>
T load(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}
template <class T>
void store(uint8_t* p, T v) {
  std::memcpy(p, &v, sizeof(T));
}

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

template <class Call>
auto with_unit(int unit, const Call& call) {
  switch (unit) {
    case 1:
      return call(uint8_t{0});
    case 2:
      return call(uint16_t{0});
    case 4:
      return call(uint32_t{0});
    default:
      return call(uint64_t{0});
  }
}

int64_t blocks_of(int64_t n) { return (n + kDeltaBlock - 1) / kDeltaBlock; }

// ---- buckets: the highest bit of a number and the kBits below it make its symbol, the rest is raw

template <int kBits>
unsigned raw_bits(uint64_t z) {
  return 63u - kBits - static_cast<unsigned>(__builtin_clzll(z | uint64_t{1} << kBits));
}
template <int kBits>
unsigned raw_bits_of_symbol(unsigned symbol) {
  return std::max(symbol >> kBits, 1u) - 1;
}
// The symbol of the largest number there is.
template <int kBits>
constexpr unsigned kLargest = std::min(255, ((63 - kBits) << kBits) + (2 << kBits) - 1);
uint64_t low_mask(unsigned bits) { return (uint64_t{1} << bits) - 1; }  // of less than 64

// number(i) for i in [0, n): its symbol, and its raw bits, which begin at a byte in each block.
template <int kBits, class Number>
void write_numbers(int64_t n, const Number& number, uint8_t* symbols, Threads threads,
                   const Allocate& allocate) {
  const int64_t blocks = blocks_of(n);
  std::vector<int64_t> starts(static_cast<size_t>(blocks) + 1, 0);
  in_parts(threads, blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t end = std::min(n, (b + 1) * kDeltaBlock);
      int64_t bits = 0;
      for (int64_t i = b * kDeltaBlock; i < end; ++i) {
        const uint64_t z = number(i);
        const unsigned raw = raw_bits<kBits>(z);
        symbols[i] = static_cast<uint8_t>((raw << kBits) + (z >> raw));
        bits += raw;
      }
      starts[static_cast<size_t>(b) + 1] = (bits + 7) / 8;
    }
  });
  for (size_t b = 0; b < static_cast<size_t>(blocks); ++b) starts[b + 1] += starts[b];
  uint8_t* const out = allocate(starts.back());
  in_parts(threads, blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t end = std::min(n, (b + 1) * kDeltaBlock);
      uint8_t* p = out + starts[static_cast<size_t>(b)];
      uint8_t* const stop = out + starts[static_cast<size_t>(b) + 1];
      if (p == stop) continue;
      uint64_t filled = 0;
      unsigned fill = 0;
      int64_t i = b * kDeltaBlock;
      // Eight bytes at a time, while they are this block's.
      for (; i < end && stop - p >= 16; ++i) {
        const uint64_t z = number(i);
        const unsigned raw = raw_bits<kBits>(z);
        const uint64_t v = z & low_mask(raw);
        filled |= v << fill;
        store(p, filled);
        const unsigned sum = fill + raw;
        filled = sum >= 64 ? v >> 1 >> (63 - fill) : filled;
        p += sum >> 6 << 3;
        fill = sum & 63;
      }
      uint8_t tail[32] = {};
      uint8_t* const here = p;
      p = tail;
      for (; i < end; ++i) {
        const uint64_t z = number(i);
        const unsigned raw = raw_bits<kBits>(z);
        const uint64_t v = z & low_mask(raw);
        filled |= v << fill;
        const unsigned sum = fill + raw;
        if (sum >= 64) {
          store(p, filled);
          filled = v >> 1 >> (63 - fill);
          p += 8;
        }
        fill = sum & 63;
      }
      store(p, filled);
      std::memcpy(here, tail, static_cast<size_t>(stop - here));
    }
  });
}

// Where the raw bits of each block begin; false unless they are as many as there are bytes.
template <int kBits>
bool find_starts(const uint8_t* symbols, int64_t n, int64_t raw_bytes, Threads threads,
                 std::vector<int64_t>* starts) {
  const int64_t blocks = blocks_of(n);
  starts->assign(static_cast<size_t>(blocks) + 1, 0);
  std::atomic<bool> good = true;
  in_parts(threads, blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t end = std::min(n, (b + 1) * kDeltaBlock);
      uint32_t bits = 0;  // at most 2^15 * 61
      uint8_t largest = 0;
      for (int64_t i = b * kDeltaBlock; i < end; ++i) {
        bits += raw_bits_of_symbol<kBits>(symbols[i]);
        largest = std::max(largest, symbols[i]);
      }
      if (largest > kLargest<kBits>) good = false;
      (*starts)[static_cast<size_t>(b) + 1] = (bits + 7) / 8;
    }
  });
  for (size_t b = 0; b < static_cast<size_t>(blocks); ++b) (*starts)[b + 1] += (*starts)[b];
  return good && starts->back() == raw_bytes;
}

// Calls see(i, z) for the numbers of block b; returns false where spare bits are not 0.
template <int kBits, class See>
bool read_block(const uint8_t* symbols, int64_t n, const uint8_t* raw, int64_t raw_bytes,
                const std::vector<int64_t>& starts, int64_t b, const See& see) {
  const int64_t begin = b * kDeltaBlock, end = std::min(n, begin + kDeltaBlock);
  const int64_t start = starts[static_cast<size_t>(b)];
  const int64_t bytes = starts[static_cast<size_t>(b) + 1] - start;
  const uint8_t* base = raw + start;
  std::vector<uint8_t> padded;
  if (raw_bytes - start - bytes < 16) {  // the loop reads up to 16 bytes past the last bit
    padded.assign(static_cast<size_t>(bytes) + 16, 0);
    if (bytes > 0) std::memcpy(padded.data(), base, static_cast<size_t>(bytes));
    base = padded.data();
  }
  uint64_t at = 0;
  for (int64_t i = begin; i < end; ++i) {
    const unsigned symbol = symbols[i], bits = raw_bits_of_symbol<kBits>(symbol);
    const uint8_t* p = base + (at >> 3);
    const unsigned shift = at & 7;
    const uint64_t word = load<uint64_t>(p) >> shift | uint64_t{p[8]} << 1 << (63 - shift);
    const uint64_t z = uint64_t{symbol - (bits << kBits)} << bits | (word & low_mask(bits));
    at += bits;
    if (!see(i, z)) return false;
  }
  return (at & 7) == 0 || base[at >> 3] >> (at & 7) == 0;
}

template <class T>
uint64_t difference(T now, T before, bool use_xor) {
  if (use_xor) return static_cast<T>(now ^ before);
  // The distance around the circle, its sign in the lowest bit: small numbers for small steps.
  const T d = static_cast<T>(now - before);
  const T sign = static_cast<T>(0 - (d >> (8 * sizeof(T) - 1)));
  return static_cast<T>(static_cast<T>(d << 1) ^ sign);
}
template <class T>
T changed(T before, T z, bool use_xor) {
  if (use_xor) return static_cast<T>(before ^ z);
  const T sign = static_cast<T>(0 - (z & 1));
  return static_cast<T>(before + static_cast<T>(static_cast<T>(z >> 1) ^ sign));
}

constexpr int64_t kCompareBlock = 1 << 16;  // units
constexpr int64_t kClassWords = 32;         // of 64 units, whose masks are made at once

uint64_t word_product(uint64_t w, uint64_t index) {
  const uint64_t key = kFingerprintKey * (index + 1);
  const uint64_t lo = static_cast<uint32_t>(w + key);
  const uint64_t hi = static_cast<uint32_t>((w >> 32) + (key >> 32));
  return lo * hi;
}

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
  in_parts(threads, (bytes + kBlock - 1) / kBlock, 4, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kBlock, end = std::min(bytes, last * kBlock);
    sum += kernel->fingerprint(data + begin, end - begin, begin / 8);
  });
  return sum;
}

int64_t find_changes(const DeltaKernel* kernel, int unit, const uint8_t* new_data,
                     const uint8_t* old_data, int64_t n, int64_t most, uint64_t* sums,
                     Threads threads, const std::function<Changes(int64_t)>& allocate) {
  const int64_t blocks = (n + kCompareBlock - 1) / kCompareBlock;
  std::vector<uint64_t> mask(static_cast<size_t>((n + 63) / 64));
  std::vector<int64_t> counts(static_cast<size_t>(blocks) + 1, 0);
  std::atomic<uint64_t> sum_new = 0, sum_old = 0;
  in_parts(threads, blocks, 4, [&](int64_t first, int64_t last) {
    uint64_t both[2] = {0, 0};
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * kCompareBlock, count = std::min(kCompareBlock, n - begin);
      counts[static_cast<size_t>(b) + 1] =
          kernel->compare(unit, new_data + begin * unit, old_data + begin * unit, count * unit,
                          begin * unit / 8, mask.data() + begin / 64, both);
    }
    sum_new += both[0];
    sum_old += both[1];
  });
  sums[0] = sum_new;
  sums[1] = sum_old;
  for (size_t b = 0; b < static_cast<size_t>(blocks); ++b) counts[b + 1] += counts[b];
  const int64_t total = counts.back();
  const Changes out = allocate(total <= most ? total : 0);
  if (total > most || total == 0) return total;
  with_unit(unit, [&](auto zero) {
    using T = decltype(zero);
    in_parts(threads, blocks, 4, [&](int64_t first, int64_t last) {
      int64_t k = counts[static_cast<size_t>(first)];
      const int64_t words = std::min<int64_t>((n + 63) / 64, last * kCompareBlock / 64);
      for (int64_t w = first * kCompareBlock / 64; w < words; ++w) {
        for (uint64_t m = mask[static_cast<size_t>(w)]; m != 0; m &= m - 1, ++k) {
          const int64_t at = 64 * w + __builtin_ctzll(m);
          out.positions[k] = at;
          store(out.new_values + k * unit, load<T>(new_data + at * unit));
          store(out.old_values + k * unit, load<T>(old_data + at * unit));
        }
      }
    });
  });
  return total;
}

void write_gaps(const int64_t* positions, int64_t n, uint8_t* symbols, Threads threads,
                const Allocate& allocate) {
  auto gap = [&](int64_t i) {
    const int64_t before = i ? positions[i - 1] : -1;
    return static_cast<uint64_t>(positions[i] - before - 1);
  };
  write_numbers<kGapBits>(n, gap, symbols, threads, allocate);
}

void write_values(int unit, const uint8_t* new_values, const uint8_t* old_values, int64_t n,
                  bool use_xor, uint8_t* symbols, Threads threads, const Allocate& allocate) {
  with_unit(unit, [&](auto zero) {
    using T = decltype(zero);
    auto number = [&](int64_t i) {
      const int64_t at = i * static_cast<int64_t>(sizeof(T));
      return difference(load<T>(new_values + at), load<T>(old_values + at), use_xor);
    };
    write_numbers<kValueBits>(n, number, symbols, threads, allocate);
  });
}

bool read_gaps(const uint8_t* symbols, int64_t n, const uint8_t* raw, int64_t raw_bytes,
               int64_t limit, int64_t* positions, Threads threads) {
  std::vector<int64_t> starts;
  if (!find_starts<kGapBits>(symbols, n, raw_bytes, threads, &starts)) return false;
  // In each block from 0; a gap is less than 2^34, so that the sums of a block fit.
  const int64_t blocks = blocks_of(n);
  std::atomic<bool> good = true;
  in_parts(threads, blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      int64_t next = 0;
      const bool read =
          read_block<kGapBits>(symbols, n, raw, raw_bytes, starts, b, [&](int64_t i, uint64_t z) {
            next += static_cast<int64_t>(z) + 1;
            positions[i] = next - 1;
            return true;
          });
      if (!read) good = false;
    }
  });
  if (!good) return false;
  std::vector<int64_t> base(static_cast<size_t>(blocks) + 1, 0);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t last = positions[std::min(n, (b + 1) * kDeltaBlock) - 1];
    const int64_t before = base[static_cast<size_t>(b)];
    if (last >= limit - before) return false;
    base[static_cast<size_t>(b) + 1] = before + last + 1;
  }
  in_parts(threads, blocks - 1, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = (first + 1) * kDeltaBlock; i < std::min(n, (last + 1) * kDeltaBlock); ++i) {
      positions[i] += base[static_cast<size_t>(i / kDeltaBlock)];
    }
  });
  return true;
}

bool read_values(int unit, const uint8_t* old_data, const int64_t* positions,
                 const uint8_t* symbols, int64_t n, const uint8_t* raw, int64_t raw_bytes,
                 bool use_xor, uint8_t* values, Threads threads) {
  std::vector<int64_t> starts;
  if (!find_starts<kValueBits>(symbols, n, raw_bytes, threads, &starts)) return false;
  std::atomic<bool> good = true;
  with_unit(unit, [&](auto zero) {
    using T = decltype(zero);
    in_parts(threads, blocks_of(n), 4, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        uint64_t most = 0;
        const bool read = read_block<kValueBits>(
            symbols, n, raw, raw_bytes, starts, b, [&](int64_t i, uint64_t z) {
              const int64_t from = (positions ? positions[i] : i) * unit;
              most |= z;
              store(values + i * unit,
                    changed(load<T>(old_data + from), static_cast<T>(z), use_xor));
              return true;
            });
        if (!read || static_cast<T>(most) != most) good = false;
      }
    });
  });
  return good;
}

uint64_t fingerprint_change(int unit, const uint8_t* data, int64_t n, const int64_t* positions,
                            const uint8_t* values, int64_t count) {
  uint64_t sum = 0;
  const int64_t bytes = n * unit;
  for (int64_t i = 0; i < count;) {
    const int64_t word = positions[i] * unit / 8;
    uint64_t before = 0;
    std::memcpy(&before, data + 8 * word,
                static_cast<size_t>(std::min<int64_t>(8, bytes - 8 * word)));
    uint64_t now = before;
    for (; i < count && positions[i] * unit / 8 == word; ++i) {
      std::memcpy(reinterpret_cast<uint8_t*>(&now) + positions[i] * unit % 8, values + i * unit,
                  static_cast<size_t>(unit));
    }
    sum += word_product(now, static_cast<uint64_t>(word)) -
           word_product(before, static_cast<uint64_t>(word));
  }
  return sum;
}

namespace {

// Calls see(word, masks) for each 64 units: for each class which of them have it.
template <class See>
bool each_word(const DeltaKernel* kernel, int unit, const uint8_t* data, int64_t n,
               const uint8_t* map, int classes, const See& see) {
  uint64_t masks[kClassWords * kMaxClasses];
  const int64_t whole = n / 64, words = (n + 63) / 64;
  for (int64_t w = 0; w < words;) {
    const int64_t here = std::min(kClassWords, whole - w);
    if (here > 0) {
      kernel->class_masks(unit, data + w * 64 * unit, here, map, classes, masks);
      for (int64_t j = 0; j < here; ++j) {
        if (!see(w + j, masks + j * classes)) return false;
      }
      w += here;
      continue;
    }
    uint8_t last[64 * 8] = {};
    std::memcpy(last, data + w * 64 * unit, static_cast<size_t>((n - w * 64) * unit));
    kernel->class_masks(unit, last, 1, map, classes, masks);
    for (int c = 0; c < classes; ++c) masks[c] &= low_mask(static_cast<unsigned>(n - w * 64));
    return see(w, masks);
  }
  return true;
}

}  // namespace

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
  int64_t next[kMaxClasses], seen[kMaxClasses] = {};
  for (int64_t c = 0, at = 0; c < kMaxClasses; at += counts[c++]) next[c] = at;
  int64_t i = 0;
  each_word(kernel, unit, data, n, map, classes, [&](int64_t w, const uint64_t* masks) {
    for (; i < count && positions[i] < 64 * (w + 1); ++i) {
      const int c = of[static_cast<size_t>(i)];
      const uint64_t below = masks[c] & low_mask(static_cast<unsigned>(positions[i] & 63));
      order[next[c]] = i;
      ranks[next[c]++] = seen[c] + __builtin_popcountll(below);
    }
    for (int c = 0; c < classes; ++c) seen[c] += __builtin_popcountll(masks[c]);
    return i < count;
  });
  return true;
}

bool find_places(const DeltaKernel* kernel, int unit, const uint8_t* data, int64_t n,
                 const uint8_t* map, int classes, const int64_t* counts, const int64_t* ranks,
                 int64_t* positions, int64_t* order) {
  int64_t next[kMaxClasses], end[kMaxClasses], seen[kMaxClasses] = {}, left = 0;
  for (int c = 0; c < classes; left += counts[c++]) {
    next[c] = left;
    end[c] = left + counts[c];
  }
  int64_t found = 0;
  each_word(kernel, unit, data, n, map, classes, [&](int64_t w, const uint64_t* masks) {
    uint64_t all = 0;
    uint8_t which[64];
    for (int c = 0; c < classes; ++c) {
      const int64_t before = seen[c];
      seen[c] += __builtin_popcountll(masks[c]);
      if (next[c] == end[c] || ranks[next[c]] >= seen[c]) continue;
      uint64_t rest = masks[c];
      int64_t rank = before;
      do {
        for (; rank < ranks[next[c]]; ++rank) rest &= rest - 1;
        const int bit = __builtin_ctzll(rest);
        all |= uint64_t{1} << bit;
        which[bit] = static_cast<uint8_t>(c);
        positions[next[c]++] = 64 * w + bit;
      } while (next[c] < end[c] && ranks[next[c]] < seen[c]);
    }
    // In the order of positions: `next` tells how many of a class are done, so count anew.
    if (all != 0) {
      int64_t at[kMaxClasses];
      for (int c = 0; c < classes; ++c) at[c] = next[c];
      for (uint64_t m = all; m != 0; m &= m - 1) --at[which[__builtin_ctzll(m)]];
      for (uint64_t m = all; m != 0; m &= m - 1) order[found++] = at[which[__builtin_ctzll(m)]]++;
    }
    return found < left;
  });
  return found == left;
}

}  // namespace cfl::codec
