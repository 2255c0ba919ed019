// The lanes of a lossless blob cut into planes of bytes and put together again; part of
// codec_kernel_impl.h, once per instruction set.

// ---- a lane's bits as they are cut, from the high byte down
// ---------------------------------------------------------------

template <int kWidth>
struct LaneOf;
template <>
struct LaneOf<1> {
  using T = uint8_t;
};
template <>
struct LaneOf<2> {
  using T = uint16_t;
};
template <>
struct LaneOf<4> {
  using T = uint32_t;
};
template <>
struct LaneOf<8> {
  using T = uint64_t;
};

constexpr uint64_t kBias =
    2048 - 1023 + 192;  // exponents 2^-192 to 2^63 of float64 become 0 to 255
constexpr uint64_t kMantissa = (1ull << 52) - 1;

template <int kWidth, Cut kCut>
CFL_INLINE typename LaneOf<kWidth>::T turned(typename LaneOf<kWidth>::T v) {
  using T = typename LaneOf<kWidth>::T;
  if constexpr (kCut == Cut::kRebiased) {
    const uint64_t e = ((v >> 52) + kBias) & 2047;
    return (e & 255) << 56 | e >> 8 << 53 | (v & kMantissa) << 1 | v >> 63;
  } else if constexpr (kCut == Cut::kRotated) {
    return static_cast<T>(v << 1 | v >> (8 * kWidth - 1));
  } else {
    return v;
  }
}

template <int kWidth, Cut kCut>
CFL_INLINE typename LaneOf<kWidth>::T turned_back(typename LaneOf<kWidth>::T v) {
  using T = typename LaneOf<kWidth>::T;
  if constexpr (kCut == Cut::kRebiased) {
    const uint64_t e = ((v >> 56 | (v >> 53 & 7) << 8) - kBias) & 2047;
    return v << 63 | e << 52 | (v >> 1 & kMantissa);
  } else if constexpr (kCut == Cut::kRotated) {
    return static_cast<T>(v >> 1 | v << (8 * kWidth - 1));
  } else {
    return v;
  }
}

// ---- cutting
// ------------------------------------------------------------------------------------

// `planes` may have null pointers: what is not wanted.
template <int kWidth, Cut kCut>
CFL_INLINE void split_loop(const uint8_t* w, int64_t n, uint8_t* const* planes, int64_t at) {
  using T = typename LaneOf<kWidth>::T;
  constexpr int64_t kTurn = 1024;  // lanes that stay in the first cache for all planes
  for (int64_t begin = at; begin < n; begin += kTurn) {
    const int64_t count = min64(kTurn, n - begin);
    const uint8_t* __restrict from = w + begin * kWidth;
    for (int p = 0; p < kWidth; ++p) {
      if (!planes[p]) continue;
      uint8_t* __restrict to = planes[p] + begin;
      const int shift = 8 * (kWidth - 1 - p);
      for (int64_t i = 0; i < count; ++i) {
        T v;
        memcpy(&v, from + i * kWidth, kWidth);
        to[i] = static_cast<uint8_t>(turned<kWidth, kCut>(v) >> shift);
      }
    }
  }
}

#if CFL_CODEC_ISA == 512
template <int kWidth, Cut kCut>
CFL_INLINE __m512i turned_lanes(__m512i v) {
  if constexpr (kCut == Cut::kRebiased) {
    const __m512i e =
        _mm512_and_si512(_mm512_add_epi64(_mm512_srli_epi64(v, 52), _mm512_set1_epi64(kBias)),
                         _mm512_set1_epi64(2047));
    const __m512i low = _mm512_ternarylogic_epi64(
        _mm512_slli_epi64(_mm512_and_si512(v, _mm512_set1_epi64(kMantissa)), 1),
        _mm512_srli_epi64(v, 63), _mm512_slli_epi64(_mm512_srli_epi64(e, 8), 53), 0xfe);
    return _mm512_or_si512(low, _mm512_slli_epi64(e, 56));
  } else if constexpr (kCut == Cut::kRotated) {
    if constexpr (kWidth == 2) return _mm512_shldi_epi16(v, v, 1);
    if constexpr (kWidth == 4) return _mm512_rol_epi32(v, 1);
    if constexpr (kWidth == 8) return _mm512_rol_epi64(v, 1);
  }
  return v;
}

