// What every binding, of the CPU and of CUDA, asks of its arguments before it takes a pointer.
//
//   Checked check("ridge_solve");
//   Size D{"D"}, K{"K"};
//   check.tensor("gram", gram, kFloats, {D, D});
//   check.tensor("cross", cross, kFloats, {D, K});
//   check.number("limit", limit, 0);
//
// says that gram is (..., D, D), and cross (..., D, K) with the same D and the same batch
// dimensions. What is right costs some ten nanoseconds a tensor and allocates nothing; what is not
// raises `cfl_ops.<op>: <argument> must ..., but got ...`. The layout is not asked for: torch sends
// a call with a tensor that is not strided to the Python fallback.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cfl {

using torch::stable::Tensor;

// A set of dtypes, by torch's codes for them.
struct Dtypes {
  uint64_t codes;
  Dtypes operator|(Dtypes other) const { return {codes | other.codes}; }
  bool has(int32_t code) const { return code >= 0 && code < 64 && (codes >> code & 1) != 0; }
};
inline Dtypes one_dtype(int32_t code) { return {code < 64 ? uint64_t{1} << code : 0}; }

inline const Dtypes kFloat16 = one_dtype(aoti_torch_dtype_float16());
inline const Dtypes kBFloat16 = one_dtype(aoti_torch_dtype_bfloat16());
inline const Dtypes kFloat32 = one_dtype(aoti_torch_dtype_float32());
inline const Dtypes kFloat64 = one_dtype(aoti_torch_dtype_float64());
inline const Dtypes kUInt8 = one_dtype(aoti_torch_dtype_uint8());
inline const Dtypes kUInt16 = one_dtype(aoti_torch_dtype_uint16());
inline const Dtypes kInt16 = one_dtype(aoti_torch_dtype_int16());
inline const Dtypes kInt32 = one_dtype(aoti_torch_dtype_int32());
inline const Dtypes kInt64 = one_dtype(aoti_torch_dtype_int64());
inline const Dtypes kReals = kFloat32 | kFloat64;
inline const Dtypes kFloats = kFloat16 | kBFloat16 | kReals;
inline const Dtypes kSymbols = kUInt8 | kUInt16;
inline const Dtypes kUnits = kUInt8 | kInt16 | kInt32 | kInt64;

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}
inline Dtypes dtype_of(const Tensor& tensor) { return one_dtype(dtype_code(tensor)); }

// a * b of sizes; a product that no int64 holds would lead to a small allocation.
inline int64_t times(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result)) {
    throw std::runtime_error("cfl_ops: the product of the sizes must be less than 2^63");
  }
  return result;
}

// A size that several arguments share; the first that has it says what it is, where it is not
// given.
struct Size {
  const char* name;
  int64_t value = -1;
  const char* argument = nullptr;
};
struct Dim {
  Size* size;
  Dim(Size& shared) : size(&shared) {}  // implicit, for lists of them
};

// Where the elements of an argument are.
struct View {
  const char* name;
  AtenTensorHandle handle;
  const int64_t *sizes, *strides;
  int64_t ndim, element;
  bool written;

  bool empty() const {
    return std::any_of(sizes, sizes + ndim, [](int64_t n) { return n == 0; });
  }
  bool dense() const {
    int64_t expected = 1;
    for (int64_t i = ndim - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }
  // Bytes from the first element to the end of the last one; 0 where there is none.
  int64_t extent() const {
    int64_t last = 0;
    for (int64_t i = 0; i < ndim; ++i) {
      if (sizes[i] == 0) return 0;
      last += (sizes[i] - 1) * strides[i];
    }
    return (last + 1) * element;
  }
  // Addresses of the first element and of the end of the last one; twice 0 where there is none.
  std::pair<int64_t, int64_t> span() const {
    const int64_t bytes = extent();
    if (bytes == 0) return {0, 0};
    void* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    const auto begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
    return {begin, begin + bytes};
  }
};

// Whether arguments share memory. Most are told apart by where they begin and end; the rest by
// arithmetic; what is left element by element.
class Memory {
 public:
  using Span = std::pair<int64_t, int64_t>;

