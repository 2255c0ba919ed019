// The codec on the CPU: from tensors to codec_payload.h. Semantics: python/cfl_ops/ops/codec.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/codec_checks.h"
#include "cpu/codec_payload.h"
#include "cpu/gram_kernel.h"
#include "cpu/tensor.h"

namespace cfl::codec {
namespace {

Float float_kind(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return Float::kF16;
    case ScalarType::BFloat16:
      return Float::kBF16;
    case ScalarType::Float:
      return Float::kF32;
    case ScalarType::Double:
      return Float::kF64;
    default:
      STD_TORCH_CHECK(false, "cfl_ops: the codec takes floating-point weights");
  }
}

int symbol_size(const Tensor& symbols) {
  const bool known =
      symbols.scalar_type() == ScalarType::Byte || symbols.scalar_type() == ScalarType::UInt16;
  STD_TORCH_CHECK(known, "cfl_ops: symbols must be uint8 or uint16");
  return symbols.scalar_type() == ScalarType::Byte ? 1 : 2;
}

// The instruction set that tests and CFL_OPS settings chose for the Gram kernel rules here too.
const Kernel* kernel() { return kernel_at_most(static_cast<int>(cfl::cpu::isa())); }

Threads threads() {
  return {&cfl::parallel_for, static_cast<int64_t>(torch::stable::get_num_threads())};
}

double read_float(Float dtype, const void* data, int64_t i) {
  switch (dtype) {
    case Float::kF16:
      return static_cast<double>(
          static_cast<float>(static_cast<const torch::headeronly::Half*>(data)[i]));
    case Float::kBF16:
      return static_cast<double>(
          static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data)[i]));
    case Float::kF32:
      return static_cast<const float*>(data)[i];
    default:
      return static_cast<const double*>(data)[i];
  }
}
void write_float(Float dtype, void* data, int64_t i, double value) {
  switch (dtype) {
    case Float::kF16:
      static_cast<torch::headeronly::Half*>(data)[i] = static_cast<float>(value);
      break;
    case Float::kBF16:
      static_cast<torch::headeronly::BFloat16*>(data)[i] = static_cast<float>(value);
      break;
    case Float::kF32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    default:
      static_cast<double*>(data)[i] = value;
  }
}

// As _affine in quantize.py: float32 arithmetic where it carries the range, else float64; powers of
// two keep the extremes of float64 representable.
Affine make_affine(Float dtype, double minimum, double maximum, int bits, int* wide) {
  const double levels = std::ldexp(1.0, bits);
  Affine a = {minimum, 0, 0, 1, 1, static_cast<int32_t>(levels) - 1};
  double range = maximum - minimum;
  if (dtype == Float::kF64) {
    *wide = 1;
    if (maximum * 0.5 - minimum * 0.5 > 0x1p899) {
      a.pre = 0x1p-4;
    } else if (range > 0 && range < 0x1p-899) {
      a.pre = 0x1p200;
    }
    a.post = 1 / a.pre;
    a.origin = minimum * a.pre;
    range = maximum * a.pre - a.origin;
  } else {
    *wide = range != 0 && !(range >= 0x1p-100 && range <= 0x1p100);
  }
  if (range > 0) {
    a.scale = levels / range;
    a.step = range / levels;
  }
  return a;
}

// A large group is cut into blocks, so that few groups still occupy all threads.
constexpr int64_t kRangeBlock = 1 << 17;

struct Range {
  double minimum, maximum;
  int64_t bad;
};

