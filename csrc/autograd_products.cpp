// SPDX-License-Identifier: Apache-2.0
// The autograd Functions LinearCrossEntropy and Linear.
#include <ATen/TensorOperators.h>

#include <vector>

#include "autograd_common.h"
#include "loss.h"

namespace pyseq::autograd {

namespace {

struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  // The gradients for a gradient of 1 are made here, where the softmax is at hand; backward
  // only scales them.
  static Tensor forward(AutogradContext* context, const Tensor& hidden, const Tensor& weight,
                        const Tensor& target, const OptionalTensor& bias, int64_t ignore_index,
                        double label_smoothing) {
    const bool needs_hidden = hidden.requires_grad(), needs_weight = weight.requires_grad(),
               needs_bias = bias.has_value() && bias->requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op =
        find_operator<&linear_cross_entropy_forward>("pyseq::linear_cross_entropy_forward");
    const auto [loss, d_hidden, d_weight, d_bias] =
        op.call(hidden, weight, target, bias, ignore_index, label_smoothing, needs_hidden,
                needs_weight, needs_bias);
    // The last four only for a second differentiation.
    context->save_for_backward({needs_hidden ? d_hidden : Tensor(),
                                needs_weight ? d_weight : Tensor(), needs_bias ? d_bias : Tensor(),
                                hidden, weight, target, or_undefined(bias)});
    auto& options = context->saved_data;
    options["ignore_index"] = ignore_index;
    options["label_smoothing"] = label_smoothing;
    return loss;
  }

  static variable_list backward(AutogradContext* context, variable_list d) {
    const variable_list saved = context->get_saved_variables();
    variable_list result(6);
    {
      const at::NoGradGuard constant;
      const auto scaled = [&](const Tensor& gradient) {
        return gradient.defined() ? gradient * d[0] : gradient;
      };
      result[0] = scaled(saved[0]);
      result[1] = scaled(saved[1]);
      result[3] = scaled(saved[2]);
    }
    auto& options = context->saved_data;
    return differentiable("linear_cross_entropy", std::move(result), d, [&] {
      return torch::jit::Stack{saved[3],
                               saved[4],
                               saved[5],
                               given(saved[6]),
                               options["ignore_index"],
                               options["label_smoothing"]};
    });
  }
};

struct Linear : Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias) {
    context->save_for_backward({x, weight});
    context->saved_data["needs"] = std::vector<bool>{x.requires_grad(), weight.requires_grad(),
                                                     bias.has_value() && bias->requires_grad()};
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<&pyseq::linear>("pyseq::linear");
    return op.call(x, weight, bias);
  }

  // By the operator itself, so that it can be differentiated any number of times.
  static variable_list backward(AutogradContext* context, variable_list d) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const c10::List<bool> needs = context->saved_data["needs"].toBoolList();
    static const auto op = find_operator<&pyseq::linear>("pyseq::linear");
    variable_list result(3);
    const auto rows = [](const Tensor& t) {
      return t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2);
    };
    const Tensor d_rows = rows(d[0]).t();
    if (needs[0]) result[0] = op.call(d[0], weight.t(), std::nullopt);
    if (needs[1]) result[1] = op.call(d_rows, rows(x).t(), std::nullopt);
    if (needs[2]) result[2] = d_rows.sum(1);
    return result;
  }
};

}  // namespace

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                            const OptionalTensor& bias, int64_t ignore_index,
                            double label_smoothing) {
  const OptionalTensor hidden_(hidden), weight_(weight);
  if (!needs_grad("linear_cross_entropy", {&hidden_, &weight_, &bias})) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op =
        find_operator<&pyseq::linear_cross_entropy>("pyseq::linear_cross_entropy");
    return op.call(hidden, weight, target, bias, ignore_index, label_smoothing);
  }
  if (is_transformed()) {
    static const auto reference =
        find_operator<&pyseq::linear_cross_entropy>("pyseq::linear_cross_entropy_reference");
    return reference.call(hidden, weight, target, bias, ignore_index, label_smoothing);
  }
  return LinearCrossEntropy::apply(hidden, weight, target, bias, ignore_index, label_smoothing);
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const OptionalTensor x_(x), weight_(weight);
  if (!needs_grad("linear", {&x_, &weight_, &bias})) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<&pyseq::linear>("pyseq::linear");
    return op.call(x, weight, bias);
  }
  if (is_transformed()) {
    static const auto reference = find_operator<&pyseq::linear>("pyseq::linear_reference");
    return reference.call(x, weight, bias);
  }
  return Linear::apply(x, weight, bias);
}

}  // namespace pyseq::autograd
