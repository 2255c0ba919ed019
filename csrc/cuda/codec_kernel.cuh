// The codec on a GPU: the chunks of docs/format.md (pivot layout), one block for each.
//
// A chunk is a wavelet tree: each inner node holds, for the symbols that pass it, which way they
// go. A warp takes a tile of consecutive symbols of the chunk through the whole tree, node by node,
// with their lists in shared memory; warps wait for each other only between the phases of a chunk.
//   * Decoding goes from the last node to the first. A leaf's raw bits become a list of symbols; an
//     inner node merges its children's lists, 4 bytes to a lane: the ones before the lane's bits
//     (a table of them for each word, and one popcount) say where its bytes lie in both lists, and
//     one byte permutation picks them.
//   * Encoding goes from the first node to the last, and parts the lists by ballot.
// What both need is how many symbols have passed each node where a tile ends (`passed`), and where
// the bits of each node start. The decoder finds them by rank differences, the encoder by counting.
// The lanes prepare the visits of 32 nodes at a time; nodes that no symbol of the tile passes are
// not visited.
//
// Why not each symbol on its own, root to leaf: that is 2.5 steps on average for normal weights,
// but 7.5 for the slowest of a warp's 32 lanes, and all of them wait for it.
//
// Device code only: the launchers are in codec.cu, and python/cfl_ops/_gpu/native.py launches it
// through NVRTC.
#pragma once

#include "cuda/device.cuh"

namespace cfl::cuda {

// As cfl::codec::Node; in pre-order, the left child follows its parent.
struct alignas(16) CodecNode {
  int32_t right;  // inner node: index of the right child; leaf: 0
  int32_t first;  // inner node: rank of the right child's first symbol; leaf: of its own
  int32_t bits;   // leaf: it holds 2^bits symbols
  int32_t odd;    // depth modulo 2
};
constexpr int kTileBytes = 1 << 11;  // of the symbols that a warp takes through the tree at a time
constexpr int kMaxSharedSymbols = 4096;   // a code's tables of more symbols stay in global memory
constexpr int kPart = 1 << 15;            // weights of a group that a block quantises at a time
constexpr int kSpan = 1 << 12;            // symbols that a warp turns into weights at a time
constexpr int kMaxShared = 8192;          // counts that fit shared memory
constexpr int64_t kMostBlocks = 1 << 20;  // of grids whose blocks take several items in turn
constexpr int64_t kSampleBlock = 4096;    // symbols that are counted together
constexpr unsigned long long kBadChunk = 1000;  // as in cpu/codec_payload.h
// __launch_bounds__(kThreads, n): registers for n blocks at once. Left to itself ptxas aims at more
// than shared memory has room for, and spills.
constexpr double kHuge = 0x1.fffffffffffffp1023;  // above all finite weights, or equal

// The sum over this lane and those before it.
__device__ inline uint32_t warp_inclusive(uint32_t sum) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t below = __shfl_up_sync(kFull, sum, d);
    if (lane >= d) sum += below;
  }
  return sum;
}

// The sum of `v` over the threads before this one; *total is the sum over all of them.
__device__ inline uint32_t block_exclusive(uint32_t v, uint32_t* total) {
  __shared__ uint32_t warps[kWarps + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t mine = warp_inclusive(v);
  __syncthreads();  // the last call's readers are done
  if (lane == 31) warps[warp] = mine;
  __syncthreads();
  if (warp == 0) {
    const uint32_t one = lane < kWarps ? warps[lane] : 0;
    const uint32_t sum = warp_inclusive(one);
    if (lane < kWarps) warps[lane] = sum - one;
    if (lane == kWarps - 1) warps[kWarps] = sum;
  }
  __syncthreads();
  *total = warps[kWarps];
  return mine - v + warps[warp];
}

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

// Of `size` bytes, by the whole block, a word to each thread and row: the remainder moves on by a
// row (a look-up in four tables), and at the end by what the thread lies before the end. `tables`
// holds these 4 * 256 entries and 256 factors (codec/cuda.py); the whole rows are the last ones,
// for zeros in front change nothing. It waits for what the block is still writing to `data`.
__device__ inline uint32_t block_crc(const uint32_t* data, uint32_t size, const uint32_t* tables) {
  __shared__ uint32_t table[4 * 256];
  __shared__ uint32_t sums[kWarps];
  for (int i = threadIdx.x; i < 4 * 256; i += kThreads) table[i] = tables[i];
  __syncthreads();
  const uint32_t words = size / 4, rows = (words + kThreads - 1) / kThreads;
  const uint32_t pad = rows * kThreads - words;
  uint32_t crc = 0;
  for (uint32_t row = 0; row < rows; ++row) {
    const uint32_t i = row * kThreads + threadIdx.x;
    uint32_t word = i >= pad ? data[i - pad] : 0;
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
    crc ^= data[words] >> 8 * (i & 3) & 255;
    for (int k = 0; k < 8; ++k) crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
  }
  return ~crc;
}

// ---- histogram
// -----------------------------------------------------------------------------------

// *largest (0 before) becomes the largest symbol.
template <class S>
__global__ void __launch_bounds__(kThreads)
    codec_largest_kernel(const S* symbols, int64_t n, unsigned long long* largest) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  uint32_t most_here = 0;
#pragma unroll 8
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    most_here = most(most_here, static_cast<uint32_t>(symbols[i]));
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    most_here = most(most_here, __shfl_xor_sync(kFull, most_here, d));
  }
  if ((threadIdx.x & 31) == 0) atomicMax(largest, static_cast<unsigned long long>(most_here));
}