// The ranges of `groups` groups of `size` weights; look(g, first, count) sees each piece while it
// is in the cache.
template <class Look>
std::vector<Range> find_ranges(Float dtype, const uint8_t* w, int64_t groups, int64_t size,
                               const Kernel* k, const Look& look) {
  constexpr int64_t kPiece = 1 << 14;
  const int64_t element = kFloatSize[static_cast<int>(dtype)];
  const int64_t blocks = std::max<int64_t>(1, (size + kRangeBlock - 1) / kRangeBlock);
  auto join = [](Range& all, const Range& part) {
    all.minimum = std::min(all.minimum, part.minimum);
    all.maximum = std::max(all.maximum, part.maximum);
    all.bad += part.bad;
  };
  std::vector<Range> parts(static_cast<size_t>(groups * blocks));
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, groups * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = std::min(size, (i % blocks + 1) * kRangeBlock);
      Range all = {std::numeric_limits<double>::infinity(),
                   -std::numeric_limits<double>::infinity(), 0};
      for (int64_t at = i % blocks * kRangeBlock; at < last; at += kPiece) {
        const int64_t count = std::min(kPiece, last - at);
        Range part;
        part.bad = k->range(dtype, w + (i / blocks * size + at) * element, count, &part.minimum,
                            &part.maximum);
        look(i / blocks, at, count);
        join(all, part);
      }
      parts[i] = all;
    }
  });
  std::vector<Range> ranges(static_cast<size_t>(groups));
  for (int64_t g = 0; g < groups; ++g) {
    Range all = parts[g * blocks];
    for (int64_t b = 1; b < blocks; ++b) join(all, parts[g * blocks + b]);
    if (!(all.minimum <= all.maximum)) all.minimum = all.maximum = 0;  // nothing finite
    // No negative zero, so that the bytes do not depend on the order of a search.
    all.minimum += 0.0;
    all.maximum += 0.0;
    ranges[g] = all;
  }
  return ranges;
}

void write_ranges(Float dtype, const std::vector<Range>& ranges, Tensor& minimum, Tensor& maximum,
                  Tensor& info) {
  for (size_t g = 0; g < ranges.size(); ++g) {
    write_float(dtype, minimum.data_ptr(), static_cast<int64_t>(g), ranges[g].minimum);
    write_float(dtype, maximum.data_ptr(), static_cast<int64_t>(g), ranges[g].maximum);
    static_cast<int64_t*>(info.data_ptr())[g] = ranges[g].bad;
  }
}

// Where the sample looks in stretch i of `length` weights: a hash of i, so that no pattern of the
// weights (the columns of a matrix) meets one of the sample. As sample_index in
// python/cfl_ops/ops/codec/sample.py.
int64_t sample_place(int64_t i, int64_t length) {
  uint64_t x = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 32) * 0xd6e8feb86659fd93u;
  return static_cast<int64_t>((x >> 32) * static_cast<uint64_t>(length) >> 32);
}
constexpr int64_t kMostEvery = int64_t{1} << 31;  // so that the product above fits

