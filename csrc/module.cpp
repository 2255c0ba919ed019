// The module cfl_ops._C: importing it registers the kernels; its functions tell how it was built.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/blas.h"
#include "cpu/gram_kernel.h"
#include "cpu/tensor.h"

namespace py = pybind11;

namespace {

// _core/dispatch.py looks for these words in the file of an extension that cannot be loaded.
constexpr char kBuiltWith[] = "built with torch " CFL_OPS_TORCH_BUILD;

py::dict build_info() {
  py::dict info;
  info["version"] = CFL_OPS_VERSION;
  info["built with torch"] = std::string(kBuiltWith).substr(sizeof("built with torch ") - 1);
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["ISA"] = cfl::cpu::isa_name(cfl::cpu::isa());
#ifdef CFL_OPS_WITH_CUDA
  info["CUDA kernels"] = "linked";
#else
  info["CUDA kernels"] = "not linked";
#endif
  info["BLAS"] = cfl::cpu::blas_available() ? "torch's" : "not found";
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of cfl_ops.";
  cfl::cpu::isa();  // raises for a CFL_OPS_ISA that there is not
  py::list names;
  for (const char* name : cfl::cpu::kIsaNames) names.append(name);
  m.attr("isa_names") = py::tuple(names);
  m.def("build_info", &build_info, "How this extension was built and what it found, as a dict.");
  m.def(
      "poison_fresh_memory", [](bool on) { cfl::poison_fresh_memory = on; },
      "For tests: fill fresh outputs with NaN, so that an unwritten element shows.");
  m.def(
      "set_isa", [](int isa) { cfl::cpu::set_isa(static_cast<cfl::cpu::Isa>(isa)); },
      "For tests: use an instruction set below the best one (0 generic, 1 AVX2, 2 AVX-512, 3 "
      "AMX).");
  m.def(
      "best_isa", [] { return static_cast<int>(cfl::cpu::best_isa()); },
      "The best instruction set that this machine and this build have.");
}