  static bool shares_within(const View& v, Span span) {
    const int64_t bytes = span.second - span.first;
    if (bytes == 0 || v.dense()) return false;
    std::array<int64_t, 64> order;
    int64_t dims = 0;
    for (int64_t i = 0; i < v.ndim; ++i) {
      if (v.sizes[i] == 1) continue;
      if (v.strides[i] == 0) return true;
      int64_t at = dims++;
      for (; at > 0 && v.strides[order[at - 1]] > v.strides[i]; --at) order[at] = order[at - 1];
      order[at] = i;
    }
    int64_t reach = 0;
    bool nested = true;
    for (int64_t k = 0; k < dims; ++k) {
      nested = nested && v.strides[order[k]] > reach;
      reach += (v.sizes[order[k]] - 1) * v.strides[order[k]];
    }
    if (nested) return false;
    const Elements elements(v);
    if (elements.count > bytes / v.element) return true;
    std::vector<bool> seen(static_cast<size_t>(bytes));
    return elements.any([&](int64_t at) {
      const bool twice = seen[at];
      seen[at] = true;
      return twice;
    });
  }

  // Of arguments whose spans meet.
  static bool shared(const View& a, Span of_a, const View& b, Span of_b) {
    const auto [a0, a1] = of_a;
    const auto [b0, b1] = of_b;
    for (int64_t i = 0; i < a.ndim; ++i) {
      if (a.sizes[i] > 1 && interleaved(a, b, b0 - a0, a.strides[i] * a.element)) return false;
    }
    const Elements in_a(a), in_b(b);
    // So many would take long; as they meet themselves so often, they hardly miss one another.
    if (in_a.count > a1 - a0 || in_b.count > b1 - b0) return true;
    const int64_t first = std::max(a0, b0), size = std::min(a1, b1) - first;
    std::vector<bool> taken(static_cast<size_t>(size));
    auto bytes = [&](const Elements& elements, int64_t start, int64_t width, auto see) {
      return elements.any([&](int64_t at) {
        for (int64_t byte = 0; byte < width; ++byte) {
          const int64_t place = start + at + byte - first;
          if (place >= 0 && place < size && see(place)) return true;
        }
        return false;
      });
    };
    bytes(in_a, a0, a.element, [&](int64_t place) {
      taken[place] = true;
      return false;
    });
    return bytes(in_b, b0, b.element, [&](int64_t place) { return bool(taken[place]); });
  }

 private:
  // The places of the elements in bytes, those of an expanded dimension once.
  struct Elements {
    std::array<int64_t, 64> sizes, strides;
    int64_t ndim = 0, count = 1;

    explicit Elements(const View& v) {
      for (int64_t i = 0; i < v.ndim; ++i) {
        if (v.sizes[i] == 1 || v.strides[i] == 0) continue;
        sizes[ndim] = v.sizes[i];
        strides[ndim++] = v.strides[i] * v.element;
        if (__builtin_mul_overflow(count, v.sizes[i], &count)) {
          count = std::numeric_limits<int64_t>::max();
        }
      }
    }
    template <class See>
    bool any(See see) const {
      std::array<int64_t, 64> index{};
      for (int64_t at = 0;;) {
        if (see(at)) return true;
        int64_t i = ndim - 1;
        for (; i >= 0 && ++index[i] == sizes[i]; --i) {
          at -= (sizes[i] - 1) * strides[i];
          index[i] = 0;
        }
        if (i < 0) return false;
        at += strides[i];
      }
    }
  };

  // Whether rows of `period` bytes hold the elements of a and of b in different places, as those of
  // the views w[:, :-1] and w[:, -1] of one matrix.
  static bool interleaved(const View& a, const View& b, int64_t apart, int64_t period) {
    const int64_t a_bytes = within(a, period), b_bytes = within(b, period);
    const int64_t from = (apart % period + period) % period;
    return a_bytes <= from && from + b_bytes <= period;
  }
  static int64_t within(const View& v, int64_t period) {
    int64_t bytes = v.element;
    for (int64_t i = 0; i < v.ndim; ++i) {
      const int64_t stride = v.strides[i] * v.element;
      if (v.sizes[i] > 1 && stride % period != 0) bytes += (v.sizes[i] - 1) * stride;
    }
    return bytes;
  }
};

class Checked {
 public:
  explicit Checked(const char* op) : op_(op) {}

