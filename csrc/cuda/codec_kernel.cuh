// The codec on a GPU: the chunks of docs/format.md (pivot layout), one block for each.
//
// A chunk is a wavelet tree. To decode, once every 64-bit line of its bits knows how many ones come
// before it, rank(p), the ones before bit p, costs one look-up and at most two popcounts; so
//   * the sizes of all nodes follow from rank differences (one thread walks the few nodes), and
//   * every thread finds its own symbol from the root down, about two steps on average,
// with no dependence between threads and with neighbouring reads by neighbouring threads.
//
// To encode, a symbol's bit at a node goes behind those of the earlier symbols that pass the node.
// Each warp owns a stretch of the chunk and counts, node by node, what passes; a scan over the
// warps gives each its place, and a second walk writes the bits.
//
// Device code only: the launchers are in codec.cu, and python/cfl_ops/_cuda.py launches it through
// NVRTC.
#pragma once

#include "cuda/device.cuh"

namespace cfl::cuda {

// As cfl::codec::Node; in pre-order, the left child follows its parent.
struct CodecNode {
  int32_t right;  // inner node: index of the right child; leaf: 0
  int32_t first;  // inner node: rank of the right child's first symbol; leaf: of its own
  int32_t bits;   // leaf: it holds 2^bits symbols
};
constexpr int kMaxCodecNodes = 1024;
constexpr int kLine = 64;         // bits that share one entry of the table of ones
constexpr int kPart = 1 << 15;    // weights of a group that a block quantises at a time
constexpr int kMaxShared = 8192;  // counts that fit shared memory
constexpr double kHuge = 0x1.fffffffffffffp1023;  // above all finite weights, or equal

// The sum of `v` over the threads before this one; *total is the sum over all of them.
__device__ inline uint32_t block_exclusive(uint32_t v, uint32_t* total) {
  __shared__ uint32_t warps[kWarps + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  auto inclusive = [&](uint32_t sum) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t below = __shfl_up_sync(kFull, sum, d);
      if (lane >= d) sum += below;
    }
    return sum;
  };
  const uint32_t mine = inclusive(v);
  __syncthreads();  // the last call's readers are done
  if (lane == 31) warps[warp] = mine;
  __syncthreads();
  if (warp == 0) {
    const uint32_t one = lane < kWarps ? warps[lane] : 0;
    const uint32_t sum = inclusive(one);
    if (lane < kWarps) warps[lane] = sum - one;
    if (lane == kWarps - 1) warps[kWarps] = sum;
  }
  __syncthreads();
  *total = warps[kWarps];
  return mine - v + warps[warp];
}

// The bits of a chunk, which may start at any byte.
struct Bits {
  const uint32_t* words;  // aligned, at or before the chunk
  uint32_t skip;          // bits from there to the chunk
  uint32_t count;         // bits of the chunk

  __device__ uint32_t at(uint32_t pos) const {  // 32 of them; what lies past the end reads as zero
    if (pos >= count) return 0;
    const uint32_t p = pos + skip, s = p & 31;
    const uint32_t low = words[p >> 5] >> s;
    const uint32_t bits = s && count - pos > 32 - s ? low | words[(p >> 5) + 1] << (32 - s) : low;
    return count - pos >= 32 ? bits : bits & ((1u << (count - pos)) - 1);
  }
  __device__ uint32_t rank(const uint32_t* table, uint32_t pos) const {
    uint32_t ones = table[pos / kLine], p = pos / kLine * kLine;
    for (; p + 32 <= pos; p += 32) ones += __popc(at(p));
    return p < pos ? ones + __popc(at(p) & ((1u << (pos - p)) - 1)) : ones;
  }
};

// ---- checksum
// ------------------------------------------------------------------------------------

// a * b modulo the polynomial of CRC-32, both bit-reflected.
__device__ inline uint32_t crc_multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
    if (a & bit) product ^= b;
    b = b & 1 ? b >> 1 ^ 0xedb88320u : b >> 1;
  }
  return product;
}

