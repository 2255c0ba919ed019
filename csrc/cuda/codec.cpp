// The codec's launchers as torch ops, cfl_ops::cuda_*: contiguous tensors in, nothing allocated.
// What is checked is what would corrupt memory; what the host made of the data (trees, offsets, the
// bytes of shared memory) is believed. python/cfl_ops/_gpu/native.py defines them and is their only
// caller.
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
      return Float::kF64;
  }
}
int symbol_size(const Tensor& symbols) { return static_cast<int>(symbols.element_size()); }
const Affine* affine_of(const std::optional<Tensor>& affine) {
  return affine ? pointer<const Affine>(*affine) : nullptr;
}

int64_t max_alphabet(int64_t symbol_bytes) { return symbol_bytes == 1 ? 256 : 65536; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What encoding and decoding know of a code: its tree, with the codes of `alphabet` symbols.
void check_code(Checked& check, int64_t chunk_log2, const Tensor& tree, int64_t nodes,
                int64_t leaves, int64_t alphabet, const Tensor& crc_tables, int64_t shared) {
  check.integer("chunk_log2", chunk_log2, 10, 15);
  check.integer("nodes", nodes, 1, 1024);
  check.integer("leaves", leaves, 1, max_alphabet(2));
  check.integer("shared", shared, 0, int64_t{1} << 20);
  Size words{"words of a tree", 4 * nodes + (leaves + 1) / 2 + alphabet};
  Size crc{"words of the tables", codec_crc_words()};
  check.tensor("tree", tree, kInt32, {words});
  check.tensor("crc_tables", crc_tables, kInt32, {crc});
}

void largest_op(const Tensor& symbols, Tensor largest) {
  Checked check("cuda_largest");
  Size one{"one number", 1};
  check.flat("symbols", symbols, kSymbols);
  check.tensor("largest", largest, kInt64, {one});
  check.all_contiguous();
  const OnDevice device(symbols);
  launched(codec_largest(symbols.data_ptr(), symbol_size(symbols), symbols.numel(),
                         pointer<unsigned long long>(largest), device.stream()),
           "huffman_encode");
}

void histogram_op(const Tensor& symbols, Tensor counts) {
  Checked check("cuda_histogram");
  check.flat("symbols", symbols, kSymbols);
  Size all{"symbols and the largest one", max_alphabet(symbols.element_size()) + 1};
  check.tensor("counts", counts, kInt64, {all});
  check.all_contiguous();
  const OnDevice device(symbols);
  launched(codec_histogram(symbols.data_ptr(), symbol_size(symbols), symbols.numel(),
                           pointer<unsigned long long>(counts), device.stream()),
           "huffman_encode");
}

void encode_op(const Tensor& symbols, int64_t chunk_log2, const Tensor& tree, int64_t nodes,
               int64_t leaves, int64_t alphabet, const Tensor& crc_tables, int64_t staged_words,
               int64_t shared, Tensor slots, Tensor entries) {
  Checked check("cuda_encode");
  Size n{"n"}, words{"words of a slot"}, two{"bytes and checksum", 2};
  check.tensor("symbols", symbols, kSymbols, {n});
  check.integer("alphabet", alphabet, 1, max_alphabet(symbols.element_size()));
  check_code(check, chunk_log2, tree, nodes, leaves, alphabet, crc_tables, shared);
  Size chunks{"chunks", divide_up(n.value, int64_t{1} << chunk_log2)};
  check.tensor("slots", slots, kInt32, {chunks, words});
  check.tensor("entries", entries, kInt32, {chunks, two});
  check.integer("staged_words", staged_words, 0, words.value);
  check.all_contiguous();
  const OnDevice device(symbols);
  launched(codec_encode(symbols.data_ptr(), symbol_size(symbols), symbols.numel(),
                        static_cast<int>(chunk_log2), pointer<int32_t>(tree),
                        static_cast<int>(nodes), static_cast<int>(leaves),
                        static_cast<int>(alphabet), pointer<uint32_t>(crc_tables),
                        pointer<uint32_t>(slots), slots.size(1), static_cast<int>(staged_words),
                        shared, pointer<uint32_t>(entries), device.stream()),
           "huffman_encode");
}

void gather_op(const Tensor& slots, const Tensor& entries, const Tensor& offsets, Tensor out) {
  Checked check("cuda_gather");
  Size chunks{"chunks"}, words{"words of a slot"}, two{"bytes and checksum", 2}, bytes{"bytes"};
  check.tensor("slots", slots, kInt32, {chunks, words});
  check.tensor("entries", entries, kInt32, {chunks, two});
  check.tensor("offsets", offsets, kInt64, {chunks});
  check.tensor("out", out, kUInt8, {bytes});
  check.all_contiguous();
  const OnDevice device(slots);
  launched(codec_gather(pointer<uint32_t>(slots), slots.size(1), offsets.numel(),
                        pointer<uint32_t>(entries), pointer<int64_t>(offsets),
                        pointer<uint8_t>(out), device.stream()),
           "huffman_encode");
}

void decode_op(const Tensor& payload, const Tensor& entries, const Tensor& offsets, int64_t n,
               int64_t chunk_log2, int64_t first_chunk, const Tensor& tree, int64_t nodes,
               int64_t leaves, const Tensor& crc_tables, const std::optional<Tensor>& affine,
               int64_t group_size, int64_t symbol_bytes, int64_t start, int64_t largest,
               int64_t lists, int64_t shared, Tensor out, Tensor info) {
  Checked check("cuda_decode");
  Size bytes{"bytes"}, chunks{"chunks"}, two{"bytes and checksum", 2}, groups{"groups"},
      numbers{"numbers of a group", 6};
  check.tensor("payload", payload, kUInt8, {bytes});
  check.tensor("entries", entries, kInt32, {chunks, two});
  check.tensor("offsets", offsets, kInt64, {chunks});
  check_code(check, chunk_log2, tree, nodes, leaves, 0, crc_tables, shared);
  check.tensor("affine", affine, kFloat64, {groups, numbers});
  check.integer("symbol_bytes", symbol_bytes, 1, 2);
  check.flat("out", out, affine ? kFloats : symbol_bytes == 1 ? kUInt8 : kUInt16);
  check.tensor("info", info, kInt64, {});
  check.all_contiguous();
  const int64_t count = out.numel(), last = start + count - 1;
  check.integer("n", n, count, int64_t{1} << 40);
  check.integer("start", start, 0, n - count);
  check.integer("group_size", group_size, 1);
  check.integer("largest", largest, 0, bytes.value);
  check.integer("lists", lists, 1, codec_warps());
  check.that(count == 0 || (first_chunk == start >> chunk_log2 &&
                            chunks.value == (last >> chunk_log2) - first_chunk + 1),
             "first_chunk", "and the chunks must be those of the symbols asked for, but got ",
             first_chunk, " and ", chunks.value);
  check.that(!affine || count == 0 || last / group_size < groups.value, "affine",
             "must have a row for every group, but has ", groups.value);
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
  }
  args.largest = static_cast<int>(largest);
  args.lists = static_cast<int>(lists);
  args.shared = shared;
  args.info = pointer<unsigned long long>(info);
  launched(codec_decode(args, device.stream()), "huffman_decode");
}

