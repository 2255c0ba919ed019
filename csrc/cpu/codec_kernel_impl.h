// The codec's inner loops, included once per instruction set (CFL_CODEC_ISA: 0 generic, 2 AVX2,
// 512 AVX-512 with VBMI and VBMI2) by codec_kernel_*.cpp.
//
// No C++ standard library here, and everything but the entry point in an unnamed namespace: inline
// functions compiled with this file's instructions must not be picked by the linker for older CPUs.

#include <string.h>

#include "cpu/codec_kernel.h"

#if CFL_CODEC_ISA > 0
#include <immintrin.h>
#endif

#define CFL_INLINE inline __attribute__((always_inline))

namespace cfl::codec {
namespace {

CFL_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

CFL_INLINE int64_t padded(int64_t n) { return (n + 2 * kPad - 1) & ~(kPad - 1); }

CFL_INLINE uint64_t load64(const uint8_t* p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}
CFL_INLINE void store64(uint8_t* p, uint64_t v) { memcpy(p, &v, 8); }
CFL_INLINE uint64_t low_mask(int64_t bits) { return bits >= 64 ? ~0ull : (1ull << bits) - 1; }
CFL_INLINE int64_t ones(uint64_t v) { return __builtin_popcountll(v); }

// 64 bits from any bit position; the last of them may come from the ninth byte.
CFL_INLINE uint64_t bits64(const uint8_t* base, int64_t pos) {
  const uint8_t* p = base + (pos >> 3);
  const unsigned s = pos & 7;
  return (load64(p) >> s) | (static_cast<uint64_t>(p[8]) << 1 << (63 - s));
}

CFL_INLINE int64_t count_ones(const uint8_t* base, int64_t pos, int64_t n) {
  int64_t sum = 0, i = 0;
  for (; i + 64 <= n; i += 64) sum += ones(bits64(base, pos + i));
  if (i < n) sum += ones(bits64(base, pos + i) & low_mask(n - i));
  return sum;
}

CFL_INLINE const uint8_t* symbols_of(const Tree* tree, uint8_t) { return tree->symbol8; }
CFL_INLINE const uint16_t* symbols_of(const Tree* tree, uint16_t) { return tree->symbol; }

// ---- tables of byte shuffles, for AVX2
// -----------------------------------------------------------

#if CFL_CODEC_ISA == 2
struct Shuffles {
  // merge8: 8 of 16 bytes, the left list in the low half, the right list in the high half.
  // left16, right16: the bytes of 8 16-bit symbols from one list, zero where the other's go.
  // squeeze8, squeeze16: the elements whose bit is one, moved to the front.
  alignas(64) uint8_t merge8[256][8], left16[256][16], right16[256][16], squeeze8[256][8],
      squeeze16[256][16];
  constexpr Shuffles() : merge8(), left16(), right16(), squeeze8(), squeeze16() {
    for (int m = 0; m < 256; ++m) {
      int l = 0, r = 0;
      for (int j = 0; j < 8; ++j) {
        const bool one = m >> j & 1;
        merge8[m][j] = static_cast<uint8_t>(one ? 8 + r : l);
        for (int b = 0; b < 2; ++b) {
          left16[m][2 * j + b] = static_cast<uint8_t>(one ? 0x80 : 2 * l + b);
          right16[m][2 * j + b] = static_cast<uint8_t>(one ? 2 * r + b : 0x80);
          if (one) squeeze16[m][2 * r + b] = static_cast<uint8_t>(2 * j + b);
        }
        if (one) squeeze8[m][r] = static_cast<uint8_t>(j);
        (one ? r : l) += 1;
      }
    }
  }
};
constexpr Shuffles kShuffles;
#endif

// ---- encoding
// ------------------------------------------------------------------------------------

struct BitWriter {
  uint8_t* p;
  uint64_t acc;   // bits not yet written
  unsigned fill;  // how many, below 64
  Ahead ahead;

  CFL_INLINE void put64(uint64_t v) {
#if CFL_CODEC_ISA == 512
    _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T1);
    ahead.at += ahead.step;
#endif
    store64(p, acc | v << fill);
    p += 8;
    acc = v >> 1 >> (63 - fill);
  }
  // n <= 64 bits; those above are zero. Without a branch, for its outcome is hard to foretell.
  CFL_INLINE void put(uint64_t v, unsigned n) {
    acc |= v << fill;
    store64(p, acc);
    const unsigned sum = fill + n;
    acc = sum >= 64 ? v >> 1 >> (63 - fill) : acc;
    p += sum >> 6 << 3;
    fill = sum & 63;
  }
};

template <class T>
void partition_scalar(BitWriter& out, const T* ranks, int64_t n, int32_t pivot, T*& l, T*& r) {
  for (int64_t i = 0; i < n; i += 32) {
    const int count = static_cast<int>(min64(32, n - i));
    uint64_t m = 0;
    for (int j = 0; j < count; ++j) {
      const T v = ranks[i + j];
      const int one = v >= pivot;
      *r = v;
      *l = v;
      r += one;
      l += 1 - one;
      m |= static_cast<uint64_t>(one) << j;
    }
    out.put(m, static_cast<unsigned>(count));
  }
}

// Writes for each rank whether it is at least `pivot`; gathers those below in front of `ranks` and
// the others in `right`, and returns how many others.
int64_t partition(BitWriter& out, uint8_t* ranks, int64_t n, int32_t pivot, uint8_t* right) {
  int64_t i = 0;
  uint8_t *l = ranks, *r = right;
#if CFL_CODEC_ISA == 512
  const __m512i least = _mm512_set1_epi8(static_cast<char>(pivot));
  BitWriter w = out;
  for (; i + 64 <= n; i += 64) {
    const __m512i v = _mm512_loadu_si512(ranks + i);
    const uint64_t m = _mm512_cmpge_epu8_mask(v, least);
    w.put64(m);
    const int64_t c = ones(m);
    _mm512_storeu_si512(r, _mm512_maskz_compress_epi8(m, v));
    _mm512_storeu_si512(l, _mm512_maskz_compress_epi8(~m, v));
    r += c;
    l += 64 - c;
  }
  if (i < n) {
    const uint64_t keep = low_mask(n - i);
    const __m512i v = _mm512_loadu_si512(ranks + i);
    const uint64_t m = _mm512_mask_cmpge_epu8_mask(keep, v, least);
    w.put(m, static_cast<unsigned>(n - i));
    _mm512_storeu_si512(r, _mm512_maskz_compress_epi8(m, v));
    _mm512_storeu_si512(l, _mm512_maskz_compress_epi8(keep & ~m, v));
    r += ones(m);
  }
  out = w;
#else
#if CFL_CODEC_ISA == 2
  const __m256i least = _mm256_set1_epi8(static_cast<char>(pivot));
  for (; i + 32 <= n; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ranks + i));
    const uint32_t word = static_cast<uint32_t>(
        _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(v, least), v)));
    out.put(word, 32);
    alignas(32) uint64_t part[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(part), v);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const unsigned m = word >> (8 * j) & 255;
      const __m128i eight = _mm_cvtsi64_si128(static_cast<int64_t>(part[j]));
      auto squeeze = [&](unsigned mask, uint8_t* to) {
        const __m128i pick =
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffles.squeeze8[mask]));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(eight, pick));
      };
      squeeze(m, r);
      squeeze(~m & 255, l);
      const int64_t c = ones(m);
      r += c;
      l += 8 - c;
    }
  }
