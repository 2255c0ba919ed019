// The two layouts that the codec could have had, on the same symbols, codes as good, one thread:
//   pivot      what the library writes (docs/format.md), all of it: header, checksums, code table
//   lanes      64 interleaved lanes with one shared cursor of 16-bit words, a code table of 2^L
//   entries,
//              decoded with AVX-512 gather and expand; no header, no checksum, no bounds check
// g++ -std=c++20 -O3 -march=native -ffp-contract=off -DCFL_HAVE_X86_ISAS -Icsrc
// benches/codec_layouts.cpp
//     csrc/cpu/codec_payload.cpp csrc/cpu/codec_kernel_*.cpp -o /tmp/codec_layouts &&
//     /tmp/codec_layouts
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/codec_payload.h"

namespace {

using namespace cfl::codec;

constexpr int kVectors = 4, kLanes = 16 * kVectors;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Huffman lengths cut to `limit`, with the Kraft sum repaired by lengthening the rarest short
// codes.
std::vector<uint8_t> limited_lengths(const std::vector<uint64_t>& counts, int limit) {
  std::vector<uint8_t> lengths = code_lengths(counts);
  std::vector<size_t> order;
  uint64_t kraft = 0;
  for (size_t s = 0; s < lengths.size(); ++s) {
    if (!lengths[s]) continue;
    lengths[s] = std::min<uint8_t>(lengths[s], static_cast<uint8_t>(limit));
    kraft += uint64_t{1} << (limit - lengths[s]);
    order.push_back(s);
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return counts[a] < counts[b]; });
  for (size_t i = 0; kraft > uint64_t{1} << limit;) {
    const size_t s = order[i];
    if (lengths[s] < limit) {
      kraft -= uint64_t{1} << (limit - lengths[s] - 1);
      ++lengths[s];
    } else {
      ++i;
    }
  }
  return lengths;
}

struct Lanes {
  int limit;
  std::vector<uint32_t> table;  // symbol | length << 16
  std::vector<uint16_t> words;
};

template <class T>
Lanes encode_lanes(const std::vector<T>& symbols, const std::vector<uint8_t>& lengths, int limit) {
  Lanes out;
  out.limit = limit;
  out.table.assign(size_t{1} << limit, 0);
  std::vector<uint32_t> code(lengths.size(), 0);
  uint32_t next = 0;
  for (int length = 1; length <= limit; ++length) {
    for (size_t s = 0; s < lengths.size(); ++s) {
      if (lengths[s] != length) continue;
      code[s] = next >> (limit - length);
      const uint32_t span = 1u << (limit - length);
      for (uint32_t i = 0; i < span && next + i < out.table.size(); ++i) {
        out.table[next + i] = static_cast<uint32_t>(s) | static_cast<uint32_t>(length) << 16;
      }
      next += span;
    }
  }
  // Each lane's bits as words; then the words in the order in which the decoder will ask for them.
  std::vector<std::vector<uint16_t>> lane_words(kLanes);
  for (int lane = 0; lane < kLanes; ++lane) {
    uint64_t acc = 0;
    int fill = 0;
    for (size_t i = lane; i < symbols.size(); i += kLanes) {
      acc = acc << lengths[symbols[i]] | code[symbols[i]];
      fill += lengths[symbols[i]];
      while (fill >= 16) lane_words[lane].push_back(static_cast<uint16_t>(acc >> (fill -= 16)));
    }
    if (fill) lane_words[lane].push_back(static_cast<uint16_t>(acc << (16 - fill)));
    lane_words[lane].insert(lane_words[lane].end(), 4, 0);
  }
  std::vector<size_t> taken(kLanes, 0);
  std::vector<int> count(kLanes, 0);
  auto pull = [&](int lane) {
    out.words.push_back(lane_words[lane][taken[lane]++]);
    count[lane] += 16;
  };
  for (int lane = 0; lane < kLanes; ++lane) pull(lane);
  for (size_t i = 0; i + kLanes <= symbols.size(); i += kLanes) {
    for (int v = 0; v < kVectors; ++v) {
      for (int lane = 16 * v; lane < 16 * v + 16; ++lane) {
        if (count[lane] < 16) pull(lane);
      }
      for (int lane = 16 * v; lane < 16 * v + 16; ++lane) count[lane] -= lengths[symbols[i + lane]];
    }
  }
  out.words.insert(out.words.end(), 64, 0);
  return out;
}

