// The inner loops of deltas, included once per instruction set by codec_delta_*.cpp, under the
// rules of codec_kernel_impl.h: no C++ library, all but the entry point in an unnamed namespace.
// One file of more than 600 lines, since all of it is one translation unit an instruction set, and
// comparing, fingerprints and numbers share their vectors.
#include <string.h>

#if CFL_CODEC_ISA > 0
#include <immintrin.h>
#endif

#define CFL_INLINE inline __attribute__((always_inline))

namespace cfl::codec {
namespace {

constexpr uint64_t kKey = kFingerprintKey;

CFL_INLINE uint64_t load64(const uint8_t* p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}

CFL_INLINE uint64_t low_mask(unsigned bits) { return (uint64_t{1} << bits) - 1; }  // bits < 64

// What a word adds to the fingerprint's sum. Two rounds, as one alone is nearly linear in words and
// places: then rows of a 0/1 matrix could be swapped unseen.
CFL_INLINE uint64_t word_term(uint64_t w, uint64_t key) {
  const uint64_t t = w + key, p = (t & 0xffffffffu) * (t >> 32);
  const uint64_t b = t ^ (p << 32 | p >> 32);
  return b + (b & 0xffffffffu) * (b >> 32);
}

// What is left after whole vectors; the last word is filled up with zeros.
CFL_INLINE uint64_t fingerprint_tail(const uint8_t* data, int64_t bytes, int64_t first) {
  uint64_t sum = 0, key = kKey * static_cast<uint64_t>(first + 1);
  for (; bytes >= 8; bytes -= 8, data += 8, key += kKey) sum += word_term(load64(data), key);
  if (bytes > 0) {
    uint64_t w = 0;
    memcpy(&w, data, static_cast<size_t>(bytes));
    sum += word_term(w, key);
  }
  return sum;
}

// Vectors of words, with the keys that go with them.
#if CFL_CODEC_ISA == 512
using Vector = __m512i;
constexpr int kBytes = 64;
CFL_INLINE Vector load(const uint8_t* p) { return _mm512_loadu_si512(p); }
CFL_INLINE Vector all(uint64_t v) { return _mm512_set1_epi64(static_cast<int64_t>(v)); }
CFL_INLINE Vector add64(Vector a, Vector b) { return _mm512_add_epi64(a, b); }
CFL_INLINE Vector exclusive(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
CFL_INLINE Vector swap_halves(Vector a) { return _mm512_rol_epi64(a, 32); }
CFL_INLINE Vector product(Vector a) { return _mm512_mul_epu32(a, _mm512_srli_epi64(a, 32)); }
// a, and the bits in which b and c differ.
CFL_INLINE Vector either(Vector a, Vector b, Vector c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0xf6);
}
CFL_INLINE void spill(uint64_t* to, Vector v) { _mm512_storeu_si512(to, v); }
CFL_INLINE Vector fill(const uint64_t* from) { return _mm512_loadu_si512(from); }
#elif CFL_CODEC_ISA == 2
using Vector = __m256i;
constexpr int kBytes = 32;
CFL_INLINE Vector load(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
CFL_INLINE Vector all(uint64_t v) { return _mm256_set1_epi64x(static_cast<int64_t>(v)); }
CFL_INLINE Vector add64(Vector a, Vector b) { return _mm256_add_epi64(a, b); }
CFL_INLINE Vector exclusive(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
CFL_INLINE Vector swap_halves(Vector a) { return _mm256_shuffle_epi32(a, 0xb1); }
CFL_INLINE Vector product(Vector a) { return _mm256_mul_epu32(a, _mm256_srli_epi64(a, 32)); }
CFL_INLINE Vector either(Vector a, Vector b, Vector c) {
  return _mm256_or_si256(a, _mm256_xor_si256(b, c));
}
CFL_INLINE void spill(uint64_t* to, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
}
CFL_INLINE Vector fill(const uint64_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
#endif

#if CFL_CODEC_ISA > 0
constexpr int kLanes = kBytes / 8;

// As word_term.
CFL_INLINE Vector terms(Vector w, Vector keys) {
  const Vector t = add64(w, keys);
  const Vector b = exclusive(t, swap_halves(product(t)));
  return add64(b, product(b));
}

CFL_INLINE Vector keys_from(int64_t first) {
  uint64_t keys[kLanes];
  for (int i = 0; i < kLanes; ++i) keys[i] = kKey * static_cast<uint64_t>(first + 1 + i);
  return fill(keys);
}
CFL_INLINE uint64_t total(Vector v) {
  uint64_t lanes[kLanes], sum = 0;
  spill(lanes, v);
  for (uint64_t lane : lanes) sum += lane;
  return sum;
}
#endif

uint64_t fingerprint_bytes(const uint8_t* data, int64_t bytes, int64_t first) {
  uint64_t sum = 0;
  int64_t at = 0;
#if CFL_CODEC_ISA > 0
  Vector sums[4] = {all(0), all(0), all(0), all(0)}, keys[4];
  for (int j = 0; j < 4; ++j) keys[j] = keys_from(first + j * kLanes);
  const Vector step = all(kKey * 4 * kLanes);
  for (; at + 4 * kBytes <= bytes; at += 4 * kBytes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sums[j] = add64(sums[j], terms(load(data + at + j * kBytes), keys[j]));
      keys[j] = add64(keys[j], step);
    }
  }
  sum = total(add64(add64(sums[0], sums[1]), add64(sums[2], sums[3])));
#endif
  return sum + fingerprint_tail(data + at, bytes - at, first + at / 8);
}

#if CFL_CODEC_ISA == 512
template <int kUnit>
CFL_INLINE uint64_t differ(Vector a, Vector b) {
  if constexpr (kUnit == 1) return _mm512_cmpneq_epi8_mask(a, b);
  if constexpr (kUnit == 2) return _mm512_cmpneq_epi16_mask(a, b);
  if constexpr (kUnit == 4) return _mm512_cmpneq_epi32_mask(a, b);
  return _mm512_cmpneq_epi64_mask(a, b);
}
#elif CFL_CODEC_ISA == 2
template <int kUnit>
CFL_INLINE uint64_t differ(Vector a, Vector b) {
  if constexpr (kUnit == 1) {
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, b)));
  } else if constexpr (kUnit == 2) {
    const __m256i equal = _mm256_cmpeq_epi16(a, b);
    const __m256i packed =
        _mm256_permute4x64_epi64(_mm256_packs_epi16(equal, _mm256_setzero_si256()), 0x08);
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(packed)) & 0xffffu;
  } else if constexpr (kUnit == 4) {
    return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b))) ^ 0xff;
  } else {
    return _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(a, b))) ^ 0xf;
  }
}
#endif

