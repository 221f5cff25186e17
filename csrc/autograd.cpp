// SPDX-License-Identifier: Apache-2.0
// The autograd Functions Scan and Decode.
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>

#include <algorithm>
#include <string>

#include "autograd_common.h"
#include "decode.h"
#include "devices.h"
#include "layers.h"
#include "scan_both.h"

namespace pyseq::autograd {

namespace {

// Says which of the results of a scan are tensors without use, which take no gradient.
void mark_scan_results(AutogradContext* context, const std::string& cell, bool return_states,
                       const Tensor& c_n, const Tensor& c_steps) {
  const bool has_c = scan_cell_shape(cell, /*peepholes=*/false).has_cell;
  variable_list without_use;
  if (!has_c) without_use.push_back(c_n);
  if (!has_c || !return_states) without_use.push_back(c_steps);
  context->mark_non_differentiable(without_use);
  context->saved_data["has_c"] = has_c;
  context->saved_data["has_c_steps"] = has_c && return_states;
}

// What acts on a scan besides its weights, as a Function takes it: the tensors that there are, and
// for each of the operator's arguments whether it is there.
struct Extras {
  variable_list tensors;
  std::vector<bool> present;
};

Extras split_extras(std::initializer_list<const OptionalTensor*> list) {
  Extras extras;
  for (const OptionalTensor* extra : list) {
    if (extra->has_value()) extras.tensors.push_back(**extra);
  }
  if (extras.tensors.empty()) return extras;
  for (const OptionalTensor* extra : list) extras.present.push_back(extra->has_value());
  return extras;
}

// The inverse.
template <class Present>
ScanExtraList join_extras(at::TensorList tensors, const Present& present) {
  if (present.empty()) return std::nullopt;
  c10::List<OptionalTensor> list;
  size_t next = 0;
  for (const bool is_there : present) {
    list.push_back(is_there ? OptionalTensor(tensors[next++]) : std::nullopt);
  }
  return list;
}

// Arguments of a scan before its extras.
constexpr size_t kBeforeExtras = 15;

// Appends the gradients of the extras to those of the other arguments, in the order of the schema.
// Those that have no derivative came back without elements.
void append_gradients(variable_list& made, const ScanExtraList& extras,
                      const std::vector<Tensor>& d_extras) {
  for (size_t i = 0; i < d_extras.size(); ++i) {
    const OptionalTensor extra = extras->get(i);
    const bool has_gradient = extra.has_value() && d_extras[i].sizes() == extra->sizes();
    made.push_back(if_given(has_gradient, d_extras[i]));
  }
  made.resize(kBeforeExtras + kScanExtras);
}

// The arguments of a scan, for its specification.
torch::jit::Stack with_extras(torch::jit::Stack arguments, const ScanExtraList& extras) {
  for (size_t i = 0; i < kScanExtras; ++i) {
    arguments.emplace_back(extras.has_value() ? extras->get(i) : std::nullopt);
  }
  return arguments;
}

// Gradients in the order of the schema as a Function returns them, which takes the extras that
// there are, and last what says so.
variable_list for_function(const variable_list& made, const c10::List<bool>& present) {
  variable_list result(made.begin(), made.begin() + kBeforeExtras);
  for (size_t i = 0; i < present.size(); ++i) {
    if (present[i]) result.push_back(made[kBeforeExtras + i]);
  }
  result.emplace_back();
  return result;
}

// Takes the arguments of the operator, in its order: `differentiable` finds the gradients by it.
struct Scan : Function<Scan> {
  static constexpr size_t kResults = 4;  // of the operator
  static constexpr size_t kInputs = 11;  // saved tensors before the extras

  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& w_ih,
                               const Tensor& w_hh, const OptionalTensor& b_ih,
                               const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                               const OptionalTensor& h_0, const OptionalTensor& c_0,
                               const OptionalTensor& lengths, const OptionalTensor& resets,
                               std::string cell, bool reverse, int64_t keep_every,
                               bool return_states, const OptionalTensor& w_ch,
                               at::TensorList extras, std::vector<bool> present) {
    const bool needs_x = x.requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<&scan_forward>("pyseq::scan_forward");
    variable_list results =
        op.call(x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, cell, reverse,
                keep_every, return_states, w_ch, join_extras(extras, present));
    variable_list saved{x,
                        w_ih,
                        w_hh,
                        or_undefined(b_ih),
                        or_undefined(b_hh),
                        or_undefined(w_hr),
                        or_undefined(h_0),
                        or_undefined(c_0),
                        or_undefined(lengths),
                        or_undefined(resets),
                        or_undefined(w_ch)};
    saved.insert(saved.end(), extras.begin(), extras.end());
    saved.insert(saved.end(), results.begin() + kResults, results.end());
    results.resize(kResults);
    context->save_for_backward(std::move(saved));
    auto& options = context->saved_data;
    options["cell"] = cell;
    options["reverse"] = reverse;
    options["keep_every"] = keep_every;
    options["needs_x"] = needs_x;
    options["loops"] = loops_at_once;
    options["present"] = std::move(present);
    context->set_materialize_grads(false);
    mark_scan_results(context, cell, return_states, results[2], results[3]);
    return results;
  }

