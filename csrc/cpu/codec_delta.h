// Deltas on the CPU: comparing, fingerprints, numbers in buckets, classes of the old exponent. The
// bytes are those of docs/format.md ("Delta"). No torch here, so that the fuzzer can feed the
// reader.
#pragma once

#include <cstdint>
#include <functional>

#include "cpu/codec_delta_kernel.h"
#include "cpu/codec_payload.h"

namespace cfl::codec {

// The one of the same instruction set.
const DeltaKernel* delta_kernel(const Kernel* kernel);

uint64_t fingerprint(const DeltaKernel* kernel, const uint8_t* data, int64_t bytes,
                     Threads threads);

// Where two tensors of n units differ. `allocate` is called once with their number, then filled
// is what it gave: positions, and what new and old hold there; nothing where there are more than
// `most`. sums: of the fingerprints of new and old, and the bits
// that differ anywhere.
int64_t find_changes(const DeltaKernel* kernel, int unit, const uint8_t* new_data,
                     const uint8_t* old_data, int64_t n, int64_t most, uint64_t* sums,
                     Threads threads, const std::function<Changes(int64_t)>& allocate);

// Numbers to symbols and raw bits (values are multiples of 2^shift). `allocate` gives the memory of
// the raw bits.
using Allocate = std::function<uint8_t*(int64_t)>;
void write_gaps(const DeltaKernel* kernel, const int64_t* positions, int64_t n, uint8_t* symbols,
                Threads threads, const Allocate& allocate);
void write_values(const DeltaKernel* kernel, int unit, const uint8_t* new_values,
                  const uint8_t* old_values, int64_t n, bool use_xor, int shift, uint8_t* symbols,
                  Threads threads, const Allocate& allocate);

// And back; false where the bytes contradict themselves or `limit` (positions are below it).
bool read_gaps(const DeltaKernel* kernel, const uint8_t* symbols, int64_t n, const uint8_t* raw,
               int64_t raw_bytes, int64_t limit, int64_t* positions, Threads threads);
// `old` holds n values, or with `positions` (checked by the caller) those are looked up in it.
bool read_values(const DeltaKernel* kernel, int unit, const uint8_t* old_data,
                 const int64_t* positions, const uint8_t* symbols, int64_t n, const uint8_t* raw,
                 int64_t raw_bytes, bool use_xor, int shift, uint8_t* values, Threads threads);

// The rank of each position (they rise) among the units of its class, sorted by class; order[i]:
// which position that was; counts: of each class. False where one has no class.
bool find_ranks(const DeltaKernel* kernel, int unit, const uint8_t* data, int64_t n,
                const uint8_t* map, const int64_t* positions, int64_t count, int64_t* ranks,
                int64_t* order, int64_t* counts);
// And back: counts[c] rising ranks for each class (checked by the caller). order sorts the
// positions. False where a class has fewer units.
bool find_places(const DeltaKernel* kernel, int unit, const uint8_t* data, int64_t n,
                 const uint8_t* map, int classes, const int64_t* counts, const int64_t* ranks,
                 int64_t* positions, int64_t* order);

// The elements of `values` sorted by the class of the old element beside them (what has none comes
// last), each class in its order; or with `back` from there to where they were. counts: of each.
void sort_by_class(int unit, const uint8_t* old_data, int64_t n, const uint8_t* map,
                   const uint8_t* values, bool back, uint8_t* out, int64_t* counts);

}  // namespace cfl::codec