// By the whole block, a word to each thread and row: the remainder moves on by a row (a look-up in
// four tables), and at the end by what the thread lies before the end. `tables` holds these 4 * 256
// entries and 256 factors (_cuda.py); the whole rows are the last ones, for zeros in front change
// nothing.
__device__ inline uint32_t block_crc(const Bits& bits, uint32_t size, const uint32_t* tables) {
  __shared__ uint32_t table[4 * 256];
  __shared__ uint32_t sums[kWarps];
  __syncthreads();
  for (int i = threadIdx.x; i < 4 * 256; i += kThreads) table[i] = tables[i];
  __syncthreads();
  const uint32_t words = size / 4, rows = (words + kThreads - 1) / kThreads;
  const uint32_t pad = rows * kThreads - words;
  uint32_t crc = 0;
  for (uint32_t row = 0; row < rows; ++row) {
    const uint32_t i = row * kThreads + threadIdx.x;
    uint32_t word = i >= pad ? bits.at(32 * (i - pad)) : 0;
    if (i == pad) word = ~word;  // a checksum starts as all ones
    crc = table[crc & 255] ^ table[256 + (crc >> 8 & 255)] ^ table[512 + (crc >> 16 & 255)] ^
          table[768 + (crc >> 24)] ^ word;
  }
  crc = crc_multiply(crc, tables[4 * 256 + threadIdx.x]);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) crc ^= __shfl_xor_sync(kFull, crc, d);
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = crc;
  __syncthreads();
  crc = words == 0 ? kFull : 0;
  for (int w = 0; w < kWarps; ++w) crc ^= sums[w];
  for (uint32_t i = 4 * words; i < size; ++i) {
    crc ^= bits.at(8 * i) & 255;
    for (int k = 0; k < 8; ++k) crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
  }
  return ~crc;
}

// ---- histogram
// -----------------------------------------------------------------------------------

// Of the first `block` symbols of every `step`. Symbols beyond the alphabet are the caller's fault.
template <class T>
__global__ void __launch_bounds__(kThreads)
    codec_histogram_kernel(const T* symbols, int64_t n, int alphabet, int64_t block, int64_t step,
                           unsigned long long* counts) {
  CFL_DYNAMIC_SHARED(local);
  const bool shared_counts = alphabet <= kMaxShared;
  if (shared_counts) {
    for (int s = threadIdx.x; s < alphabet; s += kThreads) local[s] = 0;
    __syncthreads();
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t sampled = (n + step - 1) / step * block;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < sampled;
       i += stride) {
    const int64_t at = block == step ? i : i / block * step + i % block;
    if (at >= n) continue;
    if (shared_counts) {
      atomicAdd(&local[symbols[at]], 1u);
    } else {
      atomicAdd(&counts[symbols[at]], 1ull);
    }
  }
  if (!shared_counts) return;
  __syncthreads();
  for (int s = threadIdx.x; s < alphabet; s += kThreads) {
    if (local[s]) atomicAdd(&counts[s], static_cast<unsigned long long>(local[s]));
  }
}

// ---- encoding
// ------------------------------------------------------------------------------------

__device__ inline void put_bits(uint32_t* words, uint32_t pos, uint32_t value, int bits) {
  if (bits == 0) return;
  const uint32_t s = pos & 31;
  atomicOr(&words[pos >> 5], value << s);
  if (s + bits > 32) atomicOr(&words[(pos >> 5) + 1], value >> (32 - s));
}

// One warp takes symbols [first, last) down the tree, 32 at a time; `passed` counts, for each node,
// what has passed it. All lanes stay together until the last one is at its leaf.
template <bool kWrite, class T>
__device__ inline void codec_walk(const T* symbols, int first, int last, const CodecNode* nodes,
                                  const int32_t* rank_of, uint32_t* passed, const uint32_t* start,
                                  uint32_t* words) {
  const int lane = threadIdx.x & 31;
  for (int i = first; i < last; i += 32) {
    const bool inside = i + lane < last;
    const int rank = inside ? rank_of[symbols[i + lane]] : 0;
    int v = inside ? 0 : -1;
    while (__any_sync(kFull, v >= 0)) {
      const bool live = v >= 0;
      const uint32_t peers = __match_any_sync(kFull, v);
      const uint32_t before = __popc(peers & ((1u << lane) - 1));
      const CodecNode node = nodes[live ? v : 0];
      const uint32_t index = live ? passed[v] + before : 0;
      __syncwarp();
      if (live && before == 0) passed[v] += __popc(peers);
      __syncwarp();
      const bool inner = live && node.right != 0;
      const bool right = inner && rank >= node.first;
      if (kWrite) {
        // The first lane at a node writes the bits of all that are there with it.
        const uint32_t together = __reduce_or_sync(peers, static_cast<uint32_t>(right) << before);
        if (inner && before == 0) put_bits(words, start[v] + index, together, __popc(peers));
        if (live && !inner)
          put_bits(words, start[v] + index * node.bits, rank - node.first, node.bits);
      }
      v = inner ? (right ? node.right : v + 1) : -1;
    }
  }
}