  // (..., *dims), with the batch dimensions of the first argument.
  void tensor(const char* name, const Tensor& value, Dtypes dtypes,
              std::initializer_list<Dim> dims) {
    look(name, value, dtypes, dims, false, false);
  }
  void tensor(const char* name, const std::optional<Tensor>& value, Dtypes dtypes,
              std::initializer_list<Dim> dims) {
    if (value) look(name, *value, dtypes, dims, false, false);
  }
  // A number for each batch, or one (0-d) for all of them.
  void scalar(const char* name, const Tensor& value, Dtypes dtypes) {
    look(name, value, dtypes, {}, false, true);
  }
  void scalar(const char* name, const std::optional<Tensor>& value, Dtypes dtypes) {
    if (value) look(name, *value, dtypes, {}, false, true);
  }
  // As tensor(), of an argument that the op writes to; apart() then asks what it overlaps.
  void written(const char* name, const Tensor& value, Dtypes dtypes,
               std::initializer_list<Dim> dims) {
    look(name, value, dtypes, dims, true, false);
  }
  void written(const char* name, const std::optional<Tensor>& value, Dtypes dtypes,
               std::initializer_list<Dim> dims) {
    if (value) look(name, *value, dtypes, dims, true, false);
  }
  // One of any number of dimensions, which shares none with the others.
  void flat(const char* name, const Tensor& value, Dtypes dtypes, bool is_written = false) {
    note(name, value, dtypes, is_written);
  }

  // After all tensors: what is written shares no memory with itself or another argument.
  void apart() const {
    std::array<Memory::Span, kMostTensors> spans;
    for (int i = 0; i < count_; ++i) spans[i] = views_[i].span();
    for (int i = 0; i < count_; ++i) {
      const View& view = views_[i];
      if (!view.written) continue;
      if (Memory::shares_within(view, spans[i])) {
        fail(view.name,
             "must not share memory between its elements, as it is written to, but got shape ",
             shape(view), " with strides ", list(view.strides, view.ndim));
      }
      for (int j = 0; j < count_; ++j) {
        if (spans[i].second <= spans[j].first || spans[j].second <= spans[i].first || i == j) {
          continue;
        }
        if (Memory::shared(view, spans[i], views_[j], spans[j])) {
          fail(
              view.name,
              "must not share memory with another argument, as it is written to, but got a view of "
              "that of ",
              views_[j].name);
        }
      }
    }
  }

  // The argument asked for last is contiguous, or all of them.
  void contiguous() const { contiguous(views_[count_ - 1]); }
  void all_contiguous() const {
    std::for_each(views_.begin(), views_.begin() + count_, [&](const View& v) { contiguous(v); });
  }
  Dtypes dtype(const char* name, torch::headeronly::ScalarType value, Dtypes dtypes) const {
    using torch::stable::detail::from, torch::stable::detail::to;
    const int32_t code = to<int32_t>(from(value));
    if (!dtypes.has(code)) must_be(name, dtypes, code);
    return one_dtype(code);
  }
  void integer(const char* name, int64_t value, int64_t least,
               int64_t most = std::numeric_limits<int64_t>::max()) const {
    if (value >= least && value <= most) return;
    if (most == std::numeric_limits<int64_t>::max()) {
      fail(name, "must be at least ", least, ", but got ", value);
    }
    fail(name, "must be from ", least, " to ", most, ", but got ", value);
  }
  void number(const char* name, double value,
              double least = -std::numeric_limits<double>::infinity()) const {
    if (std::isfinite(value) && value >= least) return;
    if (least == 0) fail(name, "must be finite and not negative, but got ", value);
    fail(name, "must be finite, but got ", value);
  }
  // Anything else: that(good, "y", "must be given where num_classes is, but got None").
  template <class... Words>
  void that(bool good, const char* name, const Words&... words) const {
    if (!good) fail(name, words...);
  }

  template <class... Words>
  [[noreturn, gnu::cold, gnu::noinline]] void fail(const char* name, const Words&... words) const {
    std::ostringstream out;
    out << "cfl_ops." << op_ << ": " << name << ' ';
    (out << ... << words);
    throw std::runtime_error(out.str());
  }

 private:
  void contiguous(const View& view) const {
    if (view.dense() || view.empty()) return;
    fail(view.name, "must be contiguous, but got shape ", shape(view), " with strides ",
         list(view.strides, view.ndim));
  }

  [[noreturn]] void must_be(const char* name, Dtypes dtypes, int32_t code) const {
    fail(name, "must be ", words(dtypes), ", but got ", words(one_dtype(code)));
  }

  static constexpr int kMostTensors = 16;