  static variable_list backward(AutogradContext* context, variable_list d) {
    const variable_list all = context->get_saved_variables();
    auto& options = context->saved_data;
    const c10::List<bool> present = options["present"].toBoolList();
    const size_t extra_count = std::count(present.begin(), present.end(), true);
    const at::TensorList tensors(all);
    const ScanExtraList extras = join_extras(tensors.slice(kInputs), present);
    const at::TensorList saved = tensors.slice(kInputs + extra_count);
    const Tensor &x = all[0], &w_ih = all[1], &w_hh = all[2];
    const OptionalTensor b_ih = given(all[3]), b_hh = given(all[4]), w_hr = given(all[5]),
                         h_0 = given(all[6]), c_0 = given(all[7]), lengths = given(all[8]),
                         resets = given(all[9]), w_ch = given(all[10]);
    variable_list result(kBeforeExtras);
    {
      const at::NoGradGuard constant;
      const bool needs_x = options["needs_x"].toBool();
      const LoopsAtOnce shared(options["loops"].toInt());
      static const auto op = find_operator<&scan_backward>("pyseq::scan_backward");
      const auto [d_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_h_0, d_c_0, d_w_ch, d_extras] =
          op.call(given(d[0]), given(d[1]), if_used(options["has_c"], d[2]),
                  if_used(options["has_c_steps"], d[3]), x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0,
                  lengths, resets, saved, options["cell"].toStringView(),
                  options["reverse"].toBool(), options["keep_every"].toInt(), needs_x, w_ch,
                  extras);
      result[0] = if_given(needs_x, d_x);
      result[1] = d_w_ih;
      result[2] = d_w_hh;
      result[3] = if_given(b_ih.has_value(), d_b_ih);
      result[4] = if_given(b_hh.has_value(), d_b_hh);
      result[5] = if_given(w_hr.has_value(), d_w_hr);
      result[6] = if_given(h_0.has_value(), d_h_0);
      result[7] = if_given(c_0.has_value(), d_c_0);
      result[14] = if_given(w_ch.has_value(), d_w_ch);
      append_gradients(result, extras, d_extras);
    }
    result = differentiable("scan", std::move(result), d, [&] {
      return with_extras(
          {x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, options["cell"],
           options["reverse"], options["keep_every"], options["has_c_steps"], w_ch},
          extras);
    });
    return for_function(result, present);
  }
};

struct Decode : Function<Decode> {
  static constexpr size_t kResults = 6;  // of the operator
  static constexpr size_t kInputs = 18;  // saved tensors before those of the layers