// Adds to `counts`, of all symbols or of the first kSampleBlock of every so many (docs/format.md,
// how the lengths are found). Behind the counts of 16-bit symbols follows the largest of them.
template <class S>
__global__ void __launch_bounds__(kThreads)
    codec_histogram_kernel(const S* symbols, int64_t n, unsigned long long* counts) {
  CFL_DYNAMIC_SHARED(local);
  const int alphabet = sizeof(S) == 1 ? 256 : static_cast<int>(counts[1 << 16]) + 1;
  const int64_t every = n / (int64_t{1024} * alphabet);
  const int64_t block = every > 1 ? kSampleBlock : n, step = every > 1 ? kSampleBlock * every : n;
  const bool shared_counts = alphabet <= kMaxShared;
  if (shared_counts) {
    for (int s = threadIdx.x; s < alphabet; s += kThreads) local[s] = 0;
    __syncthreads();
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t sampled = (n + step - 1) / step * block;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < sampled;
       i += stride) {
    const int64_t at = block == step ? i : i / kSampleBlock * step + i % kSampleBlock;
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

// ---- a tile's lists
// ------------------------------------------------------------------------------

// A warp's lists lie on two stacks, those of even and of odd depth, so that an inner node reads
// from one and writes to the other. Each list starts at a word; kSlack words hold what that wastes
// (3 bytes for each of at most 61 depths) and what is read past the end.
template <class S>
struct Tile {
  static constexpr uint32_t kSymbols = kTileBytes / sizeof(S);
  static constexpr uint32_t kEach = 4 / sizeof(S);  // symbols of a word
  static constexpr uint32_t kSlack = 64;
  static constexpr uint32_t kStack = kTileBytes / 4 + kSlack;  // words

  __device__ static uint32_t words(uint32_t symbols) { return (symbols + kEach - 1) / kEach; }
};

// What a warp must know to take a tile through the tree.
struct Passage {
  const CodecNode* nodes;
  int count;               // of the nodes
  const uint32_t* start;   // of each node's bits in the chunk
  const uint16_t* passed;  // [tile * count + node]: symbols of this and earlier tiles that pass it

  __device__ uint32_t before(int tile, int node) const {
    return tile ? passed[(tile - 1) * count + node] : 0;
  }
  __device__ uint32_t through(int tile, int node) const {
    return passed[tile * count + node] - before(tile, node);
  }
};

// One warp's visit of a node. Each lane prepares one, and all carry them out in turn.
struct Visit {
  uint32_t here = 0;   // symbols of the tile that pass the node
  uint32_t at = 0;     // their first bit in the chunk
  uint32_t list = 0;   // where their list starts in the warp's memory, in words
  uint32_t left = 0;   // inner node: the left child's list; leaf: the bits of a symbol
  uint32_t right = 0;  // inner node: the right child's list; leaf: the rank of its first symbol
  uint32_t extra = 0;  // inner node: decoding, the ones before `at`; encoding, node.first

  __device__ Visit of_lane(int lane) const {
    const uint32_t place = __shfl_sync(kFull, list << 16 | here, lane);
    const uint32_t lists = __shfl_sync(kFull, right << 16 | left, lane);
    return {place & 0xffffu, __shfl_sync(kFull, at, lane),   place >> 16, lists & 0xffffu,
            lists >> 16,     __shfl_sync(kFull, extra, lane)};
  }
};

// The tops of both stacks in words, that of the even one in the low half: sums of differences
// borrow from the high half and give back.
__device__ inline uint32_t on_stack(uint32_t odd, uint32_t words) {
  return odd ? words << 16 : words;
}
template <class S>
__device__ inline uint32_t top_of(uint32_t tops, uint32_t odd) {
  return odd ? Tile<S>::kStack + (tops >> 16) : tops & 0xffffu;
}

// ---- encoding
// ------------------------------------------------------------------------------------

// Bits of `value` beyond the first `bits` must be zero.
__device__ inline void put_bits(uint32_t* words, uint32_t pos, uint32_t value, uint32_t bits) {
  const uint32_t s = pos & 31;
  atomicOr(&words[pos >> 5], value << s);
  if (s + bits > 32) atomicOr(&words[(pos >> 5) + 1], value >> (32 - s));
}

// By one warp: take(k, word, count) for each word of `count` symbols, the first of them the k-th.
template <class S, class Take>
__device__ inline void each_word(const S* symbols, uint32_t n, Take take) {
  constexpr uint32_t kEach = Tile<S>::kEach;
  const uint32_t lane = threadIdx.x & 31;
  const bool aligned = (reinterpret_cast<intptr_t>(symbols) & 3) == 0;
  const uint32_t whole = aligned ? n / kEach : 0;
#pragma unroll 4
  for (uint32_t i = lane; i < whole; i += 32) {
    take(i * kEach, reinterpret_cast<const uint32_t*>(symbols)[i], kEach);
  }
  for (uint32_t k = (whole + lane) * kEach; k < n; k += 32 * kEach) {
    const uint32_t count = least(kEach + 0, n - k);
    uint32_t word = 0;
#pragma unroll 1
    for (uint32_t j = 0; j < count; ++j) {
      word |= static_cast<uint32_t>(symbols[k + j]) << 8 * sizeof(S) * j;
    }
    take(k, word, count);
  }
}
template <class S>
__device__ inline uint32_t symbol_at(uint32_t word, uint32_t j) {
  return static_cast<S>(word >> 8 * sizeof(S) * j);
}

// By one warp: how many symbols of a tile reach each leaf. `counts` is scratch.
template <class S>
__device__ inline void codec_count_tile(const S* symbols, uint32_t n, const uint32_t* codes,
                                        int nodes, uint32_t* counts, uint16_t* passed) {
  constexpr uint32_t kEach = Tile<S>::kEach;
  const int lane = threadIdx.x & 31;
  for (int v = lane; v < nodes; v += 32) counts[v] = 0;
  __syncwarp();
  each_word(symbols, n, [&](uint32_t, uint32_t word, uint32_t count) {
#pragma unroll
    for (uint32_t j = 0; j < kEach; ++j) {
      if (j < count) atomicAdd(&counts[codes[symbol_at<S>(word, j)] >> 16], 1u);
    }
  });
  __syncwarp();
  // Each lane takes what it will set to zero for the next tile.
  for (int v = lane; v < nodes; v += 32) passed[v] = static_cast<uint16_t>(counts[v]);
}

// By one warp: the bits of a tile, to `words`.
template <class S>
__device__ inline void codec_part_tile(const S* symbols, uint32_t n, int tile,
                                       const uint32_t* codes, const Passage& passage,
                                       uint32_t* memory, uint32_t* words) {
  constexpr uint32_t kEach = Tile<S>::kEach;
  const uint32_t lane = threadIdx.x & 31, below = (1u << lane) - 1;
  each_word(symbols, n, [&](uint32_t k, uint32_t word, uint32_t count) {
    uint32_t ranks = 0;
#pragma unroll
    for (uint32_t j = 0; j < kEach; ++j) {
      if (j < count) ranks |= (codes[symbol_at<S>(word, j)] & 0xffffu) << 8 * sizeof(S) * j;
    }
    memory[k / kEach] = ranks;
  });
  uint32_t tops = on_stack(0, Tile<S>::words(n));
  for (int first = 0; first < passage.count; first += 32) {
    const int v = first + static_cast<int>(lane);
    Visit mine;
    uint32_t change = 0, odd = 0, rights = 0;
    bool inner = false;
    if (v < passage.count && (mine.here = passage.through(tile, v)) != 0) {
      const CodecNode node = passage.nodes[v];
      inner = node.right != 0;
      odd = node.odd;
      mine.at = passage.start[v] + passage.before(tile, v) * (inner ? 1 : node.bits);
      mine.left = node.bits;
      mine.right = mine.extra = node.first;
      change = 0 - on_stack(odd, Tile<S>::words(mine.here));
      if (inner) {
        rights = passage.through(tile, node.right);
        change += on_stack(1 - odd, Tile<S>::words(rights) + Tile<S>::words(mine.here - rights));
      }
    }
    const uint32_t after = tops + warp_inclusive(change);
    tops = __shfl_sync(kFull, after, 31);
    mine.list = top_of<S>(after, odd);
    if (inner) {  // the left list, which is wanted first, lies on top
      mine.right = top_of<S>(after - change, 1 - odd);
      mine.left = mine.right + Tile<S>::words(rights);
    }
    const uint32_t inners = __ballot_sync(kFull, inner);
    // Leaves without bits are nothing to visit.
    uint32_t todo = __ballot_sync(kFull, mine.here != 0 && (inner || mine.left != 0));
    for (; todo != 0; todo &= todo - 1) {
      const int next = __ffs(todo) - 1;
      const Visit visit = mine.of_lane(next);
      const uint32_t* from = memory + visit.list;
      __syncwarp();  // the lists of the node before are complete, and read
      if ((inners >> next & 1) == 0) {
        const uint32_t bits = visit.left;
        for (uint32_t k = lane * kEach; k < visit.here; k += 32 * kEach) {
          const uint32_t ranks = from[k / kEach], some = least(kEach, visit.here - k);
          uint32_t raw = 0;
#pragma unroll
          for (uint32_t j = 0; j < kEach; ++j) {
            const uint32_t one = symbol_at<S>(ranks, j) - visit.right;
            if (j < some) raw |= one << j * bits;
          }
          put_bits(words, visit.at + k * bits, raw, some * bits);
        }
        continue;
      }
      S* left = reinterpret_cast<S*>(memory + visit.left);
      S* right = reinterpret_cast<S*>(memory + visit.right);
      const S* ranks = reinterpret_cast<const S*>(from) + lane;
      uint32_t ones = 0;
      for (uint32_t strip = 0; strip < visit.here; strip += 32 * 32) {
        const uint32_t end = least(visit.here, strip + 32 * 32);
        uint32_t bits = 0;  // of 32 symbols in each lane
#pragma unroll 4
        for (uint32_t k = strip; k < end; k += 32) {
          const bool inside = k + lane < end;
          const uint32_t rank = ranks[k];  // past the end: of another list, or slack
          const bool goes_right = inside && rank >= visit.extra;
          const uint32_t together = __ballot_sync(kFull, goes_right);
          const uint32_t place = ones + __popc(together & below);
          S* to = goes_right ? right + place : left + (k + lane - place);
          if (inside) *to = static_cast<S>(rank);
          ones += __popc(together);
          if (k - strip == 32 * lane) bits = together;
        }
        const uint32_t k = strip + 32 * lane;
        if (k < end) put_bits(words, visit.at + k, bits, least(32u, end - k));
      }
    }
  }
  __syncwarp();  // before the next tile's lists
}

// tree: the nodes, the symbol of each rank (16 bits each, padded to a word), and for each symbol
// its rank and, in the upper half, its leaf. A chunk's bits go to its slot (words), its size and
// checksum to `entries`. Where they do not fit the slot, only the size is written. Shared memory:
// encode_shared of codec/cuda.py.
template <class S>
__global__ void __launch_bounds__(kThreads, 3)
    codec_encode_kernel(const S* symbols, int64_t n, int chunk_log2, const int32_t* tree, int count,
                        int leaves, int alphabet, const uint32_t* crc_tables, uint32_t* slots,
                        int64_t slot_words, int staged_words, uint32_t* entries) {
  CFL_DYNAMIC_SHARED(memory);
  const int64_t chunk = int64_t{1} << chunk_log2, begin = blockIdx.x * chunk;
  const uint32_t here = static_cast<uint32_t>(least(chunk, n - begin));
  const int tiles = static_cast<int>((chunk + Tile<S>::kSymbols - 1) / Tile<S>::kSymbols);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t each_warp = most(2 * Tile<S>::kStack, static_cast<uint32_t>(count));
  CodecNode* nodes = reinterpret_cast<CodecNode*>(memory);
  uint32_t* start = memory + 4 * count;
  uint16_t* passed = reinterpret_cast<uint16_t*>(start + count);
  uint32_t* scratch = start + count + (tiles * count + 1) / 2;
  uint32_t* staged = scratch + kWarps * each_warp;
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(tree) + 4 * count + (leaves + 1) / 2;
  if (sizeof(S) == 1 || alphabet <= kMaxSharedSymbols) {
    for (int i = threadIdx.x; i < alphabet; i += kThreads) staged[i] = codes[i];
    codes = staged;
    staged += alphabet;
  }
  scratch += warp * each_warp;
  for (int i = threadIdx.x; i < 4 * count; i += kThreads) memory[i] = tree[i];
  __syncthreads();

  auto part = [&](int tile) { return symbols + begin + tile * Tile<S>::kSymbols; };
  auto size_of = [&](int tile) {
    const uint32_t first = tile * Tile<S>::kSymbols;
    return first < here ? least(Tile<S>::kSymbols + 0, here - first) : 0;
  };
  for (int tile = warp; tile < tiles; tile += kWarps) {
    codec_count_tile(part(tile), size_of(tile), codes, count, scratch, passed + tile * count);
  }
  __syncthreads();
  if (threadIdx.x < tiles) {  // what passes an inner node: children come after their parents
    uint16_t* mine = passed + threadIdx.x * count;
    for (int v = count - 1; v >= 0; --v) {
      if (nodes[v].right) mine[v] = static_cast<uint16_t>(mine[v + 1] + mine[nodes[v].right]);
    }
  }
  __syncthreads();
  for (int v = warp; v < count; v += kWarps) {
    uint32_t sum = lane < tiles ? passed[lane * count + v] : 0;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t earlier = __shfl_up_sync(kFull, sum, d);
      if (lane >= d) sum += earlier;
    }
    if (lane < tiles) passed[lane * count + v] = static_cast<uint16_t>(sum);
    if (lane == 31) start[v] = sum * (nodes[v].right ? 1 : nodes[v].bits);
  }
  __syncthreads();
  const int each = (count + kThreads - 1) / kThreads;
  const int lo = least(count, static_cast<int>(threadIdx.x) * each), hi = least(count, lo + each);
  uint32_t mine = 0, total_bits;
  for (int v = lo; v < hi; ++v) mine += start[v];
  uint32_t at = block_exclusive(mine, &total_bits);
  for (int v = lo; v < hi; ++v) {
    const uint32_t own = start[v];
    start[v] = at;
    at += own;
  }

  const uint32_t size = (total_bits + 7) / 8, used = (total_bits + 31) / 32;
  if (used > slot_words) {
    if (threadIdx.x == 0) entries[2 * blockIdx.x] = size;
    return;
  }
  uint32_t* slot = slots + blockIdx.x * slot_words;
  const Passage passage = {nodes, count, start, passed};
  // Once for each kind of memory, for the compiler's sake: a pointer to either makes slow atomics.
  auto write = [&](uint32_t* words) {
    for (uint32_t i = threadIdx.x; i < used; i += kThreads) words[i] = 0;
    __syncthreads();
    for (int tile = warp; tile < tiles && size_of(tile); tile += kWarps) {
      codec_part_tile(part(tile), size_of(tile), tile, codes, passage, scratch, words);
    }
    const uint32_t crc = block_crc(words, size, crc_tables);
    if (threadIdx.x == 0) {
      entries[2 * blockIdx.x] = size;
      entries[2 * blockIdx.x + 1] = crc;
    }
  };
  if (used > staged_words) {
    write(slot);
  } else {
    write(staged);
    for (uint32_t i = threadIdx.x; i < used; i += kThreads) slot[i] = staged[i];
  }
}

// Chunks from their slots to offsets[chunk] of `out`, one after another.
template <class T>
__global__ void __launch_bounds__(kThreads)
    codec_gather_kernel(const uint32_t* slots, int64_t slot_words, const uint32_t* entries,
                        const int64_t* offsets, T* out) {
  const uint32_t* from = slots + blockIdx.x * slot_words;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(from);
  const uint32_t size = entries[2 * blockIdx.x];
  T* to = out + offsets[blockIdx.x];
  // Bytes up to a word of `out`, whole words, and the bytes that are left.
  const uint32_t head = least(size, static_cast<uint32_t>(-reinterpret_cast<intptr_t>(to) & 3));
  const uint32_t words = (size - head) / 4;
  uint32_t* aligned = reinterpret_cast<uint32_t*>(to + head);
  for (uint32_t i = threadIdx.x; i < words; i += kThreads) {
    aligned[i] = __funnelshift_r(from[i], head ? from[i + 1] : 0, 8 * head);
  }
  if (threadIdx.x < head) to[threadIdx.x] = bytes[threadIdx.x];
  const uint32_t tail = head + 4 * words + threadIdx.x;
  if (tail < size) to[tail] = bytes[tail];
}

// ---- weights to symbols and back
// -----------------------------------------------------------------

// As _Affine of ops/codec/quantize.py: symbol = trunc((w pre - origin) scale), weight = ((symbol
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
    } else if (range > 0 && range < 0x1p-899) {
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
      if (value * 0 != 0) {  // NaN or Inf
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
__global__ void __launch_bounds__(kThreads, 4)
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

// By one warp: `count` symbols as weights; the first of them is the number-th of the tensor.
template <class S, class T>
__device__ inline void codec_store_weights(const S* symbols, uint32_t count, T* out,
                                           const Affine* affine, int64_t number,
                                           int64_t group_size) {
  const uint32_t lane = threadIdx.x & 31;
  int64_t group = number / group_size;
  if (group_size < 32) {  // lanes in different groups
    const uint32_t size = static_cast<uint32_t>(group_size);
    const uint32_t skip = static_cast<uint32_t>(number - group * group_size);
    for (uint32_t k = lane; k < count; k += 32) {
      codec_weight(affine[group + (skip + k) / size], symbols[k], &out[k]);
    }
    return;
  }
  for (uint32_t first = 0; first < count; ++group) {
    const uint32_t last = static_cast<uint32_t>(
        least(static_cast<int64_t>(count), (group + 1) * group_size - number));
    const Affine a = affine[group];
    for (uint32_t k = first + lane; k < last; k += 32) codec_weight(a, symbols[k], &out[k]);
    first = last;
  }
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    codec_dequantize_kernel(const S* symbols, int64_t n, int64_t size, const Affine* affine,
                            T* weights) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  for (int64_t i = warp * kSpan; i < n; i += warps * kSpan) {
    const uint32_t count = static_cast<uint32_t>(least(int64_t{kSpan}, n - i));
    codec_store_weights(symbols + i, count, weights + i, affine, i, size);
  }
}

// ---- decoding
// ------------------------------------------------------------------------------------

// The bits of a chunk in shared memory, from the first one on, and the ones before each word modulo
// 2^16: only their differences within a node, at most 2^15, are wanted.
struct Ranks {
  const uint32_t* words;
  const uint16_t* ones;

  __device__ uint32_t at(uint32_t pos) const {  // 32 bits
    return __funnelshift_r(words[pos >> 5], words[(pos >> 5) + 1], pos & 31);
  }
  __device__ uint32_t rank(uint32_t pos) const {
    return ones[pos >> 5] + __popc(words[pos >> 5] & ((1u << (pos & 31)) - 1));
  }
};

// kEach symbols of a list from the i-th on.
template <class S>
__device__ inline uint32_t window(const uint32_t* list, uint32_t i) {
  const uint32_t byte = i * sizeof(S);
  return __funnelshift_r(list[byte / 4], list[byte / 4 + 1], 8 * (byte & 3));
}

// For __byte_perm: the bytes that a node's bits take, from a window of the left list (0..3) and one
// of the right (4..7).
template <class S>
__device__ inline uint32_t picking(uint32_t pattern) {
  uint32_t pick = 0, rights = 0;
  for (uint32_t j = 0; j < Tile<S>::kEach; ++j) {
    const uint32_t one = pattern >> j & 1;
    const uint32_t byte = one ? 4 + rights * sizeof(S) : (j - rights) * sizeof(S);
    for (uint32_t b = 0; b < sizeof(S); ++b) pick |= (byte + b) << 4 * (j * sizeof(S) + b);
    rights += one;
  }
  return pick;
}

// By one warp: the symbols of a tile, to the start of `memory`.
template <class S>
__device__ inline void codec_merge_tile(int tile, const Ranks& bits, const Passage& passage,
                                        const uint16_t* symbol_of, const uint32_t* picks,
                                        uint32_t* memory) {
  constexpr uint32_t kEach = Tile<S>::kEach;
  const uint32_t lane = threadIdx.x & 31;
  uint32_t tops = 0;
  for (int last = passage.count - 1; last >= 0; last -= 32) {
    const int v = last - static_cast<int>(lane);
    Visit mine;
    uint32_t change = 0, odd = 0, rights = 0;
    bool inner = false;
    if (v >= 0 && (mine.here = passage.through(tile, v)) != 0) {
      const CodecNode node = passage.nodes[v];
      inner = node.right != 0;
      odd = node.odd;
      mine.at = passage.start[v] + passage.before(tile, v) * (inner ? 1 : node.bits);
      mine.left = node.bits;
      mine.right = node.first;
      change = on_stack(odd, Tile<S>::words(mine.here));
      if (inner) {
        mine.extra = bits.rank(mine.at);
        rights = (bits.rank(mine.at + mine.here) - mine.extra) & 0xffffu;
        change -= on_stack(1 - odd, Tile<S>::words(rights) + Tile<S>::words(mine.here - rights));
      }
    }
    const uint32_t after = tops + warp_inclusive(change);
    tops = __shfl_sync(kFull, after, 31);
    mine.list = top_of<S>(after - change, odd);
    if (inner) {  // the left list was written last, and lies on top
      mine.right = top_of<S>(after, 1 - odd);
      mine.left = mine.right + Tile<S>::words(rights);
    }
    const uint32_t inners = __ballot_sync(kFull, inner);
    for (uint32_t todo = __ballot_sync(kFull, mine.here != 0); todo != 0; todo &= todo - 1) {
      const int next = __ffs(todo) - 1;
      const Visit visit = mine.of_lane(next);
      uint32_t* to = memory + visit.list;
      __syncwarp();  // the lists of the node before are complete, and read
      if (inners >> next & 1) {
        const uint32_t *left = memory + visit.left, *right = memory + visit.right;
        for (uint32_t k = lane * kEach; k < visit.here; k += 32 * kEach) {
          const uint32_t ones = (bits.rank(visit.at + k) - visit.extra) & 0xffffu;
          const uint32_t pattern = bits.at(visit.at + k) & ((1u << kEach) - 1);
          to[k / kEach] =
              __byte_perm(window<S>(left, k - ones), window<S>(right, ones), picks[pattern]);
        }
        continue;
      }
      const uint32_t each = visit.left, mask = (1u << each) - 1;
      const uint16_t* symbols = symbol_of + visit.right;
      for (uint32_t k = lane * kEach; k < visit.here; k += 32 * kEach) {
        const uint32_t raw = bits.at(visit.at + k * each);
        uint32_t word = 0;
#pragma unroll
        for (uint32_t j = 0; j < kEach; ++j) {
          word |= static_cast<uint32_t>(symbols[raw >> j * each & mask]) << 8 * sizeof(S) * j;
        }
        to[k / kEach] = word;
      }
    }
  }
  __syncwarp();
}

// By one warp: `count` symbols of a list from `skip` on, as they are.
template <class S>
__device__ inline void codec_store_symbols(const uint32_t* list, uint32_t skip, uint32_t count,
                                           S* out) {
  uint32_t k = threadIdx.x & 31;
  if (skip == 0 && (reinterpret_cast<intptr_t>(out) & 3) == 0) {
    const uint32_t words = count / Tile<S>::kEach;
    for (uint32_t i = k; i < words; i += 32) reinterpret_cast<uint32_t*>(out)[i] = list[i];
    k += words * Tile<S>::kEach;
  }
  for (; k < count; k += 32) out[k] = reinterpret_cast<const S*>(list)[skip + k];
}

// *info becomes `code` if it is 0 or more than that.
__device__ inline void report(unsigned long long* info, unsigned long long code) {
  unsigned long long known = 0;
  while (known == 0 || known > code) {
    const unsigned long long found = atomicCAS(info, known, code);
    if (found == known) return;
    known = found;
  }
}

template <class S, class T>
struct IsSame {
  static constexpr bool value = false;
};
template <class T>
struct IsSame<T, T> {
  static constexpr bool value = true;
};

// Symbols [start_at, start_at + wanted) of n, of type S, from the chunks first_chunk and on; as
// weights where T is another type. entries and offsets (in the payload) are of these chunks, the
// largest of which has `largest` bytes. *info (0 before) becomes kBadChunk and the smallest number
// of a bad chunk. As many warps merge as have `lists` in shared memory (decode_shared of
// codec/cuda.py).
template <class S, class T>
__global__ void __launch_bounds__(kThreads, 3)
    codec_decode_kernel(const uint8_t* payload, const uint32_t* entries, const int64_t* offsets,
                        int64_t n, int chunk_log2, int64_t first_chunk, const int32_t* tree,
                        int count, int leaves, const uint32_t* crc_tables, const Affine* affine,
                        int64_t group_size, int64_t start_at, int64_t wanted, int largest,
                        int lists, T* out, unsigned long long* info) {
  CFL_DYNAMIC_SHARED(memory);
  __shared__ uint32_t picks[16];
  __shared__ bool good;
  const int64_t chunk = int64_t{1} << chunk_log2, number = first_chunk + blockIdx.x;
  const int64_t begin = number * chunk;
  const uint32_t here = static_cast<uint32_t>(least(chunk, n - begin));
  const int tiles = static_cast<int>((chunk + Tile<S>::kSymbols - 1) / Tile<S>::kSymbols);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t bytes = entries[2 * blockIdx.x], words = (bytes + 3) / 4;
  const int most_words = (largest + 3) / 4;

  CodecNode* nodes = reinterpret_cast<CodecNode*>(memory);
  uint32_t* start = memory + 4 * count;
  uint16_t* passed = reinterpret_cast<uint16_t*>(start + count);
  uint32_t* data = start + count + (tiles * count + 1) / 2;
  uint16_t* ones = reinterpret_cast<uint16_t*>(data + most_words + 2);
  uint32_t* stacks = data + most_words + 2 + (most_words + 2) / 2;
  const uint16_t* symbol_of = reinterpret_cast<const uint16_t*>(tree + 4 * count);
  if (sizeof(S) == 1 || leaves <= kMaxSharedSymbols) {
    for (int i = threadIdx.x; i < (leaves + 1) / 2; i += kThreads) {
      stacks[i] = static_cast<uint32_t>(tree[4 * count + i]);
    }
    symbol_of = reinterpret_cast<const uint16_t*>(stacks);
    stacks += (leaves + 1) / 2;
  }
  stacks += warp * 2 * Tile<S>::kStack;
  for (int i = threadIdx.x; i < 4 * count; i += kThreads) {
    memory[i] = static_cast<uint32_t>(tree[i]);
  }
  if (threadIdx.x < 16) picks[threadIdx.x] = picking<S>(threadIdx.x);
  // The chunk, which may start at any byte, and two more words of zeros: `Ranks` and `window` look
  // that far. Nothing is read that lies behind the chunk, where the payload may end.
  const uint8_t* from = payload + offsets[blockIdx.x];
  const uint32_t misaligned = static_cast<uint32_t>(reinterpret_cast<intptr_t>(from) & 3);
  const uint32_t* aligned = reinterpret_cast<const uint32_t*>(from - misaligned);
  const uint32_t whole = bytes >= 4 ? (bytes - 4) / 4 : 0;
#pragma unroll 8
  for (uint32_t i = threadIdx.x; i < whole; i += kThreads) {
    data[i] = __funnelshift_r(aligned[i], aligned[i + 1], 8 * misaligned);
  }
  for (uint32_t i = whole + threadIdx.x; i < words + 2; i += kThreads) {
    uint32_t word = 0;
    for (uint32_t b = 4 * i; b < bytes && b < 4 * i + 4; ++b) {
      word |= static_cast<uint32_t>(from[b]) << 8 * (b & 3);
    }
    data[i] = word;
  }
  const bool intact = block_crc(data, bytes, crc_tables) == entries[2 * blockIdx.x + 1];

  // An odd number of words to each thread: no two lanes of a warp on the same bank.
  const uint32_t each = (words + kThreads - 1) / kThreads | 1;
  const uint32_t lo = least(words, each * threadIdx.x), hi = least(words, lo + each);
  uint32_t mine = 0, total;
  for (uint32_t i = lo; i < hi; ++i) mine += __popc(data[i]);
  uint32_t sum = block_exclusive(mine, &total);
  for (uint32_t i = lo; i < hi; ++i) {
    ones[i] = static_cast<uint16_t>(sum);
    sum += __popc(data[i]);
  }
  if (threadIdx.x == 0) ones[words] = static_cast<uint16_t>(total);
  __syncthreads();

  const Ranks ranks = {data, ones};
  if (warp == 0) {
    // Each lane follows the symbols up to the end of its tile through the nodes; those up to the
    // end of the last tile are all. What passes a node is set when its parent is visited, which
    // comes first in pre-order. The other warps wait: what can be loaded ahead is.
    uint32_t at = 0, some = lane < tiles ? least(here, (lane + 1) * Tile<S>::kSymbols) : 0;
    uint16_t* passing = passed + lane * count;
    if (lane < tiles) passing[0] = static_cast<uint16_t>(some);
    CodecNode node = nodes[0];
    bool fits = intact;
    for (int v = 0; v < count && fits; ++v) {
      const CodecNode next = nodes[least(v + 1, count - 1)];
      const uint32_t waiting = lane < tiles && v + 1 < count ? passing[v + 1] : 0;
      const uint32_t all = __shfl_sync(kFull, some, tiles - 1);
      const uint32_t need = all * (node.right ? 1 : node.bits);  // at most 2^15 * 16
      fits = need <= 8 * bytes - at;
      if (!fits) break;
      if (lane == 0) start[v] = at;
      if (node.right && lane < tiles) {
        const uint32_t rights = (ranks.rank(at + some) - ranks.rank(at)) & 0xffffu;
        some -= rights;
        passing[v + 1] = static_cast<uint16_t>(some);
        passing[node.right] = static_cast<uint16_t>(rights);
      } else {
        some = waiting;
      }
      at += need;
      node = next;
    }
    if (lane == 0) {
      good = fits && (at + 7) / 8 == bytes;
      if (!good) report(info, kBadChunk + number);
    }
  }
  __syncthreads();
  if (!good) return;

  const Passage passage = {nodes, count, start, passed};
  for (int tile = warp; tile < tiles && warp < lists; tile += lists) {
    const int64_t tile_begin = begin + tile * Tile<S>::kSymbols;
    const int64_t tile_end = least(tile_begin + Tile<S>::kSymbols, begin + here);
    const int64_t first = most(tile_begin, start_at), last = least(tile_end, start_at + wanted);
    if (first >= last) continue;
    codec_merge_tile<S>(tile, ranks, passage, symbol_of, picks, stacks);
    const uint32_t skip = static_cast<uint32_t>(first - tile_begin);
    const uint32_t some = static_cast<uint32_t>(last - first);
    T* to = out + (first - start_at);
    if constexpr (IsSame<S, T>::value) {
      codec_store_symbols<S>(stacks, skip, some, to);
    } else {
      codec_store_weights(reinterpret_cast<const S*>(stacks) + skip, some, to, affine, first,
                          group_size);
    }
    __syncwarp();  // before the next tile's lists
  }
}

}  // namespace cfl::cuda