#endif
  partition_scalar(out, ranks + i, n - i, pivot, l, r);
#endif
  return r - right;
}

int64_t partition(BitWriter& out, uint16_t* ranks, int64_t n, int32_t pivot, uint16_t* right) {
  int64_t i = 0;
  uint16_t *l = ranks, *r = right;
#if CFL_CODEC_ISA == 512
  const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(pivot));
  BitWriter w = out;
  for (; i + 64 <= n; i += 64) {
    uint64_t word = 0;
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      // In place: the left list never reaches beyond what was read.
      const __m512i v = _mm512_loadu_si512(ranks + i + 32 * j);
      const uint32_t m = _mm512_cmpge_epu16_mask(v, least);
      word |= static_cast<uint64_t>(m) << (32 * j);
      const int64_t c = ones(m);
      _mm512_storeu_si512(r, _mm512_maskz_compress_epi16(m, v));
      _mm512_storeu_si512(l, _mm512_maskz_compress_epi16(~m, v));
      r += c;
      l += 32 - c;
    }
    w.put64(word);
  }
  for (; i + 32 <= n; i += 32) {
    const __m512i v = _mm512_loadu_si512(ranks + i);
    const uint32_t m = _mm512_cmpge_epu16_mask(v, least);
    w.put(m, 32);
    const int64_t c = ones(m);
    _mm512_storeu_si512(r, _mm512_maskz_compress_epi16(m, v));
    _mm512_storeu_si512(l, _mm512_maskz_compress_epi16(~m, v));
    r += c;
    l += 32 - c;
  }
  if (i < n) {
    const uint32_t keep = static_cast<uint32_t>(low_mask(n - i));
    const __m512i v = _mm512_loadu_si512(ranks + i);
    const uint32_t m = _mm512_mask_cmpge_epu16_mask(keep, v, least);
    w.put(m, static_cast<unsigned>(n - i));
    _mm512_storeu_si512(r, _mm512_maskz_compress_epi16(m, v));
    _mm512_storeu_si512(l, _mm512_maskz_compress_epi16(keep & ~m, v));
    r += ones(m);
  }
  out = w;
#else
#if CFL_CODEC_ISA == 2
  const __m128i least = _mm_set1_epi16(static_cast<int16_t>(pivot));
  for (; i + 8 <= n; i += 8) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ranks + i));
    const __m128i is = _mm_cmpeq_epi16(_mm_max_epu16(v, least), v);
    const unsigned m =
        static_cast<unsigned>(_mm_movemask_epi8(_mm_packs_epi16(is, _mm_setzero_si128())));
    out.put(m, 8);
    auto squeeze = [&](unsigned mask, uint16_t* to) {
      const __m128i pick =
          _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.squeeze16[mask]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(v, pick));
    };
    squeeze(m, r);
    squeeze(~m & 255, l);
    const int64_t c = ones(m);
    r += c;
    l += 8 - c;
  }
#endif
  partition_scalar(out, ranks + i, n - i, pivot, l, r);
#endif
  return r - right;
}

template <class T>
void pack_scalar(BitWriter& out, const T* ranks, int64_t n, int k, int32_t first) {
  for (int64_t i = 0; i < n; ++i) out.put(static_cast<uint64_t>(ranks[i] - first), k);
}

void pack(BitWriter& out, const uint8_t* ranks, int64_t n, int k, int32_t lowest) {
  if (k == 0) return;
  if (k == 8) {  // the root: the writer is at its first byte
    memcpy(out.p, ranks, n);
    out.p += n;
    return;
  }
#if CFL_CODEC_ISA == 512
  if (k <= 7) {
    // Neighbours are joined until each 64-bit lane holds 8 symbols in 8 k bits; squeezed together
    // they are k lanes, which are then shifted by the bits that wait in the writer.
    const __m512i first = _mm512_set1_epi8(static_cast<char>(lowest));
    const __m512i by_k = _mm512_set1_epi16(static_cast<int16_t>(1 | 1 << k << 8));
    const __m512i by_2k = _mm512_set1_epi32(1 | 1 << (2 * k) << 16);
    const __m128i by_4k = _mm_cvtsi32_si128(4 * k);
    const __m512i low = _mm512_set1_epi64(0xffffffff);
    const uint64_t bytes = low_mask(k) * 0x0101010101010101;
    const __m512i before = _mm512_setr_epi64(0, 0, 1, 2, 3, 4, 5, 6);
    const __m512i last = _mm512_set1_epi64(k - 1);
    const __m512i shift = _mm512_set1_epi64(out.fill);
    // The last lane that was squeezed, of which the top bits still wait to be written.
    __m512i carry =
        _mm512_set1_epi64(out.fill ? static_cast<int64_t>(out.acc << (64 - out.fill)) : 0);
    uint8_t* p = out.p;
    int64_t i = 0;
    auto join = [&](__m512i v) {
      v = _mm512_maddubs_epi16(by_k, v);
      v = _mm512_madd_epi16(v, by_2k);
      v = _mm512_or_si512(_mm512_and_si512(v, low),
                          _mm512_sll_epi64(_mm512_srli_epi64(v, 32), by_4k));
      return _mm512_maskz_compress_epi8(bytes, v);
    };
    for (; i + 64 <= n; i += 64, p += 8 * k) {
      const __m512i v = join(_mm512_sub_epi8(_mm512_loadu_si512(ranks + i), first));
      const __m512i previous = _mm512_mask_permutexvar_epi64(carry, 0xfe, before, v);
      _mm512_storeu_si512(p, _mm512_shldv_epi64(v, previous, shift));
      carry = _mm512_permutexvar_epi64(last, v);
    }
    out.p = p;
    const uint64_t wait = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm512_castsi512_si128(carry)));
    out.acc = out.fill ? wait >> (64 - out.fill) : 0;
    if (i < n) {
      const uint64_t keep = low_mask(n - i);
      alignas(64) uint64_t lanes[8];
      _mm512_store_si512(lanes,
                         join(_mm512_maskz_sub_epi8(keep, _mm512_loadu_si512(ranks + i), first)));
      int64_t left = (n - i) * k;
      for (int j = 0; left > 0; ++j, left -= 64)
        out.put(lanes[j], static_cast<unsigned>(min64(64, left)));
    }
    return;
  }