// The range of each group and, with bits > 0, a histogram of 2^bits bins of one of each `every`
// weights.
std::tuple<Tensor, Tensor, Tensor, Tensor> weight_range_op(const Tensor& strided, int64_t bits,
                                                           int64_t every) {
  Checked check("weight_range");
  Size columns{"size"};
  check.tensor("w", strided, kFloats, {columns});
  check_bits(check, bits, 0);
  check.integer("every", every, 1, kMostEvery);
  const Tensor w = torch::stable::contiguous(strided);
  const Float dtype = float_kind(w.scalar_type());
  const int64_t element = static_cast<int64_t>(w.element_size()), size = w.size(w.dim() - 1);
  const auto batch = batch_shape(w, 1);
  const int64_t groups = product(batch), levels = bits ? int64_t{1} << bits : 0;
  Tensor minimum = empty_cpu(batch, w.scalar_type()), maximum = empty_cpu(batch, w.scalar_type());
  Tensor counts = empty_cpu(batch_shape(w, 1, {levels}), ScalarType::Long);
  Tensor info = empty_cpu(batch, ScalarType::Long);
  const Kernel* k = kernel();
  const auto* in = static_cast<const uint8_t*>(w.data_ptr());
  const int64_t sampled = bits ? (size + every - 1) / every : 0;
  std::vector<uint8_t> sample(static_cast<size_t>(groups * sampled * element));
  auto gather = [&](int64_t g, int64_t at, int64_t count) {
    if (sampled == 0) return;
    auto copy = [&](auto zero) {
      using T = decltype(zero);
      const T* from = reinterpret_cast<const T*>(in) + g * size;
      T* to = reinterpret_cast<T*>(sample.data()) + g * sampled;
      if (every == 1) {
        std::copy_n(from + at, count, to + at);
        return;
      }
      for (int64_t i = at / every; i * every < at + count; ++i) {
        const int64_t place = i * every + sample_place(i, std::min(every, size - i * every));
        if (place >= at && place < at + count) to[i] = from[place];  // else it is another piece's
      }
    };
    if (element == 8) {
      copy(uint64_t{0});
    } else if (element == 4) {
      copy(uint32_t{0});
    } else {
      copy(uint16_t{0});
    }
  };
  const std::vector<Range> ranges = find_ranges(dtype, in, groups, size, k, gather);
  write_ranges(dtype, ranges, minimum, maximum, info);
  auto* total = static_cast<int64_t*>(counts.data_ptr());
  std::fill(total, total + groups * levels, 0);
  std::vector<uint16_t> symbols(static_cast<size_t>(sampled));
  for (int64_t g = 0; g < groups && sampled > 0; ++g) {
    if (ranges[g].bad) continue;
    int wide = 0;
    const Affine affine =
        make_affine(dtype, ranges[g].minimum, ranges[g].maximum, static_cast<int>(bits), &wide);
    k->quantize(dtype, sample.data() + g * sampled * element, sampled, &affine, wide, 2,
                symbols.data());
    for (int64_t i = 0; i < sampled; ++i) ++total[g * levels + symbols[i]];
  }
  return {minimum, maximum, counts, info};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_op(const Tensor& strided, int64_t bits,
                                                               bool histogram) {
  Checked check("quantize");
  Size columns{"size"};
  check.tensor("w", strided, kFloats, {columns});
  check_bits(check, bits);
  const Tensor w = torch::stable::contiguous(strided);
  const Float dtype = float_kind(w.scalar_type());
  const int64_t element = static_cast<int64_t>(w.element_size()), size = w.size(w.dim() - 1);
  const auto batch = batch_shape(w, 1);
  const int64_t groups = product(batch), levels = int64_t{1} << bits;
  const int symbol_bytes = bits <= 8 ? 1 : 2;
  Tensor symbols = empty_cpu(batch_shape(w, 1, {size}),
                             symbol_bytes == 1 ? ScalarType::Byte : ScalarType::UInt16);
  Tensor minimum = empty_cpu(batch, w.scalar_type()), maximum = empty_cpu(batch, w.scalar_type());
  Tensor counts = empty_cpu(batch_shape(w, 1, {histogram ? levels : 0}), ScalarType::Long);
  Tensor info = empty_cpu(batch, ScalarType::Long);
  const Kernel* k = kernel();
  const auto* in = static_cast<const uint8_t*>(w.data_ptr());
  auto* out = static_cast<uint8_t*>(symbols.data_ptr());

  constexpr int64_t kBlock = kRangeBlock;
  const int64_t blocks = std::max<int64_t>(1, (size + kBlock - 1) / kBlock);
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, size));
  const std::vector<Range> ranges =
      find_ranges(dtype, in, groups, size, k, [](int64_t, int64_t, int64_t) {});
  write_ranges(dtype, ranges, minimum, maximum, info);
  std::vector<Affine> affine(groups);
  std::vector<int> wide(groups);
  for (int64_t g = 0; g < groups; ++g) {
    affine[g] =
        make_affine(dtype, ranges[g].minimum, ranges[g].maximum, static_cast<int>(bits), &wide[g]);
  }

  const int64_t tables =
      histogram ? std::min<int64_t>(groups * blocks, torch::stable::get_num_threads()) : 0;
  auto quantize_blocks = [&](int64_t begin, int64_t end, int64_t* table) {
    std::vector<uint32_t> even, odd;
    if (table && symbol_bytes == 2) {
      even.assign(65536, 0);
      odd.assign(65536, 0);
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / blocks, first = i % blocks * kBlock,
                    count = std::min(kBlock, size - first);
      uint8_t* to = out + (g * size + first) * symbol_bytes;
      if (static_cast<int64_t*>(info.data_ptr())[g]) {
        std::memset(to, 0, count * symbol_bytes);
        continue;
      }
      // In pieces that stay in the first cache until they are counted.
      constexpr int64_t kPiece = 4096;
      const int64_t piece = table ? kPiece : count;
      for (int64_t at = 0; at < count; at += piece) {
        const int64_t n = std::min(piece, count - at);
        k->quantize(dtype, in + (g * size + first + at) * element, n, &affine[g], wide[g],
                    symbol_bytes, to + at * symbol_bytes);
        if (table && symbol_bytes == 2) {
          k->histogram16(reinterpret_cast<uint16_t*>(to) + at, n, even.data(), odd.data());
        }
      }
      if (table && symbol_bytes == 1) {
        static_assert(sizeof(uint64_t) == sizeof(int64_t));
        uint64_t block_counts[256] = {};
        k->histogram8(to, count, block_counts);
        for (int64_t s = 0; s < levels; ++s) table[s] += static_cast<int64_t>(block_counts[s]);
      }
    }
    if (table && symbol_bytes == 2) {
      for (int64_t s = 0; s < levels; ++s) table[s] += int64_t{even[s]} + odd[s];
    }
  };
  if (!histogram) {
    torch::stable::parallel_for(0, groups * blocks, grain, [&](int64_t begin, int64_t end) {
      quantize_blocks(begin, end, nullptr);
    });
  } else {
    auto* total = static_cast<int64_t*>(counts.data_ptr());
    std::fill(total, total + groups * levels, 0);
    if (groups > 1) {
      torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g)
          quantize_blocks(g * blocks, (g + 1) * blocks, total + g * levels);
      });
    } else if (groups == 1) {
      std::vector<std::vector<int64_t>> part(tables, std::vector<int64_t>(levels, 0));
      torch::stable::parallel_for(0, tables, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          quantize_blocks(blocks * t / tables, blocks * (t + 1) / tables, part[t].data());
        }
      });
      for (const auto& one : part) {
        for (int64_t s = 0; s < levels; ++s) total[s] += one[s];
      }
    }
  }
  return {symbols, minimum, maximum, counts, info};
}