template <int kWidth, Cut kCut>
CFL_INLINE __m512i lanes_turned_back(__m512i v) {
  if constexpr (kCut == Cut::kRebiased) {
    const __m512i high = _mm512_and_si512(_mm512_srli_epi64(v, 45), _mm512_set1_epi64(7 << 8));
    const __m512i e = _mm512_and_si512(
        _mm512_sub_epi64(_mm512_or_si512(_mm512_srli_epi64(v, 56), high), _mm512_set1_epi64(kBias)),
        _mm512_set1_epi64(2047));
    return _mm512_ternarylogic_epi64(
        _mm512_slli_epi64(v, 63), _mm512_slli_epi64(e, 52),
        _mm512_and_si512(_mm512_srli_epi64(v, 1), _mm512_set1_epi64(kMantissa)), 0xfe);
  } else if constexpr (kCut == Cut::kRotated) {
    if constexpr (kWidth == 2) return _mm512_shrdi_epi16(v, v, 1);
    if constexpr (kWidth == 4) return _mm512_ror_epi32(v, 1);
    if constexpr (kWidth == 8) return _mm512_ror_epi64(v, 1);
  }
  return v;
}

// The bytes of a vector with those of each plane together, that of the high bytes first.
template <int kWidth>
CFL_INLINE __m512i plane_order() {
  alignas(64) uint8_t index[64];
  for (int i = 0; i < 64; ++i) {
    const int lanes = 64 / kWidth;
    index[i] = static_cast<uint8_t>(i % lanes * kWidth + kWidth - 1 - i / lanes);
  }
  return _mm512_load_si512(index);
}
#endif

