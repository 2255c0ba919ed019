#include "cpu/codec_lossless.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "cpu/codec_work.h"

namespace cfl::codec {
namespace {

constexpr char kMagic[4] = {'C', 'F', 'L', 'C'};
constexpr uint8_t kVersion = 3, kKind = 3, kChunkLog2 = 15;
constexpr int64_t kBlobBytes = 56, kMostRawDims = 13;
constexpr int64_t kChunk = kLosslessChunk;
static_assert(kChunk == int64_t{1} << kChunkLog2);

int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }
int64_t chunk_size(int64_t n, int64_t c) { return std::min(kChunk, n - c * kChunk); }

std::vector<uint8_t> pack_shape(const std::vector<int64_t>& shape) {
  std::vector<uint8_t> out;
  for (int64_t extent : shape) {
    auto value = static_cast<uint64_t>(extent);
    for (; value >= 128; value >>= 7) out.push_back(static_cast<uint8_t>(value & 127) | 128);
    out.push_back(static_cast<uint8_t>(value));
  }
  return out;
}

// Reads from a part of the head, never past its end.
struct Reader {
  const uint8_t *at, *end;

  const uint8_t* take(int64_t bytes) {
    if (bytes < 0 || bytes > end - at) return nullptr;
    const uint8_t* here = at;
    at += bytes;
    return here;
  }
  bool extent(int64_t* value) {
    uint64_t found = 0;
    for (int shift = 0;; shift += 7) {
      if (at == end || shift > 56) return false;
      const uint8_t byte = *at++;
      found |= static_cast<uint64_t>(byte & 127) << shift;
      if (byte < 128) {
        *value = static_cast<int64_t>(found);
        return byte != 0 || shift == 0;
      }
    }
  }
};

}  // namespace

Element element_of(int dtype) {
  struct Row {
    int width, per;
    bool rotated;
  };
  static constexpr Row rows[] = {
      {2, 1, true},  {2, 1, true},  {4, 1, true},  {8, 1, true},  {1, 1, false}, {1, 1, false},
      {1, 1, false}, {2, 1, false}, {4, 1, false}, {8, 1, false}, {2, 1, false}, {4, 1, false},
      {8, 1, false}, {4, 2, true},  {8, 2, true},  {1, 1, true},  {1, 1, true},  {2, 2, true}};
  // Then float8 and float4, and after them integers of less than a byte and bits, of which bits16
  // has two.
  const Row row = dtype < 18 ? rows[dtype] : Row{dtype == 37 ? 2 : 1, 1, dtype < 22};
  const Cut cut = !row.rotated ? Cut::kPlain : row.width == 8 ? Cut::kRebiased : Cut::kRotated;
  return {{row.width, cut}, row.per};
}