#endif
  pack_scalar(out, ranks, n, k, lowest);
}

void pack(BitWriter& out, const uint16_t* ranks, int64_t n, int k, int32_t lowest) {
  if (k == 0) return;
  int64_t i = 0;
#if CFL_CODEC_ISA == 512
  if (k <= 14) {
    const __m512i first = _mm512_set1_epi16(static_cast<int16_t>(lowest));
    const __m512i by_k = _mm512_set1_epi32(1 | 1 << k << 16);
    const __m128i by_2k = _mm_cvtsi32_si128(2 * k);
    const __m512i low = _mm512_set1_epi64(0xffffffff);
    BitWriter w = out;
    for (; i + 32 <= n; i += 32) {
      __m512i v = _mm512_sub_epi16(_mm512_loadu_si512(ranks + i), first);
      v = _mm512_madd_epi16(v, by_k);
      v = _mm512_or_si512(_mm512_and_si512(v, low),
                          _mm512_sll_epi64(_mm512_srli_epi64(v, 32), by_2k));
      alignas(64) uint64_t lanes[8];
      _mm512_store_si512(lanes, v);
      if (k <= 8) {
#pragma GCC unroll 4
        for (int j = 0; j < 8; j += 2) w.put(lanes[j] | lanes[j + 1] << 1 << (4 * k - 1), 8 * k);
      } else {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) w.put(lanes[j], 4 * k);
      }
    }
    out = w;
  }
#endif
  pack_scalar(out, ranks + i, n - i, k, lowest);
}

// `below` is subtracted from the ranks: those of the subtree are in [0, span).
template <class T>
void encode_node(const Tree* tree, int32_t index, int32_t below, int32_t span, BitWriter& out,
                 T* ranks, int64_t n, T* arena) {
  const Node& node = tree->nodes[index];
  if (n == 0) return;
  if (node.right == 0) {
    pack(out, ranks, n, node.bits, node.first - below);
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (span <= 256) {  // twice as many fit a vector from here on
      uint8_t* narrow = reinterpret_cast<uint8_t*>(arena);
      for (int64_t i = 0; i < n; ++i) narrow[i] = static_cast<uint8_t>(ranks[i]);
      encode_node(tree, index, below, span, out, narrow, n, narrow + padded(n));
      return;
    }
  }
  const int32_t pivot = node.first - below;
  const int64_t n_right = partition(out, ranks, n, pivot, arena);
  encode_node(tree, index + 1, below, pivot, out, ranks, n - n_right, arena + padded(n_right));
  if constexpr (sizeof(T) == 2) {
    for (int64_t i = 0; i < n_right; ++i) arena[i] = static_cast<T>(arena[i] - pivot);
    encode_node(tree, node.right, node.first, span - pivot, out, arena, n_right,
                arena + padded(n_right));
  } else {
    encode_node(tree, node.right, below, span, out, arena, n_right, arena + padded(n_right));
  }
}

void to_ranks(const Tree* tree, const uint8_t* symbols, int64_t n, uint8_t* ranks) {
  const uint8_t* rank = tree->rank8;
  int64_t i = 0;
#if CFL_CODEC_ISA == 512
  const __m512i t0 = _mm512_loadu_si512(rank), t1 = _mm512_loadu_si512(rank + 64);
  const __m512i t2 = _mm512_loadu_si512(rank + 128), t3 = _mm512_loadu_si512(rank + 192);
  for (; i + 64 <= n; i += 64) {
    const __m512i v = _mm512_loadu_si512(symbols + i);
    const __m512i low = _mm512_permutex2var_epi8(t0, v, t1);
    const __m512i high = _mm512_permutex2var_epi8(t2, v, t3);
    _mm512_storeu_si512(ranks + i, _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(v), high));
  }
#endif
  for (; i < n; ++i) ranks[i] = rank[symbols[i]];
}
void to_ranks(const Tree* tree, const uint16_t* symbols, int64_t n, uint16_t* ranks) {
  const uint16_t* rank = tree->rank;
#pragma GCC unroll 8
  for (int64_t i = 0; i < n; ++i) ranks[i] = rank[symbols[i]];
}

template <class T>
int64_t encode(const Tree* tree, const T* symbols, int64_t n, uint8_t* out, T* arena, Ahead ahead) {
  if (!ahead.at) ahead = {reinterpret_cast<const uint8_t*>(symbols), 0};
  BitWriter writer = {out, 0, 0, ahead};
  to_ranks(tree, symbols, n, arena);
  encode_node(tree, 0, 0, tree->symbols, writer, arena, n, arena + padded(n));
  store64(writer.p, writer.acc);
  return 8 * (writer.p - out) + writer.fill;
}

// ---- checksum
// ------------------------------------------------------------------------------------

struct CrcTables {
  uint32_t table[8][256];
  constexpr CrcTables() : table() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int j = 0; j < 8; ++j) c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
      table[0][i] = c;
    }
    for (int t = 1; t < 8; ++t) {
      for (uint32_t i = 0; i < 256; ++i) {
        table[t][i] = table[t - 1][i] >> 8 ^ table[0][table[t - 1][i] & 255];
      }
    }
  }
};
constexpr CrcTables kCrc;

// On the register itself, without the inversions at both ends.
uint32_t crc_bytes(uint32_t crc, const uint8_t* data, int64_t n) {
  for (; n >= 8; n -= 8, data += 8) {
    const uint64_t v = load64(data) ^ crc;
    crc = kCrc.table[7][v & 255] ^ kCrc.table[6][v >> 8 & 255] ^ kCrc.table[5][v >> 16 & 255] ^
          kCrc.table[4][v >> 24 & 255] ^ kCrc.table[3][v >> 32 & 255] ^
          kCrc.table[2][v >> 40 & 255] ^ kCrc.table[1][v >> 48 & 255] ^ kCrc.table[0][v >> 56];
  }
  for (; n > 0; --n, ++data) crc = crc >> 8 ^ kCrc.table[0][(crc ^ *data) & 255];
  return crc;
}

