// SPDX-License-Identifier: Apache-2.0
// What the autograd Functions share. They call the operators through the dispatcher, so that
// tracing (torch.compile) sees those and not what is inside them.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <initializer_list>

#include "autograd.h"
#include "dispatcher.h"
#include "second_order.h"
#include "widened.h"

namespace pyseq::autograd {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

inline OptionalTensor given(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

// Whether autograd has to record the call. A tangent of forward mode would be dropped without
// a word, so it is refused.
inline bool needs_grad(const char* name, std::initializer_list<const OptionalTensor*> tensors,
                       at::TensorList more = {}) {
  bool needed = false;
  const auto look = [&](const Tensor& tensor) {
    TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(), "pyseq::", name,
                                " has no forward-mode derivative, only a backward one");
    needed = needed || tensor.requires_grad();
  };
  for (const OptionalTensor* tensor : tensors) {
    if (tensor->has_value()) look(**tensor);
  }
  for (const Tensor& tensor : more) look(tensor);
  return needed && at::GradMode::is_enabled();
}

// A gradient that belongs to an optional argument.
inline Tensor if_given(bool present, const Tensor& gradient) {
  return present ? gradient : Tensor();
}

// The gradient of a result that not every call has a use for.
inline OptionalTensor if_used(const c10::IValue& used, const Tensor& gradient) {
  return used.toBool() ? given(gradient) : std::nullopt;
}

}  // namespace pyseq::autograd
