// The loops of deltas for any CPU.
#include "cpu/codec_delta_kernel.h"

#define CFL_CODEC_ISA 0
#include "cpu/codec_delta_impl.h"

namespace cfl::codec {
const DeltaKernel* delta_generic() { return &kDelta; }
}  // namespace cfl::codec