// tree: the nodes, `leaves` entries that only the decoder reads, and the rank of each symbol. A
// chunk's bits go to its slot (words), its size and checksum to `entries`. Where they do not fit
// the slot, only the size is written.
template <class T>
__global__ void __launch_bounds__(kThreads)
    codec_encode_kernel(const T* symbols, int64_t n, int chunk_log2, const int32_t* tree, int count,
                        int leaves, const uint32_t* crc_tables, uint32_t* slots, int64_t slot_words,
                        int staged_words, uint32_t* entries) {
  CFL_DYNAMIC_SHARED(passed);  // [kWarps][count], then start[count], then staged[staged_words]
  __shared__ uint32_t total_bits;
  uint32_t* start = passed + kWarps * count;
  uint32_t* staged = start + count;
  const CodecNode* nodes = reinterpret_cast<const CodecNode*>(tree);
  const int32_t* rank_of = tree + 3 * count + leaves;
  const int64_t chunk = int64_t{1} << chunk_log2, begin = blockIdx.x * chunk;
  const int here = static_cast<int>(least(chunk, n - begin));
  const int warp = threadIdx.x >> 5;
  const int each = ((here + kWarps - 1) / kWarps + 31) / 32 * 32;
  const int first = least(here, warp * each), last = least(here, first + each);

  for (int i = threadIdx.x; i < kWarps * count; i += kThreads) passed[i] = 0;
  __syncthreads();
  codec_walk<false>(symbols + begin, first, last, nodes, rank_of, passed + warp * count, start,
                    staged);
  __syncthreads();
  for (int v = threadIdx.x; v < count; v += kThreads) {
    uint32_t sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t mine = passed[w * count + v];
      passed[w * count + v] = sum;
      sum += mine;
    }
    start[v] = sum * (nodes[v].right ? 1 : nodes[v].bits);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t bits = 0;
    for (int v = 0; v < count; ++v) {
      const uint32_t own = start[v];
      start[v] = bits;
      bits += own;
    }
    total_bits = bits;
  }
  __syncthreads();
  const uint32_t size = (total_bits + 7) / 8;
  const int64_t used = (static_cast<int64_t>(total_bits) + 31) / 32;
  if (used > slot_words) {
    if (threadIdx.x == 0) entries[2 * blockIdx.x] = size;
    return;
  }
  uint32_t* slot = slots + blockIdx.x * slot_words;
  uint32_t* words = used <= staged_words ? staged : slot;
  for (int64_t i = threadIdx.x; i < used; i += kThreads) words[i] = 0;
  __syncthreads();
  codec_walk<true>(symbols + begin, first, last, nodes, rank_of, passed + warp * count, start,
                   words);
  __syncthreads();
  const uint32_t crc = block_crc(Bits{words, 0, 8 * size}, size, crc_tables);
  if (threadIdx.x == 0) {
    entries[2 * blockIdx.x] = size;
    entries[2 * blockIdx.x + 1] = crc;
  }
  if (words == slot) return;
  for (int64_t i = threadIdx.x; i < used; i += kThreads) slot[i] = words[i];
}

// Chunks from their slots to offsets[chunk] of `out`, one after another.
template <class T>
__global__ void __launch_bounds__(kThreads)
    codec_gather_kernel(const uint32_t* slots, int64_t slot_words, const uint32_t* entries,
                        const int64_t* offsets, T* out) {
  const uint32_t* from = slots + blockIdx.x * slot_words;
  const uint32_t size = entries[2 * blockIdx.x];
  const Bits bits = {from, 0, 8 * size};
  T* to = out + offsets[blockIdx.x];
  // Bytes up to a word of `out`, whole words, and the bytes that are left.
  const uint32_t head = least(size, static_cast<uint32_t>(-reinterpret_cast<intptr_t>(to) & 3));
  const uint32_t words = (size - head) / 4;
  uint32_t* aligned = reinterpret_cast<uint32_t*>(to + head);
  for (uint32_t i = threadIdx.x; i < words; i += kThreads) aligned[i] = bits.at(8 * head + 32 * i);
  if (threadIdx.x < head) to[threadIdx.x] = static_cast<T>(bits.at(8 * threadIdx.x));
  const uint32_t tail = head + 4 * words + threadIdx.x;
  if (tail < size) to[tail] = static_cast<T>(bits.at(8 * tail));
}

