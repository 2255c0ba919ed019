// Argument checks, choice of the instruction set, and the one parallel region of the Gram kernel.

#include "gram_kernel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "gram_kernel_isa.h"
#include "kept_memory.h"

#if defined(CFL_HAVE_X86_ISAS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cfl::cpu {
namespace {

using detail::Kernel;
using detail::Plan;

void* pack_scratch(size_t bytes) {
  thread_local KeptMemory memory;
  return memory.get<char>(bytes);
}

void* partial_scratch(size_t bytes) {
  thread_local KeptMemory memory;
  return memory.get<char>(bytes);
}

#if defined(CFL_HAVE_X86_ISAS)
// Linux asks each process to request the tile registers before their first use.
bool amx_allowed() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return detail::amx_compiled() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(CFL_HAVE_X86_ISAS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return amx_allowed() ? Isa::kAmx : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

Isa initial() {
  const char* asked = std::getenv("CFL_OPS_ISA");
  if (!asked || !*asked) return best_isa();
  std::string names;
  for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (std::strcmp(asked, isa_name(isa)) == 0) return std::min(isa, best_isa());
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("cfl_ops: CFL_OPS_ISA must be one of " + names + ", but got '" +
                              asked + "'");
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

const Kernel* kernel_for(const GramArgs& args) {
  switch (isa()) {
#if defined(CFL_HAVE_X86_ISAS)
    case Isa::kAmx:
      if (const Kernel* kernel = detail::kernel_amx(args)) return kernel;
      [[fallthrough]];
    case Isa::kAvx512:
      return detail::kernel_avx512(args);
    case Isa::kAvx2:
      return detail::kernel_avx2(args);
#endif
    default:
      return detail::kernel_generic(args);
  }
}

template <class T>
void scale(void* data, int64_t count, double beta) {
  T* out = static_cast<T*>(data);
  if (!out) return;
  if (beta == 0) {
    std::fill_n(out, count, T(0));
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] *= T(beta);
  }
}

template <class T>
void scale_outputs(const GramArgs& args) {
  const int64_t d1 = args.cols + (args.bias ? 1 : 0);
  scale<T>(args.gram, d1 * d1, args.beta);
  scale<T>(args.cross, d1 * args.targets, args.beta);
  scale<T>(args.target_sum, args.targets, args.beta);
  scale<T>(args.target_sq, args.targets, args.beta);
}

template <class T>
void write_stats(void* data, const double* stats, const Plan& plan) {
  T* out = static_cast<T*>(data);
  if (!out) return;
  const int64_t targets = plan.args.targets;
  for (int64_t k = 0; k < targets; ++k) {
    double sum = 0;
    for (int64_t g = 0; g < plan.row_groups; ++g) sum += stats[g * 2 * targets + k];
    const double old = plan.args.beta == 0 ? 0.0 : plan.args.beta * double(out[k]);
    out[k] = T(old + sum);
  }
}

// Less work than this (a few microseconds) is not worth a parallel region.
constexpr double kParallelProducts = 1e6;

struct Call {
  const Kernel* kernel;
  const Plan* plan;
};

void run_parts(int64_t begin, int64_t end, void* ctx) {
  const Call& call = *static_cast<const Call*>(ctx);
  for (int64_t part = begin; part < end; ++part) call.kernel->run(call.plan, part);
}

}  // namespace

const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { current().store(std::min(isa, best_isa()), std::memory_order_relaxed); }

int64_t gram(const GramArgs& args, ParallelFor parallel_for, int num_threads) {
  if (args.labels) {
    for (int64_t b = 0; b < args.rows; ++b) {
      const int64_t label = args.labels[b * args.label_stride];
      if (label < 0 || label >= args.targets) return b;
    }
  }
  const bool wide = args.acc_dtype == DType::kF64;
  if (args.rows == 0) {
    wide ? scale_outputs<double>(args) : scale_outputs<float>(args);
    return -1;
  }

  Plan plan{};
  plan.args = args;
  if (args.targets == 0) plan.args.y = nullptr, plan.args.labels = nullptr;
  plan.scratch = pack_scratch;
  const Kernel* kernel = kernel_for(args);
  const int64_t d1 = args.cols + (args.bias ? 1 : 0);
  const double products = double(args.rows + 1) * double(d1) * double(d1 + args.targets);
  const bool parallel = parallel_for && num_threads > 1 && products >= kParallelProducts;
  kernel->shape(&plan, parallel ? num_threads : 1);

  std::vector<detail::TilePos> band_begin(size_t(plan.bands + 1));
  std::vector<int> band_done(size_t(plan.bands), 0);
  std::vector<double> stats(size_t(plan.row_groups * 2 * args.targets), 0.0);
  plan.band_begin = band_begin.data();
  plan.band_done = band_done.data();
  plan.target_stats = stats.data();
  if (plan.row_groups > 1) {
    plan.partial =
        static_cast<char*>(partial_scratch(size_t(plan.row_groups - 1) * plan.partial_bytes));
  }
  kernel->cut(&plan);

  Call call{kernel, &plan};
  const int64_t parts = plan.row_groups * plan.bands;
  if (parts == 1) {
    run_parts(0, 1, &call);
  } else {
    parallel_for(0, parts, 1, run_parts, &call);
  }

  if (args.targets > 0) {
    const double* sums = plan.target_stats;
    const double* squares = sums + args.targets;
    if (wide) {
      write_stats<double>(args.target_sum, sums, plan);
      write_stats<double>(args.target_sq, squares, plan);
    } else {
      write_stats<float>(args.target_sum, sums, plan);
      write_stats<float>(args.target_sq, squares, plan);
    }
  }
  return -1;
}

}  // namespace cfl::cpu