Tensor dequantize_op(const Tensor& strided, const Tensor& minimum_in, const Tensor& maximum_in,
                     int64_t bits) {
  Checked check("dequantize");
  Size columns{"size"};
  check.tensor("symbols", strided, kSymbols, {columns});
  check.scalar("minimum", minimum_in, kFloats);
  check.scalar("maximum", maximum_in, dtype_of(minimum_in));
  check_bits(check, bits);
  const Tensor q = torch::stable::contiguous(strided);
  const Tensor minimum = torch::stable::contiguous(minimum_in),
               maximum = torch::stable::contiguous(maximum_in);
  const Float dtype = float_kind(minimum.scalar_type());
  const int64_t size = q.size(q.dim() - 1), groups = product(batch_shape(q, 1));
  // A 0-d end of the range serves every batch (expand_batch).
  const bool one_minimum = minimum.dim() == 0, one_maximum = maximum.dim() == 0;
  const int bytes = symbol_size(q);
  Tensor w = empty_cpu(batch_shape(q, 1, {size}), minimum.scalar_type());
  const int64_t element = static_cast<int64_t>(w.element_size());
  const Kernel* k = kernel();
  constexpr int64_t kBlock = 1 << 15, kWorthStreaming = 4096;
  const int64_t blocks = std::max<int64_t>(1, (size + kBlock - 1) / kBlock);
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, groups * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / blocks, first = i % blocks * kBlock,
                    count = std::min(kBlock, size - first);
      const int64_t at = g * size + first;
      Pending part = {};
      part.symbols = static_cast<const uint8_t*>(q.data_ptr()) + at * bytes;
      part.n = count;
      part.out = static_cast<uint8_t*>(w.data_ptr()) + at * element;
      part.affine = make_affine(dtype, read_float(dtype, minimum.data_ptr(), one_minimum ? 0 : g),
                                read_float(dtype, maximum.data_ptr(), one_maximum ? 0 : g),
                                static_cast<int>(bits), &part.wide);
      part.dtype = dtype;
      part.stream = count >= kWorthStreaming && w.numel() * element > kCached;
      k->dequantize(&part, bytes);
    }
  });
  return w;
}

Tensor encode_to_tensor(const Symbols& symbols, const std::vector<int64_t>& shape,
                        int64_t chunk_log2, int64_t reserve) {
  Tensor buffer;
  const int64_t size =
      encode_payload(symbols, shape.data(), static_cast<int64_t>(shape.size()),
                     static_cast<int>(chunk_log2), kernel(), threads(), [&](int64_t bytes) {
                       buffer = empty_cpu({reserve + bytes}, ScalarType::Byte);
                       return static_cast<uint8_t*>(buffer.data_ptr()) + reserve;
                     });
  STD_TORCH_CHECK(size >= 0, "cfl_ops: no code could be built");
  std::memset(buffer.data_ptr(), 0, reserve);
  return torch::stable::narrow(buffer, 0, 0, reserve + size);
}

