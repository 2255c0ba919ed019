// Fuzzes the reader of docs/format.md with bytes that may be anything: it must return an error or
// the symbols, touch no memory that is not its own, and allocate nothing that the bytes do not
// back.
//
// The first byte of an input chooses what happens to the rest:
//   bits 0-1  instruction set; bit 2  repair length and checksums, so that mutations reach the code
//   table and the bits behind them; bit 3  decode a slice to float32; bit 4  instead encode the
//   rest as symbols and demand them back, then flip one bit of the payload and demand an error;
//   bit 5  weights share a range beyond their chunk; bit 6  a lossless blob instead of a payload,
//   where bits 0-2 and 4 mean the same, and bit 3 a slice.
//
// With clang this is a libFuzzer target. Without it (CFL_FUZZ_STANDALONE), main() mutates valid
// payloads.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/codec_lossless.h"
#include "cpu/codec_payload.h"
#include "cpu/codec_work.h"

namespace {

using namespace cfl::codec;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "codec_fuzz: %s\n", what);
  std::abort();
}

std::vector<uint8_t> encode(const void* symbols, int symbol_size, int64_t n, int chunk_log2,
                            const Kernel* kernel) {
  std::vector<uint8_t> out;
  Symbols all;
  all.size = symbol_size;
  all.n = n;
  all.data = static_cast<const uint8_t*>(symbols);
  const int64_t size = encode_payload(all, &n, 1, chunk_log2, kernel, {}, [&](int64_t bytes) {
    out.assign(static_cast<size_t>(bytes), 0);
    return out.data();
  });
  if (size < 0) fail("no code was built");
  out.resize(static_cast<size_t>(size));
  return out;
}

// Makes the checksum of the header fit what it says.
void repair_checksum(std::vector<uint8_t>* payload, const Kernel* kernel) {
  uint8_t* p = payload->data();
  const uint64_t size = payload->size();
  if (size < static_cast<uint64_t>(kHeaderBytes) || p[7] > kMaxChunkLog2) return;
  const uint64_t numel = load<uint64_t>(p + 8) % (1 << 20);
  const uint64_t chunks = (numel + (1ull << p[7]) - 1) >> p[7];
  const uint64_t head =
      kHeaderBytes + 8ull * load<uint32_t>(p + 28) + load<uint32_t>(p + 32) + 8 * chunks;
  if (head > size) return;
  const uint32_t crc = kernel->crc32(kernel->crc32(0, p, kHeaderBytes - 4), p + kHeaderBytes,
                                     static_cast<int64_t>(head) - kHeaderBytes);
  store<uint32_t>(p + kHeaderBytes - 4, crc);
}

// Makes length and checksums fit what the bytes say, where there is room for that.
void repair(std::vector<uint8_t>* payload, const Kernel* kernel) {
  uint8_t* p = payload->data();
  const uint64_t size = payload->size();
  if (size < static_cast<uint64_t>(kHeaderBytes)) return;
  std::memcpy(p, "CFLH\x01\x01", 6);
  p[6] = static_cast<uint8_t>(1 + p[6] % 2);
  if (p[7] != 15) p[7] = static_cast<uint8_t>(kMinChunkLog2 + p[7] % 4);
  store<uint64_t>(p + 16, size);
  const uint64_t numel = load<uint64_t>(p + 8) % (1 << 16);
  store<uint64_t>(p + 8, numel);
  const uint64_t ndim = load<uint32_t>(p + 28) % 4, table = load<uint32_t>(p + 32) % 600;
  store<uint32_t>(p + 28, static_cast<uint32_t>(ndim));
  store<uint32_t>(p + 32, static_cast<uint32_t>(table));
  const uint64_t chunks = (numel + (1ull << p[7]) - 1) >> p[7];
  const uint64_t head = kHeaderBytes + 8 * ndim + table + 8 * chunks;
  if (head > size) return;
  if (ndim == 1) store<uint64_t>(p + kHeaderBytes, numel);
  uint64_t at = head;
  for (uint64_t c = 0; c < chunks; ++c) {
    uint8_t* entry = p + head - 8 * (chunks - c);
    const uint64_t bytes =
        c + 1 == chunks ? size - at : std::min<uint64_t>(load<uint32_t>(entry), size - at);
    store<uint32_t>(entry, static_cast<uint32_t>(bytes));
    store<uint32_t>(entry + 4, kernel->crc32(0, p + at, static_cast<int64_t>(bytes)));
    at += bytes;
  }
  repair_checksum(payload, kernel);
}