// ---- weights to symbols and back
// -----------------------------------------------------------------

// As _Affine of python/cfl_ops/codec.py: symbol = trunc((w pre - origin) scale), weight = ((symbol
// + 1/2) step + origin) post.
struct Affine {
  double origin, scale, step, pre, post;
  int64_t wide;  // whether the arithmetic is float64; else it is float32, with pre = post = 1
};

template <class T>
struct IsDouble {
  static constexpr bool value = false;
};
template <>
struct IsDouble<double> {
  static constexpr bool value = true;
};

__device__ inline Affine make_affine(bool is_double, double minimum, double maximum, int levels) {
  Affine a = {minimum, 0, 0, 1, 1, 1};
  double range = maximum - minimum;
  if (is_double) {
    if (__dadd_rn(maximum * 0.5, -(minimum * 0.5)) > 0x1p899) {
      a.pre = 0x1p-4;
    } else if (range < 0x1p-899) {
      a.pre = 0x1p200;
    }
    a.post = 1 / a.pre;
    a.origin = __dmul_rn(minimum, a.pre);
    range = __dadd_rn(__dmul_rn(maximum, a.pre), -a.origin);
  } else {
    a.wide = range != 0 && !(range >= 0x1p-100 && range <= 0x1p100);
  }
  if (range > 0) {
    a.scale = levels / range;
    a.step = range / levels;
  }
  return a;
}

// The smallest and the largest finite weight and the number of others, of each part of each group.
template <class T>
__global__ void __launch_bounds__(kThreads)
    codec_range_kernel(const T* weights, int64_t groups, int64_t size, int64_t parts, double* ends,
                       int64_t* bad) {
  __shared__ double lows[kWarps], highs[kWarps];
  __shared__ int64_t bads[kWarps];
  for (int64_t item = blockIdx.x; item < groups * parts; item += gridDim.x) {
    const int64_t first = item % parts * kPart;
    const int count = static_cast<int>(least(static_cast<int64_t>(kPart), size - first));
    const T* w = weights + item / parts * size + first;
    auto low = widen(T{}), high = widen(T{});
    bool any = false;
    int64_t others = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const auto value = widen(w[i]);
      if (value - value != 0) {
        ++others;
      } else if (!any) {
        low = high = value;
        any = true;
      } else {
        low = least(low, value);
        high = most(high, value);
      }
    }
    double lowest = any ? static_cast<double>(low) : kHuge;
    double highest = any ? static_cast<double>(high) : -kHuge;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      lowest = least(lowest, __shfl_xor_sync(kFull, lowest, d));
      highest = most(highest, __shfl_xor_sync(kFull, highest, d));
      others += __shfl_xor_sync(kFull, others, d);
    }
    const int warp = threadIdx.x >> 5;
    if ((threadIdx.x & 31) == 0) {
      lows[warp] = lowest;
      highs[warp] = highest;
      bads[warp] = others;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int k = 1; k < kWarps; ++k) {
        lowest = least(lowest, lows[k]);
        highest = most(highest, highs[k]);
        others += bads[k];
      }
      ends[2 * item] = lowest;
      ends[2 * item + 1] = highest;
      bad[item] = others;
    }
    __syncthreads();
  }
}

// The ends of each group from those of its parts, and the arithmetic they lead to; a warp to a
// group.
template <class T>
__global__ void __launch_bounds__(kThreads)
    codec_ends_kernel(const double* ends, const int64_t* bad, int64_t groups, int64_t parts,
                      int levels, T* minimum, T* maximum, int64_t* info, Affine* affine) {
  const int lane = threadIdx.x & 31;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5); g < groups;
       g += step) {
    double lowest = kHuge, highest = -kHuge;
    int64_t others = 0;
    for (int64_t p = g * parts + lane; p < (g + 1) * parts; p += 32) {
      lowest = least(lowest, ends[2 * p]);
      highest = most(highest, ends[2 * p + 1]);
      others += bad[p];
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      lowest = least(lowest, __shfl_xor_sync(kFull, lowest, d));
      highest = most(highest, __shfl_xor_sync(kFull, highest, d));
      others += __shfl_xor_sync(kFull, others, d);
    }
    if (lane != 0) continue;
    if (!(lowest <= highest)) lowest = highest = 0;  // nothing finite
    lowest += 0.0;  // no negative zero, so that the bytes do not depend on the order of a search
    highest += 0.0;
    narrow(lowest, &minimum[g]);
    narrow(highest, &maximum[g]);
    info[g] = others;
    affine[g] = make_affine(IsDouble<T>::value, lowest, highest, levels);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    codec_affine_kernel(const T* minimum, const T* maximum, int64_t groups, int levels,
                        Affine* affine) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (g >= groups) return;
  affine[g] = make_affine(IsDouble<T>::value, widen(minimum[g]), widen(maximum[g]), levels);
}

