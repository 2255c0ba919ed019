// Lossless blobs on the CPU: from tensors to codec_lossless.h. Semantics:
// python/cfl_ops/ops/codec/lossless.py.
#include <cstring>
#include <vector>

#include "cpu/codec_checks.h"
#include "cpu/codec_lossless.h"
#include "cpu/gram_kernel.h"
#include "cpu/tensor.h"

namespace cfl::codec {
namespace {

const Kernel* kernel() { return kernel_at_most(static_cast<int>(cfl::cpu::isa())); }

Threads threads() {
  return {&cfl::parallel_for, static_cast<int64_t>(torch::stable::get_num_threads())};
}

Tensor lossless_encode_op(const Tensor& strided, int64_t dtype, std::vector<int64_t> shape) {
  Checked check("lossless_encode");
  check_bytes(check, "data", strided);
  check.integer("dtype", dtype, 0, kDtypes - 1);
  check.that(static_cast<int64_t>(shape.size()) <= kMaxDims, "shape", "must have at most ",
             kMaxDims, " dimensions, but got ", shape.size());
  const int64_t size = element_of(static_cast<int>(dtype)).size();
  int64_t numel = 1, bytes = 0;
  bool empty = false, fits = true;
  for (int64_t extent : shape) {
    check.that(extent >= 0, "shape", "must have no negative size, but got ", extent);
    empty |= extent == 0;
    fits &= extent == 0 || !__builtin_mul_overflow(numel, extent, &numel);
  }
  fits &= empty || !__builtin_mul_overflow(numel, size, &bytes);
  check.that(fits && strided.numel() == bytes, "shape", "must hold ", strided.numel(),
             " bytes in elements of ", size, ", but has another number of them");
  const Tensor data = torch::stable::contiguous(strided);
  Tensor buffer;
  const int64_t used =
      encode_lossless(static_cast<const uint8_t*>(data.data_ptr()), static_cast<int>(dtype), shape,
                      kernel(), threads(), [&](int64_t room, int64_t kept) {
                        Tensor larger = empty_cpu({room}, ScalarType::Byte);
                        if (kept) std::memcpy(larger.data_ptr(), buffer.data_ptr(), kept);
                        buffer = larger;
                        return static_cast<uint8_t*>(buffer.data_ptr());
                      });
  if (used == 0) return empty_cpu({0}, ScalarType::Byte);
  return torch::stable::narrow(buffer, 0, 0, used);
}

Tensor lossless_decode_op(const Tensor& strided, Tensor out, int64_t start) {
  Checked check("lossless_decode_");
  check_bytes(check, "blob", strided);
  check.flat("out", out, kUInt8, true);
  check.contiguous();
  check.apart();
  check.that(out.dim() == 1, "out", "must be 1-d, but has ", out.dim(), " dimensions");
  const Tensor blob = torch::stable::contiguous(strided);
  const auto* bytes = static_cast<const uint8_t*>(blob.data_ptr());
  Tensor info = empty_cpu({}, ScalarType::Long);
  // Of how many bytes an element is stands in the blob, which is checked before out is written to.
  int64_t size = 1;
  if (blob.numel() > 6 && bytes[6] < kDtypes) size = element_of(bytes[6]).size();
  int64_t code = kOutOfRange;
  Lossless found;
  if (out.numel() % size != 0) {
    code = parse_lossless(bytes, blob.numel(), &found, kernel());
    if (code == kGood) code = kOutOfRange;
  } else {
    code = decode_lossless(bytes, blob.numel(), start, out.numel() / size,
                           static_cast<uint8_t*>(out.data_ptr()), kernel(), threads());
  }
  *static_cast<int64_t*>(info.data_ptr()) = code;
  return info;
}

}  // namespace
}  // namespace cfl::codec

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) {
  m.impl("lossless_encode", TORCH_BOX(&cfl::codec::lossless_encode_op));
  m.impl("lossless_decode_", TORCH_BOX(&cfl::codec::lossless_decode_op));
}
