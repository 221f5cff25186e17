// SPDX-License-Identifier: Apache-2.0
// Modules of which only the weights are wanted.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "python_values.h"

namespace pyseq {

// A weight, unless it would be made: those who have such weights are of classes of their own.
template <class To>
bool read_now(pybind11::handle module, const pybind11::dict& parameters, pybind11::handle name,
              To& to) {
  const pybind11::object weight = attribute_now(module, parameters, name, /*may_make=*/false);
  return weight && read(weight, to);
}

// Those of these names, in their order.
inline bool read_now(pybind11::handle module, const pybind11::dict& parameters,
                     const pybind11::list& names, std::vector<at::Tensor>& to) {
  to.resize(names.size());
  for (size_t i = 0; i < to.size(); ++i) {
    if (!read_now(module, parameters, names[i], to[i])) return false;
  }
  return true;
}

// A module of which only the weights are wanted: calling it would do no more than its class does.
class BareModule {
 public:
  explicit BareModule(pybind11::handle module)
      : module_(module), own_(module.attr("__dict__")), parameters_(own_["_parameters"]) {}

  bool is_bare() const {
    return !own_.contains("forward") && is_empty("_forward_hooks") &&
           is_empty("_forward_pre_hooks") && is_empty("_backward_hooks") &&
           is_empty("_backward_pre_hooks");
  }
  template <class To>
  bool read_weight(const char* name, To& to) const {
    return read_now(module_, parameters_, pybind11::str(name), to);
  }
  bool read_weights(const pybind11::list& names, std::vector<at::Tensor>& to) const {
    return read_now(module_, parameters_, names, to);
  }
  const pybind11::dict& parameters() const { return parameters_; }

 private:
  bool is_empty(const char* name) const {
    return PyObject_Size(pybind11::object(own_[name]).ptr()) == 0;
  }

  pybind11::handle module_;
  pybind11::dict own_, parameters_;
};

}  // namespace pyseq
