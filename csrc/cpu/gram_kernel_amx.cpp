// The Gram kernel on bfloat16 tile registers. Null unless compiled with the AMX flags.

#include "gram_kernel_isa.h"

namespace cfl::cpu::detail {

bool amx_compiled() { return false; }
const Kernel* kernel_amx(const GramArgs&) { return nullptr; }

}  // namespace cfl::cpu::detail