void decode(const std::vector<uint8_t>& payload, bool to_float, int64_t group_size,
            const Kernel* kernel) {
  Header header;
  const int64_t size = static_cast<int64_t>(payload.size());
  if (parse(payload.data(), size, &header, kernel) != kGood) return;
  // Each chunk of at most 2^20 symbols is backed by its 8 bytes of chunk table.
  if (header.numel > size / 8 * (int64_t{1} << kMaxChunkLog2))
    fail("more symbols than the bytes back");
  if (header.numel > 1 << 20) return;
  const int64_t start = to_float ? header.numel / 3 : 0, count = header.numel - start;
  // Exactly as large as promised, so that the sanitizer sees a write behind its end.
  std::vector<uint8_t> out(static_cast<size_t>(count * (to_float ? 4 : header.symbol_size)));
  Weights weights;
  weights.group_size = group_size;
  weights.affine = [](int64_t, int* wide) {
    *wide = 0;
    return Affine{-1, 1, 0.5, 1, 1, 255};
  };
  decode_payload(payload.data(), size, start, count, out.data(), header.symbol_size,
                 to_float ? &weights : nullptr, kernel, {});
}

void round_trip(const uint8_t* data, int64_t size, const Kernel* kernel) {
  if (size < 3) return;
  const int symbol_size = 1 + data[0] % 2, chunk_log2 = kMinChunkLog2 + data[0] / 2 % 3;
  const uint32_t flip = load<uint16_t>(data + 1);
  const int64_t n = (size - 3) / symbol_size;
  std::vector<uint8_t> symbols(data + 3, data + 3 + n * symbol_size), out(symbols.size());
  if (symbol_size == 2) {  // alphabets of a few thousand
    for (int64_t i = 0; i < n; ++i) symbols[2 * i + 1] &= 15;
  }
  std::vector<uint8_t> payload = encode(symbols.data(), symbol_size, n, chunk_log2, kernel);
  const int64_t bytes = static_cast<int64_t>(payload.size());
  auto read = [&] {
    return decode_payload(payload.data(), bytes, 0, n, out.data(), symbol_size, nullptr, kernel,
                          {});
  };
  if (read() != kGood || out != symbols) fail("the symbols did not come back");
  payload[flip / 8 % payload.size()] ^= static_cast<uint8_t>(1 << flip % 8);
  if (read() == kGood && n > 0) fail("a flipped bit went unseen");
}

// ---- lossless blobs
// -----------------------------------------------------------------------------------

std::vector<uint8_t> encode_blob(const uint8_t* data, int dtype, int64_t numel,
                                 const Kernel* kernel) {
  std::vector<uint8_t> out;
  const int64_t size =
      encode_lossless(data, dtype, {numel}, kernel, {}, [&](int64_t bytes, int64_t kept) {
        if (kept > static_cast<int64_t>(out.size()) || bytes < kept) fail("lost what was written");
        // Exactly as large as asked for, so that the sanitizer sees a write behind its end.
        std::vector<uint8_t> larger(static_cast<size_t>(bytes));
        std::copy_n(out.begin(), kept, larger.begin());
        out = std::move(larger);
        return out.data();
      });
  out.resize(static_cast<size_t>(size));
  return out;
}

