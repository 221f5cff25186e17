// SPDX-License-Identifier: Apache-2.0
// Arguments read, and results made, as objects of Python, for calls that are to be short:
// pybind11's conversions of so many would take longer than a small step does.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <utility>
#include <vector>

namespace pyseq {

// A tensor; none of a class of its own, which may have plans of its own for a call.
inline bool read(pybind11::handle from, at::Tensor& to) {
  if (!THPVariable_CheckExact(from.ptr())) return false;
  to = THPVariable_Unpack(from.ptr());
  return true;
}

// The same or None.
inline bool read(pybind11::handle from, std::optional<at::Tensor>& to) {
  return from.is_none() || read(from, to.emplace());
}

// A state: None, a tensor, or a tuple of two or more. Of less a module has a word to say.
inline bool read(pybind11::handle from, std::vector<at::Tensor>& to) {
  constexpr size_t kLeast = 2;
  if (from.is_none()) return true;
  if (!PyTuple_CheckExact(from.ptr())) return read(from, to.emplace_back());
  const auto parts = pybind11::reinterpret_borrow<pybind11::tuple>(from);
  if (parts.size() < kLeast) return false;
  to.reserve(parts.size());
  for (const pybind11::handle part : parts) {
    if (!read(part, to.emplace_back())) return false;
  }
  return true;
}

// What a module has of that name now. Most are among its parameters; what is not (quantized,
// parametrized) the module gives. Null where it would be made anew, as a parametrization does each
// time that it is read, and `may_make` is false.
inline pybind11::object attribute_now(pybind11::handle module, const pybind11::dict& parameters,
                                      pybind11::handle name, bool may_make) {
  PyObject* const parameter = PyDict_GetItemWithError(parameters.ptr(), name.ptr());
  if (parameter != nullptr) return pybind11::reinterpret_borrow<pybind11::object>(parameter);
  if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  const bool is_made = pybind11::hasattr(pybind11::type::handle_of(module), name);
  return is_made && !may_make ? pybind11::object() : pybind11::object(module.attr(name));
}

inline pybind11::object wrapped(at::Tensor&& tensor) {
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(tensor)));
}

}  // namespace pyseq
