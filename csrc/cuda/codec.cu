// Launchers of codec_kernel.cuh: they choose the instantiation, the grid and the shared memory.
#include "cuda/codec.cuh"
#include "cuda/codec_kernel.cuh"
#include "cuda/launch.cuh"

namespace cfl::cuda {
namespace {

int64_t counting_blocks(int64_t symbols) {
  return least<int64_t>(1024, divide_up(symbols, 16 * kThreads));
}

template <class Call>
cudaError_t by_symbol(int size, Call call) {
  return size == 1 ? call(uint8_t{}) : call(uint16_t{});
}
template <class Call>
cudaError_t by_float(Float dtype, Call call) {
  switch (dtype) {
    case Float::kF16:
      return call(Half{});
    case Float::kBF16:
      return call(BFloat{});
    case Float::kF32:
      return call(float{});
    default:
      return call(double{});
  }
}
template <class T>
const T* in(const void* data) {
  return static_cast<const T*>(data);
}

}  // namespace

int64_t codec_parts(int64_t size) { return divide_up(size, kPart); }
int64_t codec_crc_words() { return 4 * 256 + kThreads; }
int64_t codec_warps() { return kWarps; }

cudaError_t codec_largest(const void* symbols, int symbol_size, int64_t n,
                          unsigned long long* largest, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return by_symbol(symbol_size, [&](auto s) {
    using S = decltype(s);
    return launch(&codec_largest_kernel<S>, counting_blocks(n), 0, stream, in<S>(symbols), n,
                  largest);
  });
}

cudaError_t codec_histogram(const void* symbols, int symbol_size, int64_t n,
                            unsigned long long* counts, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const size_t shared = (symbol_size == 1 ? 256 : kMaxShared) * sizeof(uint32_t);
  return by_symbol(symbol_size, [&](auto s) {
    using S = decltype(s);
    return launch(&codec_histogram_kernel<S>, counting_blocks(n), shared, stream, in<S>(symbols), n,
                  counts);
  });
}

cudaError_t codec_encode(const void* symbols, int symbol_size, int64_t n, int chunk_log2,
                         const int32_t* tree, int nodes, int leaves, int alphabet,
                         const uint32_t* crc_tables, uint32_t* slots, int64_t slot_words,
                         int staged_words, int64_t shared, uint32_t* entries, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return by_symbol(symbol_size, [&](auto s) {
    using S = decltype(s);
    return launch(&codec_encode_kernel<S>, divide_up(n, int64_t{1} << chunk_log2), shared, stream,
                  in<S>(symbols), n, chunk_log2, tree, nodes, leaves, alphabet, crc_tables, slots,
                  slot_words, staged_words, entries);
  });
}

cudaError_t codec_gather(const uint32_t* slots, int64_t slot_words, int64_t chunks,
                         const uint32_t* entries, const int64_t* offsets, uint8_t* out,
                         cudaStream_t stream) {
  if (chunks == 0) return cudaSuccess;
  return launch(&codec_gather_kernel<uint8_t>, chunks, 0, stream, slots, slot_words, entries,
                offsets, out);
}

cudaError_t codec_range(const void* weights, Float dtype, int64_t groups, int64_t size, int levels,
                        double* ends, int64_t* bad, void* minimum, void* maximum, int64_t* info,
                        Affine* affine, cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  const int64_t parts = codec_parts(size);
  return by_float(dtype, [&](auto t) {
    using T = decltype(t);
    if (size > 0) {
      const cudaError_t error = launch(&codec_range_kernel<T>, least(kMostBlocks, groups * parts),
                                       0, stream, in<T>(weights), groups, size, parts, ends, bad);
      if (error != cudaSuccess) return error;
    }
    return launch(&codec_ends_kernel<T>, least(kMostBlocks, divide_up(groups, kWarps)), 0, stream,
                  static_cast<const double*>(ends), static_cast<const int64_t*>(bad), groups, parts,
                  levels, static_cast<T*>(minimum), static_cast<T*>(maximum), info, affine);
  });
}

cudaError_t codec_affine(const void* minimum, const void* maximum, Float dtype, int64_t groups,
                         int levels, Affine* affine, cudaStream_t stream) {
  if (groups == 0) return cudaSuccess;
  return by_float(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(&codec_affine_kernel<T>, divide_up(groups, kThreads), 0, stream, in<T>(minimum),
                  in<T>(maximum), groups, levels, affine);
  });
}

cudaError_t codec_quantize(const void* weights, Float dtype, int64_t groups, int64_t size,
                           const Affine* affine, const int64_t* info, int levels, void* symbols,
                           int symbol_size, unsigned long long* counts, cudaStream_t stream) {
  if (groups == 0 || size == 0) return cudaSuccess;
  const int64_t parts = codec_parts(size);
  const size_t shared = counts && levels <= kMaxShared ? levels * sizeof(uint32_t) : 0;
  return by_float(dtype, [&](auto t) {
    return by_symbol(symbol_size, [&](auto s) {
      using T = decltype(t);
      using S = decltype(s);
      return launch(&codec_quantize_kernel<T, S>, least(kMostBlocks, groups * parts), shared,
                    stream, in<T>(weights), groups, size, parts, affine, info, levels,
                    static_cast<S*>(symbols), counts);
    });
  });
}

cudaError_t codec_dequantize(const void* symbols, int symbol_size, int64_t n, int64_t size,
                             const Affine* affine, void* weights, Float dtype,
                             cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t blocks = least(kMostBlocks, divide_up(n, int64_t{kSpan} * kWarps));
  return by_float(dtype, [&](auto t) {
    return by_symbol(symbol_size, [&](auto s) {
      using T = decltype(t);
      using S = decltype(s);
      return launch(&codec_dequantize_kernel<S, T>, blocks, 0, stream, in<S>(symbols), n, size,
                    affine, static_cast<T*>(weights));
    });
  });
}

cudaError_t codec_decode(const CodecDecodeArgs& args, cudaStream_t stream) {
  if (args.chunks == 0) return cudaSuccess;
  return by_symbol(args.symbol_size, [&](auto s) {
    using S = decltype(s);
    auto decode = [&](auto t) {
      using T = decltype(t);
      return launch(&codec_decode_kernel<S, T>, args.chunks, args.shared, stream, args.payload,
                    args.entries, args.offsets, args.n, args.chunk_log2, args.first_chunk,
                    args.tree, args.nodes, args.leaves, args.crc_tables, args.affine,
                    args.group_size, args.start, args.count, args.largest, args.lists,
                    static_cast<T*>(args.out), args.info);
    };
    return args.affine ? by_float(args.dtype, decode) : decode(s);
  });
}

}  // namespace cfl::cuda