// weights and symbols are (groups, size), affine (groups, 6) float64.
void range_op(const Tensor& weights, int64_t levels, Tensor ends, Tensor bad, Tensor minimum,
              Tensor maximum, Tensor info, Tensor affine) {
  Checked check("cuda_range");
  Size groups{"groups"}, size{"size"}, two{"ends", 2}, numbers{"numbers of a group", 6};
  check.tensor("weights", weights, kFloats, {groups, size});
  Size parts{"parts of a group", codec_parts(size.value)};
  check.tensor("ends", ends, kFloat64, {groups, parts, two});
  check.tensor("bad", bad, kInt64, {groups, parts});
  check.tensor("minimum", minimum, dtype_of(weights), {groups});
  check.tensor("maximum", maximum, dtype_of(weights), {groups});
  check.tensor("info", info, kInt64, {groups});
  check.tensor("affine", affine, kFloat64, {groups, numbers});
  check.integer("levels", levels, 1, max_alphabet(2));
  check.all_contiguous();
  const OnDevice device(weights);
  launched(codec_range(weights.data_ptr(), float_kind(weights), weights.size(0), weights.size(1),
                       static_cast<int>(levels), pointer<double>(ends), pointer<int64_t>(bad),
                       minimum.data_ptr(), maximum.data_ptr(), pointer<int64_t>(info),
                       pointer<Affine>(affine), device.stream()),
           "quantize");
}