#if CFL_CODEC_ISA > 0
// x^exponent modulo the CRC polynomial, bit-reflected and shifted by one, as carry-less products of
// reflected numbers need it.
constexpr uint64_t crc_power(int exponent) {
  uint32_t r = 0x80000000u;  // x^0, reflected
  for (int i = 0; i < exponent; ++i) r = r & 1 ? r >> 1 ^ 0xedb88320u : r >> 1;
  return static_cast<uint64_t>(r) << 1;
}
static_assert(crc_power(4 * 128 + 32) == 0x154442bd4 && crc_power(4 * 128 - 32) == 0x1c6e41596);
#endif

uint32_t crc32(uint32_t crc, const uint8_t* data, int64_t n) {
  crc = ~crc;
#if CFL_CODEC_ISA == 512
  if (n >= 512) {
    constexpr uint64_t k256[2] = {crc_power(2048 + 32), crc_power(2048 - 32)};
    constexpr uint64_t k64[2] = {crc_power(512 + 32), crc_power(512 - 32)};
    constexpr uint64_t k16[2] = {crc_power(128 + 32), crc_power(128 - 32)};
    auto fold = [](__m512i x, __m512i k, __m512i next) {
      return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(x, k, 0x00),
                                       _mm512_clmulepi64_epi128(x, k, 0x11), next, 0x96);
    };
    auto constants = [](const uint64_t* k) {
      return _mm512_broadcast_i32x4(
          _mm_set_epi64x(static_cast<int64_t>(k[1]), static_cast<int64_t>(k[0])));
    };
    __m512i x[4];
    for (int j = 0; j < 4; ++j) x[j] = _mm512_loadu_si512(data + 64 * j);
    x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
    const __m512i far = constants(k256), near = constants(k64);
    data += 256;
    n -= 256;
    for (; n >= 256; n -= 256, data += 256) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) x[j] = fold(x[j], far, _mm512_loadu_si512(data + 64 * j));
    }
    __m512i y = x[0];
    for (int j = 1; j < 4; ++j) y = fold(y, near, x[j]);
    alignas(64) __m128i part[4];
    _mm512_store_si512(part, y);
    const __m128i k = _mm_set_epi64x(static_cast<int64_t>(k16[1]), static_cast<int64_t>(k16[0]));
    __m128i z = part[0];
    for (int j = 1; j < 4; ++j) {
      z = _mm_xor_si128(
          _mm_xor_si128(_mm_clmulepi64_si128(z, k, 0x00), _mm_clmulepi64_si128(z, k, 0x11)),
          part[j]);
    }
    alignas(16) uint8_t rest[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(rest), z);
    crc = crc_bytes(0, rest, 16);
  }
#elif CFL_CODEC_ISA == 2
  if (n >= 128) {
    constexpr uint64_t k64[2] = {crc_power(512 + 32), crc_power(512 - 32)};
    constexpr uint64_t k16[2] = {crc_power(128 + 32), crc_power(128 - 32)};
    auto fold = [](__m128i x, __m128i k, __m128i next) {
      return _mm_xor_si128(
          _mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00), _mm_clmulepi64_si128(x, k, 0x11)), next);
    };
    auto constants = [](const uint64_t* k) {
      return _mm_set_epi64x(static_cast<int64_t>(k[1]), static_cast<int64_t>(k[0]));
    };
    auto load = [](const uint8_t* p) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    };
    __m128i x[4];
    for (int j = 0; j < 4; ++j) x[j] = load(data + 16 * j);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
    const __m128i far = constants(k64), near = constants(k16);
    data += 64;
    n -= 64;
    for (; n >= 64; n -= 64, data += 64) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) x[j] = fold(x[j], far, load(data + 16 * j));
    }
    __m128i y = x[0];
    for (int j = 1; j < 4; ++j) y = fold(y, near, x[j]);
    alignas(16) uint8_t rest[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(rest), y);
    crc = crc_bytes(0, rest, 16);
  }
#endif
  return ~crc_bytes(crc, data, n);
}

// ---- histograms
// ----------------------------------------------------------------------------------

void histogram8(const uint8_t* symbols, int64_t n, uint64_t* counts) {
  // Eight tables, so that equal neighbours do not wait for each other's store.
  constexpr int64_t kBlock = int64_t{1} << 30;
  while (n > 0) {
    uint32_t table[8][256];
    memset(table, 0, sizeof(table));
    const int64_t block = min64(n, kBlock);
    int64_t i = 0;
    for (; i + 8 <= block; i += 8) {
      const uint64_t v = load64(symbols + i);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) ++table[j][v >> (8 * j) & 255];
    }
    for (; i < block; ++i) ++table[0][symbols[i]];
    for (int s = 0; s < 256; ++s) {
      for (int j = 0; j < 8; ++j) counts[s] += table[j][s];
    }
    symbols += block;
    n -= block;
  }
}

void histogram16(const uint16_t* symbols, int64_t n, uint32_t* even, uint32_t* odd) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    uint64_t v;
    memcpy(&v, symbols + i, 8);
    ++even[v & 65535];
    ++odd[v >> 16 & 65535];
    ++even[v >> 32 & 65535];
    ++odd[v >> 48];
  }
  for (; i < n; ++i) ++even[symbols[i]];
}

uint16_t max16(const uint16_t* symbols, int64_t n) {
  constexpr int kLanes = 128;
  uint16_t most[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const uint16_t v = symbols[i + j];
      most[j] = v > most[j] ? v : most[j];
    }
  }
  uint16_t result = 0;
  for (; i < n; ++i) result = symbols[i] > result ? symbols[i] : result;
  for (int j = 0; j < kLanes; ++j) result = most[j] > result ? most[j] : result;
  return result;
}

// ---- floating point
// ------------------------------------------------------------------------------

CFL_INLINE float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
CFL_INLINE uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
CFL_INLINE float widen_f16(uint16_t v) {
  const uint32_t sign = static_cast<uint32_t>(v & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(v & 0x7fff) << 13;
  // Rescaling by 2^112 is right for subnormals too; an exponent of all ones is set again.
  const float scaled = float_of(rest) * 0x1p112f;
  const uint32_t special = (v & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return float_of(bits_of(scaled) | special | sign);
}
CFL_INLINE uint16_t narrow_bf16(float f) {  // finite
  const uint32_t u = bits_of(f);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
CFL_INLINE uint16_t narrow_f16(float f) {  // finite, |f| <= 65504 after rounding
  const uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a < 0x38800000) {  // subnormal: the addition rounds to a multiple of 2^-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(a) + 0.5f) - 0x3f000000));
  }
  const uint32_t rounded = (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13;
  return static_cast<uint16_t>(sign | (rounded > 0x7bff ? 0x7bff : rounded));
}

constexpr int64_t kBlock = 1024;

// A block of at most kBlock float16 or bfloat16 values as float32.
void widen(Float dtype, const uint16_t* w, int64_t n, float* out) {
  if (dtype == Float::kBF16) {
    for (int64_t i = 0; i < n; ++i) out[i] = float_of(static_cast<uint32_t>(w[i]) << 16);
    return;
  }
  int64_t i = 0;
#if CFL_CODEC_ISA == 512
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_ps(out + i,
                     _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i))));
  }
