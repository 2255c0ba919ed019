// The loops of deltas for AVX-512 with VBMI; a stub where the compiler lacks the flags, as
// codec_kernel_avx512.cpp.
#include "cpu/codec_delta_kernel.h"

#if defined(__AVX512VBMI2__) && defined(__VPCLMULQDQ__)
#define CFL_CODEC_ISA 512
#include "cpu/codec_delta_impl.h"

namespace cfl::codec {
const DeltaKernel* delta_avx512() { return &kDelta; }
}  // namespace cfl::codec
#else
namespace cfl::codec {
const DeltaKernel* delta_avx512() { return nullptr; }
}  // namespace cfl::codec
#endif
