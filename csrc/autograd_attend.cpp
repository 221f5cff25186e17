// SPDX-License-Identifier: Apache-2.0
// The autograd Functions Attend and AttendHistory.
#include <string>

#include "autograd_common.h"

namespace pyseq::autograd {

namespace {

struct Attend : Function<Attend> {
  static variable_list forward(AutogradContext* context, const Tensor& query, const Tensor& keys,
                               const Tensor& memory, const OptionalTensor& weight_v,
                               const OptionalTensor& lengths, std::string score,
                               const OptionalTensor& positions, int64_t window, int64_t heads,
                               const OptionalTensor& step, bool need_weights) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // Backward takes them, wanted or not, but of windows on the CPU.
    const bool keeps = need_weights || window == 0 || !query.is_cpu();
    static const auto op = find_operator<&pyseq::attend>("pyseq::attend");
    const auto [attended, attn] = op.call(query, keys, memory, weight_v, lengths, score, positions,
                                          window, heads, step, keeps);
    context->save_for_backward({query, keys, memory, or_undefined(weight_v), or_undefined(lengths),
                                keeps ? attn : Tensor(), or_undefined(positions),
                                or_undefined(step)});
    auto& options = context->saved_data;
    options["score"] = score;
    options["window"] = window;
    options["heads"] = heads;
    options["need_weights"] = need_weights;
    context->set_materialize_grads(false);
    if (need_weights) return {attended, attn};
    const Tensor unwanted = keeps ? attn.new_empty({0}) : attn;
    context->mark_non_differentiable({unwanted});
    return {attended, unwanted};
  }

  static variable_list backward(AutogradContext* context, variable_list d) {
    const variable_list saved = context->get_saved_variables();
    auto& options = context->saved_data;
    const OptionalTensor weight_v = given(saved[3]), positions = given(saved[6]),
                         step = given(saved[7]);
    variable_list result(11);
    {
      const at::NoGradGuard constant;
      static const auto op = find_operator<&attend_backward>("pyseq::attend_backward");
      const auto [d_query, d_keys, d_memory, d_weight_v, d_positions] =
          op.call(given(d[0]), if_used(options["need_weights"], d[1]), saved[0], saved[1], saved[2],
                  weight_v, given(saved[4]), given(saved[5]), options["score"].toStringView(),
                  positions, options["window"].toInt(), options["heads"].toInt(), step);
      result[0] = d_query;
      result[1] = d_keys;
      result[2] = d_memory;
      result[3] = if_given(weight_v.has_value(), d_weight_v);
      result[6] = if_given(positions.has_value(), d_positions);
    }
    return differentiable("attend", std::move(result), d, [&] {
      return torch::jit::Stack{saved[0],
                               saved[1],
                               saved[2],
                               weight_v,
                               given(saved[4]),
                               options["score"],
                               positions,
                               options["window"],
                               options["heads"],
                               step,
                               options["need_weights"]};
    });
  }
};

// Takes the arguments of the operator, in its order: `differentiable` finds the gradients by it.
struct AttendHistory : Function<AttendHistory> {
  static variable_list forward(AutogradContext* context, const Tensor& query, const Tensor& keys,
                               const Tensor& memory, const Tensor& weight_v,
                               const Tensor& weight_history, const OptionalTensor& lengths,
                               const OptionalTensor& past, const OptionalTensor& positions,
                               int64_t window, int64_t heads, const OptionalTensor& step,
                               std::string history, bool need_weights) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<&pyseq::attend_history>("pyseq::attend_history");
    // Backward takes the weights, wanted or not.
    const auto [attended, attn, past_n] =
        op.call(query, keys, memory, weight_v, weight_history, lengths, past, positions, window,
                heads, step, history, /*need_weights=*/true);
    context->save_for_backward({query, keys, memory, weight_v, weight_history,
                                or_undefined(lengths), or_undefined(past), or_undefined(positions),
                                or_undefined(step), attn});
    auto& options = context->saved_data;
    options["window"] = window;
    options["heads"] = heads;
    options["history"] = history;
    options["need_weights"] = need_weights;
    context->set_materialize_grads(false);
    if (need_weights) return {attended, attn, past_n};
    const Tensor unwanted = attn.new_empty({0});
    context->mark_non_differentiable({unwanted});
    return {attended, unwanted, past_n};
  }