// The bits of the units of a word in one.
template <int kUnit>
CFL_INLINE uint64_t fold(uint64_t w) {
  if constexpr (kUnit <= 4) w |= w >> 32;
  if constexpr (kUnit <= 2) w |= w >> 16;
  if constexpr (kUnit <= 1) w |= w >> 8;
  return kUnit == 8 ? w : w & ((uint64_t{1} << (8 * kUnit % 64)) - 1);
}

// The changes among 64 units, the first of which is number `first`; both are in the cache.
template <int kUnit>
CFL_INLINE void put_changes(uint64_t word, const uint8_t* a, const uint8_t* b, int64_t first,
                            int64_t count, const Changes& to) {
  for (int64_t i = count; word != 0; word &= word - 1, ++i) {
    const int bit = __builtin_ctzll(word);
    to.positions[i] = first + bit;
    memcpy(to.new_values + i * kUnit, a + bit * kUnit, kUnit);
    memcpy(to.old_values + i * kUnit, b + bit * kUnit, kUnit);
  }
}

#if CFL_CODEC_ISA == 512
template <int kUnit>
CFL_INLINE __m512i squeeze(uint64_t m, __m512i v) {
  if constexpr (kUnit == 1) return _mm512_maskz_compress_epi8(m, v);
  if constexpr (kUnit == 2) return _mm512_maskz_compress_epi16(static_cast<__mmask32>(m), v);
  if constexpr (kUnit == 4) return _mm512_maskz_compress_epi32(static_cast<__mmask16>(m), v);
  return _mm512_maskz_compress_epi64(static_cast<__mmask8>(m), v);
}

alignas(64) constexpr uint8_t kRising[64] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
    22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
    44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};

// As list_ones, of one word and with room behind.
CFL_INLINE void list_word(uint64_t word, int64_t first, int64_t count, int64_t* out) {
  const __m512i places = _mm512_maskz_compress_epi8(word, load(kRising));
  const __m256i four = _mm256_cvtepu8_epi64(_mm512_castsi512_si128(places));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_add_epi64(four, _mm256_set1_epi64x(first)));
  if (count <= 4) return;
  alignas(64) uint8_t rest[64];
  _mm512_store_si512(rest, places);
  for (int64_t j = 4; j < count; ++j) out[j] = first + rest[j];
}

// Without a branch for each: how many there are is hard to foretell.
template <int kUnit>
CFL_INLINE void put_changes_512(uint64_t word, const uint8_t* a, const uint8_t* b, int64_t first,
                                int64_t count, const Changes& to) {
  constexpr int kPer = 64 / kUnit;
  list_word(word, first, __builtin_popcountll(word), to.positions + count);
#pragma GCC unroll 8
  for (int j = 0; j < kUnit; ++j) {
    const uint64_t m = kPer == 64 ? word : word >> (j * kPer % 64) & low_mask(kPer % 64);
    _mm512_storeu_si512(to.new_values + count * kUnit, squeeze<kUnit>(m, load(a + 64 * j)));
    _mm512_storeu_si512(to.old_values + count * kUnit, squeeze<kUnit>(m, load(b + 64 * j)));
    count += __builtin_popcountll(m);
  }
}
#endif