int64_t parse_lossless(const uint8_t* blob, int64_t size, Lossless* found, const Kernel* kernel) {
  if (size < kBlobBytes) return kTooShort;
  if (std::memcmp(blob, kMagic, 4) != 0) return kBadMagic;
  if (blob[4] != kVersion || blob[5] != kKind || blob[6] >= kDtypes || blob[7] != kChunkLog2) {
    return kBadVersion;
  }
  if (load<uint64_t>(blob + 8) != static_cast<uint64_t>(size)) return kBadLength;
  const uint64_t numel = load<uint64_t>(blob + 16), table = load<uint64_t>(blob + 24);
  const uint32_t ndim = load<uint32_t>(blob + 48);
  if (table > static_cast<uint64_t>(size - kBlobBytes)) return kBadHeader;
  const int64_t head = kBlobBytes + static_cast<int64_t>(table);
  uint32_t crc = kernel->crc32(0, blob, kBlobBytes - 4);
  crc = kernel->crc32(crc, blob + kBlobBytes, static_cast<int64_t>(table));
  if (crc != load<uint32_t>(blob + kBlobBytes - 4)) return kBadHeaderChecksum;
  if (ndim > kMaxDims || load<uint64_t>(blob + 32) != 0 || load<uint64_t>(blob + 40) != 0) {
    return kBadHeader;
  }
  found->dtype = blob[6];
  found->element = element_of(found->dtype);
  const int width = found->element.lanes.width, per = found->element.per;
  if (numel == 0 || numel > static_cast<uint64_t>(kMaxSymbols / per)) return kBadHeader;
  found->numel = static_cast<int64_t>(numel);
  found->n = found->numel * per;
  found->chunks = chunks_of(found->n);
  found->end = blob + size;

  Reader reader = {blob + kBlobBytes, blob + head};
  int64_t product = 1;
  found->shape.resize(ndim);
  for (int64_t& extent : found->shape) {
    if (!reader.extent(&extent) || extent == 0 || product > found->numel / extent) {
      return kBadHeader;
    }
    product *= extent;
  }
  if (product != found->numel) return kBadHeader;
  int tables[kMaxPlanes] = {};
  int64_t all = 0, in_store = 0;
  std::vector<int64_t> symbols[kMaxPlanes];
  for (int p = 0; p < width; ++p) {
    const uint8_t* count = reader.take(1);
    if (!count || *count > kMaxTables) return kBadHeader;
    tables[p] = *count;
    all += tables[p];
    found->map[p] = nullptr;
    if (tables[p] == 0) {
      in_store += found->n;
      continue;
    }
    const uint8_t* map = found->map[p] = reader.take(found->chunks);
    if (!map) return kBadHeader;
    symbols[p].assign(static_cast<size_t>(tables[p]) + 1, 0);
    for (int64_t c = 0; c < found->chunks; ++c) {
      if (map[c] > tables[p]) return kBadHeader;
      symbols[p][map[c]] += chunk_size(found->n, c);
    }
    in_store += symbols[p][0];
    for (int t = 1; t <= tables[p]; ++t) {
      if (symbols[p][static_cast<size_t>(t)] == 0) return kBadHeader;
    }
  }
  const uint8_t* sizes = reader.take(8 * all);
  found->checksums = sizes ? reader.take(4 * found->chunks) : nullptr;
  if (!found->checksums || reader.at != reader.end) return kBadHeader;
  found->stored = blob + head;
  if (in_store > size - head) return kBadHeader;
  const uint8_t* at = found->stored + in_store;
  for (int p = 0; p < width; ++p) {
    found->payloads[p] = std::vector<Header>(static_cast<size_t>(tables[p]));
    for (int t = 0; t < tables[p]; ++t, sizes += 8) {
      const uint64_t bytes = load<uint64_t>(sizes);
      // Its header, its shape, and the sizes and checksums of its chunks.
      const int64_t least =
          kHeaderBytes + 8 + 8 * chunks_of(symbols[p][static_cast<size_t>(t) + 1]);
      if (bytes > static_cast<uint64_t>(found->end - at) || bytes < static_cast<uint64_t>(least)) {
        return kBadHeader;
      }
      Header& header = found->payloads[p][static_cast<size_t>(t)];
      const int64_t error = parse(at, static_cast<int64_t>(bytes), &header, kernel);
      if (error != kGood) return error;
      if (header.symbol_size != 1 || header.chunk_log2 != kChunkLog2 ||
          header.numel != symbols[p][static_cast<size_t>(t) + 1]) {
        return kBadHeader;
      }
      at += bytes;
    }
  }
  return at == found->end ? kGood : kBadHeader;
}

// ---- encoding
// --------------------------------------------------------------------------------------

