// SPDX-License-Identifier: Apache-2.0
#include "call_layers.h"

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "python_values.h"
#include "scan_layers.h"
#include "straight.h"

namespace pyseq {

namespace {

using pybind11::dict;
using pybind11::handle;
using pybind11::list;
using pybind11::object;

// The weights of a layer or direction, as they are now: w_ih, w_hh, both biases or none, w_hr or
// not. None is made where the operators will be called all the same, and it would be made once
// more.
bool read_weights(handle module, const dict& parameters, const list& names, bool may_make,
                  DirectionWeights& to) {
  constexpr size_t kBoth = 2;
  const size_t count = names.size(), biases = count / 2 * 2;
  OptionalTensor* const optional[] = {&to.b_ih, &to.b_hh};
  if (count < kBoth || biases > 2 * kBoth) return false;
  for (size_t i = 0; i < count; ++i) {
    const object weight = attribute_now(module, parameters, names[i], may_make);
    if (!weight) return false;
    const bool is_tensor = i == 0        ? read(weight, to.w_ih)
                           : i == 1      ? read(weight, to.w_hh)
                           : i >= biases ? read(weight, to.w_hr)
                                         : read(weight, *optional[i - kBoth]);
    if (!is_tensor) return false;
  }
  return true;
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
  if (!read_layers(module, parameters, names, may_make, in.weights)) return pybind11::none();
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

bool read_layers(handle module, const dict& parameters, const list& names, bool may_make,
                 std::vector<DirectionWeights>& to) {
  to.resize(names.size());
  for (size_t i = 0; i < to.size(); ++i) {
    const auto own = names[i].cast<list>();
    if (!read_weights(module, parameters, own, may_make, to[i])) return false;
  }
  return true;
}

void define_scan_layers(pybind11::module_& m) {
  using pybind11::arg;
  m.def("scan_layers", &call_scan_layers, arg("module"), arg("parameters"), arg("names"),
        arg("input"), arg("hx"), arg("lengths"), arg("cell"), arg("bidirectional"),
        arg("batch_first"), arg("training"),
        "What a recurrent module of pyseq.nn returns, or None: see scan_layers.h.");
}

}  // namespace pyseq