constexpr int64_t kFetch = 2048;  // bytes ahead

template <int kUnit>
int64_t compare_units(const uint8_t* a, const uint8_t* b, int64_t bytes, int64_t first,
                      uint64_t* mask, uint64_t* sums, const Changes& found) {
  int64_t at = 0, count = 0;
#if CFL_CODEC_ISA > 0
  constexpr int kVectors = 64 * kUnit / kBytes;  // for a word of the mask
  const Vector step = all(kKey * kLanes);
  Vector keys = keys_from(first), sum_a = all(0), sum_b = all(0), other = all(0);
  for (; at + 64 * kUnit <= bytes; at += 64 * kUnit) {
    uint64_t word = 0;
    for (int line = 0; line < kUnit; ++line) {  // beyond the end nothing is read
      __builtin_prefetch(a + at + kFetch + 64 * line);
      __builtin_prefetch(b + at + kFetch + 64 * line);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const Vector x = load(a + at + j * kBytes), y = load(b + at + j * kBytes);
      word |= differ<kUnit>(x, y) << (j * kBytes / kUnit);
      sum_a = add64(sum_a, terms(x, keys));
      sum_b = add64(sum_b, terms(y, keys));
      other = either(other, x, y);
      keys = add64(keys, step);
    }
    *mask++ = word;
    if (found.positions && word) {
      const int64_t unit = (8 * first + at) / kUnit;
#if CFL_CODEC_ISA == 512
      put_changes_512<kUnit>(word, a + at, b + at, unit, count, found);
#else
      put_changes<kUnit>(word, a + at, b + at, unit, count, found);
#endif
    }
    count += __builtin_popcountll(word);
  }
  sums[0] += total(sum_a);
  sums[1] += total(sum_b);
  uint64_t lanes[kLanes];
  spill(lanes, other);
  for (uint64_t lane : lanes) sums[2] |= fold<kUnit>(lane);
#endif
  sums[0] += fingerprint_tail(a + at, bytes - at, first + at / 8);
  sums[1] += fingerprint_tail(b + at, bytes - at, first + at / 8);
  for (; at < bytes; at += 64 * kUnit) {
    const int64_t here = bytes - at < 64 * kUnit ? bytes - at : 64 * kUnit;
    uint64_t word = 0;
    if (memcmp(a + at, b + at, static_cast<size_t>(here)) != 0) {
      for (int64_t u = 0; u * kUnit < here; ++u) {
        uint64_t x = 0, y = 0;
        memcpy(&x, a + at + u * kUnit, kUnit);
        memcpy(&y, b + at + u * kUnit, kUnit);
        sums[2] |= x ^ y;
        word |= static_cast<uint64_t>(x != y) << u;
      }
    }
    *mask++ = word;
    if (found.positions) {
      put_changes<kUnit>(word, a + at, b + at, (8 * first + at) / kUnit, count, found);
    }
    count += __builtin_popcountll(word);
  }
  return count;
}

int64_t compare_bytes(int unit, const uint8_t* a, const uint8_t* b, int64_t bytes, int64_t first,
                      uint64_t* mask, uint64_t* sums, Changes found) {
  switch (unit) {
    case 1:
      return compare_units<1>(a, b, bytes, first, mask, sums, found);
    case 2:
      return compare_units<2>(a, b, bytes, first, mask, sums, found);
    case 4:
      return compare_units<4>(a, b, bytes, first, mask, sums, found);
    default:
      return compare_units<8>(a, b, bytes, first, mask, sums, found);
  }
}

#if CFL_CODEC_ISA == 512
// The contexts of 64 units, a byte each (context_of in codec_delta.h).
template <int kUnit>
CFL_INLINE __m512i contexts(const uint8_t* data) {
  if constexpr (kUnit == 1) {
    const __m512i v = load(data);
    const __m512i low = _mm512_set1_epi8(1);
    return _mm512_or_si512(_mm512_add_epi8(v, v), _mm512_and_si512(_mm512_srli_epi16(v, 7), low));
  } else if constexpr (kUnit == 2) {
    const __m256i low = _mm512_cvtepi16_epi8(_mm512_srli_epi16(load(data), 7));
    const __m256i high = _mm512_cvtepi16_epi8(_mm512_srli_epi16(load(data + 64), 7));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  } else if constexpr (kUnit == 4) {
    alignas(64) uint8_t out[64];
    for (int j = 0; j < 4; ++j) {
      const __m512i v = _mm512_srli_epi32(load(data + 64 * j), 23);
      _mm_store_si128(reinterpret_cast<__m128i*>(out + 16 * j), _mm512_cvtepi32_epi8(v));
    }
    return load(out);
  } else {
    alignas(64) uint8_t out[64];
    for (int j = 0; j < 8; ++j) {
      const __m512i v =
          _mm512_sub_epi64(_mm512_srli_epi64(load(data + 64 * j), 52), _mm512_set1_epi64(831));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * j), _mm512_cvtepi64_epi8(v));
    }
    return load(out);
  }
}
#endif