int64_t encode_lossless(const uint8_t* data, int dtype, const std::vector<int64_t>& shape,
                        const Kernel* kernel, Threads threads,
                        const std::function<uint8_t*(int64_t, int64_t)>& allocate) {
  const Element element = element_of(dtype);
  const Lanes lanes = element.lanes;
  const int width = lanes.width;
  int64_t numel = 1;
  for (int64_t extent : shape) numel *= extent;
  if (numel == 0 || numel > kMaxSymbols / element.per) return 0;
  const int64_t n = numel * element.per, chunks = chunks_of(n);

  // A look at each chunk: what is coded, and with which tables.
  std::vector<uint32_t> counts[kMaxPlanes];
  for (int p = 0; p < width; ++p) counts[p].assign(static_cast<size_t>(256 * chunks), 0);
  constexpr int64_t kLook = kChunk / kLookEvery * kLookRun;
  const int64_t looks = std::max<int64_t>(1, std::min(threads.count, chunks / 8));
  run_tasks(threads, looks, [&](int64_t t) {
    const int64_t most = chunks == 1 ? n : kLook;
    Scratch scratch(width * round_up(most + kPad));
    uint8_t* planes[kMaxPlanes] = {};
    for (int64_t c = chunks * t / looks; c < chunks * (t + 1) / looks; ++c) {
      for (int p = 0; p < width; ++p) planes[p] = scratch.data() + p * round_up(most + kPad);
      const int64_t size = chunk_size(n, c);
      const int64_t run = chunks == 1 ? n : kLookRun, every = chunks == 1 ? n : kLookEvery;
      // Of a whole chunk one run in four first: planes after the first that they show to be nearly
      // uniform are stored, without more.
      const int64_t first = chunks > 1 && size == kChunk ? kGlance : 1;
      auto look = [&](int64_t at) {
        for (int64_t line = 0; chunks > 1 && line < width; ++line) {
          __builtin_prefetch(data + (c * kChunk + at + 4 * every) * width + 64 * line);
        }
        const int64_t count = std::min(run, size - at);
        kernel->split(&lanes, data + (c * kChunk + at) * width, count, planes);
        for (int p = 0; p < width; ++p) planes[p] += planes[p] ? count : 0;
      };
      auto count = [&](int p, uint64_t* here) {
        const uint8_t* from = scratch.data() + p * round_up(most + kPad);
        kernel->histogram8(from, planes[p] - from, here);
      };
      for (int64_t at = 0; at < size; at += first * every) look(at);
      for (int p = 1; p < width && first > 1; ++p) {
        uint64_t here[256] = {};
        count(p, here);
        if (nearly_uniform(here, kGlanceLimit)) planes[p] = nullptr;
      }
      for (int64_t at = 0; first > 1 && at < size; at += every) {
        if (at / every % first != 0) look(at);
      }
      for (int p = 0; p < width; ++p) {
        if (!planes[p]) continue;
        uint64_t here[256] = {};
        count(p, here);
        uint32_t* to = counts[p].data() + 256 * c;
        for (int s = 0; s < 256; ++s) to[s] = static_cast<uint32_t>(here[s]);
      }
    }
  });
  std::vector<TableOf> tables[kMaxPlanes];
  run_tasks(threads, width, [&](int64_t p) { tables[p] = choose_tables(counts[p], n); });

  // The head, but for the sizes of payloads and the checksums.
  std::vector<uint8_t> head(static_cast<size_t>(kBlobBytes), 0);
  const std::vector<uint8_t> extents = pack_shape(shape);
  head.insert(head.end(), extents.begin(), extents.end());
  std::vector<uint8_t> map[kMaxPlanes];
  std::vector<int64_t> place(static_cast<size_t>(chunks) + 1, 0);  // of a chunk's stored pieces
  int64_t all = 0, likely = 0;
  int carrier = -1;  // the plane that, as it is encoded, takes the stored pieces along
  for (int p = 0; p < width; ++p) {
    map[p].assign(static_cast<size_t>(chunks), 0);
    head.push_back(static_cast<uint8_t>(tables[p].size()));
    for (size_t t = 0; t < tables[p].size(); ++t) {
      for (int64_t c : tables[p][t].chunks) map[p][c] = static_cast<uint8_t>(t + 1);
      // With what encode_payload asks for beyond that, and what a look may be wrong by.
      const bool sampled = static_cast<int64_t>(tables[p][t].chunks.size()) * kChunk >= 1 << 19;
      likely += tables[p][t].bytes + tables[p][t].bytes / 32 + (sampled ? 1 << 17 : 1 << 10);
    }
    if (!tables[p].empty()) head.insert(head.end(), map[p].begin(), map[p].end());
    all += static_cast<int64_t>(tables[p].size());
    int64_t coded = 0;
    for (uint8_t table : map[p]) coded += table != 0;
    if (coded == chunks && carrier < 0) carrier = p;
  }
  if (all == 0) return 0;
  for (int64_t c = 0; c < chunks; ++c) {
    int64_t pieces = 0;
    for (int p = 0; p < width; ++p) pieces += map[p][c] == 0;
    place[c + 1] = place[c] + pieces * chunk_size(n, c);
  }
  const int64_t sizes = static_cast<int64_t>(head.size()), checksums = sizes + 8 * all;
  const int64_t stored = checksums + 4 * chunks, first = stored + place[chunks];
  head.resize(static_cast<size_t>(stored), 0);

  int64_t used = first, room = 0;
  uint8_t* blob = nullptr;
  auto ask = [&](int64_t more, int64_t kept) {
    if (blob && used + more <= room) return;
    room = std::max(used + more, first + likely);
    blob = allocate(room, kept);
  };
  std::vector<uint32_t> crc(static_cast<size_t>(chunks), 0);
  // Cuts a chunk: its stored pieces go to their place, past the caches where they are many, and
  // one plane to `out`.
  const bool past = place[chunks] > kCached;
  auto cut_chunk = [&](int64_t c, int wanted, uint8_t* out) {
    uint8_t* planes[kMaxPlanes] = {};
    const int64_t size = chunk_size(n, c);
    static thread_local cpu::KeptMemory kept;
    uint8_t* const to = blob + stored + place[c];
    uint8_t* const begin = past ? kept.get<uint8_t>(static_cast<size_t>(width * kChunk)) : to;
    uint8_t* at = begin;
    for (int p = 0; p < width; ++p) {
      if (map[p][c]) continue;
      planes[p] = at;
      at += size;
    }
    if (wanted >= 0) planes[wanted] = out;
    kernel->split(&lanes, data + c * kChunk * width, size, planes);
    crc[c] = kernel->crc32(0, begin, at - begin);
    if (past) kernel->copy_past(to, begin, at - begin);
  };
  ask(0, 0);
  if (carrier < 0) {
    run_tasks(threads, looks, [&](int64_t t) {
      for (int64_t c = chunks * t / looks; c < chunks * (t + 1) / looks; ++c)
        cut_chunk(c, -1, nullptr);
    });
  }
  const uint8_t* entry = head.data() + sizes;
  for (int p = 0; p < width; ++p) {
    for (const TableOf& table : tables[p]) {
      Symbols symbols;
      const int64_t members = static_cast<int64_t>(table.chunks.size());
      symbols.n = (members - 1) * kChunk + chunk_size(n, table.chunks.back());
      symbols.make = [&](int64_t begin, int64_t count, uint8_t* out, bool encoded) {
        const int64_t c = table.chunks[static_cast<size_t>(begin / kChunk)];
        if (encoded && p == carrier) return cut_chunk(c, p, out);
        uint8_t* planes[kMaxPlanes] = {};
        planes[p] = out;
        kernel->split(&lanes, data + (c * kChunk + begin % kChunk) * width, count, planes);
      };
      symbols.ahead = [&](int64_t begin) -> Ahead {
        const int64_t c = table.chunks[static_cast<size_t>(begin / kChunk)];
        return {data + c * kChunk * width, width <= 2 ? 64 : 128};
      };
      const int64_t bytes =
          encode_payload(symbols, &symbols.n, 1, kChunkLog2, kernel, threads, [&](int64_t asked) {
            ask(asked, used);
            return blob + used;
          });
      if (bytes < 0) return 0;  // cannot happen
      store<uint64_t>(const_cast<uint8_t*>(entry), static_cast<uint64_t>(bytes));
      entry += 8;
      used += bytes;
    }
  }
  const bool few = static_cast<int64_t>(shape.size()) <= kMostRawDims;
  const int64_t extent_bytes = static_cast<int64_t>(extents.size());
  const int64_t raw =
      kBlobBytes + n * width + (few ? 8 * static_cast<int64_t>(shape.size()) : extent_bytes);
  if (used >= raw) return 0;
  std::memcpy(head.data() + checksums, crc.data(), 4 * static_cast<size_t>(chunks));
  uint8_t* h = head.data();
  std::memcpy(h, kMagic, 4);
  h[4] = kVersion;
  h[5] = kKind;
  h[6] = static_cast<uint8_t>(dtype);
  h[7] = kChunkLog2;
  store<uint64_t>(h + 8, static_cast<uint64_t>(used));
  store<uint64_t>(h + 16, static_cast<uint64_t>(numel));
  store<uint64_t>(h + 24, static_cast<uint64_t>(stored - kBlobBytes));
  store<uint32_t>(h + 48, static_cast<uint32_t>(shape.size()));
  uint32_t sum = kernel->crc32(0, h, kBlobBytes - 4);
  sum = kernel->crc32(sum, h + kBlobBytes, stored - kBlobBytes);
  store<uint32_t>(h + kBlobBytes - 4, sum);
  std::memcpy(blob, h, static_cast<size_t>(stored));
  return used;
}