  // Takes what the operator takes, so that the gradients are in the schema's order, as
  // `differentiable` wants them.
  static variable_list forward(AutogradContext* context, const Tensor& x, at::TensorList layers,
                               const Tensor& keys, const Tensor& memory, const Tensor& combine,
                               const OptionalTensor& weight_query, const OptionalTensor& weight_v,
                               const OptionalTensor& h_0, const OptionalTensor& c_0,
                               const OptionalTensor& feed, const OptionalTensor& lengths,
                               const OptionalTensor& dropout_masks, std::string cell,
                               std::string score, bool input_feeding, bool /*need_weights*/,
                               const OptionalTensor& weight_history,
                               const OptionalTensor& weight_position,
                               const OptionalTensor& weight_position_v, const OptionalTensor& step,
                               const OptionalTensor& past, int64_t heads, int64_t window,
                               std::string history, std::string order, std::string fed) {
    const bool needs_x = x.requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<&decode_forward>("pyseq::decode_forward");
    variable_list results =
        op.call(x, layers, keys, memory, combine, weight_query, weight_v, h_0, c_0, feed, lengths,
                dropout_masks, cell, score, input_feeding, weight_history, weight_position,
                weight_position_v, step, past, heads, window, history, order, fed);
    variable_list saved{x,
                        keys,
                        memory,
                        combine,
                        or_undefined(weight_query),
                        or_undefined(weight_v),
                        or_undefined(h_0),
                        or_undefined(c_0),
                        or_undefined(feed),
                        or_undefined(lengths),
                        or_undefined(dropout_masks),
                        or_undefined(weight_history),
                        or_undefined(weight_position),
                        or_undefined(weight_position_v),
                        or_undefined(step),
                        or_undefined(past),
                        results[0],
                        results[1]};
    saved.insert(saved.end(), layers.begin(), layers.end());
    saved.insert(saved.end(), results.begin() + kResults, results.end());
    results.resize(kResults);
    context->save_for_backward(std::move(saved));
    auto& options = context->saved_data;
    options["cell"] = cell;
    options["score"] = score;
    options["input_feeding"] = input_feeding;
    options["needs_x"] = needs_x;
    options["layers"] = static_cast<int64_t>(layers.size());
    options["heads"] = heads;
    options["window"] = window;
    options["history"] = history;
    options["order"] = order;
    options["fed"] = fed;
    context->set_materialize_grads(false);
    variable_list constant;
    if (cell != "lstm") constant.push_back(results[3]);
    if (fed != "context") constant.push_back(results[4]);
    if (history == "none") constant.push_back(results[5]);
    context->mark_non_differentiable(constant);
    return results;
  }

  static variable_list backward(AutogradContext* context, variable_list d) {
    const variable_list all = context->get_saved_variables();
    auto& options = context->saved_data;
    const at::TensorList tensors(all);
    const size_t layer_count = options["layers"].toInt();
    const at::TensorList layers = tensors.slice(kInputs, layer_count),
                         saved = tensors.slice(kInputs + layer_count);
    const bool is_lstm = options["cell"].toStringView() == "lstm";
    const bool feeds_context = options["fed"].toStringView() == "context";
    const bool remembers = options["history"].toStringView() != "none";
    const Tensor &x = all[0], &keys = all[1], &memory = all[2], &combine = all[3],
                 &output = all[16], &attn = all[17];
    const OptionalTensor weight_query = given(all[4]), weight_v = given(all[5]),
                         h_0 = given(all[6]), c_0 = given(all[7]), feed = given(all[8]),
                         lengths = given(all[9]), dropout_masks = given(all[10]),
                         weight_history = given(all[11]), weight_position = given(all[12]),
                         weight_position_v = given(all[13]), step = given(all[14]),
                         past = given(all[15]);
    variable_list result;
    {
      const at::NoGradGuard constant;
      const bool needs_x = options["needs_x"].toBool();
      static const auto op = find_operator<&decode_backward>("pyseq::decode_backward");
      const auto [d_x, d_layers, d_keys, d_memory, d_combine, d_weight_query, d_weight_v, d_h_0,
                  d_c_0, d_feed, d_weight_history, d_weight_position, d_weight_position_v, d_past] =
          op.call(given(d[0]), given(d[1]), given(d[2]), is_lstm ? given(d[3]) : std::nullopt,
                  feeds_context ? given(d[4]) : std::nullopt,
                  remembers ? given(d[5]) : std::nullopt, x, layers, keys, memory, combine,
                  weight_query, weight_v, h_0, c_0, feed, lengths, dropout_masks, output, attn,
                  saved, options["cell"].toStringView(), options["score"].toStringView(),
                  options["input_feeding"].toBool(), needs_x, weight_history, weight_position,
                  weight_position_v, step, past, options["heads"].toInt(),
                  options["window"].toInt(), options["history"].toStringView(),
                  options["order"].toStringView(), options["fed"].toStringView());
      result.push_back(if_given(needs_x, d_x));
      result.insert(result.end(), d_layers.begin(), d_layers.end());
      for (const Tensor& gradient :
           {d_keys, d_memory, d_combine, if_given(weight_query.has_value(), d_weight_query),
            if_given(weight_v.has_value(), d_weight_v), if_given(h_0.has_value(), d_h_0),
            if_given(c_0.has_value(), d_c_0), if_given(feed.has_value(), d_feed)}) {
        result.push_back(gradient);
      }
      result.resize(result.size() + 6);  // lengths, dropout_masks and four options
      result.push_back(if_given(weight_history.has_value(), d_weight_history));
      result.push_back(if_given(weight_position.has_value(), d_weight_position));
      result.push_back(if_given(weight_position_v.has_value(), d_weight_position_v));
      result.push_back(Tensor());  // step
      result.push_back(if_given(past.has_value(), d_past));
      result.resize(result.size() + 5);  // the other options
    }
    return differentiable("decode", std::move(result), d, [&] {
      return torch::jit::Stack{x,
                               layers,
                               keys,
                               memory,
                               combine,
                               weight_query,
                               weight_v,
                               h_0,
                               c_0,
                               feed,
                               lengths,
                               dropout_masks,
                               options["cell"],
                               options["score"],
                               options["input_feeding"],
                               /*need_weights=*/true,
                               weight_history,
                               weight_position,
                               weight_position_v,
                               step,
                               past,
                               options["heads"],
                               options["window"],
                               options["history"],
                               options["order"],
                               options["fed"],
                               /*memory_rows=*/OptionalTensor()};
    });
  }
};

}  // namespace

