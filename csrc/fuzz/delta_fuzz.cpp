// Fuzzes the C++ parts of the reader of deltas (codec_delta.h) with bytes that may be anything: it
// must say no or give numbers within their limits, and touch no memory that is not its own. What it
// reads is written again, and must come out as it was.
//
// The first byte of an input chooses: bits 0-1 instruction set; bits 2-3 bytes of a unit; bit 4
// XOR; bits 5-6 what is read: gaps, values of all, gaps and values at them, classes.
// The second byte: the limit, the shift, how many classes; then two bytes: how many symbols come
// before the raw bits.
//
// With clang this is a libFuzzer target. Without it (CFL_FUZZ_STANDALONE), main() makes inputs.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/codec_delta.h"

namespace {

using namespace cfl::codec;
using Bytes = std::vector<uint8_t>;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "delta_fuzz: %s\n", what);
  std::abort();
}

struct Split {
  Bytes symbols, raw;
  Allocate allocate() {
    return [this](int64_t bytes) {
      raw.assign(static_cast<size_t>(bytes), 0);
      return raw.data();
    };
  }
};

int64_t size_of(const Bytes& bytes) { return static_cast<int64_t>(bytes.size()); }

// Positions, where the bytes are those of positions below n; written again they give the bytes.
bool gaps(const DeltaKernel* kernel, const Split& in, int64_t n, std::vector<int64_t>* positions) {
  const int64_t count = size_of(in.symbols);
  positions->assign(in.symbols.size(), -1);
  if (!read_gaps(kernel, in.symbols.data(), count, in.raw.data(), size_of(in.raw), n,
                 positions->data(), {})) {
    return false;
  }
  for (size_t i = 0; i < positions->size(); ++i) {
    const int64_t before = i ? (*positions)[i - 1] : -1;
    if ((*positions)[i] <= before || (*positions)[i] >= n) fail("a position out of order");
  }
  Split out;
  out.symbols.resize(in.symbols.size());
  write_gaps(kernel, positions->data(), count, out.symbols.data(), {}, out.allocate());
  if (out.symbols != in.symbols || out.raw != in.raw) fail("gaps did not come back");
  return true;
}

void values(const DeltaKernel* kernel, int unit, const Split& in, const Bytes& old_data,
            const std::vector<int64_t>* positions, bool use_xor, int shift) {
  const int64_t count = size_of(in.symbols);
  Bytes found(in.symbols.size() * static_cast<size_t>(unit));
  if (!read_values(kernel, unit, old_data.data(), positions ? positions->data() : nullptr,
                   in.symbols.data(), count, in.raw.data(), size_of(in.raw), use_xor, shift,
                   found.data(), {})) {
    return;
  }
  const int64_t n = size_of(old_data) / unit;
  Bytes before(found.size());
  Bytes after = old_data;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (positions ? (*positions)[static_cast<size_t>(i)] : i) * unit;
    std::copy_n(old_data.data() + at, unit, before.data() + i * unit);
    std::copy_n(found.data() + i * unit, unit, after.data() + at);
  }
  if (positions) {
    const uint64_t change =
        kernel->change(unit, old_data.data(), n * unit, positions->data(), found.data(), count);
    const uint64_t sum = fingerprint(kernel, after.data(), n * unit, {});
    if (sum - fingerprint(kernel, old_data.data(), n * unit, {}) != change) {
      fail("the fingerprint's change is wrong");
    }
  }
  if (shift) return;  // what a large number loses does not come back
  Split out;
  out.symbols.resize(in.symbols.size());
  write_values(kernel, unit, found.data(), before.data(), count, use_xor, 0, out.symbols.data(), {},
               out.allocate());
  if (out.symbols != in.symbols || out.raw != in.raw) fail("values did not come back");
}

void classes(const DeltaKernel* kernel, int unit, const Bytes& old_data, const uint8_t* choice,
             int64_t choices, int count) {
  const int64_t n = size_of(old_data) / unit;
  uint8_t map[256];
  for (int v = 0; v < 256; ++v) {
    const int c = choices ? choice[v % choices] % (count + 1) : 0;
    map[v] = c == count ? 255 : static_cast<uint8_t>(c);
  }
  std::vector<int64_t> wanted;
  for (int64_t i = 0; i < n; ++i) {
    const bool has = map[context_of(unit, old_data.data() + i * unit)] != 255;
    if (has && (choices == 0 || choice[i % choices] & 1)) wanted.push_back(i);
  }
  const auto many = static_cast<int64_t>(wanted.size());
  std::vector<int64_t> ranks(wanted.size()), order(wanted.size()), found(wanted.size()),
      sorted(wanted.size());
  int64_t counts[kMaxClasses];
  if (!find_ranks(kernel, unit, old_data.data(), n, map, wanted.data(), many, ranks.data(),
                  order.data(), counts)) {
    fail("a position without a class");
  }
  if (!find_places(kernel, unit, old_data.data(), n, map, count, counts, ranks.data(), found.data(),
                   sorted.data())) {
    fail("places were not found");
  }
  for (int64_t i = 0; i < many; ++i) {
    if (found[static_cast<size_t>(sorted[static_cast<size_t>(i)])] !=
        wanted[static_cast<size_t>(i)]) {
      fail("places did not come back");
    }
  }
  if (many == 0) return;
  // Ranks beyond a class: refused, and nothing else.
  for (int64_t c = 0, at = 0; c < count; at += counts[c++]) {
    if (counts[c]) ranks[static_cast<size_t>(at + counts[c] - 1)] += n;
  }
  if (find_places(kernel, unit, old_data.data(), n, map, count, counts, ranks.data(), found.data(),
                  sorted.data())) {
    fail("a class has more than it has");
  }
}

