// The codec on a GPU: one block works on one chunk.
//
// Decoding treats the chunk as what it is, a wavelet tree. Once every 128-bit line of its bits
// knows how many ones come before it, rank(p), the ones before bit p, costs one look-up and at most
// four popcounts; so
//   * the sizes of all nodes follow from rank differences (one thread walks the few nodes), and
//   * every thread finds its own symbol from the root down, about two steps on average,
// with no dependence between threads and with neighbouring reads by neighbouring threads.
//
// Encoding goes level by level: symbols lie grouped by node, a scan of their bits gives each its
// place in the next level's groups, and so the place of its bit in the node's string.
#include "cuda/codec.cuh"

namespace cfl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ uint32_t warp_inclusive(uint32_t v) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, v, d);
    if ((threadIdx.x & 31) >= static_cast<unsigned>(d)) v += below;
  }
  return v;
}

// The sum of `v` over the threads before this one; *total is the sum over all of them.
__device__ uint32_t block_exclusive(uint32_t v, uint32_t* total) {
  __shared__ uint32_t warps[kWarps + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t inclusive = warp_inclusive(v);
  __syncthreads();  // the last call's readers are done
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const uint32_t mine = lane < kWarps ? warps[lane] : 0;
    const uint32_t sum = warp_inclusive(mine);
    if (lane < kWarps) warps[lane] = sum - mine;
    if (lane == kWarps - 1) warps[kWarps] = sum;
  }
  __syncthreads();
  *total = warps[kWarps];
  return inclusive - v + warps[warp];
}

// ---- checksum
// ------------------------------------------------------------------------------------

__device__ uint32_t crc_byte(uint32_t crc, uint32_t byte) {
  crc ^= byte;
#pragma unroll
  for (int i = 0; i < 8; ++i) crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
  return crc;
}

// a * b modulo the polynomial, both bit-reflected.
__device__ uint32_t crc_multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
    if (a & bit) product ^= b;
    b = b & 1 ? b >> 1 ^ 0xedb88320u : b >> 1;
  }
  return product;
}
__device__ uint32_t crc_power(uint32_t bytes) {  // x^(8 bytes)
  uint32_t result = 0x80000000u, square = 0x00800000u;
  for (; bytes; bytes >>= 1) {
    if (bytes & 1) result = crc_multiply(result, square);
    square = crc_multiply(square, square);
  }
  return result;
}

// By the whole block: each thread takes a stretch, and shifts its remainder to its place.
__device__ uint32_t block_crc(const uint8_t* data, uint32_t size) {
  __shared__ uint32_t sum;
  __syncthreads();
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  const uint32_t stretch = (size + kThreads - 1) / kThreads;
  const uint32_t begin = min(size, stretch * threadIdx.x), end = min(size, begin + stretch);
  uint32_t crc = begin == 0 ? 0xffffffffu : 0;
  for (uint32_t i = begin; i < end; ++i) crc = crc_byte(crc, data[i]);
  if (begin == 0 || begin < end) atomicXor(&sum, crc_multiply(crc, crc_power(size - end)));
  __syncthreads();
  return ~sum;
}