Symbols symbols_of(const Tensor& contiguous) {
  Symbols symbols;
  symbols.size = symbol_size(contiguous);
  symbols.n = contiguous.numel();
  symbols.data = static_cast<const uint8_t*>(contiguous.data_ptr());
  return symbols;
}

Tensor huffman_encode_op(const Tensor& strided, std::vector<int64_t> shape, int64_t chunk_log2,
                         int64_t reserve) {
  Checked check("huffman_encode");
  check.flat("symbols", strided, kSymbols);
  check_payload_of(check, strided.numel(), shape, chunk_log2, reserve);
  const Tensor symbols = torch::stable::contiguous(strided);
  return encode_to_tensor(symbols_of(symbols), shape, chunk_log2, reserve);
}

// Quantises within given ranges and encodes, a chunk at a time: with a sampled code the symbols
// never go through memory.
Tensor quantize_encode_op(const Tensor& strided, const Tensor& minimum_in, const Tensor& maximum_in,
                          int64_t bits, std::vector<int64_t> shape, int64_t chunk_log2,
                          int64_t reserve) {
  Checked check("quantize_encode");
  Size columns{"size"};
  check.tensor("w", strided, kFloats, {columns});
  check.scalar("minimum", minimum_in, dtype_of(strided));
  check.scalar("maximum", maximum_in, dtype_of(strided));
  check_bits(check, bits);
  check_payload_of(check, strided.numel(), shape, chunk_log2, reserve);
  const Tensor w = torch::stable::contiguous(strided);
  const Tensor minimum = torch::stable::contiguous(minimum_in),
               maximum = torch::stable::contiguous(maximum_in);
  const Float dtype = float_kind(w.scalar_type());
  const int64_t element = static_cast<int64_t>(w.element_size()), size = w.size(w.dim() - 1);
  const int64_t groups = product(batch_shape(w, 1));
  const bool one_minimum = minimum.dim() == 0, one_maximum = maximum.dim() == 0;
  const Kernel* k = kernel();
  const auto* in = static_cast<const uint8_t*>(w.data_ptr());
  std::vector<Affine> affine(groups);
  std::vector<int> wide(groups);
  Symbols symbols;
  symbols.size = bits <= 8 ? 1 : 2;
  symbols.n = w.numel();
  for (int64_t g = 0; g < groups; ++g) {
    affine[g] = make_affine(dtype, read_float(dtype, minimum.data_ptr(), one_minimum ? 0 : g),
                            read_float(dtype, maximum.data_ptr(), one_maximum ? 0 : g),
                            static_cast<int>(bits), &wide[g]);
  }
  symbols.make = [&](int64_t begin, int64_t count, uint8_t* out, bool) {
    while (count > 0) {
      const int64_t g = begin / size, here = std::min(count, (g + 1) * size - begin);
      k->quantize(dtype, in + begin * element, here, &affine[g], wide[g], symbols.size, out);
      begin += here;
      count -= here;
      out += here * symbols.size;
    }
  };
  // The largest weight of a group falls into the last bin.
  for (const Affine& a : affine)
    symbols.largest = std::max<int64_t>(symbols.largest, a.scale > 0 ? a.top : 0);
  Tensor made;
  if (symbols.n > 0 &&
      sample_stride(symbols.n, symbols.size == 1 ? 256 : symbols.largest + 1) == 1) {
    // The code is made from all symbols: do not make them twice.
    made = empty_cpu({symbols.n}, symbols.size == 1 ? ScalarType::Byte : ScalarType::UInt16);
    auto* data = static_cast<uint8_t*>(made.data_ptr());
    torch::stable::parallel_for(0, symbols.n, 1 << 15, [&](int64_t begin, int64_t end) {
      symbols.make(begin, end - begin, data + begin * symbols.size, false);
    });
    symbols.data = data;
  }
  return encode_to_tensor(symbols, shape, chunk_log2, reserve);
}

Tensor info_of(int64_t code) {
  Tensor info = empty_cpu({}, ScalarType::Long);
  *static_cast<int64_t*>(info.data_ptr()) = code;
  return info;
}