#elif CFL_CODEC_ISA == 2
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i))));
  }
#endif
  for (; i < n; ++i) out[i] = widen_f16(w[i]);
}
void narrow(Float dtype, const float* w, int64_t n, uint16_t* out) {
  if (dtype == Float::kBF16) {
    for (int64_t i = 0; i < n; ++i) out[i] = narrow_bf16(w[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = narrow_f16(w[i]);
  }
}

template <class T>
int64_t count_bad(const T* w, int64_t n) {
  int64_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad += !(w[i] - w[i] == 0);
  return bad;
}

// Updates the range with n values; returns how many were NaN or Inf.
template <class T>
int64_t range_of(const T* w, int64_t n, T* minimum, T* maximum) {
  constexpr int kLanes = 512 / sizeof(T);
  T least[kLanes], most[kLanes], check[kLanes];
  int64_t bad = 0;
  for (int64_t begin = 0; begin < n; begin += 1 << 16) {
    const int64_t end = min64(n, begin + (1 << 16));
    for (int j = 0; j < kLanes; ++j) {
      least[j] = *minimum;
      most[j] = *maximum;
      check[j] = 0;
    }
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
#pragma GCC unroll 8
      for (int j = 0; j < kLanes; ++j) {
        const T v = w[i + j];
        least[j] = v < least[j] ? v : least[j];
        most[j] = v > most[j] ? v : most[j];
        check[j] += v * 0;  // NaN as soon as one value is NaN or Inf
      }
    }
    T a = *minimum, b = *maximum, c = 0;
    for (int j = 0; j < kLanes; ++j) {
      a = least[j] < a ? least[j] : a;
      b = most[j] > b ? most[j] : b;
      c += check[j];
    }
    for (; i < end; ++i) {
      a = w[i] < a ? w[i] : a;
      b = w[i] > b ? w[i] : b;
      c += w[i] * 0;
    }
    if (!(c == 0)) {  // look again, with care
      bad += count_bad(w + begin, end - begin);
      a = *minimum;
      b = *maximum;
      for (i = begin; i < end; ++i) {
        const bool finite = w[i] - w[i] == 0;
        a = finite && w[i] < a ? w[i] : a;
        b = finite && w[i] > b ? w[i] : b;
      }
    }
    *minimum = a;
    *maximum = b;
  }
  return bad;
}

int64_t range(Float dtype, const void* w, int64_t n, double* minimum, double* maximum) {
  if (dtype == Float::kF64) {
    *minimum = __builtin_inf();
    *maximum = -__builtin_inf();
    return range_of(static_cast<const double*>(w), n, minimum, maximum);
  }
  float least = __builtin_inff(), most = -__builtin_inff();
  int64_t bad = 0;
  if (dtype == Float::kF32) {
    bad = range_of(static_cast<const float*>(w), n, &least, &most);
  } else {
    for (int64_t i = 0; i < n; i += kBlock) {
      float block[kBlock];
      const int64_t count = min64(kBlock, n - i);
      widen(dtype, static_cast<const uint16_t*>(w) + i, count, block);
      bad += range_of(block, count, &least, &most);
    }
  }
  *minimum = least;
  *maximum = most;
  return bad;
}

template <class Acc, class T, class S>
CFL_INLINE void quantize_loop(const T* w, int64_t n, Acc pre, Acc origin, Acc scale, int32_t top,
                              S* out) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc v = (static_cast<Acc>(w[i]) * pre - origin) * scale;
    int32_t q = static_cast<int32_t>(v);
    q = q < top ? q : top;
    q = q > 0 ? q
              : 0;  // a weight below the range, which the ops do not pass, is no way out of tables
    out[i] = static_cast<S>(q);
  }
}

template <class S>
void quantize_as(Float dtype, const void* w, int64_t n, const Affine& a, int wide, S* out) {
  if (dtype == Float::kF64) {
    quantize_loop(static_cast<const double*>(w), n, a.pre, a.origin, a.scale, a.top, out);
    return;
  }
  float block[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = min64(kBlock, n - i);
    const float* values = block;
    if (dtype == Float::kF32) {
      values = static_cast<const float*>(w) + i;
    } else {
      widen(dtype, static_cast<const uint16_t*>(w) + i, count, block);
    }
    if (wide) {
      quantize_loop(values, count, a.pre, a.origin, a.scale, a.top, out + i);
    } else {
      quantize_loop(values, count, 1.0f, static_cast<float>(a.origin), static_cast<float>(a.scale),
                    a.top, out + i);
    }
  }
}

void quantize(Float dtype, const void* w, int64_t n, const Affine* a, int wide, int symbol_size,
              void* out) {
  if (symbol_size == 1) {
    quantize_as(dtype, w, n, *a, wide, static_cast<uint8_t*>(out));
  } else {
    quantize_as(dtype, w, n, *a, wide, static_cast<uint16_t*>(out));
  }
}

template <class Acc, class T, class S>
CFL_INLINE void dequantize_loop(const S* q, int64_t n, Acc origin, Acc step, Acc post, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc v = static_cast<Acc>(static_cast<int32_t>(q[i])) + static_cast<Acc>(0.5);
    out[i] = static_cast<T>((v * step + origin) * post);
  }
}

#if CFL_CODEC_ISA == 512
// Whole vectors of float32 weights; `out` is on a multiple of 64 bytes if they go past the caches.
// Returns how many were written.
template <bool kStream, class S>
CFL_INLINE int64_t dequantize_vectors(const S* q, int64_t n, float origin, float step, float* out) {
  const __m512 o = _mm512_set1_ps(origin), s = _mm512_set1_ps(step), half = _mm512_set1_ps(0.5f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512i v;
    if constexpr (sizeof(S) == 1) {
      v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i)));
    } else {
      v = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i)));
    }
    __m512 w = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(v), half), s);
    w = _mm512_add_ps(w, o);
    if (kStream) {
      _mm512_stream_ps(out + i, w);
    } else {
      _mm512_storeu_ps(out + i, w);
    }
  }
  return i;
}
#endif

