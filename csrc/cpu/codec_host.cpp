// What the GPU path of the codec does on the host between its kernels, as ops on CPU tensors: the
// code for counts, the header, and back. python/cfl_ops/ops/codec/host.py defines them and holds
// the same in Python, for installations without the extension.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/codec_checks.h"
#include "cpu/codec_payload.h"
#include "cpu/gram_kernel.h"
#include "cpu/tensor.h"

namespace cfl::codec {
namespace {

const Kernel* kernel() { return kernel_at_most(static_cast<int>(cfl::cpu::isa())); }

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
Tensor tensor_of(const std::vector<T>& values, ScalarType dtype) {
  Tensor out = empty_cpu({static_cast<int64_t>(values.size())}, dtype);
  if (!values.empty()) std::memcpy(out.data_ptr(), values.data(), values.size() * sizeof(T));
  return out;
}

// As the kernels of csrc/cuda read it: for each node the right child, the first rank, the bits and
// the depth modulo 2; the symbol of each rank (16 bits, padded to a word); for each symbol below
// `alphabet` its rank and, in the upper half, the number of its leaf.
Tensor pack_tree(const Tree& tree, int64_t alphabet) {
  const int32_t count = tree.count, symbol_words = (tree.symbols + 1) / 2;
  std::vector<int32_t> words(static_cast<size_t>(4 * count + symbol_words + alphabet), 0);
  int32_t* codes = words.data() + 4 * count + symbol_words;
  for (int32_t v = 0; v < count; ++v) {
    const Node& node = tree.nodes[v];
    int32_t* to = words.data() + 4 * v;
    to[0] = node.right;
    to[1] = node.first;
    to[2] = node.bits;  // and to[3] was set by the parent
    if (node.right) {
      to[4 + 3] = words[4 * node.right + 3] = 1 - to[3];
    } else if (alphabet) {
      for (int32_t rank = node.first; rank < node.first + (1 << node.bits); ++rank) {
        codes[tree.symbol[rank]] = v << 16 | rank;
      }
    }
  }
  std::memcpy(words.data() + 4 * count, tree.symbol, 2 * static_cast<size_t>(tree.symbols));
  return tensor_of(words, ScalarType::Int);
}

// So many symbols of the longest code word have fewer than 2^63 bits.
constexpr int64_t kMaxCounted = int64_t{1} << 57;

// Counts of a sample, one block in `stride`, to the code. facts: (alphabet, nodes, symbols with a
// code, longest code word, bits of all counted symbols, their number).
std::tuple<Tensor, Tensor, Tensor> host_code_op(const Tensor& strided, int64_t stride) {
  Checked check("host_code");
  check.flat("counts", strided, kInt64);
  const int64_t given = strided.numel();
  check.that(strided.dim() == 1 && given <= max_alphabet(2), "counts",
             "must be one for each of at most 65536 symbols, but got ", given, " of ",
             strided.dim(), " dimensions");
  check.integer("stride", stride, 1);
  const Tensor found = torch::stable::contiguous(strided);
  int64_t alphabet = found.numel();
  const int64_t* from = data<const int64_t>(found);
  while (alphabet > 0 && stride == 1 && from[alphabet - 1] == 0) --alphabet;
  std::vector<uint64_t> counts(static_cast<size_t>(alphabet));
  int64_t total = 0;
  for (int64_t s = 0; s < alphabet; ++s) {
    int64_t scaled;
    const bool good = from[s] >= 0 && !__builtin_mul_overflow(from[s], stride, &scaled) &&
                      scaled <= kMaxCounted - total;
    check.that(good, "counts",
               "must not be negative, and with stride add up to at most 2^57, but got ", from[s]);
    total += scaled + 1;
    counts[s] = static_cast<uint64_t>(stride > 1 && scaled == 0 ? 1 : scaled);
  }
  const std::vector<uint8_t> lengths = code_lengths(counts);
  CodeTree code;
  check.that(code.build(lengths), "counts", "must be of symbols that a code can be built for");
  int64_t bits = 0, weight = 0, longest = 0;
  for (int64_t s = 0; s < alphabet; ++s) {
    longest = std::max<int64_t>(longest, lengths[s]);
    bits += static_cast<int64_t>(counts[s]) * lengths[s];
    weight += static_cast<int64_t>(counts[s]);
  }
  const Tree& tree = code.tree();
  const std::vector<int64_t> facts = {alphabet, tree.count, tree.symbols, longest, bits, weight};
  return {pack_tree(tree, alphabet), tensor_of(pack_lengths(lengths), ScalarType::Byte),
          tensor_of(facts, ScalarType::Long)};
}

// All of a payload before its chunks, behind `reserve` zeros. entries: (chunks, 2) int32.
Tensor host_head_op(const Tensor& strided, const Tensor& table_in, std::vector<int64_t> shape,
                    int64_t symbol_bytes, int64_t chunk_log2, int64_t numel, int64_t alphabet,
                    int64_t reserve) {
  Checked check("host_head");
  check.flat("entries", strided, kInt32);
  check_bytes(check, "table", table_in);
  check_payload_of(check, numel, shape, chunk_log2, reserve);
  check.integer("symbol_bytes", symbol_bytes, 1, 2);
  check.integer("alphabet", alphabet, 0, max_alphabet(symbol_bytes));
  const int64_t chunks = (numel + (int64_t{1} << chunk_log2) - 1) >> chunk_log2;
  check.that(strided.dim() == 2 && strided.size(0) == chunks && strided.size(1) == 2, "entries",
             "must have the shape (", chunks, ", 2), for each chunk its bytes and checksum");
  const Tensor entries = torch::stable::contiguous(strided);
  const Tensor table = torch::stable::contiguous(table_in);
  const int64_t ndim = static_cast<int64_t>(shape.size());
  const int64_t before = kHeaderBytes + 8 * ndim, head = before + table.numel() + 8 * chunks;
  Tensor out = empty_cpu({reserve + head}, ScalarType::Byte);
  uint8_t* to = data<uint8_t>(out) + reserve;
  std::memset(to - reserve, 0, static_cast<size_t>(reserve));
  if (ndim) std::memcpy(to + kHeaderBytes, shape.data(), 8 * static_cast<size_t>(ndim));
  std::memcpy(to + before, table.data_ptr(), static_cast<size_t>(table.numel()));
  std::memcpy(to + before + table.numel(), entries.data_ptr(), 8 * static_cast<size_t>(chunks));
  int64_t size = head;
  for (int64_t c = 0; c < chunks; ++c) size += data<const uint32_t>(entries)[2 * c];
  write_fixed(to,
              {static_cast<int>(symbol_bytes), static_cast<int>(chunk_log2), numel, size, alphabet,
               ndim, table.numel()},
              head, kernel());
  return out;
}

// The header of a payload of `size` bytes whose first ones are `raw`, and what decoding the symbols
// [start, start + count) needs. facts: (code, or minus the bytes of the header if `raw` has fewer;
// bytes of a symbol; log2 of a chunk; symbols; first byte of the chunks; nodes; symbols with a
// code; bytes of the chunks before the first that is wanted; bytes of the largest wanted one; the
// shape).
std::tuple<Tensor, Tensor> host_parse_op(const Tensor& strided, int64_t size, int64_t start,
                                         int64_t count) {
  Checked check("host_parse");
  check_bytes(check, "raw", strided);
  check.integer("size", size, 0);
  const Tensor raw = torch::stable::contiguous(strided);
  Header header;
  const uint8_t* from = data<const uint8_t>(raw);
  std::vector<int64_t> facts(9, 0);
  facts[0] = raw.numel() < std::min(size, kHeaderBytes)
                 ? -kHeaderBytes
                 : parse(from, size, raw.numel(), &header, kernel());
  if (facts[0] != kGood) {
    return {tensor_of(facts, ScalarType::Long), tensor_of(std::vector<int32_t>(), ScalarType::Int)};
  }
  facts[1] = header.symbol_size;
  facts[2] = header.chunk_log2;
  facts[3] = header.numel;
  facts[4] = header.data - from;
  if (start >= 0 && count > 0 && start < header.numel && count <= header.numel - start) {
    const int64_t first = start >> header.chunk_log2;
    const int64_t last = (start + count - 1) >> header.chunk_log2;
    for (int64_t c = 0; c <= last; ++c) {
      uint32_t bytes;
      std::memcpy(&bytes, header.chunk_table + 8 * c, 4);
      if (c < first) {
        facts[7] += bytes;
      } else {
        facts[8] = std::max<int64_t>(facts[8], bytes);
      }
    }
  }
  facts.insert(facts.end(), header.shape.begin(), header.shape.begin() + header.ndim);
  if (header.numel == 0) {
    return {tensor_of(facts, ScalarType::Long), tensor_of(std::vector<int32_t>(), ScalarType::Int)};
  }
  const Tree& tree = header.code.tree();
  facts[5] = tree.count;
  facts[6] = tree.symbols;
  return {tensor_of(facts, ScalarType::Long), pack_tree(tree, 0)};
}

}  // namespace
}  // namespace cfl::codec

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) {
  m.impl("host_code", TORCH_BOX(&cfl::codec::host_code_op));
  m.impl("host_head", TORCH_BOX(&cfl::codec::host_head_op));
  m.impl("host_parse", TORCH_BOX(&cfl::codec::host_parse_op));
}
