// SPDX-License-Identifier: Apache-2.0
// The derivatives of what a fused backward made: by the operator's specification in plain torch,
// which transforms.py registers under the operator's name with `_reference` appended.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <functional>
#include <vector>

namespace pyseq::autograd {

// What a Function's backward returns: `made`, which has an undefined tensor for each argument (for
// each element of a list) without a gradient. Under create_graph the gradients depend on the
// `incoming` ones, those of the operator's outputs, and on its arguments, which are asked for
// then only, in the order of the schema.
std::vector<at::Tensor> differentiable(const char* op, std::vector<at::Tensor> made,
                                       const std::vector<at::Tensor>& incoming,
                                       const std::function<torch::jit::Stack()>& arguments);

}  // namespace pyseq::autograd