void changes(const DeltaKernel* kernel, int unit, const Bytes& a, const Bytes& b) {
  const int64_t n = size_of(a) / unit;
  std::vector<int64_t> positions;
  Bytes now, before;
  uint64_t sums[3];
  const int64_t count =
      find_changes(kernel, unit, a.data(), b.data(), n, n, sums, {}, [&](int64_t found) {
        positions.resize(static_cast<size_t>(found));
        now.resize(static_cast<size_t>(found * unit));
        before.resize(now.size());
        return Changes{positions.data(), now.data(), before.data()};
      });
  Bytes made(b.begin(), b.begin() + n * unit);
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(now.data() + i * unit, unit,
                made.data() + positions[static_cast<size_t>(i)] * unit);
  }
  if (!std::equal(made.begin(), made.end(), a.begin())) fail("changes were missed");
  if (sums[0] != fingerprint(kernel, a.data(), n * unit, {})) fail("a fingerprint is wrong");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 4) return 0;
  const int mode = data[0], more = data[1];
  const DeltaKernel* kernel = delta_kernel(kernel_at_most(mode & 3));
  const int unit = 1 << (mode >> 2 & 3), shift = more % (8 * unit) & (more & 64 ? 63 : 0);
  const bool use_xor = mode & 16;
  const Bytes rest(data + 4, data + size);
  const size_t cut = static_cast<size_t>(data[2] | data[3] << 8) % (rest.size() + 1);
  const Split in = {Bytes(rest.begin(), rest.begin() + static_cast<int64_t>(cut)),
                    Bytes(rest.begin() + static_cast<int64_t>(cut), rest.end())};
  // The base: of as many bytes as needed, and not one more.
  auto base = [&](size_t units) {
    Bytes out(units * static_cast<size_t>(unit));
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = static_cast<uint8_t>(rest.empty() ? i : rest[i % rest.size()] + i / 64);
    }
    return out;
  };
  std::vector<int64_t> positions;
  switch (mode >> 5 & 3) {
    case 0:
      gaps(kernel, in, int64_t{1} << (more & 63), &positions);
      break;
    case 1:
      values(kernel, unit, in, base(in.symbols.size()), nullptr, use_xor, shift);
      break;
    case 2: {  // the first half of the symbols without raw bits are gaps
      Split where;
      for (uint8_t symbol : in.symbols) where.symbols.push_back(symbol & 15);
      if (!gaps(kernel, where, 1 << 20, &positions)) fail("small gaps were refused");
      const size_t units = positions.empty() ? 1 : static_cast<size_t>(positions.back()) + 1;
      values(kernel, unit, in, base(units), &positions, use_xor, shift);
      break;
    }
    default: {
      const Bytes old_data = base(rest.size() / static_cast<size_t>(unit) + 65);
      classes(kernel, unit, old_data, in.symbols.data(), size_of(in.symbols), 1 + more / 16);
      Bytes other = old_data;
      for (size_t i = 0; i < in.symbols.size(); ++i) other[i % other.size()] ^= in.symbols[i] & 3;
      changes(kernel, unit, other, old_data);
    }
  }
  return 0;
}

#ifdef CFL_FUZZ_STANDALONE
int main(int argc, char** argv) {
  const int64_t runs = argc > 1 ? std::atoll(argv[1]) : 20000;
  uint64_t state = 88172645463325252ull;
  auto random = [&] {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  };
  for (int64_t run = 0; run < runs; ++run) {
    // Symbols of about the size of what weights give, and the raw bytes that they ask for.
    const int kept = random() % 2 ? kGapBits : kValueBits;
    const uint64_t n = random() % 600, spread = 1 + random() % 256;
    Bytes symbols;
    int64_t bits = 0;
    for (uint64_t i = 0; i < n; ++i) {
      symbols.push_back(static_cast<uint8_t>(random() % spread * (random() % spread) / spread));
      bits += std::max(symbols.back() >> kept, 1) - 1;
    }
    Bytes input = {static_cast<uint8_t>(random()), static_cast<uint8_t>(random()),
                   static_cast<uint8_t>(n), static_cast<uint8_t>(n >> 8)};
    input.insert(input.end(), symbols.begin(), symbols.end());
    for (int64_t i = (bits + 7) / 8; i > 0; --i) input.push_back(static_cast<uint8_t>(random()));
    if (bits % 8 && random() % 8) input.back() &= static_cast<uint8_t>((1 << bits % 8) - 1);
    if (random() % 4 == 0) input.resize(4 + random() % (input.size() - 3));
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("delta_fuzz: %lld inputs, no failure\n", static_cast<long long>(runs));
}
#endif
