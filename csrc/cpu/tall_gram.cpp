// tall_gram on the CPU: from tensors to the kernel of tall_gram.h, a run of rows to a thread.
// Semantics: python/cfl_ops/least_squares.py (the fallback).
#include "cpu/tall_gram.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/gram_kernel.h"
#include "cpu/tensor.h"

namespace cfl::cpu {
namespace {

using detail::TallGram;
using detail::TallGramKernel;

constexpr int64_t kRowsPerPart = 2048;

const TallGramKernel& kernel() {
  switch (isa()) {
#if defined(CFL_HAVE_X86_ISAS)
    case Isa::kAmx:
    case Isa::kAvx512:
      return *detail::tall_gram_avx512();
    case Isa::kAvx2:
      return *detail::tall_gram_avx2();
#endif
    default:
      return *detail::tall_gram_generic();
  }
}

void* scratch(size_t bytes) {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    memory.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    size = memory ? bytes : 0;
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

// A run of rows to each thread.
void sum_rows(const TallGram& args, int64_t rows, bool parallel) {
  const TallGramKernel& k = kernel();
  const size_t bytes = k.scratch_bytes(args.s, args.k);
  const int64_t numbers = args.s * (args.s + args.k);
  if (!parallel || rows <= 2 * kRowsPerPart || torch::stable::get_num_threads() == 1) {
    k.run(&args, 0, rows, scratch(bytes));
    return;
  }
  const int64_t parts = std::min<int64_t>(torch::stable::get_num_threads(), rows / kRowsPerPart);
  std::vector<double> sums(static_cast<size_t>(parts * numbers));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      TallGram mine = args;
      mine.gram = sums.data() + part * numbers;
      mine.cross = mine.gram + args.s * args.s;
      k.run(&mine, rows * part / parts, rows * (part + 1) / parts, scratch(bytes));
    }
  });
  for (int64_t i = 0; i < numbers; ++i) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += sums[part * numbers + i];
    (i < args.s * args.s ? args.gram[i] : args.cross[i - args.s * args.s]) = total;
  }
}

std::tuple<Tensor, Tensor> tall_gram(const Tensor& t, const std::optional<Tensor>& b,
                                     const std::optional<Tensor>& w) {
  const auto served = [](ScalarType dtype) { return dtype == ScalarType::Float || dtype == ScalarType::Double; };
  const Tensor x = served(t.scalar_type()) ? t : torch::stable::to(t, ScalarType::Float);
  const int64_t ndim = t.dim(), rows = t.size(ndim - 2);
  TallGram args;
  args.s = t.size(ndim - 1);
  args.wide = x.scalar_type() == ScalarType::Double;
  args.t_row_stride = x.stride(ndim - 2);
  args.t_col_stride = x.stride(ndim - 1);
  std::optional<Tensor> right, rotation;
  if (b) {
    right = b->scalar_type() == x.scalar_type() ? *b : torch::stable::to(*b, x.scalar_type());
    args.k = b->size(b->dim() - 1);
    args.b_row_stride = right->stride(b->dim() - 2);
    args.b_col_stride = right->stride(b->dim() - 1);
  }
  if (w) rotation = torch::stable::contiguous(*w);
  const Batched xs(x, 2);
  const Batched bs = right ? Batched(*right, 2) : Batched();
  const Batched ws = rotation ? Batched(*rotation, 2) : Batched();
  Tensor gram = empty_cpu(batch_shape(t, 2, {args.s, args.s}), ScalarType::Double);
  Tensor cross = empty_cpu(batch_shape(t, 2, {args.s, args.k}), ScalarType::Double);
  const int64_t batch = product(batch_shape(t, 2));
  auto one = [&](int64_t index, bool parallel) {
    TallGram mine = args;
    mine.t = xs.at(index);
    if (right) mine.b = bs.at(index);
    if (rotation) mine.w = ws.at<double>(index);
    mine.gram = static_cast<double*>(gram.data_ptr()) + index * args.s * args.s;
    mine.cross = static_cast<double*>(cross.data_ptr()) + index * args.s * args.k;
    sum_rows(mine, rows, parallel);
  };
  if (batch == 1) {
    one(0, true);
  } else {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) one(i, false);
    });
  }
  return {gram, cross};
}

}  // namespace
}  // namespace cfl::cpu

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) { m.impl("tall_gram", TORCH_BOX(&cfl::cpu::tall_gram)); }
