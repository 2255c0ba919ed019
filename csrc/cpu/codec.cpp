// The codec on the CPU: from tensors to codec_payload.h. Semantics: python/cfl_ops/codec.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

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

// As _affine in codec.py: float32 arithmetic where it carries the range, else float64; powers of
// two keep the extremes of float64 representable.
Affine make_affine(Float dtype, double minimum, double maximum, int bits, int* wide) {
  const double levels = std::ldexp(1.0, bits);
  Affine a = {minimum, 0, 0, 1, 1, static_cast<int32_t>(levels) - 1};
  double range = maximum - minimum;
  if (dtype == Float::kF64) {
    *wide = 1;
    if (maximum * 0.5 - minimum * 0.5 > 0x1p899) {
      a.pre = 0x1p-4;
    } else if (range < 0x1p-899) {
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_op(const Tensor& strided, int64_t bits,
                                                               bool histogram) {
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

  // A large group is cut into blocks, so that few groups still occupy all threads.
  constexpr int64_t kBlock = 1 << 17;
  const int64_t blocks = std::max<int64_t>(1, (size + kBlock - 1) / kBlock);
  struct Part {
    double minimum, maximum;
    int64_t bad;
  };
  std::vector<Part> parts(static_cast<size_t>(groups * blocks));
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, groups * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kBlock, count = std::min(kBlock, size - first);
      Part& part = parts[i];
      part.bad = k->range(dtype, in + (i / blocks * size + first) * element, count, &part.minimum,
                          &part.maximum);
    }
  });
  std::vector<Affine> affine(groups);
  std::vector<int> wide(groups);
  for (int64_t g = 0; g < groups; ++g) {
    Part all = parts[g * blocks];
    for (int64_t b = 1; b < blocks; ++b) {
      const Part& part = parts[g * blocks + b];
      all.minimum = std::min(all.minimum, part.minimum);
      all.maximum = std::max(all.maximum, part.maximum);
      all.bad += part.bad;
    }
    if (!(all.minimum <= all.maximum)) all.minimum = all.maximum = 0;  // nothing finite
    all.minimum +=
        0.0;  // no negative zero, so that the bytes do not depend on the order of a search
    all.maximum += 0.0;
    write_float(dtype, minimum.data_ptr(), g, all.minimum);
    write_float(dtype, maximum.data_ptr(), g, all.maximum);
    static_cast<int64_t*>(info.data_ptr())[g] = all.bad;
    affine[g] = make_affine(dtype, all.minimum, all.maximum, static_cast<int>(bits), &wide[g]);
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
  const Tensor q = torch::stable::contiguous(strided);
  const Tensor minimum = torch::stable::contiguous(minimum_in),
               maximum = torch::stable::contiguous(maximum_in);
  const Float dtype = float_kind(minimum.scalar_type());
  const int64_t size = q.size(q.dim() - 1), groups = product(batch_shape(q, 1));
  // A 0-d end of the range serves every batch (expand_batch).
  const bool one_minimum = minimum.numel() == 1, one_maximum = maximum.numel() == 1;
  STD_TORCH_CHECK(
      (one_minimum || minimum.numel() == groups) && (one_maximum || maximum.numel() == groups),
      "cfl_ops.dequantize: the ranges do not fit the symbols");
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

Tensor huffman_encode_op(const Tensor& strided, std::vector<int64_t> shape, int64_t chunk_log2,
                         int64_t reserve) {
  const Tensor symbols = torch::stable::contiguous(strided);
  Tensor buffer;
  const int64_t size =
      encode_payload(symbols.data_ptr(), symbol_size(symbols), symbols.numel(), shape.data(),
                     static_cast<int64_t>(shape.size()), static_cast<int>(chunk_log2), kernel(),
                     threads(), [&](int64_t bytes) {
                       buffer = empty_cpu({reserve + bytes}, ScalarType::Byte);
                       return static_cast<uint8_t*>(buffer.data_ptr()) + reserve;
                     });
  STD_TORCH_CHECK(size >= 0, "cfl_ops.huffman_encode: no code could be built");
  std::memset(buffer.data_ptr(), 0, reserve);
  return torch::stable::narrow(buffer, 0, 0, reserve + size);
}

Tensor info_of(int64_t code) {
  Tensor info = empty_cpu({}, ScalarType::Long);
  *static_cast<int64_t*>(info.data_ptr()) = code;
  return info;
}

// (code, bytes of a symbol, log2 of a chunk, elements, dimensions, 64 extents): see codec.py.
Tensor payload_header_op(const Tensor& strided) {
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

Tensor huffman_decode_op(const Tensor& strided, Tensor out, int64_t start) {
  const Tensor payload = torch::stable::contiguous(strided);
  STD_TORCH_CHECK(out.is_contiguous(), "cfl_ops.huffman_decode: out must be contiguous");
  return info_of(decode_payload(static_cast<const uint8_t*>(payload.data_ptr()), payload.numel(),
                                start, out.numel(), out.data_ptr(), symbol_size(out), nullptr,
                                kernel(), threads()));
}

Tensor decompress_op(const Tensor& strided, const Tensor& minimum_in, const Tensor& maximum_in,
                     int64_t bits, int64_t group_size, Tensor out, int64_t start) {
  const Tensor payload = torch::stable::contiguous(strided);
  const Tensor minimum = torch::stable::contiguous(minimum_in),
               maximum = torch::stable::contiguous(maximum_in);
  STD_TORCH_CHECK(out.is_contiguous(), "cfl_ops.decompress: out must be contiguous");
  const int64_t groups = minimum.numel();
  STD_TORCH_CHECK(group_size > 0 && maximum.numel() == groups, "cfl_ops.decompress: bad groups");
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
  m.impl("huffman_encode", TORCH_BOX(&cfl::codec::huffman_encode_op));
  m.impl("payload_header", TORCH_BOX(&cfl::codec::payload_header_op));
  m.impl("huffman_decode_", TORCH_BOX(&cfl::codec::huffman_decode_op));
  m.impl("decompress_", TORCH_BOX(&cfl::codec::decompress_op));
}