template <int kUnit>
void unit_class_masks(const uint8_t* data, int64_t words, const uint8_t* map, int classes,
                      uint64_t* masks) {
#if CFL_CODEC_ISA == 512
  const __m512i t0 = load(map), t1 = load(map + 64), t2 = load(map + 128), t3 = load(map + 192);
#endif
  for (int64_t w = 0; w < words; ++w, data += 64 * kUnit, masks += classes) {
#if CFL_CODEC_ISA == 512
    const __m512i context = contexts<kUnit>(data);
    const __m512i of = _mm512_mask_blend_epi8(_mm512_movepi8_mask(context),
                                              _mm512_permutex2var_epi8(t0, context, t1),
                                              _mm512_permutex2var_epi8(t2, context, t3));
    for (int c = 0; c < classes; ++c) {
      masks[c] = _mm512_cmpeq_epi8_mask(of, _mm512_set1_epi8(static_cast<char>(c)));
    }
#else
    alignas(64) uint8_t of[64];
    for (int u = 0; u < 64; ++u) of[u] = map[context_of(kUnit, data + u * kUnit)];
#if CFL_CODEC_ISA == 2
    const __m256i low = load(of), high = load(of + 32);
    for (int c = 0; c < classes; ++c) {
      const __m256i one = _mm256_set1_epi8(static_cast<char>(c));
      const auto half = [&](__m256i v) {
        return uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, one)))};
      };
      masks[c] = half(low) | half(high) << 32;
    }
#else
    memset(masks, 0, 8 * static_cast<size_t>(classes));
    for (int u = 0; u < 64; ++u) {
      if (of[u] < classes) masks[of[u]] |= uint64_t{1} << u;
    }
#endif
#endif
  }
}

void all_class_masks(int unit, const uint8_t* data, int64_t words, const uint8_t* map, int classes,
                     uint64_t* masks) {
  switch (unit) {
    case 1:
      return unit_class_masks<1>(data, words, map, classes, masks);
    case 2:
      return unit_class_masks<2>(data, words, map, classes, masks);
    case 4:
      return unit_class_masks<4>(data, words, map, classes, masks);
    default:
      return unit_class_masks<8>(data, words, map, classes, masks);
  }
}

int64_t list_ones(const uint64_t* mask, int64_t words, int64_t first, int64_t* out,
                  const int64_t* end) {
  const int64_t* const begin = out;
  for (int64_t w = 0; w < words; ++w) {
    const int64_t base = first + 64 * w;
#if CFL_CODEC_ISA == 512
    if (end - out >= 64) {
      const int64_t count = __builtin_popcountll(mask[w]);
      list_word(mask[w], base, count, out);
      out += count;
      continue;
    }
#else
    (void)end;
#endif
    for (uint64_t m = mask[w]; m != 0; m &= m - 1) *out++ = base + __builtin_ctzll(m);
  }
  return out - begin;
}

template <class T>
CFL_INLINE T unit_at(const uint8_t* data, int64_t i) {
  T v;
  memcpy(&v, data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return v;
}

template <class T>
void take_units(const uint8_t* data, int64_t first, int64_t n, const uint64_t* mask,
                const int64_t* positions, int64_t count, uint8_t* out) {
  constexpr int64_t kUnit = sizeof(T);
  int64_t i = 0;
#if CFL_CODEC_ISA == 512
  // Of many, whole vectors; behind what is taken they write other units, which are overwritten.
  constexpr int64_t kPer = 64 / kUnit;
  for (int64_t at = 0; 2 * count >= n / 64 && at + 64 <= n; at += 64) {
    const uint64_t word = mask[at / 64];
    if (count - i < 64 + kPer) break;
#pragma GCC unroll 8
    for (int64_t j = 0; j < kUnit; ++j) {
      const uint64_t m = kPer == 64 ? word : word >> (j * kPer % 64) & low_mask(kPer % 64);
      const __m512i v = load(data + (at + j * kPer) * kUnit);
      _mm512_storeu_si512(out + i * kUnit, squeeze<kUnit>(m, v));
      i += __builtin_popcountll(m);
    }
  }
#else
  (void)n, (void)mask;
#endif
  for (; i < count; ++i) {
    const T v = unit_at<T>(data, positions[i] - first);
    memcpy(out + i * kUnit, &v, sizeof(T));
  }
}
void take(int unit, const uint8_t* data, int64_t first, int64_t n, const uint64_t* mask,
          const int64_t* positions, int64_t count, uint8_t* out) {
  switch (unit) {
    case 1:
      return take_units<uint8_t>(data, first, n, mask, positions, count, out);
    case 2:
      return take_units<uint16_t>(data, first, n, mask, positions, count, out);
    case 4:
      return take_units<uint32_t>(data, first, n, mask, positions, count, out);
    default:
      return take_units<uint64_t>(data, first, n, mask, positions, count, out);
  }
}

// ---- numbers in buckets: the highest bit and the kKept bits below it make the symbol

template <int kKept>
CFL_INLINE unsigned raw_bits(uint64_t z) {
  return 63u - kKept - static_cast<unsigned>(__builtin_clzll(z | uint64_t{1} << kKept));
}
template <int kKept>
CFL_INLINE unsigned raw_bits_of_symbol(unsigned symbol) {
  const unsigned octave = symbol >> kKept;
  return octave - (octave != 0);
}

template <int kKept, class Number>
CFL_INLINE int64_t write_symbols(int64_t n, const Number& number, uint8_t* symbols) {
  int64_t bits = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t z = number(i);
    const unsigned raw = raw_bits<kKept>(z);
    symbols[i] = static_cast<uint8_t>((raw << kKept) + (z >> raw));
    bits += raw;
  }
  return bits;
}