  static variable_list backward(AutogradContext* context, variable_list d) {
    const variable_list saved = context->get_saved_variables();
    auto& options = context->saved_data;
    const Tensor &query = saved[0], &keys = saved[1], &memory = saved[2], &weight_v = saved[3],
                 &weight_history = saved[4], &attn = saved[9];
    const OptionalTensor lengths = given(saved[5]), past = given(saved[6]),
                         positions = given(saved[7]), step = given(saved[8]);
    variable_list result(13);
    {
      const at::NoGradGuard constant;
      static const auto op =
          find_operator<&attend_history_backward>("pyseq::attend_history_backward");
      const auto [d_query, d_keys, d_memory, d_weight_v, d_weight_history, d_past, d_positions] =
          op.call(given(d[0]), if_used(options["need_weights"], d[1]), given(d[2]), query, keys,
                  memory, weight_v, weight_history, lengths, past, attn, positions,
                  options["window"].toInt(), options["heads"].toInt(), step,
                  options["history"].toStringView());
      result[0] = d_query;
      result[1] = d_keys;
      result[2] = d_memory;
      result[3] = d_weight_v;
      result[4] = d_weight_history;
      result[6] = if_given(past.has_value(), d_past);
      result[7] = if_given(positions.has_value(), d_positions);
    }
    return differentiable("attend_history", std::move(result), d, [&] {
      return torch::jit::Stack{query,
                               keys,
                               memory,
                               weight_v,
                               weight_history,
                               lengths,
                               past,
                               positions,
                               options["window"],
                               options["heads"],
                               step,
                               options["history"],
                               options["need_weights"]};
    });
  }
};

}  // namespace

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& keys, const Tensor& memory,
                                  const OptionalTensor& weight_v, const OptionalTensor& lengths,
                                  std::string_view score, const OptionalTensor& positions,
                                  int64_t window, int64_t heads, const OptionalTensor& step,
                                  bool need_weights) {
  const OptionalTensor query_(query), keys_(keys), memory_(memory);
  if (!needs_grad("attend", {&query_, &keys_, &memory_, &weight_v, &positions})) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<&pyseq::attend>("pyseq::attend");
    return op.call(query, keys, memory, weight_v, lengths, score, positions, window, heads, step,
                   need_weights);
  }
  if (is_transformed()) {
    static const auto reference = find_operator<&pyseq::attend>("pyseq::attend_reference");
    return reference.call(query, keys, memory, weight_v, lengths, score, positions, window, heads,
                          step, need_weights);
  }
  const variable_list result =
      Attend::apply(query, keys, memory, weight_v, lengths, std::string(score), positions, window,
                    heads, step, need_weights);
  return {result[0], result[1]};
}

std::tuple<Tensor, Tensor, Tensor> attend_history(
    const Tensor& query, const Tensor& keys, const Tensor& memory, const Tensor& weight_v,
    const Tensor& weight_history, const OptionalTensor& lengths, const OptionalTensor& past,
    const OptionalTensor& positions, int64_t window, int64_t heads, const OptionalTensor& step,
    std::string_view history, bool need_weights) {
  const OptionalTensor query_(query), keys_(keys), memory_(memory), weight_v_(weight_v),
      weight_history_(weight_history);
  if (!needs_grad("attend_history",
                  {&query_, &keys_, &memory_, &weight_v_, &weight_history_, &past, &positions})) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<&pyseq::attend_history>("pyseq::attend_history");
    return op.call(query, keys, memory, weight_v, weight_history, lengths, past, positions, window,
                   heads, step, history, need_weights);
  }
  if (is_transformed()) {
    static const auto reference =
        find_operator<&pyseq::attend_history>("pyseq::attend_history_reference");
    return reference.call(query, keys, memory, weight_v, weight_history, lengths, past, positions,
                          window, heads, step, history, need_weights);
  }
  const variable_list result =
      AttendHistory::apply(query, keys, memory, weight_v, weight_history, lengths, past, positions,
                           window, heads, step, std::string(history), need_weights);
  return {result[0], result[1], result[2]};
}

}  // namespace pyseq::autograd
