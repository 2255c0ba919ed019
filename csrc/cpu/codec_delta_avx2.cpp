// The loops of deltas for AVX2; a stub where the compiler lacks the flags, as
// codec_kernel_avx2.cpp.
#include "cpu/codec_delta_kernel.h"

#if defined(__AVX2__) && defined(__BMI2__) && defined(__PCLMUL__)
#define CFL_CODEC_ISA 2
#include "cpu/codec_delta_impl.h"

namespace cfl::codec {
const DeltaKernel* delta_avx2() { return &kDelta; }
}  // namespace cfl::codec
#else
namespace cfl::codec {
const DeltaKernel* delta_avx2() { return nullptr; }
}  // namespace cfl::codec
#endif