void affine_op(const Tensor& minimum, const Tensor& maximum, int64_t levels, Tensor affine) {
  Checked check("cuda_affine");
  Size groups{"groups", minimum.numel()}, numbers{"numbers of a group", 6};
  check.flat("minimum", minimum, kFloats);
  check.flat("maximum", maximum, dtype_of(minimum));
  check.that(maximum.numel() == groups.value, "maximum", "must have ", groups.value,
             " elements as minimum has, but got ", maximum.numel());
  check.tensor("affine", affine, kFloat64, {groups, numbers});
  check.integer("levels", levels, 1, max_alphabet(2));
  check.all_contiguous();
  const OnDevice device(minimum);
  launched(
      codec_affine(minimum.data_ptr(), maximum.data_ptr(), float_kind(minimum), minimum.numel(),
                   static_cast<int>(levels), pointer<Affine>(affine), device.stream()),
      "dequantize");
}

void quantize_op(const Tensor& weights, const Tensor& affine, const Tensor& info, int64_t levels,
                 Tensor symbols, const std::optional<Tensor>& counts) {
  Checked check("cuda_quantize");
  Size groups{"groups"}, size{"size"}, numbers{"numbers of a group", 6}, bins{"levels", levels};
  check.tensor("weights", weights, kFloats, {groups, size});
  check.tensor("affine", affine, kFloat64, {groups, numbers});
  check.tensor("info", info, kInt64, {groups});
  check.tensor("symbols", symbols, kSymbols, {groups, size});
  check.integer("levels", levels, 1, max_alphabet(symbols.element_size()));
  check.tensor("counts", counts, kInt64, {groups, bins});
  check.all_contiguous();
  const OnDevice device(weights);
  launched(codec_quantize(weights.data_ptr(), float_kind(weights), weights.size(0), weights.size(1),
                          pointer<const Affine>(affine), pointer<int64_t>(info),
                          static_cast<int>(levels), symbols.data_ptr(), symbol_size(symbols),
                          counts ? pointer<unsigned long long>(*counts) : nullptr, device.stream()),
           "quantize");
}

void dequantize_op(const Tensor& symbols, const Tensor& affine, Tensor weights) {
  Checked check("cuda_dequantize");
  Size groups{"groups"}, size{"size"}, numbers{"numbers of a group", 6};
  check.tensor("symbols", symbols, kSymbols, {groups, size});
  check.tensor("affine", affine, kFloat64, {groups, numbers});
  check.flat("weights", weights, kFloats);
  check.that(weights.numel() == symbols.numel(), "weights", "must have ", symbols.numel(),
             " elements as symbols has, but got ", weights.numel());
  check.all_contiguous();
  const OnDevice device(symbols);
  launched(codec_dequantize(symbols.data_ptr(), symbol_size(symbols), symbols.numel(),
                            symbols.size(1), pointer<const Affine>(affine), weights.data_ptr(),
                            float_kind(weights), device.stream()),
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
