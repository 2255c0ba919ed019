// Launchers of the codec's CUDA kernels: raw pointers only, so that nvcc sees no torch header. They
// read and write the chunks of docs/format.md (pivot layout), the same bytes as the CPU's.
//
// Compile-checked on every build; never run on a GPU so far.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cfl::cuda {

// As cfl::codec::Node, with the subtree's first rank; in pre-order, the left child follows its
// parent.
struct CodecNode {
  int32_t right;  // inner node: index of the right child; leaf: 0
  int32_t first;  // inner node: rank of the right child's first symbol; leaf: of its own
  int32_t bits;   // leaf: it holds 2^bits symbols
};

struct CodecTree {  // in device memory
  const CodecNode* nodes;
  int32_t count;  // at most kMaxCodecNodes
  int32_t depth;
  const uint16_t* symbol;  // by rank
  const uint16_t* rank;    // by symbol
  int32_t longest;         // code, in bits
};
constexpr int kMaxCodecNodes = 1024;

// counts[0..alphabet) += the counts of n symbols of 1 or 2 bytes.
cudaError_t codec_histogram(const void* symbols, int symbol_size, int64_t n, int alphabet,
                            unsigned long long* counts, cudaStream_t stream);

struct CodecEncodeArgs {
  CodecTree tree;
  const void* symbols;
  int symbol_size;
  int64_t n;
  int chunk_log2;       // at most 16
  uint32_t* slots;      // zeroed; chunk c writes to slots + c * slot_words
  int64_t slot_words;   // at least ceil(chunk * longest / 32) + 1
  uint16_t* scratch;    // 4 * chunk for each chunk
  uint32_t* sizes;      // bytes of each chunk, out
  uint32_t* checksums;  // CRC-32 of each chunk, out
};
// Chunks into their slots; the caller sums up the sizes and calls codec_gather.
cudaError_t codec_encode(const CodecEncodeArgs& args, cudaStream_t stream);
// Copies the chunks from their slots to offsets[c] of `out`.
cudaError_t codec_gather(const uint32_t* slots, int64_t slot_words, int64_t chunks,
                         const uint32_t* sizes, const int64_t* offsets, uint8_t* out,
                         cudaStream_t stream);

struct CodecDecodeArgs {
  CodecTree tree;
  const uint8_t* data;  // the chunks; each is read as aligned words, 16 bytes past its end at most
  const int64_t* offsets;  // of each chunk in data
  const uint32_t* sizes;   // in bytes
  const uint32_t* checksums;
  int64_t n;
  int chunk_log2;
  int64_t largest;  // of the sizes
  int symbol_size;  // of out, unless weights != null
  void* out;
  float* weights;  // or: decode to float32 with one range for all
  float origin, step;
  unsigned long long* bad;  // the smallest number of a bad chunk (initially all ones)
};
// cudaErrorInvalidValue where a chunk needs more shared memory than a block can have.
cudaError_t codec_decode(const CodecDecodeArgs& args, cudaStream_t stream);

}  // namespace cfl::cuda
