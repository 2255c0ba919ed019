// The codec's launchers as torch ops, cfl_ops::cuda_*: contiguous tensors in, nothing allocated,
// nothing checked but what would corrupt memory. python/cfl_ops/_gpu/native.py defines them and is
// their only caller.
#include "cuda/codec.cuh"

#include <optional>

#include "cuda/binding.h"

namespace cfl::cuda {
namespace {

Float float_kind(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Float::kF16;
    case ScalarType::BFloat16:
      return Float::kBF16;
    case ScalarType::Float:
      return Float::kF32;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "cfl_ops: expected weights");
      return Float::kF64;
  }
}
int symbol_size(const Tensor& symbols) {
  const int64_t size = symbols.element_size();
  STD_TORCH_CHECK(size <= 2, "cfl_ops: symbols must be uint8 or uint16");
  return static_cast<int>(size);
}
const Affine* affine_of(const std::optional<Tensor>& affine) {
  return affine ? pointer<const Affine>(*affine) : nullptr;
}

void largest_op(const Tensor& symbols, Tensor largest) {
  const OnDevice device(symbols);
  check(codec_largest(symbols.data_ptr(), symbol_size(symbols), symbols.numel(),
                      pointer<unsigned long long>(largest), device.stream()),
        "huffman_encode");
}

void histogram_op(const Tensor& symbols, Tensor counts) {
  const OnDevice device(symbols);
  check(codec_histogram(symbols.data_ptr(), symbol_size(symbols), symbols.numel(),
                        pointer<unsigned long long>(counts), device.stream()),
        "huffman_encode");
}

void encode_op(const Tensor& symbols, int64_t chunk_log2, const Tensor& tree, int64_t nodes,
               int64_t leaves, int64_t alphabet, const Tensor& crc_tables, int64_t staged_words,
               int64_t shared, Tensor slots, Tensor entries) {
  const OnDevice device(symbols);
  check(codec_encode(symbols.data_ptr(), symbol_size(symbols), symbols.numel(),
                     static_cast<int>(chunk_log2), pointer<int32_t>(tree), static_cast<int>(nodes),
                     static_cast<int>(leaves), static_cast<int>(alphabet),
                     pointer<uint32_t>(crc_tables), pointer<uint32_t>(slots), slots.size(1),
                     static_cast<int>(staged_words), shared, pointer<uint32_t>(entries),
                     device.stream()),
        "huffman_encode");
}

void gather_op(const Tensor& slots, const Tensor& entries, const Tensor& offsets, Tensor out) {
  const OnDevice device(slots);
  check(codec_gather(pointer<uint32_t>(slots), slots.size(1), offsets.numel(),
                     pointer<uint32_t>(entries), pointer<int64_t>(offsets), pointer<uint8_t>(out),
                     device.stream()),
        "huffman_encode");
}

void decode_op(const Tensor& payload, const Tensor& entries, const Tensor& offsets, int64_t n,
               int64_t chunk_log2, int64_t first_chunk, const Tensor& tree, int64_t nodes,
               int64_t leaves, const Tensor& crc_tables, const std::optional<Tensor>& affine,
               int64_t group_size, int64_t symbol_bytes, int64_t start, int64_t largest,
               int64_t lists, int64_t shared, Tensor out, Tensor info) {
  const OnDevice device(payload);
  CodecDecodeArgs args = {};
  args.payload = pointer<uint8_t>(payload);
  args.entries = pointer<uint32_t>(entries);
  args.offsets = pointer<int64_t>(offsets);
  args.chunks = offsets.numel();
  args.n = n;
  args.chunk_log2 = static_cast<int>(chunk_log2);
  args.first_chunk = first_chunk;
  args.tree = pointer<int32_t>(tree);
  args.nodes = static_cast<int>(nodes);
  args.leaves = static_cast<int>(leaves);
  args.crc_tables = pointer<uint32_t>(crc_tables);
  args.affine = affine_of(affine);
  args.group_size = group_size;
  args.start = start;
  args.count = out.numel();
  args.out = out.data_ptr();
  args.symbol_size = static_cast<int>(symbol_bytes);
  if (affine) {
    args.dtype = float_kind(out);
  } else {
    STD_TORCH_CHECK(symbol_size(out) == symbol_bytes, "cfl_ops: out has another symbol size");
  }
  args.largest = static_cast<int>(largest);
  args.lists = static_cast<int>(lists);
  args.shared = shared;
  args.info = pointer<unsigned long long>(info);
  check(codec_decode(args, device.stream()), "huffman_decode");
}

// weights and symbols are (groups, size), affine (groups, 6) float64.
void range_op(const Tensor& weights, int64_t levels, Tensor ends, Tensor bad, Tensor minimum,
              Tensor maximum, Tensor info, Tensor affine) {
  const OnDevice device(weights);
  check(codec_range(weights.data_ptr(), float_kind(weights), weights.size(0), weights.size(1),
                    static_cast<int>(levels), pointer<double>(ends), pointer<int64_t>(bad),
                    minimum.data_ptr(), maximum.data_ptr(), pointer<int64_t>(info),
                    pointer<Affine>(affine), device.stream()),
        "quantize");
}

void affine_op(const Tensor& minimum, const Tensor& maximum, int64_t levels, Tensor affine) {
  const OnDevice device(minimum);
  check(codec_affine(minimum.data_ptr(), maximum.data_ptr(), float_kind(minimum), minimum.numel(),
                     static_cast<int>(levels), pointer<Affine>(affine), device.stream()),
        "dequantize");
}

void quantize_op(const Tensor& weights, const Tensor& affine, const Tensor& info, int64_t levels,
                 Tensor symbols, const std::optional<Tensor>& counts) {
  const OnDevice device(weights);
  check(codec_quantize(weights.data_ptr(), float_kind(weights), weights.size(0), weights.size(1),
                       pointer<const Affine>(affine), pointer<int64_t>(info),
                       static_cast<int>(levels), symbols.data_ptr(), symbol_size(symbols),
                       counts ? pointer<unsigned long long>(*counts) : nullptr, device.stream()),
        "quantize");
}

void dequantize_op(const Tensor& symbols, const Tensor& affine, Tensor weights) {
  const OnDevice device(symbols);
  check(codec_dequantize(symbols.data_ptr(), symbol_size(symbols), symbols.numel(), symbols.size(1),
                         pointer<const Affine>(affine), weights.data_ptr(), float_kind(weights),
                         device.stream()),
        "dequantize");
}

}  // namespace
}  // namespace cfl::cuda

CFL_CUDA_KERNELS(m) {
  m.impl("cuda_largest", TORCH_BOX(&cfl::cuda::largest_op));
  m.impl("cuda_histogram", TORCH_BOX(&cfl::cuda::histogram_op));
  m.impl("cuda_encode", TORCH_BOX(&cfl::cuda::encode_op));
  m.impl("cuda_gather", TORCH_BOX(&cfl::cuda::gather_op));
  m.impl("cuda_decode", TORCH_BOX(&cfl::cuda::decode_op));
  m.impl("cuda_range", TORCH_BOX(&cfl::cuda::range_op));
  m.impl("cuda_affine", TORCH_BOX(&cfl::cuda::affine_op));
  m.impl("cuda_quantize", TORCH_BOX(&cfl::cuda::quantize_op));
  m.impl("cuda_dequantize", TORCH_BOX(&cfl::cuda::dequantize_op));
}