  const View& note(const char* name, const Tensor& value, Dtypes dtypes, bool is_written) {
    if (count_ == kMostTensors) fail(name, "is one tensor too many for csrc/checked.h");
    if (!value.defined()) fail(name, "must be a tensor, but got None");  // the dispatcher takes it
    View& view = views_[count_++];
    view.name = name;
    view.handle = value.get();
    view.written = is_written;
    int64_t *sizes, *strides;
    int32_t device, dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(view.handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(view.handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(view.handle, &view.ndim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(view.handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(view.handle, &device));
    view.sizes = sizes;
    view.strides = strides;
    view.element = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
    if (!dtypes.has(dtype)) must_be(name, dtypes, dtype);
    if (view.ndim > 64) fail(name, "must have at most 64 dimensions, but got ", view.ndim);
    // A storage can be resized under its tensors.
    int64_t held, offset;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(view.handle, &held));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(view.handle, &offset));
    const int64_t bytes = view.extent();
    if (bytes > 0 && offset * view.element + bytes > held) {
      fail(name, "must have memory for its shape ", shape(view), ", but its storage holds ", held,
           " bytes");
    }
    const bool cpu = device == aoti_torch_device_type_cpu();
    int32_t index = -1;
    if (!cpu) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(view.handle, &index));
    if (count_ == 1) {
      device_ = device;
      index_ = index;
    } else if (device != device_ || index != index_) {
      fail(name, "must be on the device of ", views_[0].name, ", but is not");
    }
    return view;
  }

  void look(const char* name, const Tensor& value, Dtypes dtypes, std::initializer_list<Dim> dims,
            bool is_written, bool serves_all) {
    const View& view = note(name, value, dtypes, is_written);
    const auto core = static_cast<int64_t>(dims.size());
    if (view.ndim < core) {
      fail(name, "must have at least ", core, core > 1 ? " dimensions" : " dimension",
           ", but got shape ", shape(view));
    }
    const int64_t batch = view.ndim - core;
    if (!batch_of_) {
      batch_of_ = name;
      batch_sizes_ = view.sizes;
      batch_ndim_ = batch;
    } else if (!(serves_all && view.ndim == 0) &&
               (batch != batch_ndim_ ||
                !std::equal(view.sizes, view.sizes + batch, batch_sizes_))) {
      fail(name, serves_all ? "must be 0-d or have the shape " : "must have the batch dimensions ",
           list(batch_sizes_, batch_ndim_), serves_all ? " of the batch of " : " of ", batch_of_,
           ", but got shape ", shape(view));
    }
    int64_t at = batch;
    for (const Dim& dim : dims) {
      const int64_t size = view.sizes[at++];
      if (dim.size->value < 0) {
        dim.size->value = size;
        dim.size->argument = name;
      } else if (size != dim.size->value) {
        const bool shared = dim.size->argument != nullptr;
        fail(name, "must have size ", dim.size->value, " in dimension ", at - 1 - view.ndim, " (",
             dim.size->name, shared ? " of " : "", shared ? dim.size->argument : "",
             "), but got shape ", shape(view));
      }
    }
  }

  static std::string list(const int64_t* values, int64_t count) {
    std::ostringstream out;
    out << '(';
    for (int64_t i = 0; i < count; ++i) out << values[i] << (i + 1 < count ? ", " : "");
    out << (count == 1 ? ",)" : ")");
    return out.str();
  }
  static std::string shape(const View& view) { return list(view.sizes, view.ndim); }

  static std::string words(Dtypes dtypes) {
    static const std::pair<Dtypes, const char*> kNames[] = {
        {kFloat16, "float16"},
        {kBFloat16, "bfloat16"},
        {kFloat32, "float32"},
        {kFloat64, "float64"},
        {kUInt8, "uint8"},
        {kUInt16, "uint16"},
        {kInt16, "int16"},
        {kInt32, "int32"},
        {kInt64, "int64"},
        {one_dtype(aoti_torch_dtype_bool()), "bool"},
        {one_dtype(aoti_torch_dtype_complex64()), "complex64"},
        {one_dtype(aoti_torch_dtype_complex128()), "complex128"}};
    std::string all;
    for (const auto& [dtype, name] : kNames) {
      if (dtypes.codes & dtype.codes) all += (all.empty() ? "" : " or ") + std::string(name);
    }
    return all.empty() ? "another dtype" : all;
  }

  const char* op_;
  const char* batch_of_ = nullptr;
  const int64_t* batch_sizes_ = nullptr;
  int64_t batch_ndim_ = 0;
  int32_t device_ = 0, index_ = 0;
  int count_ = 0;
  std::array<View, kMostTensors> views_;
};

}  // namespace cfl