// Makes lengths and checksums fit what the bytes say, as far as there is room for that.
void repair_blob(std::vector<uint8_t>* blob, const Kernel* kernel) {
  constexpr int64_t kFixed = 56;
  uint8_t* b = blob->data();
  const int64_t size = static_cast<int64_t>(blob->size());
  if (size < kFixed) return;
  std::memcpy(b, "CFLC\x03\x03", 6);
  b[6] = static_cast<uint8_t>(b[6] % kDtypes);
  b[7] = 15;
  store<uint64_t>(b + 8, static_cast<uint64_t>(size));
  const Element element = element_of(b[6]);
  const int64_t numel = 1 + static_cast<int64_t>(load<uint64_t>(b + 16) % (1 << 17));
  store<uint64_t>(b + 16, static_cast<uint64_t>(numel));
  std::memset(b + 32, 0, 16);
  const uint32_t ndim = load<uint32_t>(b + 48) % 3;
  store<uint32_t>(b + 48, ndim);
  int64_t at = kFixed;
  auto seal = [&] {
    store<uint64_t>(b + 24, static_cast<uint64_t>(at - kFixed));
    const uint32_t crc = kernel->crc32(0, b, kFixed - 4);
    store<uint32_t>(b + kFixed - 4, kernel->crc32(crc, b + kFixed, at - kFixed));
  };
  for (uint32_t d = 0; d < ndim; ++d) {
    while (at < size && b[at] >= 128) ++at;
    at = std::min(at + 1, size);
  }
  const int64_t n = numel * element.per, chunk = kLosslessChunk, chunks = (n + chunk - 1) / chunk;
  std::vector<int64_t> stored(static_cast<size_t>(chunks), 0);
  int64_t tables = 0, in_store = 0;
  for (int p = 0; p < element.lanes.width; ++p) {
    if (at + 1 + chunks > size) return seal();
    const uint8_t count = b[at] = static_cast<uint8_t>(b[at] % (kMaxTables + 1));
    uint8_t* map = b + ++at;
    for (int64_t c = 0; c < chunks; ++c) {
      if (count) map[c] = static_cast<uint8_t>(map[c] % (count + 1));
      if (count && map[c]) continue;
      stored[static_cast<size_t>(c)] += std::min(chunk, n - c * chunk);
    }
    if (count) at += chunks;
    tables += count;
  }
  uint8_t* sizes = b + at;
  at += 8 * tables + 4 * chunks;
  for (int64_t bytes : stored) in_store += bytes;
  if (at > size || in_store > size - at) {
    at = std::min(at, size);
    return seal();
  }
  int64_t payload = at + in_store;
  for (int64_t t = 0; t < tables; ++t) {
    const int64_t left = size - payload;
    const auto asked = std::min(load<uint64_t>(sizes + 8 * t), static_cast<uint64_t>(left));
    const int64_t bytes = t + 1 == tables ? left : static_cast<int64_t>(asked);
    store<uint64_t>(sizes + 8 * t, static_cast<uint64_t>(bytes));
    std::vector<uint8_t> inner(b + payload, b + payload + bytes);
    repair(&inner, kernel);
    if (bytes > 7) inner[7] = 15;
    repair_checksum(&inner, kernel);
    std::copy(inner.begin(), inner.end(), b + payload);
    payload += bytes;
  }
  for (int64_t c = 0, from = at; c < chunks; ++c) {
    const int64_t bytes = stored[static_cast<size_t>(c)];
    store<uint32_t>(sizes + 8 * tables + 4 * c, kernel->crc32(0, b + from, bytes));
    from += bytes;
  }
  seal();
}

void decode_blob(const std::vector<uint8_t>& blob, bool slice, const Kernel* kernel) {
  Lossless head;
  const int64_t size = static_cast<int64_t>(blob.size());
  if (parse_lossless(blob.data(), size, &head, kernel) != kGood) return;
  if (head.n > size * kLosslessChunk) fail("more lanes than the bytes back");
  if (head.n > 1 << 20) return;
  const int64_t start = slice ? head.numel / 3 : 0, count = head.numel - start - (slice ? 1 : 0);
  if (count < 0) return;
  std::vector<uint8_t> out(static_cast<size_t>(count * head.element.size()));
  decode_lossless(blob.data(), size, start, count, out.data(), kernel, {});
}

