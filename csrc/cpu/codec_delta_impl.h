// The inner loops of deltas, included once per instruction set by codec_delta_*.cpp, under the
// rules of codec_kernel_impl.h: no C++ library, all but the entry point in an unnamed namespace.
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

CFL_INLINE uint64_t word_product(uint64_t w, uint64_t key) {
  const uint64_t lo = static_cast<uint32_t>(w) + static_cast<uint32_t>(key);
  const uint64_t hi = static_cast<uint32_t>(w >> 32) + static_cast<uint32_t>(key >> 32);
  return (lo & 0xffffffffu) * (hi & 0xffffffffu);
}

// What is left after whole vectors; the last word is filled up with zeros.
CFL_INLINE uint64_t fingerprint_tail(const uint8_t* data, int64_t bytes, int64_t first) {
  uint64_t sum = 0, key = kKey * static_cast<uint64_t>(first + 1);
  for (; bytes >= 8; bytes -= 8, data += 8, key += kKey) sum += word_product(load64(data), key);
  if (bytes > 0) {
    uint64_t w = 0;
    memcpy(&w, data, static_cast<size_t>(bytes));
    sum += word_product(w, key);
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
CFL_INLINE Vector add32(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
CFL_INLINE Vector product(Vector a) { return _mm512_mul_epu32(a, _mm512_srli_epi64(a, 32)); }
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
CFL_INLINE Vector add32(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
CFL_INLINE Vector product(Vector a) { return _mm256_mul_epu32(a, _mm256_srli_epi64(a, 32)); }
CFL_INLINE void spill(uint64_t* to, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
}
CFL_INLINE Vector fill(const uint64_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
#endif

#if CFL_CODEC_ISA > 0
constexpr int kLanes = kBytes / 8;

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
      sums[j] = add64(sums[j], product(add32(load(data + at + j * kBytes), keys[j])));
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

template <int kUnit>
int64_t compare_units(const uint8_t* a, const uint8_t* b, int64_t bytes, int64_t first,
                      uint64_t* mask, uint64_t* sums) {
  int64_t at = 0, count = 0;
#if CFL_CODEC_ISA > 0
  constexpr int kVectors = 64 * kUnit / kBytes;  // for a word of the mask
  const Vector step = all(kKey * kLanes);
  Vector keys = keys_from(first), sum_a = all(0), sum_b = all(0);
  for (; at + 64 * kUnit <= bytes; at += 64 * kUnit) {
    uint64_t word = 0;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const Vector x = load(a + at + j * kBytes), y = load(b + at + j * kBytes);
      word |= differ<kUnit>(x, y) << (j * kBytes / kUnit);
      sum_a = add64(sum_a, product(add32(x, keys)));
      sum_b = add64(sum_b, product(add32(y, keys)));
      keys = add64(keys, step);
    }
    *mask++ = word;
    count += __builtin_popcountll(word);
  }
  sums[0] += total(sum_a);
  sums[1] += total(sum_b);
#endif
  sums[0] += fingerprint_tail(a + at, bytes - at, first + at / 8);
  sums[1] += fingerprint_tail(b + at, bytes - at, first + at / 8);
  for (; at < bytes; at += 64 * kUnit) {
    const int64_t here = bytes - at < 64 * kUnit ? bytes - at : 64 * kUnit;
    uint64_t word = 0;
    if (memcmp(a + at, b + at, static_cast<size_t>(here)) != 0) {
      for (int64_t u = 0; u * kUnit < here; ++u) {
        const bool other = memcmp(a + at + u * kUnit, b + at + u * kUnit, kUnit) != 0;
        word |= static_cast<uint64_t>(other) << u;
      }
    }
    *mask++ = word;
    count += __builtin_popcountll(word);
  }
  return count;
}

int64_t compare_bytes(int unit, const uint8_t* a, const uint8_t* b, int64_t bytes, int64_t first,
                      uint64_t* mask, uint64_t* sums) {
  switch (unit) {
    case 1:
      return compare_units<1>(a, b, bytes, first, mask, sums);
    case 2:
      return compare_units<2>(a, b, bytes, first, mask, sums);
    case 4:
      return compare_units<4>(a, b, bytes, first, mask, sums);
    default:
      return compare_units<8>(a, b, bytes, first, mask, sums);
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

const DeltaKernel kDelta = {&fingerprint_bytes, &compare_bytes, &all_class_masks};

}  // namespace
}  // namespace cfl::codec