// (code, bytes of a symbol, log2 of a chunk, elements, dimensions, 64 extents): see huffman.py.
Tensor payload_header_op(const Tensor& strided) {
  Checked check("payload_header");
  check_bytes(check, "payload", strided);
  const Tensor payload = torch::stable::contiguous(strided);
  Tensor out = empty_cpu({5 + kMaxDims}, ScalarType::Long);
  auto* fields = static_cast<int64_t*>(out.data_ptr());
  std::fill(fields, fields + 5 + kMaxDims, 0);
  Header header;
  fields[0] =
      parse(static_cast<const uint8_t*>(payload.data_ptr()), payload.numel(), &header, kernel());
  if (fields[0] != kGood) return out;
  fields[1] = header.symbol_size;
  fields[2] = header.chunk_log2;
  fields[3] = header.numel;
  fields[4] = header.ndim;
  std::copy_n(header.shape.begin(), header.ndim, fields + 5);
  return out;
}

// A payload, and the memory to decode it to.
void check_decoding(Checked& check, const Tensor& payload, const Tensor& out, Dtypes dtypes) {
  check_bytes(check, "payload", payload);
  check.flat("out", out, dtypes, true);
  check.contiguous();
}

Tensor huffman_decode_op(const Tensor& strided, Tensor out, int64_t start) {
  Checked check("huffman_decode_");
  check_decoding(check, strided, out, kSymbols);
  check.apart();
  const Tensor payload = torch::stable::contiguous(strided);
  return info_of(decode_payload(static_cast<const uint8_t*>(payload.data_ptr()), payload.numel(),
                                start, out.numel(), out.data_ptr(), symbol_size(out), nullptr,
                                kernel(), threads()));
}

Tensor decompress_op(const Tensor& strided, const Tensor& minimum_in, const Tensor& maximum_in,
                     int64_t bits, int64_t group_size, Tensor out, int64_t start) {
  Checked check("decompress_");
  check_decoding(check, strided, out, kFloats);
  check.flat("minimum", minimum_in, dtype_of(out));
  check.flat("maximum", maximum_in, dtype_of(out));
  check.that(minimum_in.numel() == maximum_in.numel(), "maximum", "must have ", minimum_in.numel(),
             " elements as minimum has, but got ", maximum_in.numel());
  check_bits(check, bits);
  check.integer("group_size", group_size, 1);
  check.apart();
  const Tensor payload = torch::stable::contiguous(strided);
  const Tensor minimum = torch::stable::contiguous(minimum_in),
               maximum = torch::stable::contiguous(maximum_in);
  const int64_t groups = minimum.numel();
  if (start < 0 || start > std::numeric_limits<int64_t>::max() - out.numel() ||
      (out.numel() > 0 && (start + out.numel() - 1) / group_size >= groups)) {
    return info_of(kOutOfRange);
  }
  Weights weights;
  weights.dtype = float_kind(out.scalar_type());
  weights.group_size = group_size;
  weights.affine = [&](int64_t group, int* wide) {
    return make_affine(weights.dtype, read_float(weights.dtype, minimum.data_ptr(), group),
                       read_float(weights.dtype, maximum.data_ptr(), group), static_cast<int>(bits),
                       wide);
  };
  return info_of(decode_payload(static_cast<const uint8_t*>(payload.data_ptr()), payload.numel(),
                                start, out.numel(), out.data_ptr(), 0, &weights, kernel(),
                                threads()));
}

}  // namespace
}  // namespace cfl::codec

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) {
  m.impl("quantize", TORCH_BOX(&cfl::codec::quantize_op));
  m.impl("dequantize", TORCH_BOX(&cfl::codec::dequantize_op));
  m.impl("weight_range", TORCH_BOX(&cfl::codec::weight_range_op));
  m.impl("quantize_encode", TORCH_BOX(&cfl::codec::quantize_encode_op));
  m.impl("huffman_encode", TORCH_BOX(&cfl::codec::huffman_encode_op));
  m.impl("payload_header", TORCH_BOX(&cfl::codec::payload_header_op));
  m.impl("huffman_decode_", TORCH_BOX(&cfl::codec::huffman_decode_op));
  m.impl("decompress_", TORCH_BOX(&cfl::codec::decompress_op));
}