ScanResult scan(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                const OptionalTensor& b_hh, const OptionalTensor& w_hr, const OptionalTensor& h_0,
                const OptionalTensor& c_0, const OptionalTensor& lengths,
                const OptionalTensor& resets, std::string_view cell, bool reverse,
                int64_t keep_every, bool return_states, const OptionalTensor& w_ch,
                const OptionalTensor& h_mask, const OptionalTensor& zoneout_h,
                const OptionalTensor& zoneout_c, const OptionalTensor& reset_h,
                const OptionalTensor& reset_c, const OptionalTensor& gain_ih,
                const OptionalTensor& gain_hh, const OptionalTensor& gain_c,
                const OptionalTensor& bias_c) {
  const OptionalTensor x_(x), w_ih_(w_ih), w_hh_(w_hh);
  const Extras extra = split_extras(
      {&h_mask, &zoneout_h, &zoneout_c, &reset_h, &reset_c, &gain_ih, &gain_hh, &gain_c, &bias_c});
  if (!needs_grad("scan", {&x_, &w_ih_, &w_hh_, &b_ih, &b_hh, &w_hr, &h_0, &c_0, &w_ch},
                  extra.tensors)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<&pyseq::scan>("pyseq::scan");
    return op.call(x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, cell, reverse,
                   keep_every, return_states, w_ch, h_mask, zoneout_h, zoneout_c, reset_h, reset_c,
                   gain_ih, gain_hh, gain_c, bias_c);
  }
  check_differentiable(w_hh);
  for (const auto& [mask, mask_name] :
       {std::pair{&h_mask, "h_mask"}, {&zoneout_h, "zoneout_h"}, {&zoneout_c, "zoneout_c"}}) {
    TORCH_CHECK(!mask->has_value() || !(*mask)->requires_grad(), mask_name,
                " has no gradient, got a tensor that requires one: detach() it");
  }
  if (is_transformed()) {
    static const auto reference = find_operator<&pyseq::scan>("pyseq::scan_reference");
    return reference.call(x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, cell, reverse,
                          keep_every, return_states, w_ch, h_mask, zoneout_h, zoneout_c, reset_h,
                          reset_c, gain_ih, gain_hh, gain_c, bias_c);
  }
  const variable_list result = Scan::apply(
      x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, std::string(cell), reverse,
      keep_every, return_states, w_ch, at::TensorList(extra.tensors), extra.present);
  return {result[0], result[1], result[2], result[3]};
}

