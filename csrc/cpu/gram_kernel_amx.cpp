// The bfloat16 Gram kernel on AMX tile registers; "not available" unless compiled with their flags.

#if defined(__AMX_BF16__) && defined(__AVX512BW__)
#define CFL_ISA_AMX
#include "gram_kernel_isa.cpp"
#else

#include "gram_kernel_isa.h"

namespace cfl::cpu::detail {

bool amx_compiled() { return false; }
const Kernel* kernel_amx(const GramArgs&) { return nullptr; }

}  // namespace cfl::cpu::detail

#endif