template <int kWidth, Cut kCut>
void split_as(const uint8_t* w, int64_t n, uint8_t* const* planes) {
  int64_t i = 0;
#if CFL_CODEC_ISA == 512
  if constexpr (kWidth == 2) {
    alignas(64) uint8_t index[64];
    for (int j = 0; j < 64; ++j) index[j] = static_cast<uint8_t>(2 * j);
    const __m512i even = _mm512_load_si512(index);
    const __m512i odd = _mm512_add_epi8(even, _mm512_set1_epi8(1));
    for (; i + 64 <= n; i += 64) {
      const __m512i a = turned_lanes<2, kCut>(_mm512_loadu_si512(w + 2 * i));
      const __m512i b = turned_lanes<2, kCut>(_mm512_loadu_si512(w + 2 * i + 64));
      if (planes[0]) _mm512_storeu_si512(planes[0] + i, _mm512_permutex2var_epi8(a, odd, b));
      if (planes[1]) _mm512_storeu_si512(planes[1] + i, _mm512_permutex2var_epi8(a, even, b));
    }
  } else if constexpr (kWidth == 4) {
    const __m512i order = plane_order<4>();
    for (; i + 64 <= n; i += 64) {
      __m512i v[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        v[j] = _mm512_permutexvar_epi8(
            order, turned_lanes<4, kCut>(_mm512_loadu_si512(w + 4 * i + 64 * j)));
      }
      const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
      const __m512i b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
      const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
      const __m512i d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
      if (planes[0]) _mm512_storeu_si512(planes[0] + i, _mm512_shuffle_i32x4(a, b, 0x88));
      if (planes[1]) _mm512_storeu_si512(planes[1] + i, _mm512_shuffle_i32x4(a, b, 0xdd));
      if (planes[2]) _mm512_storeu_si512(planes[2] + i, _mm512_shuffle_i32x4(c, d, 0x88));
      if (planes[3]) _mm512_storeu_si512(planes[3] + i, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
  } else if constexpr (kWidth == 8) {
    const __m512i order = plane_order<8>();
    for (; i + 8 <= n; i += 8) {
      alignas(64) uint64_t part[8];
      _mm512_store_si512(part, _mm512_permutexvar_epi8(
                                   order, turned_lanes<8, kCut>(_mm512_loadu_si512(w + 8 * i))));
#pragma GCC unroll 8
      for (int p = 0; p < 8; ++p) {
        if (planes[p]) store64(planes[p] + i, part[p]);
      }
    }
  }
#endif
  split_loop<kWidth, kCut>(w, n, planes, i);
}

// Calls f.template operator()<width, cut>().
template <class F>
CFL_INLINE void for_lanes(const Lanes& lanes, const F& f) {
  const bool plain = lanes.cut == Cut::kPlain;
  switch (lanes.width) {
    case 1:
      return plain ? f.template operator()<1, Cut::kPlain>()
                   : f.template operator()<1, Cut::kRotated>();
    case 2:
      return plain ? f.template operator()<2, Cut::kPlain>()
                   : f.template operator()<2, Cut::kRotated>();
    case 4:
      return plain ? f.template operator()<4, Cut::kPlain>()
                   : f.template operator()<4, Cut::kRotated>();
    default:
      return plain ? f.template operator()<8, Cut::kPlain>()
                   : f.template operator()<8, Cut::kRebiased>();
  }
}

void split(const Lanes* lanes, const uint8_t* w, int64_t n, uint8_t* const* planes) {
  for_lanes(*lanes, [&]<int kWidth, Cut kCut>() { split_as<kWidth, kCut>(w, n, planes); });
}

void copy_past(uint8_t* to, const uint8_t* from, int64_t n) {
#if CFL_CODEC_ISA == 512
  const int64_t lead = min64(n, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63));
  memcpy(to, from, static_cast<size_t>(lead));
  int64_t i = lead;
  for (; i + 64 <= n; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
  memcpy(to + i, from + i, static_cast<size_t>(n - i));
  _mm_sfence();
#else
  memcpy(to, from, static_cast<size_t>(n));
#endif
}

// ---- putting together
// ---------------------------------------------------------------------------

template <int kWidth, Cut kCut>
CFL_INLINE void join_loop(const uint8_t* const* planes, int64_t n, uint8_t* __restrict out) {
  using T = typename LaneOf<kWidth>::T;
  const uint8_t* from[kWidth];
  for (int p = 0; p < kWidth; ++p) from[p] = planes[p];
  for (int64_t i = 0; i < n; ++i) {
    T v = 0;
#pragma GCC unroll 8
    for (int p = 0; p < kWidth; ++p) {
      v = static_cast<T>(v | static_cast<T>(from[p][i]) << (8 * (kWidth - 1 - p)));
    }
    v = turned_back<kWidth, kCut>(v);
    memcpy(out + i * kWidth, &v, kWidth);
  }
}

template <int kWidth>
CFL_INLINE void passed(Joining& j, int64_t n) {
  for (int p = 0; p < kWidth; ++p) j.planes[p] += n;
  j.out += n * kWidth;
  j.n -= n;
}

// Writes the first n lanes, if there are as many.
template <int kWidth, Cut kCut>
CFL_INLINE void join_some(Joining& j, int64_t n) {
  n = min64(n, j.n);
  if (n <= 0) return;
  join_loop<kWidth, kCut>(j.planes, n, j.out);
  passed<kWidth>(j, n);
}

// Writes the first lanes until the next is on a multiple of 64 bytes; whether it is.
template <int kWidth, Cut kCut>
CFL_INLINE bool align_lanes(Joining& j) {
  const int64_t bytes = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(j.out) & 63);
  if (bytes == 0) return true;
  if (bytes % kWidth) return false;
  join_some<kWidth, kCut>(j, bytes / kWidth);
  return j.n > 0;
}

#if CFL_CODEC_ISA == 512
// Writes lanes, a line of the cache with each step (see Weights32).
template <int kWidth, Cut kCut, bool kStream>
struct Joiner {
  const uint8_t* planes[kWidth];
  uint8_t* out;
  int64_t left;
  Ahead ahead;

  CFL_INLINE void step() {
    constexpr int64_t kStep = 64 / kWidth;
    if (left < kStep) return;
    _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T1);
    ahead.at += ahead.step;
    __m512i v;
    if constexpr (kWidth == 2) {
      auto load = [](const uint8_t* p) {
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      };
      v = _mm512_or_si512(_mm512_slli_epi16(load(planes[0]), 8), load(planes[1]));
    } else if constexpr (kWidth == 4) {
      auto load = [](const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      };
      const __m512i high = _mm512_slli_epi32(load(planes[0]), 24);
      v = _mm512_ternarylogic_epi32(high, _mm512_slli_epi32(load(planes[1]), 16),
                                    _mm512_slli_epi32(load(planes[2]), 8), 0xfe);
      v = _mm512_or_si512(v, load(planes[3]));
    } else {
      alignas(64) uint64_t part[8];
#pragma GCC unroll 8
      for (int p = 0; p < 8; ++p) part[7 - p] = load64(planes[p]);
      v = _mm512_permutexvar_epi8(transposed(), _mm512_load_si512(part));
    }
    v = lanes_turned_back<kWidth, kCut>(v);
    if (kStream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), v);
    } else {
      _mm512_storeu_si512(out, v);
    }
