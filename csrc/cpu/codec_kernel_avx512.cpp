// The codec's loops for AVX-512 with VBMI2 (Ice Lake, Zen 4 and later); a stub where the compiler
// lacks the flags.
#if defined(__AVX512VBMI2__) && defined(__VPCLMULQDQ__)
#define CFL_CODEC_ISA 512
#include "cpu/codec_kernel_impl.h"

namespace cfl::codec {
const Kernel* kernel_avx512() { return &kKernel; }
}  // namespace cfl::codec
#else
#include "cpu/codec_kernel.h"

namespace cfl::codec {
const Kernel* kernel_avx512() { return nullptr; }
}  // namespace cfl::codec
#endif