#if CFL_CODEC_ISA == 512
// The same of eight numbers below 2^53 at a time, whose highest bit is a float's exponent.
template <int kKept, class Numbers>
CFL_INLINE int64_t write_symbols_by_8(int64_t n, const Numbers& numbers, uint8_t* symbols) {
  const __m512i least = _mm512_set1_epi64(1 << kKept), bias = _mm512_set1_epi64(1023 + kKept);
  __m512i bits = _mm512_setzero_si512();
  for (int64_t i = 0; i + 8 <= n; i += 8) {
    const __m512i z = numbers(i);
    const __m512i real = _mm512_castpd_si512(_mm512_cvtepu64_pd(_mm512_or_si512(z, least)));
    const __m512i raw = _mm512_sub_epi64(_mm512_srli_epi64(real, 52), bias);
    const __m512i symbol =
        _mm512_add_epi64(_mm512_slli_epi64(raw, kKept), _mm512_srlv_epi64(z, raw));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(symbols + i), _mm512_cvtepi64_epi8(symbol));
    bits = _mm512_add_epi64(bits, raw);
  }
  return static_cast<int64_t>(total(bits));
}
#endif

template <int kKept, class Number>
CFL_INLINE void write_bits(int64_t n, const Number& number, uint8_t* raw, int64_t bytes) {
  if (bytes == 0) return;
  uint8_t *p = raw, *const end = raw + bytes;
  uint8_t tail[32];
  bool in_tail = false;
  uint64_t filled = 0;
  unsigned fill = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!in_tail && end - p < 16) {  // from here on a store of eight bytes could pass the end
      raw = p;
      p = tail;
      in_tail = true;
    }
    const uint64_t z = number(i);
    const unsigned bits = raw_bits<kKept>(z);
    const uint64_t v = z & low_mask(bits);
    filled |= v << fill;
    memcpy(p, &filled, 8);
    const unsigned sum = fill + bits;
    filled = sum >= 64 ? v >> 1 >> (63 - fill) : filled;
    p += sum >> 6 << 3;
    fill = sum & 63;
  }
  if (in_tail) {
    memcpy(p, &filled, 8);
    memcpy(raw, tail, static_cast<size_t>(end - raw));
  } else {
    memcpy(p, &filled, static_cast<size_t>(end - p));
  }
}

int64_t write_gap_symbols(const int64_t* positions, int64_t before, int64_t n, uint8_t* symbols) {
  if (n == 0) return 0;
  auto first = [&](int64_t) { return static_cast<uint64_t>(positions[0] - before - 1); };
  auto gap = [&](int64_t i) { return static_cast<uint64_t>(positions[i + 1] - positions[i] - 1); };
  int64_t bits = write_symbols<kGapBits>(1, first, symbols), done = 0;
#if CFL_CODEC_ISA == 512
  auto gaps = [&](int64_t i) {
    const __m512i after = _mm512_loadu_si512(positions + i + 1);
    const __m512i apart = _mm512_sub_epi64(after, _mm512_loadu_si512(positions + i));
    return _mm512_sub_epi64(apart, _mm512_set1_epi64(1));
  };
  bits += write_symbols_by_8<kGapBits>(n - 1, gaps, symbols + 1);
  done = (n - 1) / 8 * 8;
#endif
  auto rest = [&](int64_t i) { return gap(done + i); };
  return bits + write_symbols<kGapBits>(n - 1 - done, rest, symbols + 1 + done);
}
void write_gap_bits(const int64_t* positions, int64_t before, int64_t n, uint8_t* raw,
                    int64_t bytes) {
  int64_t last = before;
  auto gap = [&](int64_t i) {
    const int64_t found = positions[i] - last - 1;
    last = positions[i];
    return static_cast<uint64_t>(found);
  };
  write_bits<kGapBits>(n, gap, raw, bytes);
}