#pragma GCC unroll 8
    for (int p = 0; p < kWidth; ++p) planes[p] += kStep;
    out += 64;
    left -= kStep;
  }

  static CFL_INLINE __m512i transposed() {
    return _mm512_set_epi64(0x3f372f271f170f07, 0x3e362e261e160e06, 0x3d352d251d150d05,
                            0x3c342c241c140c04, 0x3b332b231b130b03, 0x3a322a221a120a02,
                            0x3931292119110901, 0x3830282018100800);
  }
};

// Calls f with a Joiner of what is pending, which must be at least two bytes wide, and keeps what
// it has left.
template <int kWidth, Cut kCut, class F>
CFL_INLINE void with_joiner(Joining& j, const F& f) {
  auto run = [&](auto joiner) {
    for (int p = 0; p < kWidth; ++p) joiner.planes[p] = j.planes[p];
    joiner.out = j.out;
    joiner.left = j.n;
    joiner.ahead = j.ahead;
    f(joiner);
    for (int p = 0; p < kWidth; ++p) j.planes[p] = joiner.planes[p];
    j.out = joiner.out;
    j.n = joiner.left;
    j.ahead = joiner.ahead;
  };
  if (align_lanes<kWidth, kCut>(j) && j.stream) {
    run(Joiner<kWidth, kCut, true>());
  } else {
    run(Joiner<kWidth, kCut, false>());
  }
}
#endif

template <int kWidth, Cut kCut>
void join_as(Joining& j) {
#if CFL_CODEC_ISA == 512
  if constexpr (kWidth > 1) {
    with_joiner<kWidth, kCut>(j, [](auto& joiner) {
      auto local = joiner;
      while (local.left >= 64 / kWidth) local.step();
      joiner = local;
    });
  }
#endif
  join_some<kWidth, kCut>(j, j.n);
}

void join(Joining* joining) {
  if (joining->n > 0) {
    for_lanes(joining->lanes, [&]<int kWidth, Cut kCut>() { join_as<kWidth, kCut>(*joining); });
  }
#if CFL_CODEC_ISA == 512
  if (joining->stream) _mm_sfence();
#endif
}
