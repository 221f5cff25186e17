// SPDX-License-Identifier: Apache-2.0
#include "call_decoder.h"

#include <optional>
#include <string_view>
#include <utility>

#include "bare_module.h"
#include "decode_whole.h"
#include "python_values.h"

namespace pyseq {

namespace {

using pybind11::dict;
using pybind11::handle;
using pybind11::list;
using pybind11::object;
using pybind11::tuple;

// (hidden, feed) or what a decoder returns, without what only some have. Hidden is a pair where the
// cell has a c.
bool read_start(handle from, WholeInputs& to) {
  if (from.is_none()) return true;
  if (!PyTuple_Check(from.ptr())) return false;
  const auto parts = pybind11::reinterpret_borrow<tuple>(from);
  if (parts.size() < 2 || parts.size() > 3 || !(parts.size() == 2 || parts[2].is_none())) {
    return false;
  }
  const bool is_pair = PyTuple_Check(parts[0].ptr());
  return (parts[0].is_none() || is_pair == (to.cell == "lstm")) && read(parts[0], to.state) &&
         read(parts[1], to.feed);
}

// Whether a call repays letting other threads of Python in; see call_layers.cpp.
bool takes_long(const WholeInputs& in) {
  constexpr double kShort = 1 << 18;  // multiply-adds: some microseconds
  const double numbers = static_cast<double>(in.x.numel()) + static_cast<double>(in.memory.numel());
  return numbers * static_cast<double>(in.combine.numel()) > kShort;
}

// (output, weights, h or (h, c), feed) or None.
object call_decode_whole(handle module, const dict& parameters, const list& names, handle score,
                         handle combine, handle x, handle memory, handle keys, handle lengths,
                         handle state, std::string_view cell, std::string_view order,
                         std::string_view fed, int64_t heads, bool input_feeding, bool batch_first,
                         bool training, bool need_weights) {
  WholeInputs in{.cell = cell,
                 .order = order,
                 .fed = fed,
                 .heads = heads,
                 .feeding = input_feeding,
                 .batch_first = batch_first,
                 .training = training,
                 .need_weights = need_weights};
  const BareModule scoring(score), combining(combine);
  OptionalTensor weight, weight_memory;
  if (!scoring.is_bare() || !combining.is_bare() || !combining.read_weight("weight", in.combine) ||
      !scoring.read_weight("weight", weight) ||
      !scoring.read_weight("weight_memory", weight_memory) ||
      !scoring.read_weight("weight_query", in.weight_query) ||
      !scoring.read_weight("weight_v", in.weight_v) || !read(x, in.x) || !read(memory, in.memory) ||
      !read(keys, in.keys) || !read(lengths, in.lengths) || !read_start(state, in)) {
    return pybind11::none();
  }
  in.weight_keys = weight_memory.has_value() ? std::move(weight_memory) : std::move(weight);
  if (!read_now(module, parameters, names, in.layers)) return pybind11::none();
  std::optional<Decoded> result;
  try {
    std::optional<pybind11::gil_scoped_release> without_gil;
    if (takes_long(in)) without_gil.emplace();
    result = decode_whole(in);
  } catch (const c10::Error&) {
    // A module has its own words for what the operators refuse.
    return pybind11::none();
  }
  if (!result.has_value()) return pybind11::none();
  auto& [output, weights, h_n, c_n, feed_n, past_n] = *result;
  object last = wrapped(std::move(h_n));
  if (cell == "lstm") last = pybind11::make_tuple(std::move(last), wrapped(std::move(c_n)));
  object feed = wrapped(fed == "output" ? output.select(0, -1) : std::move(feed_n));
  return pybind11::make_tuple(wrapped(std::move(output)),
                              need_weights ? wrapped(std::move(weights)) : pybind11::none(),
                              std::move(last), std::move(feed));
}

}  // namespace

void define_decode_whole(pybind11::module_& m) {
  using pybind11::arg;
  m.def("decode_whole", &call_decode_whole, arg("module"), arg("parameters"), arg("names"),
        arg("score"), arg("combine"), arg("x"), arg("memory"), arg("keys"), arg("lengths"),
        arg("state"), arg("cell"), arg("order"), arg("fed"), arg("heads"), arg("input_feeding"),
        arg("batch_first"), arg("training"), arg("need_weights"),
        "What a decoder of pyseq.nn returns, or None: see decode_whole.h.");
}

}  // namespace pyseq