template <class T>
struct Unit;
template <>
struct Unit<uint8_t> {
  using type = uint8_t;
  using with_sign = int8_t;
};
template <>
struct Unit<uint16_t> {
  using type = uint16_t;
  using with_sign = int16_t;
};
template <>
struct Unit<uint32_t> {
  using type = uint32_t;
  using with_sign = int32_t;
};
template <>
struct Unit<uint64_t> {
  using type = uint64_t;
  using with_sign = int64_t;
};

// The XOR, or the distance around the circle with its sign in the lowest bit: small for small
// steps.
template <class T, bool kXor>
CFL_INLINE T difference(T now, T before, int shift) {
  if constexpr (kXor) return static_cast<T>(static_cast<T>(now ^ before) >> shift);
  using S = typename Unit<T>::with_sign;
  const S d = static_cast<S>(static_cast<S>(static_cast<T>(now - before)) >> shift);
  return static_cast<T>(static_cast<T>(static_cast<T>(d) << 1) ^
                        static_cast<T>(d >> (8 * sizeof(T) - 1)));
}
template <class T, bool kXor>
CFL_INLINE T changed(T before, T z, int shift) {
  if constexpr (kXor) return static_cast<T>(before ^ static_cast<T>(z << shift));
  const T sign = static_cast<T>(0 - (z & 1));
  const T step = static_cast<T>(static_cast<T>(z >> 1) ^ sign);
  return static_cast<T>(before + static_cast<T>(step << shift));
}