// ---- decoding
// --------------------------------------------------------------------------------------

int64_t decode_lossless(const uint8_t* blob, int64_t size, int64_t start, int64_t count,
                        uint8_t* out, const Kernel* kernel, Threads threads) {
  Lossless found;
  const int64_t error = parse_lossless(blob, size, &found, kernel);
  if (error != kGood) return error;
  if (start < 0 || count < 0 || start > found.numel || count > found.numel - start) {
    return kOutOfRange;
  }
  if (count == 0) return kGood;
  const int width = found.element.lanes.width, per = found.element.per;
  const int64_t n = found.n, begin_lane = start * per, end_lane = (start + count) * per;
  const int64_t first = begin_lane / kChunk, last = (end_lane - 1) / kChunk;
  const int64_t tasks = std::max<int64_t>(1, std::min(threads.count, last - first + 1));

  // Where the next chunk of each table, and of the stored pieces, lies.
  struct Cursor {
    const uint8_t *entry, *bits;
  };
  struct Place {
    std::vector<Cursor> tables[kMaxPlanes];
    const uint8_t* stored;
  };
  auto pass = [&](Place& place, int64_t c) {
    for (int p = 0; p < width; ++p) {
      const int table = found.map[p] ? found.map[p][c] : 0;
      if (table == 0) {
        place.stored += chunk_size(n, c);
      } else {
        Cursor& cursor = place.tables[p][static_cast<size_t>(table) - 1];
        cursor.bits += load<uint32_t>(cursor.entry);
        cursor.entry += 8;
      }
    }
  };
  std::vector<Place> places(static_cast<size_t>(tasks));
  {
    Place place;
    place.stored = found.stored;
    for (int p = 0; p < width; ++p) {
      for (const Header& header : found.payloads[p]) {
        place.tables[p].push_back({header.chunk_table, header.data});
      }
    }
    int64_t c = 0;
    for (int64_t t = 0; t < tasks; ++t) {
      for (; c < first + (last + 1 - first) * t / tasks; ++c) pass(place, c);
      places[static_cast<size_t>(t)] = place;
    }
  }
  int64_t arena = 0;
  int coded = 0;  // planes that may be
  for (int p = 0; p < width; ++p) {
    coded += found.map[p] != nullptr;
    for (const Header& header : found.payloads[p]) {
      arena = std::max(arena, round_up(arena_size(header.code.tree(), kChunk)));
    }
  }
  const int64_t slot = round_up(kChunk + kPad);
  std::atomic<int64_t> worst = kGood;
  run_tasks(threads, tasks, [&](int64_t t) {
    Scratch scratch(arena + 2 * coded * slot);
    uint8_t* block = scratch.data() + arena;
    uint8_t* other = block + coded * slot;
    Place place = std::move(places[static_cast<size_t>(t)]);
    std::vector<uint8_t> tail;
    // A chunk's lanes are written during the decoding of the next one.
    Joining joining = {};
    joining.lanes = found.element.lanes;
    joining.stream = count * found.element.size() > kCached;
    const int64_t end = first + (last + 1 - first) * (t + 1) / tasks;
    for (int64_t c = first + (last + 1 - first) * t / tasks; c < end; ++c) {
      auto fail = [&] {
        int64_t known = worst.load();
        while ((known == kGood || known > kBadChunk + c) &&
               !worst.compare_exchange_weak(known, kBadChunk + c)) {
        }
      };
      const int64_t lanes = chunk_size(n, c);
      const uint8_t* planes[kMaxPlanes] = {};
      const uint8_t* at = place.stored;
      for (int p = 0; p < width; ++p) {
        if (found.map[p] && found.map[p][c]) continue;
        planes[p] = at;
        at += lanes;
      }
      const uint32_t checksum = load<uint32_t>(found.checksums + 4 * c);
      if (kernel->crc32(0, place.stored, at - place.stored) != checksum) return fail();
      // The stored pieces of the next chunk come while this one is decoded.
      joining.ahead = {at, 64 / width * ((at - place.stored) / lanes)};
      uint8_t* to = block;
      for (int p = 0; p < width; ++p) {
        if (planes[p]) continue;
        const size_t table = static_cast<size_t>(found.map[p][c]) - 1;
        const Header& header = found.payloads[p][table];
        const Cursor& cursor = place.tables[p][table];
        const int64_t bytes = load<uint32_t>(cursor.entry);
        const uint8_t* bits = cursor.bits;
        if (kernel->crc32(0, bits, bytes) != load<uint32_t>(cursor.entry + 4)) return fail();
        if (found.end - bits - bytes < kReadPad) {  // the loops read past the end
          tail.assign(static_cast<size_t>(bytes + kReadPad), 0);
          std::memcpy(tail.data(), bits, static_cast<size_t>(bytes));
          bits = tail.data();
        }
        const int64_t read = kernel->decode8_joining(&header.code.tree(), bits, 8 * bytes, lanes,
                                                     to, scratch.data(), &joining);
        if (read < 0 || (read + 7) / 8 != bytes) return fail();
        planes[p] = to;
        to += slot;
      }
      kernel->join(&joining);
      const int64_t lo = std::max(c * kChunk, begin_lane);
      const int64_t hi = std::min(c * kChunk + lanes, end_lane);
      for (int p = 0; p < width; ++p) joining.planes[p] = planes[p] + (lo - c * kChunk);
      joining.n = hi - lo;
      joining.out = out + (lo - begin_lane) * width;
      pass(place, c);
      std::swap(block, other);
    }
    kernel->join(&joining);
  });
  return worst;
}

}  // namespace cfl::codec