Decoded decode(const Tensor& x, at::TensorList layers, const Tensor& keys, const Tensor& memory,
               const Tensor& combine, const OptionalTensor& weight_query,
               const OptionalTensor& weight_v, const OptionalTensor& h_0, const OptionalTensor& c_0,
               const OptionalTensor& feed, const OptionalTensor& lengths,
               const OptionalTensor& dropout_masks, std::string_view cell, std::string_view score,
               bool input_feeding, bool need_weights, const OptionalTensor& weight_history,
               const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
               const OptionalTensor& step, const OptionalTensor& past, int64_t heads,
               int64_t window, std::string_view history, std::string_view order,
               std::string_view fed, const OptionalTensor& memory_rows) {
  const OptionalTensor x_(x), keys_(keys), memory_(memory), combine_(combine);
  if (!needs_grad("decode",
                  {&x_, &keys_, &memory_, &combine_, &weight_query, &weight_v, &h_0, &c_0, &feed,
                   &weight_history, &weight_position, &weight_position_v, &past},
                  layers)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<&pyseq::decode>("pyseq::decode");
    return op.call(x, layers, keys, memory, combine, weight_query, weight_v, h_0, c_0, feed,
                   lengths, dropout_masks, cell, score, input_feeding, need_weights, weight_history,
                   weight_position, weight_position_v, step, past, heads, window, history, order,
                   fed, memory_rows);
  }
  if (memory_rows.has_value()) {
    // What stands for a tensor while a program is traced has no numbers to look at.
    if (!at::areAnyTensorSubclassLike({x, keys, memory, *memory_rows})) {
      check_shared_rows(
          {x,        layers,     keys,          memory,         combine,         weight_query,
           weight_v, h_0,        c_0,           feed,           lengths,         dropout_masks,
           cell,     score,      input_feeding, weight_history, weight_position, weight_position_v,
           step,     past,       heads,         window,         history,         order,
           fed,      memory_rows});
    }
    // So that the gradients of all that attend to a row are added up.
    return decode(
        x, layers, keys.index_select(1, *memory_rows), memory.index_select(1, *memory_rows),
        combine, weight_query, weight_v, h_0, c_0, feed,
        lengths.has_value() ? OptionalTensor(lengths->index_select(0, *memory_rows)) : std::nullopt,
        dropout_masks, cell, score, input_feeding, need_weights, weight_history, weight_position,
        weight_position_v, step, past, heads, window, history, order, fed, std::nullopt);
  }
  if (is_transformed()) {
    static const auto reference = find_operator<&pyseq::decode>("pyseq::decode_reference");
    return reference.call(x, layers, keys, memory, combine, weight_query, weight_v, h_0, c_0, feed,
                          lengths, dropout_masks, cell, score, input_feeding, need_weights,
                          weight_history, weight_position, weight_position_v, step, past, heads,
                          window, history, order, fed, std::nullopt);
  }
  const variable_list result =
      Decode::apply(x, layers, keys, memory, combine, weight_query, weight_v, h_0, c_0, feed,
                    lengths, dropout_masks, std::string(cell), std::string(score), input_feeding,
                    need_weights, weight_history, weight_position, weight_position_v, step, past,
                    heads, window, std::string(history), std::string(order), std::string(fed));
  return {result[0], result[1], result[2], result[3], result[4], result[5]};
}

std::tuple<Tensor, Tensor, Tensor> scan_both(const Tensor& x,
                                             const c10::List<OptionalTensor>& weights,
                                             const OptionalTensor& h_0, const OptionalTensor& c_0,
                                             const OptionalTensor& lengths,
                                             const OptionalTensor& resets, std::string_view cell) {
  const OptionalTensor x_(x);
  std::vector<Tensor> given;
  for (const OptionalTensor& weight : weights) {
    if (weight.has_value()) given.push_back(*weight);
  }
  if (needs_grad("scan_both", {&x_, &h_0, &c_0}, given)) {
    return scan_both_recorded(&scan, x, weights, h_0, c_0, lengths, resets, cell);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  static const auto op = find_operator<&pyseq::scan_both>("pyseq::scan_both");
  return op.call(x, weights, h_0, c_0, lengths, resets, cell);
}

}  // namespace pyseq::autograd