template <class T>
void decode_lanes(const Lanes& in, int64_t n, T* out) {
  const uint16_t* cursor = in.words.data();
  __m512i bits[kVectors], count[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const __m512i w =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(cursor)));
    bits[v] = _mm512_slli_epi32(w, 16);
    count[v] = _mm512_set1_epi32(16);
    cursor += 16;
  }
  const __m512i sixteen = _mm512_set1_epi32(16);
  const __m128i top = _mm_cvtsi32_si128(32 - in.limit);
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 need = _mm512_cmplt_epi32_mask(count[v], sixteen);
      const __m512i words =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(cursor)));
      const __m512i mine = _mm512_maskz_expand_epi32(need, words);
      bits[v] =
          _mm512_or_si512(bits[v], _mm512_sllv_epi32(mine, _mm512_sub_epi32(sixteen, count[v])));
      count[v] = _mm512_mask_add_epi32(count[v], need, count[v], sixteen);
      cursor += __builtin_popcount(need);
      const __m512i entry =
          _mm512_i32gather_epi32(_mm512_srl_epi32(bits[v], top), in.table.data(), 4);
      const __m512i length = _mm512_srli_epi32(entry, 16);
      bits[v] = _mm512_sllv_epi32(bits[v], length);
      count[v] = _mm512_sub_epi32(count[v], length);
      if (sizeof(T) == 1) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 16 * v), _mm512_cvtepi32_epi8(entry));
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i + 16 * v),
                            _mm512_cvtepi32_epi16(entry));
      }
    }
  }
}

template <class T>
void compare(int bits, int limit) {
  const int64_t n = 4'000'000 / kLanes * kLanes;
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> w(n);
  for (float& value : w) value = normal(generator);
  const auto [low, high] = std::minmax_element(w.begin(), w.end());
  const float scale = static_cast<float>(1 << bits) / (*high - *low), origin = *low;
  std::vector<T> symbols(n), out(n);
  for (int64_t i = 0; i < n; ++i) {
    symbols[i] =
        static_cast<T>(std::min(static_cast<int>((w[i] - origin) * scale), (1 << bits) - 1));
  }
  std::vector<uint64_t> counts(size_t{1} << bits, 0);
  for (T s : symbols) ++counts[s];
  double entropy = 0;
  for (uint64_t c : counts) {
    if (c) entropy -= static_cast<double>(c) / n * std::log2(static_cast<double>(c) / n);
  }

  const Kernel* kernel = best_kernel();
  std::vector<uint8_t> payload;
  int64_t size = 0;
  double encode = 1e9, pivot = 1e9, lanes = 1e9;
  const Lanes packed = encode_lanes(symbols, limited_lengths(counts, limit), limit);
  bool right = true;
  for (int round = 0; round < 15; ++round) {
    double t = seconds();
    Symbols all;
    all.size = sizeof(T);
    all.n = n;
    all.data = reinterpret_cast<const uint8_t*>(symbols.data());
    size = encode_payload(all, &n, 1, 15, kernel, {}, [&](int64_t bytes) {
      if (static_cast<int64_t>(payload.size()) < bytes) payload.resize(bytes);
      return payload.data();
    });
    encode = std::min(encode, seconds() - t);
    t = seconds();
    decode_payload(payload.data(), size, 0, n, out.data(), sizeof(T), nullptr, kernel, {});
    pivot = std::min(pivot, seconds() - t);
    right &= out == symbols;
    std::fill(out.begin(), out.end(), T(0));
    t = seconds();
    decode_lanes(packed, n, out.data());
    lanes = std::min(lanes, seconds() - t);
    right &= out == symbols;
  }
  std::printf(
      "%2d bits, H %.4f | pivot %5.0f Msym/s decode, %5.0f encode, %.4f bits | lanes (L = %d) "
      "%5.0f Msym/s decode, %.4f bits | %s\n",
      bits, entropy, n / pivot / 1e6, n / encode / 1e6, 8.0 * static_cast<double>(size) / n, limit,
      n / lanes / 1e6, 16.0 * static_cast<double>(packed.words.size()) / n,
      right ? "both right" : "WRONG");
}

}  // namespace

int main() {
  compare<uint8_t>(8, 12);
  compare<uint16_t>(10, 13);
  compare<uint16_t>(12, 15);
}