template <class S>
void dequantize_as(const Pending& p, int64_t n) {
  const S* q = reinterpret_cast<const S*>(p.symbols);
  const Affine& a = p.affine;
  if (p.dtype == Float::kF64) {
    dequantize_loop(q, n, a.origin, a.step, a.post, reinterpret_cast<double*>(p.out));
    return;
  }
  const float origin = static_cast<float>(a.origin), step = static_cast<float>(a.step);
  int64_t done = 0;
#if CFL_CODEC_ISA == 512
  if (p.dtype == Float::kF32 && !p.wide) {
    float* out = reinterpret_cast<float*>(p.out);
    done = p.stream && (reinterpret_cast<uintptr_t>(out) & 63) == 0
               ? dequantize_vectors<true>(q, n, origin, step, out)
               : dequantize_vectors<false>(q, n, origin, step, out);
  }
#endif
  float block[kBlock];
  for (int64_t i = done; i < n; i += kBlock) {
    const int64_t count = min64(kBlock, n - i);
    float* values = p.dtype == Float::kF32 ? reinterpret_cast<float*>(p.out) + i : block;
    if (p.wide) {
      dequantize_loop(q + i, count, a.origin, a.step, a.post, values);
    } else {
      dequantize_loop(q + i, count, origin, step, 1.0f, values);
    }
    if (p.dtype != Float::kF32) {
      narrow(p.dtype, block, count, reinterpret_cast<uint16_t*>(p.out) + i);
    }
  }
}

// Writes the first n weights that are pending, if there are as many.
template <class S>
CFL_INLINE void dequantize_some(Pending& p, int64_t n) {
  n = min64(n, p.n);
  if (n == 0) return;
  dequantize_as<S>(p, n);
  p.symbols += n * static_cast<int64_t>(sizeof(S));
  p.out += n * kFloatSize[static_cast<int>(p.dtype)];
  p.n -= n;
}

// Writes the first weights until the next is on a multiple of 64 bytes.
template <class S>
void align_out(Pending& p) {
  const int64_t size = kFloatSize[static_cast<int>(p.dtype)];
  dequantize_some<S>(p, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p.out) & 63) / size);
}

void dequantize(Pending* pending, int symbol_size) {
  if (symbol_size == 1) {
    align_out<uint8_t>(*pending);
    dequantize_some<uint8_t>(*pending, pending->n);
  } else {
    align_out<uint16_t>(*pending);
    dequantize_some<uint16_t>(*pending, pending->n);
  }
#if CFL_CODEC_ISA == 512
  if (pending->stream) _mm_sfence();
#endif
}

// ---- decoding: merging two lists
// -----------------------------------------------------------------

// out[i] is the next of `right` where bit i is one, else the next of `left`.
template <class T>
CFL_INLINE void merge_scalar(uint64_t m, int64_t n, const T*& l, const T*& r, T* out) {
  for (int64_t j = 0; j < n; ++j) {
    const int one = m >> j & 1;
    const T a = *l, b = *r;
    out[j] = one ? b : a;
    r += one;
    l += 1 - one;
  }
}

template <class W>
void merge(const uint8_t* base, int64_t pos, int64_t n, const uint8_t* l, const uint8_t* r,
           uint8_t* out, W& weights) {
  int64_t i = 0;
#if CFL_CODEC_ISA == 512
  W writer = weights;
  for (; i + 64 <= n; i += 64) {
    writer.step();
    const uint64_t m = bits64(base, pos + i);
    const __m512i right = _mm512_maskz_expand_epi8(m, _mm512_loadu_si512(r));
    _mm512_storeu_si512(out + i, _mm512_mask_expand_epi8(right, ~m, _mm512_loadu_si512(l)));
    const int64_t c = ones(m);
    r += c;
    l += 64 - c;
  }
  weights = writer;
  if (i < n) {
    const uint64_t keep = low_mask(n - i), m = bits64(base, pos + i) & keep;
    const __m512i right = _mm512_maskz_expand_epi8(m, _mm512_loadu_si512(r));
    _mm512_mask_storeu_epi8(out + i, keep,
                            _mm512_mask_expand_epi8(right, ~m, _mm512_loadu_si512(l)));
  }
#else
  (void)weights;
#if CFL_CODEC_ISA == 2
  for (; i + 64 <= n; i += 64) {
    const uint64_t word = bits64(base, pos + i);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const unsigned m = word >> (8 * j) & 255;
      const __m128i both = _mm_castps_si128(
          _mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(l))),
                       reinterpret_cast<const __m64*>(r)));
      const __m128i pick = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffles.merge8[m]));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i + 8 * j), _mm_shuffle_epi8(both, pick));
      const int64_t c = ones(m);
      r += c;
      l += 8 - c;
    }
  }
#endif
  for (; i < n; i += 64) merge_scalar(bits64(base, pos + i), min64(64, n - i), l, r, out + i);
#endif
}

template <class W>
void merge(const uint8_t* base, int64_t pos, int64_t n, const uint16_t* l, const uint16_t* r,
           uint16_t* out, W& weights) {
  int64_t i = 0;
#if CFL_CODEC_ISA == 512
  W writer = weights;
  for (; i + 64 <= n; i += 64) {
    writer.step();
    const uint64_t word = bits64(base, pos + i);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const uint32_t m = static_cast<uint32_t>(word >> (32 * j));
      const __m512i right = _mm512_maskz_expand_epi16(m, _mm512_loadu_si512(r));
      _mm512_storeu_si512(out + i + 32 * j,
                          _mm512_mask_expand_epi16(right, ~m, _mm512_loadu_si512(l)));
      const int64_t c = ones(m);
      r += c;
      l += 32 - c;
    }
  }
  weights = writer;
  for (; i < n; i += 32) {
    const uint32_t keep = static_cast<uint32_t>(low_mask(min64(32, n - i)));
    const uint32_t m = static_cast<uint32_t>(bits64(base, pos + i)) & keep;
    const __m512i right = _mm512_maskz_expand_epi16(m, _mm512_loadu_si512(r));
    _mm512_mask_storeu_epi16(out + i, keep,
                             _mm512_mask_expand_epi16(right, ~m, _mm512_loadu_si512(l)));
    const int64_t c = ones(m);
    r += c;
    l += 32 - c;
  }
#else
  (void)weights;
#if CFL_CODEC_ISA == 2
  for (; i + 64 <= n; i += 64) {
    const uint64_t word = bits64(base, pos + i);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const unsigned m = word >> (8 * j) & 255;
      const auto* left16 = reinterpret_cast<const __m128i*>(kShuffles.left16[m]);
      const auto* right16 = reinterpret_cast<const __m128i*>(kShuffles.right16[m]);
      const __m128i a = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(l)),
                                         _mm_load_si128(left16));
      const __m128i b = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(r)),
                                         _mm_load_si128(right16));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 8 * j), _mm_or_si128(a, b));
      const int64_t c = ones(m);
      r += c;
      l += 8 - c;
    }
  }
#endif
  for (; i < n; i += 64) merge_scalar(bits64(base, pos + i), min64(64, n - i), l, r, out + i);