#if CFL_CODEC_ISA == 512
// Eight units as 64-bit numbers, the upper bits those of the sign.
template <class T>
CFL_INLINE __m512i signed_units(const uint8_t* data, int64_t i) {
  const uint8_t* p = data + i * static_cast<int64_t>(sizeof(T));
  if constexpr (sizeof(T) == 1) {
    return _mm512_cvtepi8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  } else if constexpr (sizeof(T) == 2) {
    return _mm512_cvtepi16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else {
    return _mm512_cvtepi32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
}
template <class T, bool kXor>
CFL_INLINE __m512i differences(const uint8_t* now, const uint8_t* before, int64_t i, int shift) {
  constexpr int kSpare = 64 - 8 * static_cast<int>(sizeof(T));
  const __m512i a = signed_units<T>(now, i), b = signed_units<T>(before, i);
  const __m512i ones = _mm512_set1_epi64(static_cast<T>(~T{0}));
  if constexpr (kXor) {
    const __m512i z = _mm512_and_si512(_mm512_xor_si512(a, b), ones);
    return _mm512_srl_epi64(z, _mm_cvtsi32_si128(shift));
  }
  const __m512i far = _mm512_slli_epi64(_mm512_sub_epi64(a, b), kSpare);
  const __m512i d = _mm512_sra_epi64(far, _mm_cvtsi32_si128(kSpare + shift));
  const __m512i z = _mm512_xor_si512(_mm512_slli_epi64(d, 1), _mm512_srai_epi64(d, 63));
  return _mm512_and_si512(z, ones);
}
#endif

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
// call(unit, xor) with both as types.
template <class Call>
CFL_INLINE auto with_unit(int unit, int use_xor, const Call& call) {
  switch (unit) {
    case 1:
      return use_xor ? call(Unit<uint8_t>(), Flag<true>()) : call(Unit<uint8_t>(), Flag<false>());
    case 2:
      return use_xor ? call(Unit<uint16_t>(), Flag<true>()) : call(Unit<uint16_t>(), Flag<false>());
    case 4:
      return use_xor ? call(Unit<uint32_t>(), Flag<true>()) : call(Unit<uint32_t>(), Flag<false>());
    default:
      return use_xor ? call(Unit<uint64_t>(), Flag<true>()) : call(Unit<uint64_t>(), Flag<false>());
  }
}

int64_t write_value_symbols(int unit, int use_xor, int shift, const uint8_t* new_values,
                            const uint8_t* old_values, int64_t n, uint8_t* symbols) {
  return with_unit(unit, use_xor, [&](auto of, auto kind) {
    using T = typename decltype(of)::type;
    auto number = [&](int64_t i) -> uint64_t {
      return difference<T, decltype(kind)::value>(unit_at<T>(new_values, i),
                                                  unit_at<T>(old_values, i), shift);
    };
    int64_t bits = 0, done = 0;
#if CFL_CODEC_ISA == 512
    if constexpr (sizeof(T) < 8) {
      auto numbers = [&](int64_t i) {
        return differences<T, decltype(kind)::value>(new_values, old_values, i, shift);
      };
      bits = write_symbols_by_8<kValueBits>(n, numbers, symbols);
      done = n / 8 * 8;
    }
#endif
    auto rest = [&](int64_t i) { return number(done + i); };
    return bits + write_symbols<kValueBits>(n - done, rest, symbols + done);
  });
}
void write_value_bits(int unit, int use_xor, int shift, const uint8_t* new_values,
                      const uint8_t* old_values, int64_t n, uint8_t* raw, int64_t bytes) {
  with_unit(unit, use_xor, [&](auto of, auto kind) {
    using T = typename decltype(of)::type;
    auto number = [&](int64_t i) -> uint64_t {
      return difference<T, decltype(kind)::value>(unit_at<T>(new_values, i),
                                                  unit_at<T>(old_values, i), shift);
    };
    write_bits<kValueBits>(n, number, raw, bytes);
  });
}

template <int kKept>
CFL_INLINE int64_t count_raw_bits(const uint8_t* symbols, int64_t n) {
  // The symbol of the largest number there is.
  constexpr int kAll = ((63 - kKept) << kKept) + (2 << kKept) - 1;
  constexpr uint8_t kLargest = kAll < 255 ? kAll : 255;
  uint32_t bits = 0;  // at most 2^15 * 61
  uint8_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    bits += raw_bits_of_symbol<kKept>(symbols[i]);
    bad |= symbols[i] > kLargest;
  }
  return bad ? -1 : static_cast<int64_t>(bits);
}
int64_t count_bits(int kept, const uint8_t* symbols, int64_t n) {
  return kept == kGapBits ? count_raw_bits<kGapBits>(symbols, n)
                          : count_raw_bits<kValueBits>(symbols, n);
}

// How many places ahead memory is asked for, that is looked up here and there.
constexpr int64_t kAhead = 48;

// Calls see(i, z) for each number; whether spare bits are 0.
template <int kKept, class See>
CFL_INLINE bool read_numbers(const uint8_t* symbols, int64_t n, const uint8_t* raw,
                             const See& see) {
  uint64_t at = 0;
  for (int64_t i = 0; i < n; ++i) {
    const unsigned symbol = symbols[i], bits = raw_bits_of_symbol<kKept>(symbol);
    const uint8_t* p = raw + (at >> 3);
    const unsigned shift = at & 7;
    uint64_t word = load64(p) >> shift;
    // Numbers below 2^34 have no more than 30 raw bits.
    if constexpr (kKept != kGapBits) word |= uint64_t{p[8]} << 1 << (63 - shift);
    see(i, uint64_t{symbol - (bits << kKept)} << bits | (word & low_mask(bits)));
    at += bits;
  }
  return (at & 7) == 0 || raw[at >> 3] >> (at & 7) == 0;
}

int read_gap_block(const uint8_t* symbols, int64_t n, const uint8_t* raw, int64_t* positions) {
  int64_t next = 0;  // gaps are below 2^34, so that the sums of a block fit
  return read_numbers<kGapBits>(symbols, n, raw, [&](int64_t i, uint64_t z) {
    next += static_cast<int64_t>(z) + 1;
    positions[i] = next - 1;
  });
}

int read_value_block(int unit, int use_xor, int shift, const uint8_t* old_data,
                     const int64_t* positions, const uint8_t* symbols, int64_t n,
                     const uint8_t* raw, uint8_t* values) {
  return with_unit(unit, use_xor, [&](auto of, auto kind) {
    using T = typename decltype(of)::type;
    uint64_t all = 0;
    auto read = [&](const auto& place) {
      return read_numbers<kValueBits>(symbols, n, raw, [&](int64_t i, uint64_t z) {
        all |= z;
        const T value = changed<T, decltype(kind)::value>(unit_at<T>(old_data, place(i)),
                                                          static_cast<T>(z), shift);
        memcpy(values + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
      });
    };
    const int64_t last = n - 1;
    const bool good = positions ? read([&](int64_t i) {
      const int64_t ahead = positions[i + kAhead < last ? i + kAhead : last];
      __builtin_prefetch(old_data + ahead * static_cast<int64_t>(sizeof(T)));
      return positions[i];
    })
                                : read([](int64_t i) { return i; });
    return good && static_cast<T>(all) == all;
  });
}

template <class T>
CFL_INLINE uint64_t change_units(const uint8_t* data, int64_t bytes, const int64_t* positions,
                                 const uint8_t* values, int64_t count) {
  constexpr int64_t kPer = 8 / static_cast<int64_t>(sizeof(T));
  constexpr uint64_t kAll = static_cast<T>(~T{0});
  uint64_t sum = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t word = positions[i] / kPer;
    uint64_t before = 0;
    if (8 * word + 8 <= bytes) {
      before = load64(data + 8 * word);
    } else {
      memcpy(&before, data + 8 * word, static_cast<size_t>(bytes - 8 * word));
    }
    const int64_t ahead = i + kAhead < count ? i + kAhead : count - 1;
    __builtin_prefetch(data + positions[ahead] * static_cast<int64_t>(sizeof(T)));
    uint64_t now = before;
    do {
      const int64_t shift = positions[i] % kPer * 8 * static_cast<int64_t>(sizeof(T));
      now = (now & ~(kAll << shift)) | uint64_t{unit_at<T>(values, i)} << shift;
    } while (++i < count && positions[i] / kPer == word);
    const uint64_t key = kKey * static_cast<uint64_t>(word + 1);
    sum += word_term(now, key) - word_term(before, key);
  }
  return sum;
}
uint64_t change_of(int unit, const uint8_t* data, int64_t bytes, const int64_t* positions,
                   const uint8_t* values, int64_t count) {
  return with_unit(unit, 0, [&](auto of, auto) {
    return change_units<typename decltype(of)::type>(data, bytes, positions, values, count);
  });
}

// ---- classes

constexpr int64_t kClassWords = 32;  // of 64 units, whose masks are made at once

// Calls see(word, masks) for each 64 units, as long as it returns true: which have each class.
template <class See>
CFL_INLINE void each_word(int unit, const uint8_t* data, int64_t n, const uint8_t* map, int classes,
                          const See& see) {
  uint64_t masks[kClassWords * kMaxClasses];
  const int64_t whole = n / 64;
  for (int64_t w = 0; w < whole;) {
    const int64_t here = whole - w < kClassWords ? whole - w : kClassWords;
    all_class_masks(unit, data + w * 64 * unit, here, map, classes, masks);
    for (int64_t j = 0; j < here; ++j, ++w) {
      if (!see(w, masks + j * classes)) return;
    }
  }
  if (n > whole * 64) {
    uint8_t last[64 * 8] = {};
    memcpy(last, data + whole * 64 * unit, static_cast<size_t>((n - whole * 64) * unit));
    all_class_masks(unit, last, 1, map, classes, masks);
    for (int c = 0; c < classes; ++c) masks[c] &= low_mask(static_cast<unsigned>(n - whole * 64));
    see(whole, masks);
  }
}

void find_class_ranks(int unit, const uint8_t* data, int64_t n, const uint8_t* map, int classes,
                      const uint8_t* of, const int64_t* positions, int64_t count, int64_t* next,
                      int64_t* ranks, int64_t* order) {
  int64_t seen[kMaxClasses] = {}, i = 0;
  each_word(unit, data, n, map, classes, [&](int64_t w, const uint64_t* masks) {
    for (; i < count && positions[i] < 64 * (w + 1); ++i) {
      const int c = of[i];
      const uint64_t below = masks[c] & low_mask(static_cast<unsigned>(positions[i] & 63));
      order[next[c]] = i;
      ranks[next[c]++] = seen[c] + __builtin_popcountll(below);
    }
    for (int c = 0; c < classes; ++c) seen[c] += __builtin_popcountll(masks[c]);
    return i < count;
  });
}

// The place of the one with so many ones below it.
CFL_INLINE int select_bit(uint64_t mask, int64_t rank) {
#if CFL_CODEC_ISA > 0
  return __builtin_ctzll(_pdep_u64(uint64_t{1} << rank, mask));
#else
  for (; rank > 0; --rank) mask &= mask - 1;
  return __builtin_ctzll(mask);
#endif
}

int64_t find_class_places(int unit, const uint8_t* data, int64_t n, const uint8_t* map, int classes,
                          const int64_t* counts, const int64_t* ranks, int64_t* positions,
                          int64_t* order) {
  constexpr int64_t kNone = INT64_MAX;
  int64_t next[kMaxClasses], end[kMaxClasses], wanted[kMaxClasses], seen[kMaxClasses] = {};
  int64_t left = 0, found = 0;
  for (int c = 0; c < classes; left += counts[c++]) {
    next[c] = left;
    end[c] = left + counts[c];
    wanted[c] = counts[c] ? ranks[left] : kNone;
  }
  each_word(unit, data, n, map, classes, [&](int64_t w, const uint64_t* masks) {
    int64_t before[kMaxClasses], whose[64];
    uint32_t hit = 0;
    for (int c = 0; c < classes; ++c) {
      before[c] = seen[c];
      seen[c] += __builtin_popcountll(masks[c]);
      hit |= static_cast<uint32_t>(wanted[c] < seen[c]) << c;
    }
    uint64_t all = 0;
    for (; hit != 0; hit &= hit - 1) {
      const int c = __builtin_ctz(hit);
      do {
        const int bit = select_bit(masks[c], wanted[c] - before[c]);
        all |= uint64_t{1} << bit;
        whose[bit] = next[c];
        positions[next[c]++] = 64 * w + bit;
        wanted[c] = next[c] < end[c] ? ranks[next[c]] : kNone;
      } while (wanted[c] < seen[c]);
    }
    for (; all != 0; all &= all - 1) order[found++] = whose[__builtin_ctzll(all)];
    return found < left;
  });
  return found;
}

const DeltaKernel kDelta = {
    &fingerprint_bytes, &compare_bytes,    &list_ones,           &take,
    &write_gap_symbols, &write_gap_bits,   &write_value_symbols, &write_value_bits,
    &count_bits,        &read_gap_block,   &read_value_block,    &change_of,
    &find_class_ranks,  &find_class_places};

}  // namespace
}  // namespace cfl::codec