void round_trip_blob(const uint8_t* data, int64_t size, const Kernel* kernel) {
  if (size < 4) return;
  const int dtype = data[0] % kDtypes;
  const int64_t element = element_of(dtype).size(), flip = load<uint16_t>(data + 1);
  // Some are repeated, to more than a chunk.
  std::vector<uint8_t> bytes(data + 4, data + size);
  if (data[3] % 8 == 0 && !bytes.empty()) {
    while (static_cast<int64_t>(bytes.size()) < 40000 * element) {
      bytes.insert(bytes.end(), data + 4, data + size);
      for (size_t i = bytes.size(); i-- > bytes.size() - std::min<size_t>(bytes.size(), 16);) {
        bytes[i] ^= data[3];
      }
    }
  }
  const int64_t numel = static_cast<int64_t>(bytes.size()) / element;
  if (numel == 0) return;
  bytes.resize(static_cast<size_t>(numel * element));
  std::vector<uint8_t> blob = encode_blob(bytes.data(), dtype, numel, kernel), out(bytes.size());
  if (blob.empty()) return;
  if (blob.size() >= bytes.size() + 64) fail("a blob larger than the bytes as they are");
  const int64_t coded = static_cast<int64_t>(blob.size());
  auto read = [&] { return decode_lossless(blob.data(), coded, 0, numel, out.data(), kernel, {}); };
  if (read() != kGood || out != bytes) fail("the elements did not come back");
  blob[static_cast<size_t>(flip / 8 % coded)] ^= static_cast<uint8_t>(1 << flip % 8);
  if (read() == kGood) fail("a flipped bit went unseen");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  const int mode = data[0];
  const Kernel* kernel = kernel_at_most(mode & 3);
  if (mode & 64) {
    if (mode & 16) {
      round_trip_blob(data + 1, static_cast<int64_t>(size) - 1, kernel);
      return 0;
    }
    std::vector<uint8_t> blob(data + 1, data + size);
    if (mode & 4) repair_blob(&blob, kernel);
    decode_blob(blob, mode & 8, kernel);
    return 0;
  }
  if (mode & 16) {
    round_trip(data + 1, static_cast<int64_t>(size) - 1, kernel);
    return 0;
  }
  std::vector<uint8_t> payload(data + 1, data + size);
  if (mode & 4) repair(&payload, kernel);
  decode(payload, mode & 8, mode & 32 ? 5000 : 100, kernel);
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
    const int symbol_size = 1 + static_cast<int>(random() % 2);
    const int64_t n = static_cast<int64_t>(random() % 3000);
    std::vector<uint8_t> symbols(static_cast<size_t>(n * symbol_size));
    const uint64_t spread = 1 + random() % 255;
    for (size_t i = 0; i < symbols.size(); ++i) {
      symbols[i] = static_cast<uint8_t>(
          i % symbol_size ? random() % 4 : random() % spread * (random() % spread) / spread);
    }
    const bool lossless = random() % 2 == 0;
    std::vector<uint8_t> input;
    if (lossless && random() % 4 != 0) {
      const int dtype = static_cast<int>(random() % kDtypes);
      const int64_t element = element_of(dtype).size();
      const int64_t numel = static_cast<int64_t>(symbols.size()) / element;
      if (numel > 0) input = encode_blob(symbols.data(), dtype, numel, kernel_at_most(0));
    }
    if (input.empty()) {
      input = lossless ? symbols
                       : encode(symbols.data(), symbol_size, n, kMinChunkLog2, kernel_at_most(0));
    }
    if (input.empty()) input.push_back(0);
    for (uint64_t edits = random() % 8; edits > 0; --edits) {
      input[random() % input.size()] = static_cast<uint8_t>(random());
    }
    if (random() % 4 == 0) input.resize(random() % (input.size() + 1));
    input.insert(input.begin(), static_cast<uint8_t>(random() % 32 + (lossless ? 64 : 0)));
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("codec_fuzz: %lld mutated payloads and blobs, no failure\n",
              static_cast<long long>(runs));
}
#endif