#endif
}

// ---- decoding: leaves
// ----------------------------------------------------------------------------

template <class T>
void fill(T value, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

// Any number of bits, one symbol at a time.
template <class T>
void leaf_scalar(const uint8_t* base, int64_t pos, int64_t n, int bits, const T* table, T* out) {
  const uint64_t mask = low_mask(bits);
  int64_t i = 0;
  if (bits <= 7) {
    for (; i + 8 <= n; i += 8, pos += 8 * bits) {
      uint64_t word = load64(base + (pos >> 3)) >> (pos & 7);
      for (int j = 0; j < 8; ++j, word >>= bits) out[i + j] = table[word & mask];
    }
  } else if (bits <= 14) {
    for (; i + 4 <= n; i += 4, pos += 4 * bits) {
      uint64_t word = load64(base + (pos >> 3)) >> (pos & 7);
      for (int j = 0; j < 4; ++j, word >>= bits) out[i + j] = table[word & mask];
    }
  }
  for (; i < n; ++i, pos += bits) out[i] = table[load64(base + (pos >> 3)) >> (pos & 7) & mask];
}

#if CFL_CODEC_ISA == 512
// Where the fields of a 512-bit group lie: for the 64-bit lane g, the 8 bytes from bit s + g * step
// on, and the byte-wise bit positions `pattern` within them.
struct Fields {
  __m512i bytes, positions;
};
CFL_INLINE Fields fields(unsigned s, int64_t step, __m512i pattern) {
  const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i start =
      _mm512_add_epi64(_mm512_set1_epi64(s), _mm512_mul_epu32(lane, _mm512_set1_epi64(step)));
  const __m512i repeat = _mm512_set4_epi64(0x0808080808080808, 0, 0x0808080808080808, 0);
  const __m512i byte = _mm512_shuffle_epi8(_mm512_srli_epi64(start, 3), repeat);
  const __m512i bit = _mm512_shuffle_epi8(_mm512_and_si512(start, _mm512_set1_epi64(7)), repeat);
  return {_mm512_add_epi8(byte, _mm512_set1_epi64(0x0706050403020100)),
          _mm512_add_epi8(bit, pattern)};
}
#endif

template <class W>
void leaf(const uint8_t* base, int64_t pos, int64_t n, const Node& node, const uint8_t* table,
          uint8_t* out, W& weights) {
  (void)weights;
  const int k = node.bits;
  if (k == 0) {
    memset(out, table[0], n);
    return;
  }
  if (k == 8) {  // all 256 symbols, in order: the root, hence on a byte
    memcpy(out, base + (pos >> 3), n);
    return;
  }
#if CFL_CODEC_ISA == 512
  if (k <= 7) {
    const Fields f = fields(pos & 7, 8 * k, _mm512_set1_epi64(k * 0x0706050403020100));
    const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << k) - 1));
    const __m512i low = _mm512_loadu_si512(table), high = _mm512_loadu_si512(table + 64);
    const uint8_t* p = base + (pos >> 3);
    W writer = weights;
    for (int64_t i = 0; i < n; i += 64, p += 8 * k) {
      writer.step();
      __m512i v = _mm512_permutexvar_epi8(f.bytes, _mm512_loadu_si512(p));
      v = _mm512_and_si512(_mm512_multishift_epi64_epi8(f.positions, v), mask);
      v = k <= 6 ? _mm512_permutexvar_epi8(v, low) : _mm512_permutex2var_epi8(low, v, high);
      if (i + 64 <= n) {
        _mm512_storeu_si512(out + i, v);
      } else {
        _mm512_mask_storeu_epi8(out + i, low_mask(n - i), v);
      }
    }
    weights = writer;
    return;
  }
#elif CFL_CODEC_ISA == 2
  if (k <= 7) {
    const uint64_t pick = low_mask(k) * 0x0101010101010101;
    const int tables = k <= 4 ? 1 : 1 << (k - 4);
    const __m256i base_symbol = _mm256_set1_epi8(static_cast<char>(table[0]));
    // A shuffle gives 0 where bit 7 of the index is set, hence where the index + 0x70 - 16 t lies
    // behind table t: for index x the tables from x / 16 on speak, and joined by exclusive or with
    // the next one each, all but the first of them cancel.
    __m256i joined[8];
    for (int t = 0; t < tables; ++t) {
      auto part = [&](int at) {
        return _mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * at)));
      };
      joined[t] = t + 1 < tables ? _mm256_xor_si256(part(t), part(t + 1)) : part(t);
    }
    int64_t i = 0;
    while (i + 32 <= n) {
      // First the indices, then the symbols: 8 bytes that were just stored cannot be loaded as 32
      // without a wait.
      constexpr int64_t kTurn = 1024;
      const int64_t end = i + (min64(n - i, kTurn) & ~int64_t{31});
      for (int64_t j = i; j < end; j += 8, pos += 8 * k) {
        store64(out + j, _pdep_u64(load64(base + (pos >> 3)) >> (pos & 7), pick));
      }
      for (; i < end; i += 32) {
        __m256i* const to = reinterpret_cast<__m256i*>(out + i);
        __m256i v = _mm256_loadu_si256(to), found = _mm256_setzero_si256();
        if (node.run) {
          found = _mm256_add_epi8(v, base_symbol);
        } else {
          v = _mm256_add_epi8(v, _mm256_set1_epi8(0x70));
          for (int t = 0; t < tables; ++t) {
            found = _mm256_xor_si256(found, _mm256_shuffle_epi8(joined[t], v));
            v = _mm256_sub_epi8(v, _mm256_set1_epi8(16));
          }
        }
        _mm256_storeu_si256(to, found);
      }
    }
    leaf_scalar(base, pos, n - i, k, table, out + i);
    return;
  }
#endif
  leaf_scalar(base, pos, n, k, table, out);
}

