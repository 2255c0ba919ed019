// What the driver (gram_kernel.cpp) and the per-ISA kernels (gram_kernel_isa.cpp) share. Plain data
// only: an inline function here would be compiled for several ISAs under one name.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gram_kernel.h"

namespace cfl::cpu::detail {

// A place in the sequence of micro-tiles: column panel, then micro-row within the panel.
struct TilePos {
  int64_t panel;
  int64_t row;
};

// One call's work, cut into row_groups x bands parts. A band is a run of the micro-tile sequence;
// a row group is a range of the samples. Groups after the first accumulate into `partial`.
struct Plan {
  GramArgs args;
  int64_t d1;             // output rows: cols + bias
  int64_t x_panels;       // column panels of the Gram part
  int64_t panels;         // ... plus those of dense targets
  int64_t early;          // columns by which the last Gram panel begins before its regular place
  int64_t early_targets;  // likewise for the last panel of the targets
  bool whole;             // compute both triangles (very few rows)
  int64_t row_groups;
  int64_t bands;
  TilePos* band_begin;  // bands + 1 places
  char* partial;        // row_groups - 1 buffers of partial_bytes
  size_t partial_bytes;
  double* target_stats;            // row_groups x 2 x K: sums, then sums of squares
  int* band_done;                  // per band: how many row groups have finished
  void* (*scratch)(size_t bytes);  // 64-byte aligned memory of the calling thread
};

struct Kernel {
  // Decides row_groups and bands (both at most threads), x_panels and panels.
  void (*shape)(Plan* plan, int64_t threads);
  // Fills band_begin.
  void (*cut)(Plan* plan);
  // Runs one part.
  void (*run)(const Plan* plan, int64_t part);
};

// Null where the input is not served by that ISA's file.
const Kernel* kernel_generic(const GramArgs& args);
const Kernel* kernel_avx2(const GramArgs& args);
const Kernel* kernel_avx512(const GramArgs& args);
const Kernel* kernel_amx(const GramArgs& args);
bool amx_compiled();  // whether the compiler was given the AMX flags

}  // namespace cfl::cpu::detail
