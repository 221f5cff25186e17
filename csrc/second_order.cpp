// SPDX-License-Identifier: Apache-2.0
#include "second_order.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <utility>
#include <vector>

#include "widened.h"

namespace pyseq::autograd {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using torch::jit::Stack;

// Puts `replace(tensor)` in the place of every tensor of a call, in the order of the gradients:
// one for each argument, undefined for what is none, and one for each element of a list.
template <class F>
void replace_tensors(Stack& arguments, const F& replace) {
  for (c10::IValue& argument : arguments) {
    if (argument.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& element : argument.toTensorVector()) list.push_back(replace(element));
      argument = std::move(list);
    } else if (argument.isTensor()) {
      argument = replace(argument.toTensor());
    } else {
      replace(Tensor());
    }
  }
}

// One call of an operator and its first derivative.
struct Derivative {
  const char* op;
  int64_t outputs;  // of the operator
  Stack options;    // the arguments without their tensors
  // Where the sources hold the gradient of each output, then each tensor of the call; or -1.
  std::vector<int64_t> where;
  variable_list made;           // the gradients that there are
  std::vector<int64_t> places;  // and which tensors of the call they belong to
};

// The gradients as a function of what they depend on, the sources. Forward hands on what the fused
// backward made; backward differentiates the specification twice.
struct Gradients : Function<Gradients> {
  static variable_list forward(AutogradContext* context, at::TensorList sources,
                               const Derivative& derivative) {
    context->save_for_backward(sources.vec());
    context->set_materialize_grads(false);
    auto& data = context->saved_data;
    data["op"] = std::string(derivative.op);
    data["outputs"] = derivative.outputs;
    data["where"] = derivative.where;
    data["places"] = derivative.places;
    c10::impl::GenericList options(c10::AnyType::get());
    for (const c10::IValue& option : derivative.options) options.push_back(option);
    data["options"] = options;
    return derivative.made;
  }

  static variable_list backward(AutogradContext* context, variable_list d) {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode recording(true);
    // The specification computes in the dtype of the inputs, wherever backward is called, but for
    // short types, which are too coarse for it.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    auto& data = context->saved_data;
    const int64_t count = data["outputs"].toInt();
    const std::vector<int64_t> where = data["where"].toIntVector();

    // Derivatives are taken with respect to aliases: each is what one argument alone is, even if
    // the same tensor was given for two, and what comes out still depends on the tensors.
    variable_list sources = context->get_saved_variables();
    variable_list leaves;
    for (Tensor& source : sources) {
      if (!source.requires_grad()) continue;
      source = source.view_as(source);
      leaves.push_back(source);
    }
    const auto at = [&](int64_t i) { return where[i] < 0 ? Tensor() : sources[where[i]]; };
    Stack stack = data["options"].toList().vec();
    int64_t next = count;
    replace_tensors(stack, [&](const Tensor&) { return at_least_float(at(next++)); });
    const c10::OperatorHandle reference = c10::Dispatcher::singleton().findSchemaOrThrow(
        ("pyseq::" + data["op"].toStringRef() + "_reference").c_str(), "");
    TORCH_INTERNAL_ASSERT(stack.size() == reference.schema().arguments().size());
    reference.callBoxed(stack);

    variable_list outputs, d_outputs, wanted, first, d_first;
    for (int64_t i = 0; i < count; ++i) {
      const Tensor output = stack[i].toTensor(), incoming = at_least_float(at(i));
      if (!incoming.defined() || !output.requires_grad()) continue;
      outputs.push_back(output);
      d_outputs.push_back(incoming);
    }
    for (const int64_t place : data["places"].toIntVector()) wanted.push_back(at(count + place));
    const variable_list gradients =
        torch::autograd::grad(outputs, wanted, d_outputs, /*retain_graph=*/true,
                              /*create_graph=*/true, /*allow_unused=*/true);
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (!d[i].defined() || !gradients[i].defined() || !gradients[i].requires_grad()) continue;
      first.push_back(gradients[i]);
      d_first.push_back(d[i]);
    }
    variable_list result(sources.size() + 1);  // and none for the Derivative
    if (first.empty()) return result;
    const variable_list second =
        torch::autograd::grad(first, leaves, d_first, /*retain_graph=*/create_graph, create_graph,
                              /*allow_unused=*/true);
    next = 0;
    for (size_t i = 0; i < sources.size(); ++i) {
      if (sources[i].requires_grad()) result[i] = second[next++];
    }
    return result;
  }
};

}  // namespace

variable_list differentiable(const char* op, variable_list made, const variable_list& incoming,
                             const std::function<Stack()>& arguments) {
  if (!at::GradMode::is_enabled()) return made;
  const size_t count = incoming.size();
  Derivative derivative{op, static_cast<int64_t>(count), arguments(), {}, {}, {}};
  variable_list sources, inputs;
  const auto add = [&](const Tensor& tensor) {
    derivative.where.push_back(tensor.defined() ? static_cast<int64_t>(sources.size()) : -1);
    if (tensor.defined()) sources.push_back(tensor);
  };
  for (const Tensor& gradient : incoming) add(gradient);
  replace_tensors(derivative.options, [&](const Tensor& tensor) {
    add(tensor);
    inputs.push_back(tensor);
    return Tensor();
  });
  for (size_t i = 0; i < made.size(); ++i) {
    if (!made[i].defined() || !inputs[i].requires_grad()) continue;
    derivative.made.push_back(made[i]);
    derivative.places.push_back(static_cast<int64_t>(i));
  }
  const variable_list tracked = Gradients::apply(at::TensorList(sources), derivative);
  for (size_t i = 0; i < tracked.size(); ++i) made[derivative.places[i]] = tracked[i];
  return made;
}

}  // namespace pyseq::autograd