// ---- histogram
// -----------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const T* symbols, int64_t n, int alphabet, bool shared_counts,
                     unsigned long long* counts) {
  extern __shared__ uint32_t local[];
  if (shared_counts) {
    for (int s = threadIdx.x; s < alphabet; s += kThreads) local[s] = 0;
    __syncthreads();
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    if (shared_counts) {
      atomicAdd(&local[symbols[i]], 1u);
    } else {
      atomicAdd(&counts[symbols[i]], 1ull);
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

__device__ void put_bits(uint32_t* words, uint32_t pos, uint32_t value, int bits) {
  if (bits == 0) return;
  const uint32_t s = pos & 31;
  atomicOr(&words[pos >> 5], value << s);
  if (s + bits > 32) atomicOr(&words[(pos >> 5) + 1], value >> (32 - s));
}

// For each node of a chunk: its symbols, the place of the first of them when all symbols lie in the
// order of the leaves, and the place of its bits.
struct NodePlaces {
  uint32_t n[kMaxCodecNodes], first[kMaxCodecNodes], start[kMaxCodecNodes], ones[kMaxCodecNodes];
};

template <class T>
__global__ void __launch_bounds__(kThreads) encode_kernel(CodecEncodeArgs args) {
  extern __shared__ uint32_t raw[];
  NodePlaces& at = *reinterpret_cast<NodePlaces*>(raw);
  const CodecTree& tree = args.tree;
  const int64_t chunk = int64_t{1} << args.chunk_log2;
  const int64_t begin = blockIdx.x * chunk;
  const int n = static_cast<int>(min(chunk, args.n - begin));
  const T* symbols = static_cast<const T*>(args.symbols) + begin;
  uint32_t* words = args.slots + blockIdx.x * args.slot_words;
  uint16_t* rank = args.scratch + 4 * blockIdx.x * chunk;
  uint16_t* node = rank + chunk;
  uint16_t* next_rank = node + chunk;
  uint16_t* next_node = next_rank + chunk;

  // Sizes: each symbol counts in all nodes on its path.
  for (int v = threadIdx.x; v < tree.count; v += kThreads) at.n[v] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const int r = tree.rank[symbols[i]];
    rank[i] = static_cast<uint16_t>(r);
    node[i] = 0;
    int v = 0;
    atomicAdd(&at.n[0], 1u);
    while (tree.nodes[v].right) {
      v = r >= tree.nodes[v].first ? tree.nodes[v].right : v + 1;
      atomicAdd(&at.n[v], 1u);
    }
  }
  __syncthreads();
  __shared__ uint32_t total_bits;
  if (threadIdx.x == 0) {
    uint32_t bits = 0, before = 0;
    for (int v = 0; v < tree.count; ++v) {
      const bool leaf = tree.nodes[v].right == 0;
      at.start[v] = bits;
      at.first[v] = before;
      bits += leaf ? at.n[v] * tree.nodes[v].bits : at.n[v];
      if (leaf) before += at.n[v];
    }
    total_bits = bits;
  }
  __syncthreads();

  const int each = (n + kThreads - 1) / kThreads;
  const int lo = min(n, each * static_cast<int>(threadIdx.x)), hi = min(n, lo + each);
  auto goes_right = [&](int p) {
    const CodecNode& here = tree.nodes[node[p]];
    return here.right != 0 && rank[p] >= here.first;
  };
  for (int level = 0; level < tree.depth; ++level) {
    uint32_t mine = 0, total;
    for (int p = lo; p < hi; ++p) mine += goes_right(p);
    const uint32_t base = block_exclusive(mine, &total);
    uint32_t ones = base;
    for (int p = lo; p < hi; ++p) {
      if (static_cast<uint32_t>(p) == at.first[node[p]]) at.ones[node[p]] = ones;
      ones += goes_right(p);
    }
    __syncthreads();
    ones = base;
    for (int p = lo; p < hi; ++p) {
      const int v = node[p];
      const CodecNode& here = tree.nodes[v];
      const bool right = goes_right(p);
      uint32_t to = p;
      int child = v;
      if (here.right) {
        const uint32_t index = p - at.first[v], ones_before = ones - at.ones[v];
        put_bits(words, at.start[v] + index, right, 1);
        child = right ? here.right : v + 1;
        to = at.first[child] + (right ? ones_before : index - ones_before);
      }
      next_rank[to] = rank[p];
      next_node[to] = static_cast<uint16_t>(child);
      ones += right;
    }
    __syncthreads();
    uint16_t* swap = rank;
    rank = next_rank;
    next_rank = swap;
    swap = node;
    node = next_node;
    next_node = swap;
  }
  for (int p = threadIdx.x; p < n; p += kThreads) {
    const int v = node[p];
    const CodecNode& leaf = tree.nodes[v];
    put_bits(words, at.start[v] + (p - at.first[v]) * leaf.bits, rank[p] - leaf.first, leaf.bits);
  }
  __threadfence_block();
  __syncthreads();
  const uint32_t size = (total_bits + 7) / 8;
  const uint32_t crc = block_crc(reinterpret_cast<const uint8_t*>(words), size);
  if (threadIdx.x == 0) {
    args.sizes[blockIdx.x] = size;
    args.checksums[blockIdx.x] = crc;
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const uint32_t* slots, int64_t slot_words, const uint32_t* sizes,
                  const int64_t* offsets, uint8_t* out) {
  const uint8_t* from = reinterpret_cast<const uint8_t*>(slots + blockIdx.x * slot_words);
  uint8_t* to = out + offsets[blockIdx.x];
  const uint32_t size = sizes[blockIdx.x];
  for (uint32_t i = threadIdx.x; i < size; i += kThreads) to[i] = from[i];
}

// ---- decoding
// ------------------------------------------------------------------------------------

constexpr int kLine = 128;  // bits that share one entry of the table of ones

// 32 bits of a chunk that starts at any byte.
struct Bits {
  const uint32_t* words;  // aligned, at or before the chunk
  uint32_t skip;          // bits from there to the chunk
  uint32_t count;         // bits of the chunk

  __device__ uint32_t at(uint32_t pos) const {  // what lies past the end reads as zero
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

template <class T, bool kWeights>
__global__ void __launch_bounds__(kThreads) decode_kernel(CodecDecodeArgs args) {
  extern __shared__ uint32_t table[];  // ones before each line
  __shared__ uint32_t start[kMaxCodecNodes], before[kMaxCodecNodes], size[kMaxCodecNodes];
  __shared__ bool good;
  const CodecTree& tree = args.tree;
  const int64_t chunk = int64_t{1} << args.chunk_log2;
  const int64_t begin = blockIdx.x * chunk;
  const uint32_t n = static_cast<uint32_t>(min(chunk, args.n - begin));
  const uint8_t* data = args.data + args.offsets[blockIdx.x];
  const uint32_t bytes = args.sizes[blockIdx.x];
  const uint32_t misaligned = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(data) & 3);
  const Bits bits = {reinterpret_cast<const uint32_t*>(data - misaligned), 8 * misaligned,
                     8 * bytes};

  const bool intact = block_crc(data, bytes) == args.checksums[blockIdx.x];
  const uint32_t lines = (bits.count + kLine - 1) / kLine;
  const uint32_t each = (lines + kThreads - 1) / kThreads;
  const uint32_t lo = min(lines, each * threadIdx.x), hi = min(lines, lo + each);
  auto ones_of = [&](uint32_t line) {
    uint32_t ones = 0;
#pragma unroll
    for (int w = 0; w < kLine / 32; ++w) ones += __popc(bits.at(line * kLine + 32 * w));
    return ones;
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
    size[0] = n;
    for (int v = 0; v < tree.count && fits; ++v) {
      const CodecNode& node = tree.nodes[v];
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
    if (!good) atomicMin(args.bad, static_cast<unsigned long long>(blockIdx.x));
  }
  __syncthreads();
  if (!good) return;

  for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
    int v = 0;
    uint32_t index = i;
    while (tree.nodes[v].right) {
      const uint32_t pos = start[v] + index;
      const uint32_t ones_before = bits.rank(table, pos) - before[v];
      const bool right = bits.at(pos) & 1;
      index = right ? ones_before : index - ones_before;
      v = right ? tree.nodes[v].right : v + 1;
    }
    const CodecNode& leaf = tree.nodes[v];
    const uint32_t offset =
        leaf.bits ? bits.at(start[v] + index * leaf.bits) & ((1u << leaf.bits) - 1) : 0;
    const uint16_t symbol = tree.symbol[leaf.first + offset];
    if (kWeights) {
      // Rounded after each operation, as on the CPU.
      args.weights[begin + i] =
          __fadd_rn(__fmul_rn(static_cast<float>(symbol) + 0.5f, args.step), args.origin);
    } else {
      static_cast<T*>(args.out)[begin + i] = static_cast<T>(symbol);
    }
  }
}

template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 32 << 10) return cudaSuccess;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  if (bytes + (16 << 10) > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

int64_t chunks_of(int64_t n, int chunk_log2) {
  return (n + (int64_t{1} << chunk_log2) - 1) >> chunk_log2;
}

template <class T>
cudaError_t launch_encode(const CodecEncodeArgs& args, cudaStream_t stream) {
  const cudaError_t error = allow_shared(encode_kernel<T>, sizeof(NodePlaces));
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(chunks_of(args.n, args.chunk_log2));
  encode_kernel<T><<<blocks, kThreads, sizeof(NodePlaces), stream>>>(args);
  return cudaGetLastError();
}

template <class T, bool kWeights>
cudaError_t launch_decode(const CodecDecodeArgs& args, cudaStream_t stream) {
  const size_t bytes = (static_cast<size_t>(args.largest) * 8 / kLine + 2) * sizeof(uint32_t);
  const cudaError_t error = allow_shared(decode_kernel<T, kWeights>, bytes);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(chunks_of(args.n, args.chunk_log2));
  decode_kernel<T, kWeights><<<blocks, kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t codec_histogram(const void* symbols, int symbol_size, int64_t n, int alphabet,
                            unsigned long long* counts, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const bool shared = alphabet <= 8192;
  const size_t bytes = shared ? alphabet * sizeof(uint32_t) : 0;
  const int64_t wanted = (n + 16 * kThreads - 1) / (16 * kThreads);
  const unsigned blocks = static_cast<unsigned>(wanted < 2048 ? wanted : 2048);
  if (symbol_size == 1) {
    histogram_kernel<<<blocks, kThreads, bytes, stream>>>(static_cast<const uint8_t*>(symbols), n,
                                                          alphabet, shared, counts);
  } else {
    histogram_kernel<<<blocks, kThreads, bytes, stream>>>(static_cast<const uint16_t*>(symbols), n,
                                                          alphabet, shared, counts);
  }
  return cudaGetLastError();
}

cudaError_t codec_encode(const CodecEncodeArgs& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  if (args.tree.count > kMaxCodecNodes || args.chunk_log2 > 16) return cudaErrorInvalidValue;
  return args.symbol_size == 1 ? launch_encode<uint8_t>(args, stream)
                               : launch_encode<uint16_t>(args, stream);
}

cudaError_t codec_gather(const uint32_t* slots, int64_t slot_words, int64_t chunks,
                         const uint32_t* sizes, const int64_t* offsets, uint8_t* out,
                         cudaStream_t stream) {
  if (chunks == 0) return cudaSuccess;
  gather_kernel<<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(slots, slot_words, sizes,
                                                                        offsets, out);
  return cudaGetLastError();
}

cudaError_t codec_decode(const CodecDecodeArgs& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  if (args.tree.count > kMaxCodecNodes) return cudaErrorInvalidValue;
  if (args.weights) return launch_decode<uint8_t, true>(args, stream);
  return args.symbol_size == 1 ? launch_decode<uint8_t, false>(args, stream)
                               : launch_decode<uint16_t, false>(args, stream);
}

}  // namespace cfl::cuda