__device__ inline int codec_bin(const Affine& a, float w) {
  if (a.wide) {
    return static_cast<int>(__dmul_rn(__dadd_rn(static_cast<double>(w), -a.origin), a.scale));
  }
  return static_cast<int>(
      __fmul_rn(__fadd_rn(w, -static_cast<float>(a.origin)), static_cast<float>(a.scale)));
}
__device__ inline int codec_bin(const Affine& a, double w) {
  return static_cast<int>(__dmul_rn(__dadd_rn(__dmul_rn(w, a.pre), -a.origin), a.scale));
}

// Groups with NaN or Inf (info) become zeros and are not counted. counts may be null.
template <class T, class S>
__global__ void __launch_bounds__(kThreads)
    codec_quantize_kernel(const T* weights, int64_t groups, int64_t size, int64_t parts,
                          const Affine* affine, const int64_t* info, int levels, S* symbols,
                          unsigned long long* counts) {
  CFL_DYNAMIC_SHARED(local);
  const bool shared_counts = levels <= kMaxShared;
  for (int64_t item = blockIdx.x; item < groups * parts; item += gridDim.x) {
    const int64_t g = item / parts, first = item % parts * kPart;
    const int count = static_cast<int>(least(static_cast<int64_t>(kPart), size - first));
    const T* w = weights + g * size + first;
    S* to = symbols + g * size + first;
    const Affine a = affine[g];
    const bool good = info[g] == 0;
    if (counts && shared_counts) {
      for (int s = threadIdx.x; s < levels; s += kThreads) local[s] = 0;
      __syncthreads();
    }
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int bin = good ? least(codec_bin(a, widen(w[i])), levels - 1) : 0;
      to[i] = static_cast<S>(bin);
      if (!counts || !good) continue;
      if (shared_counts) {
        atomicAdd(&local[bin], 1u);
      } else {
        atomicAdd(&counts[g * levels + bin], 1ull);
      }
    }
    if (!counts || !shared_counts) continue;
    __syncthreads();
    for (int s = threadIdx.x; s < levels; s += kThreads) {
      if (local[s]) atomicAdd(&counts[g * levels + s], static_cast<unsigned long long>(local[s]));
    }
    __syncthreads();
  }
}

// Rounded after each operation, as on the CPU.
template <class T>
__device__ inline void codec_weight(const Affine& a, int symbol, T* to) {
  if (a.wide) {
    const double w = __dadd_rn(__dmul_rn(symbol + 0.5, a.step), a.origin);
    narrow(__dmul_rn(w, a.post), to);
  } else {
    narrow(__fadd_rn(__fmul_rn(static_cast<float>(symbol) + 0.5f, static_cast<float>(a.step)),
                     static_cast<float>(a.origin)),
           to);
  }
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    codec_dequantize_kernel(const S* symbols, int64_t n, int64_t size, const Affine* affine,
                            T* weights) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    codec_weight(affine[size == n ? 0 : i / size], symbols[i], &weights[i]);
  }
}

// ---- decoding
// ------------------------------------------------------------------------------------

// Where a decoded symbol goes: out as it is, or as a weight.
__device__ inline void codec_store(uint8_t* out, int symbol, const Affine*, int64_t) {
  *out = static_cast<uint8_t>(symbol);
}
__device__ inline void codec_store(uint16_t* out, int symbol, const Affine*, int64_t) {
  *out = static_cast<uint16_t>(symbol);
}
template <class T>
__device__ inline void codec_store(T* out, int symbol, const Affine* affine, int64_t group) {
  codec_weight(affine[group], symbol, out);
}

