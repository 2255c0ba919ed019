// Deltas on the CPU: from tensors to codec_delta.h. Semantics: python/cfl_ops/ops/codec/changes.py.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/codec_checks.h"
#include "cpu/codec_delta.h"
#include "cpu/gram_kernel.h"
#include "cpu/tensor.h"

namespace cfl::codec {
namespace {

const DeltaKernel* kernel() {
  return delta_kernel(kernel_at_most(static_cast<int>(cfl::cpu::isa())));
}

Threads threads() {
  return {&cfl::parallel_for, static_cast<int64_t>(torch::stable::get_num_threads())};
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// A 1-d argument.
void check_line(Checked& check, const char* name, const Tensor& value, Dtypes dtypes) {
  check.flat(name, value, dtypes);
  check.that(value.dim() == 1, name, "must be 1-d, but has ", value.dim(), " dimensions");
}
void check_same_size(const Checked& check, const char* name, const Tensor& value,
                     const Tensor& other, const char* of) {
  check.that(value.numel() == other.numel(), name, "must have ", other.numel(), " elements as ", of,
             " has, but got ", value.numel());
}

// Where an op looks or writes: within n, and rising.
void check_positions(const Checked& check, const Tensor& positions, int64_t n) {
  const int64_t* at = data<const int64_t>(positions);
  const int64_t count = positions.numel();
  bool good = count == 0 || (at[0] >= 0 && at[count - 1] < n);
  for (int64_t i = 1; i < count; ++i) good &= at[i - 1] < at[i];
  check.that(good, "positions", "must rise and be within the ", n, " elements");
}

int unit_of(const Tensor& tensor) { return static_cast<int>(tensor.element_size()); }

Tensor scalar_of(int64_t value) {
  Tensor out = empty_cpu({}, ScalarType::Long);
  *data<int64_t>(out) = value;
  return out;
}

Tensor fingerprint_op(const Tensor& strided) {
  Checked check("fingerprint");
  check_bytes(check, "data", strided);
  const Tensor bytes = torch::stable::contiguous(strided);
  return scalar_of(static_cast<int64_t>(
      fingerprint(kernel(), data<const uint8_t>(bytes), bytes.numel(), threads())));
}

// A copy of bytes, in memory that is asked for in huge pages: fresh small ones cost three times
// what the copying does.
Tensor delta_copy_op(const Tensor& strided) {
  Checked check("delta_copy");
  check_bytes(check, "data", strided);
  const Tensor bytes = torch::stable::contiguous(strided);
  Tensor out = empty_cpu({bytes.numel()}, ScalarType::Byte);
  torch::stable::parallel_for(0, bytes.numel(), 1 << 22, [&](int64_t begin, int64_t end) {
    std::memcpy(data<uint8_t>(out) + begin, data<const uint8_t>(bytes) + begin,
                static_cast<size_t>(end - begin));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> delta_scan_op(const Tensor& strided_new,
                                                         const Tensor& strided_old, int64_t most) {
  Checked check("delta_scan");
  check_line(check, "new", strided_new, kUnits);
  check_line(check, "old", strided_old, dtype_of(strided_new));
  check_same_size(check, "old", strided_old, strided_new, "new");
  check.integer("most", most, 0);
  const Tensor now = torch::stable::contiguous(strided_new);
  const Tensor before = torch::stable::contiguous(strided_old);
  Tensor positions, new_values, old_values;
  Tensor facts = empty_cpu({4}, ScalarType::Long);
  uint64_t sums[3];
  const int64_t count =
      find_changes(kernel(), unit_of(now), data<const uint8_t>(now), data<const uint8_t>(before),
                   now.numel(), most, sums, threads(), [&](int64_t changes) {
                     positions = empty_cpu({changes}, ScalarType::Long);
                     new_values = empty_cpu({changes}, now.scalar_type());
                     old_values = empty_cpu({changes}, now.scalar_type());
                     return Changes{data<int64_t>(positions), data<uint8_t>(new_values),
                                    data<uint8_t>(old_values)};
                   });
  data<int64_t>(facts)[0] = count;
  data<int64_t>(facts)[1] = static_cast<int64_t>(sums[0]);
  data<int64_t>(facts)[2] = static_cast<int64_t>(sums[1]);
  data<int64_t>(facts)[3] = static_cast<int64_t>(sums[2]);
  return {positions, new_values, old_values, facts};
}

std::tuple<Tensor, Tensor> delta_gaps_op(const Tensor& strided) {
  Checked check("delta_gaps");
  check_line(check, "positions", strided, kInt64);
  const Tensor positions = torch::stable::contiguous(strided);
  const int64_t n = positions.numel();
  check_positions(check, positions, std::numeric_limits<int64_t>::max());
  const int64_t* at = data<const int64_t>(positions);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t gap = at[i] - (i ? at[i - 1] : -1) - 1;
    check.that(gap >> 34 == 0, "positions", "must be less than 2^34 apart, but two are ", gap);
  }
  Tensor symbols = empty_cpu({n}, ScalarType::Byte), raw;
  write_gaps(kernel(), at, n, data<uint8_t>(symbols), threads(), [&](int64_t bytes) {
    raw = empty_cpu({bytes}, ScalarType::Byte);
    return data<uint8_t>(raw);
  });
  return {symbols, raw};
}

void check_numbers(Checked& check, const Tensor& symbols, const Tensor& raw) {
  check_bytes(check, "symbols", symbols);
  check_bytes(check, "raw", raw);
}

std::tuple<Tensor, Tensor> delta_positions_op(const Tensor& strided, const Tensor& strided_raw,
                                              int64_t limit) {
  Checked check("delta_positions");
  check_numbers(check, strided, strided_raw);
  check.integer("limit", limit, 0);
  const Tensor symbols = torch::stable::contiguous(strided);
  const Tensor raw = torch::stable::contiguous(strided_raw);
  const int64_t n = symbols.numel();
  Tensor positions = empty_cpu({n}, ScalarType::Long);
  const bool good = read_gaps(kernel(), data<const uint8_t>(symbols), n, data<const uint8_t>(raw),
                              raw.numel(), limit, data<int64_t>(positions), threads());
  if (!good) std::fill_n(data<int64_t>(positions), n, 0);
  return {positions, scalar_of(good ? 0 : 1)};
}

std::tuple<Tensor, Tensor> delta_values_op(const Tensor& strided_new, const Tensor& strided_old,
                                           bool use_xor, int64_t shift) {
  Checked check("delta_values");
  check_line(check, "new", strided_new, kUnits);
  check_line(check, "old", strided_old, dtype_of(strided_new));
  check_same_size(check, "old", strided_old, strided_new, "new");
  check.integer("shift", shift, 0, 8 * unit_of(strided_new) - 1);
  const Tensor now = torch::stable::contiguous(strided_new);
  const Tensor before = torch::stable::contiguous(strided_old);
  Tensor symbols = empty_cpu({now.numel()}, ScalarType::Byte), raw;
  write_values(kernel(), unit_of(now), data<const uint8_t>(now), data<const uint8_t>(before),
               now.numel(), use_xor, static_cast<int>(shift), data<uint8_t>(symbols), threads(),
               [&](int64_t bytes) {
                 raw = empty_cpu({bytes}, ScalarType::Byte);
                 return data<uint8_t>(raw);
               });
  return {symbols, raw};
}

std::tuple<Tensor, Tensor> delta_patch_op(const Tensor& strided_old,
                                          const std::optional<Tensor>& strided_positions,
                                          const Tensor& strided, const Tensor& strided_raw,
                                          bool use_xor, int64_t shift) {
  Checked check("delta_patch");
  check_line(check, "old", strided_old, kUnits);
  if (strided_positions) check_line(check, "positions", *strided_positions, kInt64);
  check_numbers(check, strided, strided_raw);
  check.integer("shift", shift, 0, 8 * unit_of(strided_old) - 1);
  check_same_size(check, "symbols", strided, strided_positions ? *strided_positions : strided_old,
                  strided_positions ? "positions" : "old");
  const Tensor before = torch::stable::contiguous(strided_old);
  const Tensor symbols = torch::stable::contiguous(strided);
  const Tensor raw = torch::stable::contiguous(strided_raw);
  Tensor positions;
  if (strided_positions) {
    positions = torch::stable::contiguous(*strided_positions);
    check_positions(check, positions, before.numel());
  }
  const int64_t n = symbols.numel();
  Tensor values = empty_cpu({n}, before.scalar_type());
  const bool good =
      read_values(kernel(), unit_of(before), data<const uint8_t>(before),
                  strided_positions ? data<const int64_t>(positions) : nullptr,
                  data<const uint8_t>(symbols), n, data<const uint8_t>(raw), raw.numel(), use_xor,
                  static_cast<int>(shift), data<uint8_t>(values), threads());
  if (!good) std::fill_n(data<uint8_t>(values), n * unit_of(before), uint8_t{0});
  return {values, scalar_of(good ? 0 : 1)};
}

void check_values_at(Checked& check, const Tensor& of, const Tensor& positions,
                     const Tensor& values) {
  check_line(check, "positions", positions, kInt64);
  check_line(check, "values", values, dtype_of(of));
  check_same_size(check, "values", values, positions, "positions");
}

Tensor delta_shift_op(const Tensor& strided_old, const Tensor& strided_positions,
                      const Tensor& strided_values) {
  Checked check("delta_shift");
  check_line(check, "old", strided_old, kUnits);
  check_values_at(check, strided_old, strided_positions, strided_values);
  const Tensor before = torch::stable::contiguous(strided_old);
  const Tensor positions = torch::stable::contiguous(strided_positions);
  const Tensor values = torch::stable::contiguous(strided_values);
  check_positions(check, positions, before.numel());
  return scalar_of(static_cast<int64_t>(kernel()->change(
      unit_of(before), data<const uint8_t>(before), before.numel() * unit_of(before),
      data<const int64_t>(positions), data<const uint8_t>(values), positions.numel())));
}

void delta_write_op(Tensor out, const Tensor& strided_positions, const Tensor& strided_values) {
  Checked check("delta_write_");
  check.flat("data", out, kUnits, true);
  check.contiguous();
  check.that(out.dim() == 1, "data", "must be 1-d, but has ", out.dim(), " dimensions");
  check_values_at(check, out, strided_positions, strided_values);
  check.apart();
  const Tensor positions = torch::stable::contiguous(strided_positions);
  const Tensor values = torch::stable::contiguous(strided_values);
  check_positions(check, positions, out.numel());
  auto put = [&](auto zero) {
    using T = decltype(zero);
    const int64_t* at = data<const int64_t>(positions);
    const T* from = data<const T>(values);
    T* to = data<T>(out);
    const int64_t n = positions.numel(), last = n - 1;
    for (int64_t i = 0; i < n; ++i) {
      __builtin_prefetch(to + at[std::min(i + 48, last)], 1);
      to[at[i]] = from[i];
    }
  };
  switch (unit_of(out)) {
    case 1:
      return put(uint8_t{0});
    case 2:
      return put(uint16_t{0});
    case 4:
      return put(uint32_t{0});
    default:
      return put(uint64_t{0});
  }
}

void check_classes(Checked& check, const Tensor& old_data, const Tensor& classes) {
  check_line(check, "old", old_data, kUnits);
  check_bytes(check, "classes", classes);
  check.that(classes.numel() == 256, "classes", "must be one for each of 256 contexts, but got ",
             classes.numel());
}

std::tuple<Tensor, Tensor, Tensor> delta_ranks_op(const Tensor& strided_old,
                                                  const Tensor& strided_classes,
                                                  const Tensor& strided_positions) {
  Checked check("delta_ranks");
  check_classes(check, strided_old, strided_classes);
  check_line(check, "positions", strided_positions, kInt64);
  const Tensor before = torch::stable::contiguous(strided_old);
  const Tensor classes = torch::stable::contiguous(strided_classes);
  const Tensor positions = torch::stable::contiguous(strided_positions);
  check_positions(check, positions, before.numel());
  const int64_t n = positions.numel();
  Tensor ranks = empty_cpu({n}, ScalarType::Long), order = empty_cpu({n}, ScalarType::Long);
  Tensor counts = empty_cpu({kMaxClasses}, ScalarType::Long);
  const bool good =
      find_ranks(kernel(), unit_of(before), data<const uint8_t>(before), before.numel(),
                 data<const uint8_t>(classes), data<const int64_t>(positions), n,
                 data<int64_t>(ranks), data<int64_t>(order), data<int64_t>(counts));
  check.that(good, "classes", "must be from 0 to 15 for every element that changes");
  return {ranks, order, counts};
}

std::tuple<Tensor, Tensor> delta_sort_op(const Tensor& strided_old, const Tensor& strided_classes,
                                         const Tensor& strided_values, bool back) {
  Checked check("delta_sort");
  check_classes(check, strided_old, strided_classes);
  check_line(check, "values", strided_values, dtype_of(strided_old));
  check_same_size(check, "values", strided_values, strided_old, "old");
  const Tensor before = torch::stable::contiguous(strided_old);
  const Tensor classes = torch::stable::contiguous(strided_classes);
  const Tensor values = torch::stable::contiguous(strided_values);
  Tensor out = empty_cpu({values.numel()}, values.scalar_type());
  Tensor counts = empty_cpu({kMaxClasses}, ScalarType::Long);
  sort_by_class(unit_of(before), data<const uint8_t>(before), before.numel(),
                data<const uint8_t>(classes), data<const uint8_t>(values), back, data<uint8_t>(out),
                data<int64_t>(counts));
  return {out, counts};
}

std::tuple<Tensor, Tensor, Tensor> delta_places_op(const Tensor& strided_old,
                                                   const Tensor& strided_classes,
                                                   const Tensor& strided_ranks,
                                                   std::vector<int64_t> counts) {
  Checked check("delta_places");
  check_classes(check, strided_old, strided_classes);
  check_line(check, "ranks", strided_ranks, kInt64);
  const Tensor before = torch::stable::contiguous(strided_old);
  const Tensor classes = torch::stable::contiguous(strided_classes);
  const Tensor ranks = torch::stable::contiguous(strided_ranks);
  const int64_t n = ranks.numel();
  check.that(counts.size() <= kMaxClasses, "counts", "must be at most 16, but got ", counts.size());
  const int64_t* at = data<const int64_t>(ranks);
  int64_t sum = 0;
  for (int64_t count : counts) {
    check.that(count >= 0 && count <= n - sum, "counts", "must add up to the ", n, " ranks");
    bool good = true;
    for (int64_t i = 0; i < count; ++i) good &= at[sum + i] > (i ? at[sum + i - 1] : -1);
    check.that(good, "ranks", "must rise within each class");
    sum += count;
  }
  check.that(sum == n, "counts", "must add up to the ", n, " ranks, but got ", sum);
  Tensor positions = empty_cpu({n}, ScalarType::Long), order = empty_cpu({n}, ScalarType::Long);
  const bool good =
      find_places(kernel(), unit_of(before), data<const uint8_t>(before), before.numel(),
                  data<const uint8_t>(classes), static_cast<int>(counts.size()), counts.data(), at,
                  data<int64_t>(positions), data<int64_t>(order));
  if (!good) {
    std::fill_n(data<int64_t>(positions), n, 0);
    std::fill_n(data<int64_t>(order), n, 0);
  }
  return {positions, order, scalar_of(good ? 0 : 1)};
}

}  // namespace
}  // namespace cfl::codec

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) {
  m.impl("fingerprint", TORCH_BOX(&cfl::codec::fingerprint_op));
  m.impl("delta_copy", TORCH_BOX(&cfl::codec::delta_copy_op));
  m.impl("delta_scan", TORCH_BOX(&cfl::codec::delta_scan_op));
  m.impl("delta_gaps", TORCH_BOX(&cfl::codec::delta_gaps_op));
  m.impl("delta_positions", TORCH_BOX(&cfl::codec::delta_positions_op));
  m.impl("delta_values", TORCH_BOX(&cfl::codec::delta_values_op));
  m.impl("delta_patch", TORCH_BOX(&cfl::codec::delta_patch_op));
  m.impl("delta_shift", TORCH_BOX(&cfl::codec::delta_shift_op));
  m.impl("delta_write_", TORCH_BOX(&cfl::codec::delta_write_op));
  m.impl("delta_ranks", TORCH_BOX(&cfl::codec::delta_ranks_op));
  m.impl("delta_sort", TORCH_BOX(&cfl::codec::delta_sort_op));
  m.impl("delta_places", TORCH_BOX(&cfl::codec::delta_places_op));
}
