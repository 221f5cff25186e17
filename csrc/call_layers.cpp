// SPDX-License-Identifier: Apache-2.0
// Arguments are read, and results made, as objects of Python: pybind11's conversions of so many
// would take longer than a small step does.
#include "call_layers.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "scan_layers.h"
#include "straight.h"

namespace pyseq {

namespace {

using pybind11::dict;
using pybind11::handle;
using pybind11::list;
using pybind11::object;

// A tensor; none of a class of its own, which may have plans of its own for a call.
bool read(handle from, Tensor& to) {
  if (!THPVariable_CheckExact(from.ptr())) return false;
  to = THPVariable_Unpack(from.ptr());
  return true;
}

// The same or None.
bool read(handle from, OptionalTensor& to) { return from.is_none() || read(from, to.emplace()); }

// A state: None, a tensor, or a tuple of two or more. Of less a module has a word to say.
bool read(handle from, std::vector<Tensor>& to) {
  constexpr size_t kLeast = 2;
  if (from.is_none()) return true;
  if (!PyTuple_CheckExact(from.ptr())) return read(from, to.emplace_back());
  const auto parts = pybind11::reinterpret_borrow<pybind11::tuple>(from);
  if (parts.size() < kLeast) return false;
  to.reserve(parts.size());
  for (const handle part : parts) {
    if (!read(part, to.emplace_back())) return false;
  }
  return true;
}

// Whether the module makes what has this name each time that it is read, as a parametrization does.
bool makes(handle module, handle name) {
  return pybind11::hasattr(pybind11::type::handle_of(module), name);
}

// The weights of a layer or direction, as they are now: w_ih, w_hh, both biases or none, w_hr or
// not. Most are among the parameters; what is not (quantized, parametrized) the module gives. None
// is made where the operators will be called all the same, and it would be made once more.
bool read(handle module, const dict& parameters, const list& names, bool may_make,
          DirectionWeights& to) {
  constexpr size_t kBoth = 2;
  const size_t count = names.size(), biases = count / 2 * 2;
  OptionalTensor* const optional[] = {&to.b_ih, &to.b_hh};
  if (count < kBoth || biases > 2 * kBoth) return false;
  for (size_t i = 0; i < count; ++i) {
    const handle name = names[i];
    object weight =
        pybind11::reinterpret_borrow<object>(PyDict_GetItemWithError(parameters.ptr(), name.ptr()));
    if (!weight) {
      if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
      if (!may_make && makes(module, name)) return false;
      weight = module.attr(name);
    }
    const bool is_tensor = i == 0        ? read(weight, to.w_ih)
                           : i == 1      ? read(weight, to.w_hh)
                           : i >= biases ? read(weight, to.w_hr)
                                         : read(weight, *optional[i - kBoth]);
    if (!is_tensor) return false;
  }
  return true;
}

object wrapped(Tensor&& tensor) {
  return pybind11::reinterpret_steal<object>(THPVariable_Wrap(std::move(tensor)));
}

// Whether a call repays letting other threads of Python in, which takes as long as some thousand
// multiply-adds.
bool takes_long(const LayersInputs& in) {
  constexpr int64_t kShort = 1 << 18;  // multiply-adds: some microseconds
  int64_t weights = 0;
  for (const DirectionWeights& own : in.weights) weights += own.w_ih.numel() + own.w_hh.numel();
  const int64_t width = in.x.dim() == 0 ? 1 : std::max<int64_t>(1, in.x.size(-1));
  return in.x.numel() / width * weights > kShort;
}

// (output, h), (output, (h, c)) or None.
object call_scan_layers(handle module, const dict& parameters, const list& names, handle input,
                        handle hx, handle lengths, std::string_view cell, bool bidirectional,
                        bool batch_first, bool training) {
  LayersInputs in{.cell = cell,
                  .bidirectional = bidirectional,
                  .batch_first = batch_first,
                  .training = training};
  if (!read(input, in.x) || !read(hx, in.state) || !read(lengths, in.lengths)) {
    return pybind11::none();
  }
  const bool may_make =
      !at::GradMode::is_enabled() && StraightCall::is_open() && StraightCall().computes_in(in.x);
  in.weights.resize(names.size());
  for (size_t i = 0; i < in.weights.size(); ++i) {
    const auto own = names[i].cast<list>();
    if (!read(module, parameters, own, may_make, in.weights[i])) return pybind11::none();
  }
  std::optional<LayersResult> result;
  try {
    std::optional<pybind11::gil_scoped_release> without_gil;
    if (takes_long(in)) without_gil.emplace();
    result = scan_layers(in);
  } catch (const c10::Error&) {
    // A module has its own words for what the operators refuse.
    return pybind11::none();
  }
  if (!result.has_value()) return pybind11::none();
  object state = wrapped(std::move(result->h_n));
  if (result->c_n.defined()) {
    state = pybind11::make_tuple(std::move(state), wrapped(std::move(result->c_n)));
  }
  return pybind11::make_tuple(wrapped(std::move(result->y)), std::move(state));
}

}  // namespace

void define_scan_layers(pybind11::module_& m) {
  using pybind11::arg;
  m.def("scan_layers", &call_scan_layers, arg("module"), arg("parameters"), arg("names"),
        arg("input"), arg("hx"), arg("lengths"), arg("cell"), arg("bidirectional"),
        arg("batch_first"), arg("training"),
        "What a recurrent module of pyseq.nn returns, or None: see scan_layers.h.");
}

}  // namespace pyseq
