// The codec's loops for any CPU.
#define CFL_CODEC_ISA 0
#include "cpu/codec_kernel_impl.h"

namespace cfl::codec {
const Kernel* kernel_generic() { return &kKernel; }
}  // namespace cfl::codec
