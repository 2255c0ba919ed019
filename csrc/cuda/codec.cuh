// Launchers of the codec's CUDA kernels (codec_kernel.cuh): raw pointers only, so that nvcc sees no
// torch header. python/cfl_ops/_gpu/native.py calls them in the right order.
//
// Their bytes are checked on the CPU, by kernels that run as fibers
// (tests/codec/test_cuda_on_host.py).
#pragma once

#if defined(CFL_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace cfl::cuda {

struct Affine;
enum class Float : int { kF16, kBF16, kF32, kF64 };

// What the memory for the launchers below is made of: parts of a group of weights, and words that
// the checksums look up.
int64_t codec_parts(int64_t size);
int64_t codec_crc_words();
int64_t codec_warps();

// *largest = max(*largest, symbols).
cudaError_t codec_largest(const void* symbols, int symbol_size, int64_t n,
                          unsigned long long* largest, cudaStream_t stream);
// See codec_histogram_kernel.
cudaError_t codec_histogram(const void* symbols, int symbol_size, int64_t n,
                            unsigned long long* counts, cudaStream_t stream);

// See codec_encode_kernel.
cudaError_t codec_encode(const void* symbols, int symbol_size, int64_t n, int chunk_log2,
                         const int32_t* tree, int nodes, int leaves, int alphabet,
                         const uint32_t* crc_tables, uint32_t* slots, int64_t slot_words,
                         int staged_words, int64_t shared, uint32_t* entries, cudaStream_t stream);
cudaError_t codec_gather(const uint32_t* slots, int64_t slot_words, int64_t chunks,
                         const uint32_t* entries, const int64_t* offsets, uint8_t* out,
                         cudaStream_t stream);

// ends and bad: scratch, 2 and 1 for each group and part of kPart weights.
cudaError_t codec_range(const void* weights, Float dtype, int64_t groups, int64_t size, int levels,
                        double* ends, int64_t* bad, void* minimum, void* maximum, int64_t* info,
                        Affine* affine, cudaStream_t stream);
cudaError_t codec_affine(const void* minimum, const void* maximum, Float dtype, int64_t groups,
                         int levels, Affine* affine, cudaStream_t stream);
cudaError_t codec_quantize(const void* weights, Float dtype, int64_t groups, int64_t size,
                           const Affine* affine, const int64_t* info, int levels, void* symbols,
                           int symbol_size, unsigned long long* counts, cudaStream_t stream);
cudaError_t codec_dequantize(const void* symbols, int symbol_size, int64_t n, int64_t size,
                             const Affine* affine, void* weights, Float dtype, cudaStream_t stream);

struct CodecDecodeArgs {
  const uint8_t* payload;   // each chunk is read as aligned words: up to 3 bytes before it
  const uint32_t* entries;  // bytes and checksum of each chunk
  const int64_t* offsets;
  int64_t chunks, n;
  int chunk_log2;
  int64_t first_chunk;
  const int32_t* tree;
  int nodes, leaves;
  const uint32_t* crc_tables;
  const Affine* affine;  // or null: out takes the symbols
  int64_t group_size;
  int64_t start, count;
  void* out;
  int symbol_size;  // of the payload
  Float dtype;      // of the weights
  int largest;      // chunk, in bytes
  int lists;
  int64_t shared;  // bytes of shared memory
  unsigned long long* info;
};
// cudaErrorInvalidValue where a chunk needs more shared memory than a block can have.
cudaError_t codec_decode(const CodecDecodeArgs& args, cudaStream_t stream);

}  // namespace cfl::cuda
