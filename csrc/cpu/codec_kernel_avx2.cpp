// The codec's loops for AVX2, BMI2 and carry-less multiplication; a stub where the compiler lacks
// the flags.
#if defined(__AVX2__) && defined(__BMI2__) && defined(__PCLMUL__)
#define CFL_CODEC_ISA 2
#include "cpu/codec_kernel_impl.h"

namespace cfl::codec {
const Kernel* kernel_avx2() { return &kKernel; }
}  // namespace cfl::codec
#else
#include "cpu/codec_kernel.h"

namespace cfl::codec {
const Kernel* kernel_avx2() { return nullptr; }
}  // namespace cfl::codec
#endif