// Symbols [start, start + count) of n, from the chunks first_chunk and on; entries and offsets (in
// the payload) are of these chunks. *bad becomes the smallest number of a bad chunk.
template <class T>
__global__ void __launch_bounds__(kThreads)
    codec_decode_kernel(const uint8_t* payload, const uint32_t* entries, const int64_t* offsets,
                        int64_t n, int chunk_log2, int64_t first_chunk, const int32_t* tree,
                        int nodes_count, const uint32_t* crc_tables, const Affine* affine,
                        int64_t group_size, int64_t start_at, int64_t count, T* out,
                        unsigned long long* bad) {
  CFL_DYNAMIC_SHARED(table);  // ones before each line
  __shared__ uint32_t start[kMaxCodecNodes], before[kMaxCodecNodes], size[kMaxCodecNodes];
  __shared__ bool good;
  const CodecNode* nodes = reinterpret_cast<const CodecNode*>(tree);
  const int32_t* symbol_of = tree + 3 * nodes_count;
  const int64_t chunk = int64_t{1} << chunk_log2, number = first_chunk + blockIdx.x;
  const int64_t begin = number * chunk;
  const uint32_t here = static_cast<uint32_t>(least(chunk, n - begin));
  const uint8_t* data = payload + offsets[blockIdx.x];
  const uint32_t bytes = entries[2 * blockIdx.x];
  const uint32_t misaligned = static_cast<uint32_t>(reinterpret_cast<intptr_t>(data) & 3);
  const Bits bits = {reinterpret_cast<const uint32_t*>(data - misaligned), 8 * misaligned,
                     8 * bytes};

  const bool intact = block_crc(bits, bytes, crc_tables) == entries[2 * blockIdx.x + 1];
  const uint32_t lines = (bits.count + kLine - 1) / kLine;
  const uint32_t each = (lines + kThreads - 1) / kThreads;
  const uint32_t lo = least(lines, each * threadIdx.x), hi = least(lines, lo + each);
  auto ones_of = [&](uint32_t line) {
    return __popc(bits.at(line * kLine)) + __popc(bits.at(line * kLine + 32));
  };
  uint32_t mine = 0, total;
  for (uint32_t line = lo; line < hi; ++line) mine += ones_of(line);
  uint32_t ones = block_exclusive(mine, &total);
  for (uint32_t line = lo; line < hi; ++line) {
    table[line] = ones;
    ones += ones_of(line);
  }
  if (threadIdx.x == 0) table[lines] = total;
  __syncthreads();

  if (threadIdx.x == 0) {
    // A size is set when the parent is visited, which comes first in pre-order.
    uint64_t pos = 0;
    bool fits = intact;
    size[0] = here;
    for (int v = 0; v < nodes_count && fits; ++v) {
      const CodecNode node = nodes[v];
      const uint64_t need = static_cast<uint64_t>(size[v]) * (node.right ? 1 : node.bits);
      fits = need <= bits.count - pos;
      if (!fits) break;
      start[v] = static_cast<uint32_t>(pos);
      before[v] = bits.rank(table, static_cast<uint32_t>(pos));
      pos += need;
      if (node.right) {
        const uint32_t right = bits.rank(table, static_cast<uint32_t>(pos)) - before[v];
        size[v + 1] = size[v] - right;
        size[node.right] = right;
      }
    }
    good = fits && (pos + 7) / 8 == bytes;
    if (!good) atomicMin(bad, static_cast<unsigned long long>(number));
  }
  __syncthreads();
  if (!good) return;

  const int64_t from = most(begin, start_at), to = least(begin + here, start_at + count);
  for (int64_t i = from + threadIdx.x; i < to; i += kThreads) {
    int v = 0;
    uint32_t index = static_cast<uint32_t>(i - begin);
    CodecNode node = nodes[0];
    while (node.right) {
      const uint32_t pos = start[v] + index;
      const uint32_t ones_before = bits.rank(table, pos) - before[v];
      const bool right = bits.at(pos) & 1;
      index = right ? ones_before : index - ones_before;
      v = right ? node.right : v + 1;
      node = nodes[v];
    }
    const uint32_t raw =
        node.bits ? bits.at(start[v] + index * node.bits) & ((1u << node.bits) - 1) : 0;
    codec_store(&out[i - start_at], symbol_of[node.first + raw], affine, i / group_size);
  }
}

}  // namespace cfl::cuda