template <class W>
void leaf(const uint8_t* base, int64_t pos, int64_t n, const Node& node, const uint16_t* table,
          uint16_t* out, W& weights) {
  (void)weights;
  const int k = node.bits;
  if (k == 0) {
    fill(table[0], n, out);
    return;
  }
#if CFL_CODEC_ISA == 512
  if (k <= 8 || (k <= 14 && node.run)) {
    const uint64_t low = k, pattern = (3 * low + 8) << 56 | (3 * low) << 48 | (2 * low + 8) << 40 |
                                      (2 * low) << 32 | (low + 8) << 24 | low << 16 | 8 << 8;
    const Fields f = fields(pos & 7, 4 * k, _mm512_set1_epi64(static_cast<int64_t>(pattern)));
    const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>((1 << k) - 1));
    const __m512i first = _mm512_set1_epi16(static_cast<int16_t>(node.base));
    const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 32);
    const uint8_t* p = base + (pos >> 3);
    W writer = weights;
    for (int64_t i = 0; i < n; i += 32, p += 4 * k) {
      writer.step();
      __m512i v = _mm512_permutexvar_epi8(f.bytes, _mm512_loadu_si512(p));
      v = _mm512_and_si512(_mm512_multishift_epi64_epi8(f.positions, v), mask);
      if (node.run) {
        v = _mm512_add_epi16(v, first);
      } else {
        __m512i found = _mm512_permutex2var_epi16(t0, v, t1);
        for (int t = 1; t < 1 << k >> 6; ++t) {
          const __mmask32 here = _mm512_cmpeq_epi16_mask(
              _mm512_srli_epi16(v, 6), _mm512_set1_epi16(static_cast<int16_t>(t)));
          const __m512i part = _mm512_permutex2var_epi16(_mm512_loadu_si512(table + 64 * t), v,
                                                         _mm512_loadu_si512(table + 64 * t + 32));
          found = _mm512_mask_mov_epi16(found, here, part);
        }
        v = found;
      }
      if (i + 32 <= n) {
        _mm512_storeu_si512(out + i, v);
      } else {
        _mm512_mask_storeu_epi16(out + i, static_cast<__mmask32>(low_mask(n - i)), v);
      }
    }
    weights = writer;
    return;
  }
#endif
  leaf_scalar(base, pos, n, k, table, out);
}

#include "cpu/codec_planes_impl.h"

// ---- decoding: the tree
// --------------------------------------------------------------------------

struct NoWeights {
  CFL_INLINE void step() {}
};

#if CFL_CODEC_ISA == 512
// Writes float32 weights, a line of the cache with each step of the decoder: at that pace the
// stores leave the core while it computes.
template <class T, bool kStream>
struct Weights32 {
  const T* q;
  float* out;
  int64_t left;
  float origin, scale;
  CFL_INLINE void step() {
    constexpr int64_t kStep = 16;
    if (left < kStep) return;
    dequantize_vectors<kStream>(q, kStep, origin, scale, out);
    q += kStep;
    out += kStep;
    left -= kStep;
  }
};
#endif

template <class T, class W>
struct Decoder {
  const Node* nodes;
  const T* symbols;
  const uint8_t* base;
  int64_t end, pos;
  W weights;

  bool take(int64_t bits) {
    if (bits > end - pos) return false;
    pos += bits;
    return true;
  }

  // Decodes n >= 1 symbols of the subtree at `index`.
  bool run(int32_t index, int64_t n, T* out, T* arena) {
    const Node& node = nodes[index];
    const int64_t start = pos;
    if (node.right == 0) {
      if (!take(n * node.bits)) return false;
      leaf(base, start, n, node, symbols + node.first, out, weights);
      return true;
    }
    if (!take(n)) return false;
    const int64_t n_right = count_ones(base, start, n), n_left = n - n_right;
    if (n_right == 0) return run(index + 1, n, out, arena);
    if (n_left == 0) return run(node.right, n, out, arena);
    T* left = arena;
    T* right = left + padded(n_left);
    arena = right + padded(n_right);
    if (!run(index + 1, n_left, left, arena) || !run(node.right, n_right, right, arena))
      return false;
    merge(base, start, n, left, right, out, weights);
    return true;
  }
};

template <class T, class W>
int64_t decode_with(const Tree* tree, const uint8_t* bits, int64_t bit_count, int64_t n, T* out,
                    T* arena, W& weights) {
  Decoder<T, W> decoder = {tree->nodes, symbols_of(tree, T()), bits, bit_count, 0, weights};
  const bool good = n == 0 || decoder.run(0, n, out, arena);
  weights = decoder.weights;
  return good ? decoder.pos : -1;
}

template <class T>
int64_t decode(const Tree* tree, const uint8_t* bits, int64_t bit_count, int64_t n, T* out,
               T* arena, Pending* pending) {
  if (pending) align_out<T>(*pending);
#if CFL_CODEC_ISA == 512
  if (pending && pending->n > 0 && pending->dtype == Float::kF32 && !pending->wide) {
    auto interleaved = [&](auto weights) {
      const int64_t read = decode_with(tree, bits, bit_count, n, out, arena, weights);
      pending->symbols = reinterpret_cast<const uint8_t*>(weights.q);
      pending->out = reinterpret_cast<uint8_t*>(weights.out);
      pending->n = weights.left;
      dequantize_some<T>(*pending, pending->n);
      return read;
    };
    const T* q = reinterpret_cast<const T*>(pending->symbols);
    float* to = reinterpret_cast<float*>(pending->out);
    const float origin = static_cast<float>(pending->affine.origin),
                step = static_cast<float>(pending->affine.step);
    if (pending->stream && (reinterpret_cast<uintptr_t>(to) & 63) == 0)
      return interleaved(Weights32<T, true>{q, to, pending->n, origin, step});
    return interleaved(Weights32<T, false>{q, to, pending->n, origin, step});
  }
#endif
  if (pending) dequantize_some<T>(*pending, pending->n);
  NoWeights none;
  return decode_with(tree, bits, bit_count, n, out, arena, none);
}

int64_t decode8_joining(const Tree* tree, const uint8_t* bits, int64_t bit_count, int64_t n,
                        uint8_t* out, uint8_t* arena, Joining* joining) {
#if CFL_CODEC_ISA == 512
  const int width = joining->lanes.width;
  if (joining->n > 0 && (width == 2 || width == 4)) {
    int64_t read = -1;
    auto decoding = [&](auto& joiner) {
      read = decode_with(tree, bits, bit_count, n, out, arena, joiner);
    };
    const bool plain = joining->lanes.cut == Cut::kPlain;
    if (width == 2 && plain) with_joiner<2, Cut::kPlain>(*joining, decoding);
    if (width == 2 && !plain) with_joiner<2, Cut::kRotated>(*joining, decoding);
    if (width == 4 && plain) with_joiner<4, Cut::kPlain>(*joining, decoding);
    if (width == 4 && !plain) with_joiner<4, Cut::kRotated>(*joining, decoding);
    return read;
  }
#else
  (void)joining;
#endif
  NoWeights none;
  return decode_with(tree, bits, bit_count, n, out, arena, none);
}

constexpr Kernel kKernel = {decode<uint8_t>, decode<uint16_t>,
                            encode<uint8_t>, encode<uint16_t>,
                            crc32,           histogram8,
                            histogram16,     max16,
                            range,           quantize,
                            dequantize,      split,
                            copy_past,       join,
                            decode8_joining};

}  // namespace
}  // namespace cfl::codec
