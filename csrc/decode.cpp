// SPDX-License-Identifier: Apache-2.0
#include "decode.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <cstring>

#include "devices.h"
#include "products.h"
#include "widened.h"

namespace pyseq {

namespace {

// What a pass writes, and backward reads; see kernels.h. Undefined where there is no such thing.
struct DecodeTensors {
  Tensor gates_first;  // (T, B, G*H)
  Tensor gates_above;  // (L - 1, T or 1, B, G*H)
  Tensor apart, states, cells, query, context, attn, output, positions, centers, pasts;
  Tensor input;  // (T, B, I), where the loop multiplies it itself
};

// What lies at an index of the first dimension, or null: no tensor that would be looked at.
template <class T>
T* slice_of(const Tensor& tensor, int64_t index) {
  return tensor.defined() ? tensor.data_ptr<T>() + index * tensor.stride(0) : nullptr;
}

template <class T>
std::vector<cpu::DecoderLayer<T>> decoder_layers(const DecodeArguments& args,
                                                 const DecodeTensors& all) {
  const DecodeShape& shape = args.shape;
  std::vector<cpu::DecoderLayer<T>> layers;
  for (int64_t l = 0; l < shape.layers; ++l) {
    const int64_t below = l > 0 ? shape.hidden : args.feeding ? shape.fed_size : 0;
    cpu::DecoderLayer<T> layer =
        layer_weights<T>(args.w_ih[l], args.w_hh[l], args.bias[l], below, /*run=*/l > 0 ? 0 : 1);
    layer.gates = l == 0 ? all.gates_first.data_ptr<T>() : slice_of<T>(all.gates_above, l - 1);
    layer.apart = slice_of<T>(all.apart, l);
    layer.states = slice_of<T>(all.states, l);
    layer.cells = slice_of<cpu::Accumulate<T>>(all.cells, l);
    if (args.masks.has_value() && l + 1 < shape.layers) {
      layer.mask = args.masks->select(0, l).const_data_ptr<T>();
    }
    layers.push_back(layer);
  }
  return layers;
}

// From one step to the next of what has `steps` of them, or one for all.
int64_t step_of(const Tensor& tensor) {
  return tensor.defined() && tensor.size(0) > 1 ? tensor.stride(0) : 0;
}

template <class T>
cpu::Decode<T> decode_arguments(const DecodeArguments& args, const DecodeTensors& all,
                                const std::vector<cpu::DecoderLayer<T>>& layers, bool save) {
  const DecodeShape& shape = args.shape;
  return {
      .cell = shape.cell.kind,
      .additive = shape.additive,
      .feeding = args.feeding,
      .save = save,
      .feeds_context = args.feeds_context,
      .attends_first = args.attends_first,
      .steps = shape.steps,
      .batch = shape.batch,
      .hidden = shape.hidden,
      .layer_count = shape.layers,
      .source = shape.source,
      .key_size = shape.key_size,
      .memory_size = shape.memory_size,
      .threads = thread_count(),
      .layers = layers.data(),
      .feed = args.feed.const_data_ptr<T>(),
      .keys = args.keys.const_data_ptr<T>(),
      .memory = args.memory.const_data_ptr<T>(),
      .combine = values<T>(args.combine),
      .w_query = values<T>(args.weight_query),
      .quantized_context = quantized(args.combine, 0),
      .quantized_hidden = quantized(args.combine, 1),
      .quantized_query = quantized(args.weight_query),
      .v = data<T>(args.weight_v),
      .lengths = data<int64_t>(args.lengths),
      .source_rows = data<int32_t>(args.source_rows),
      .attn_step = step_of(all.attn),
      .attn = all.attn.data_ptr<T>(),
      .query = data_if<T>(all.query),
      .context_step = step_of(all.context),
      .context = data_if<T>(all.context),
      .output = all.output.data_ptr<T>(),
      .heads = shape.heads,
      .window = args.window,
      .first_step = data<int64_t>(args.step),
      .position_size = shape.position_size,
      .w_position = data<T>(args.weight_position),
      .position_v = data<T>(args.weight_position_v),
      .taps = shape.taps,
      .w_history = data<T>(args.weight_history),
      .cumulative = args.cumulative,
      .positions = data_if<T>(all.positions),
      .centers = data_if<cpu::Accumulate<T>>(all.centers),
      .past = data_if<cpu::Accumulate<T>>(all.pasts),
      .x = data_if<T>(all.input),
      .w_x = all.input.defined() ? args.w_ih[0].const_data_ptr<T>() : nullptr,
      .input = all.input.defined() ? shape.input : 0,
      .w_x_stride = args.w_ih[0].size(1),
  };
}

// Calls body with the number of each layer, its state in a slot of `states` (L, slots, B, H) on the
// CPU, and how many bytes that is. Of small models torch's operators take longer than the copying.
template <class Body>
void for_each_layer(const Tensor& states, int64_t slot, const Body& body) {
  const size_t bytes = static_cast<size_t>(states.stride(1)) * states.element_size();
  if (states.numel() == 0) return;
  char* const first = static_cast<char*>(states.data_ptr()) + static_cast<size_t>(slot) * bytes;
  for (int64_t l = 0; l < states.size(0); ++l) {
    body(l, first + static_cast<size_t>(l * states.size(1)) * bytes, bytes);
  }
}

// States of all layers in `slots`, of which the first is filled.
Tensor first_states(const OptionalTensor& initial, const DecodeShape& shape, int64_t slots,
                    const Tensor& like) {
  const Tensor states = fresh({shape.layers, slots, shape.batch, shape.hidden}, like);
  if (!states.is_cpu()) {
    const Tensor first = states.select(1, 0);
    initial.has_value() ? first.copy_(*initial) : first.zero_();
    return states;
  }
  const Tensor given = initial.has_value() ? initial->contiguous() : Tensor();
  for_each_layer(states, 0, [&](int64_t l, char* state, size_t bytes) {
    if (given.defined()) {
      std::memcpy(state, static_cast<const char*>(given.const_data_ptr()) + l * bytes, bytes);
    } else {
      std::memset(state, 0, bytes);
    }
  });
  return states;
}

// A copy of those in one slot, (L, B, H).
Tensor copy_states(const Tensor& states, int64_t slot) {
  if (!states.is_cpu()) return states.select(1, slot).clone();
  const Tensor copy = fresh({states.size(0), states.size(2), states.size(3)}, states);
  for_each_layer(states, slot, [&](int64_t l, const char* state, size_t bytes) {
    std::memcpy(static_cast<char*>(copy.data_ptr()) + l * bytes, state, bytes);
  });
  return copy;
}

// Calls the kernels of the device: everything was checked and allocated.
void launch(const DecodeArguments& args, const DecodeTensors& all, bool save) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, args.x.scalar_type(), "decode", [&] {
    const auto layers = decoder_layers<scalar_t>(args, all);
    kernels_of<scalar_t>(args.x).decode_forward(
        decode_arguments<scalar_t>(args, all, layers, save));
  });
}

struct DecodeRun {
  Decoded results;
  DecodeTensors all;
};

DecodeRun run_decode(const DecodeArguments& args, bool save, bool keep_attn) {
  const auto& [cell, additive, T_, B, I, H, L, S, A, M, N, F, K, P] = args.shape;
  const Tensor &x = args.x, wide = wide_like(x);
  const int64_t rows = args.shape.rows(), kept = save ? T_ : 1;
  const bool all_states = save && args.keeps_states();
  const int64_t slots = all_states ? T_ + 1 : 2, last = all_states ? T_ : T_ % 2;
  const bool reads_input = args.reads_input();
  DecodeTensors all{
      .gates_first = reads_input ? fresh({kept, B, rows}, x)
                                 : project_input(x, args.w_ih[0], args.bias[0].sum),
      .gates_above = fresh({L - 1, kept, B, rows}, x),
      .apart = save && cell.has_apart ? fresh({L, T_, B, H}, x) : Tensor(),
      .states = first_states(args.h_0, args.shape, slots, x),
      .cells = cell.has_cell ? first_states(args.c_0, args.shape, slots, wide) : Tensor(),
      .query = args.weight_query.has_value() ? fresh({kept, B, A}, x) : Tensor(),
      .context = fresh({save && args.keeps_context() ? T_ : 1, B, M}, x),
      .attn = fresh(attn_sizes(save || keep_attn ? T_ : 1, B, N, S), x),
      .output = fresh({T_, B, H}, x),
      .positions = args.predicts ? fresh({kept, B, P}, x) : Tensor(),
      .centers = args.predicts ? fresh({kept, B}, wide) : Tensor(),
      .pasts = args.remembers ? fresh({save ? T_ + 1 : 2, B, N, S}, wide) : Tensor(),
      .input = reads_input ? x.contiguous() : Tensor(),
  };
  if (args.remembers) fill_slot(all.pasts, 0, args.past);
  launch(args, all, save);
  return {rounded(Decoded{all.output, save || keep_attn ? all.attn : nothing(x),
                          copy_states(all.states, last),
                          cell.has_cell ? copy_states(all.cells, last) : nothing(x),
                          args.feeds_context ? copy_slot(all.context, all.context.size(0) - 1)
                                             : nothing(x),
                          args.remembers ? copy_slot(all.pasts, save ? T_ : T_ % 2) : nothing(x)},
                  x.scalar_type()),
          all};
}

// What is kept for backward beside output and attn, in the order in which it is handed over.
std::vector<Tensor> packed(const DecodeArguments& args, const DecodeTensors& all) {
  std::vector<Tensor> list{all.gates_first};
  if (args.shape.layers > 1) list.push_back(all.gates_above);
  if (args.keeps_context()) list.push_back(all.context);
  if (args.keeps_states()) list.push_back(all.states);
  if (args.keeps_states() && all.cells.defined()) list.push_back(all.cells);
  for (const Tensor& tensor : {all.apart, all.query, all.positions, all.centers, all.pasts}) {
    if (tensor.defined()) list.push_back(tensor);
  }
  return list;
}

// The inverse, checked.
DecodeTensors unpacked(const DecodeArguments& args, const Tensor& output, const Tensor& attn,
                       at::TensorList list) {
  const auto& [cell, additive, T_, B, I, H, L, S, A, M, N, F, K, P] = args.shape;
  const int64_t rows = args.shape.rows();
  SavedList kept(list, args.x);
  DecodeTensors all;
  all.output = check_saved(output, "output", {T_, B, H}, args.x);
  all.attn = check_saved(attn, "attn", attn_sizes(T_, B, N, S), args.x);
  all.gates_first = kept.take(true, "gates_first", {T_, B, rows});
  all.gates_above = kept.take(L > 1, "gates_above", {L - 1, T_, B, rows});
  all.context = kept.take(args.keeps_context(), "context", {T_, B, M});
  all.states = kept.take(args.keeps_states(), "states", {L, T_ + 1, B, H});
  all.cells = kept.take_wide(args.keeps_states() && cell.has_cell, "cells", {L, T_ + 1, B, H});
  all.apart = kept.take(cell.has_apart, "apart", {L, T_, B, H});
  all.query = kept.take(args.weight_query.has_value(), "query", {T_, B, A});
  all.positions = kept.take(args.predicts, "positions", {T_, B, P});
  all.centers = kept.take_wide(args.predicts, "centers", {T_, B});
  all.pasts = kept.take_wide(args.remembers, "pasts", {T_ + 1, B, N, S});
  kept.check_end();
  return all;
}

// Fills in what of them was not kept: states, and contexts where each is a sum over all positions.
void complete(const DecodeArguments& args, DecodeTensors& all) {
  const auto& [cell, additive, T_, B, I, H, L, S, A, M, N, F, K, P] = args.shape;
  if (!args.keeps_states()) {
    all.states = first_states(args.h_0, args.shape, T_ + 1, args.x);
    if (cell.has_cell) all.cells = first_states(args.c_0, args.shape, T_ + 1, args.x);
    AT_DISPATCH_FLOATING_TYPES(args.x.scalar_type(), "decode_replay", [&] {
      for (const auto& layer : decoder_layers<scalar_t>(args, all)) {
        kernels_of<scalar_t>(args.x).replay({
            .cell = cell.kind,
            .steps = T_,
            .batch = B,
            .hidden = H,
            .reverse = false,
            .threads = thread_count(),
            .lengths = nullptr,
            .gates = layer.gates,
            .states = layer.states,
            .cells = layer.cells,
        });
      }
    });
  }
  if (!args.keeps_context()) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    all.context = fresh({T_, B, M}, args.x);
    Tensor rows = all.context.view({T_, B * N, M / N}).transpose(0, 1);
    Tensor memory = args.memory;
    if (args.lengths.has_value()) {
      // Zero times whatever padding holds may be NaN.
      const Tensor positions = at::arange(S, args.lengths->options());
      const Tensor padding = positions.ge(args.lengths->unsqueeze(1)).repeat_interleave(N, 0);
      memory = memory.masked_fill(padding.unsqueeze(2), 0);
    }
    at::bmm_out(rows, all.attn.view({T_, B * N, S}).transpose(0, 1), memory);
  }
}

// What the loop back writes beside the gradients of the results.
struct DecodeBackwardBuffers {
  Tensor d_output;
  OptionalTensor d_attn, d_fed;
  Tensor d_h, d_c, d_x_gates, d_r_gates, d_sum, d_context, d_scores, d_query, d_keys, d_memory, d_v,
      d_feed, d_positions, d_shares, d_taps, d_past;
};

void launch_backward(const DecodeArguments& args, const DecodeTensors& saved,
                     const DecodeBackwardBuffers& all) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, args.x.scalar_type(), "decode_backward", [&] {
        using Wide = cpu::Accumulate<scalar_t>;
        auto layers = decoder_layers<scalar_t>(args, saved);
        for (int64_t l = 0; l < args.shape.layers; ++l) {
          layers[l].d_x_gates = all.d_x_gates.select(0, l).data_ptr<scalar_t>();
          layers[l].d_r_gates = all.d_r_gates.select(0, l).data_ptr<scalar_t>();
          layers[l].d_h = all.d_h.select(0, l).data_ptr<Wide>();
          if (all.d_c.defined()) layers[l].d_c = all.d_c.select(0, l).data_ptr<Wide>();
        }
        kernels_of<scalar_t>(args.x).decode_backward({
            .forward = decode_arguments<scalar_t>(args, saved, layers, /*save=*/true),
            .d_output = all.d_output.const_data_ptr<scalar_t>(),
            .d_attn = data<scalar_t>(all.d_attn),
            .d_sum = all.d_sum.data_ptr<scalar_t>(),
            .d_context = all.d_context.data_ptr<scalar_t>(),
            .d_scores = data_if<scalar_t>(all.d_scores),
            .d_query = data_if<scalar_t>(all.d_query),
            .d_keys = data_if<scalar_t>(all.d_keys),
            .d_v = data_if<scalar_t>(all.d_v),
            .d_feed = all.d_feed.data_ptr<scalar_t>(),
            .d_fed = data<scalar_t>(all.d_fed),
            .d_memory = data_if<scalar_t>(all.d_memory),
            .d_positions = data_if<scalar_t>(all.d_positions),
            .d_shares = data_if<scalar_t>(all.d_shares),
            .d_past = data_if<Wide>(all.d_past),
            .d_w_history = data_if<scalar_t>(all.d_taps),
        });
      });
}

// The gradients of w_ih and b_ih of the first layer, which reads x and what is fed.
std::pair<Tensor, Tensor> first_layer_gradient(const DecodeArguments& args,
                                               const DecodeTensors& saved, const Tensor& d_x_l) {
  const auto& [cell, additive, T_, B, I, H, L, S, A, M, N, F, K, P] = args.shape;
  const Tensor d_rows = flat(d_x_l);
  if (!args.feeding) return weight_gradient(d_rows, flat(args.x));
  const Tensor weight = fresh({args.shape.rows(), I + F}, args.x);
  const Tensor bias = fresh({args.shape.rows()}, args.x);
  const Tensor of_x = weight.slice(1, 0, I), of_fed = weight.slice(1, I);
  multiply_into(of_x, d_rows.t(), flat(args.x), std::nullopt, /*accumulate=*/false, bias);
  if (args.attends_first) {
    multiply_into(of_fed, d_rows.t(), flat(saved.context));
    return {weight, bias};
  }
  multiply_into(of_fed, d_x_l.select(0, 0).t(), args.feed);
  if (T_ > 1) {
    const Tensor& source = args.feeds_context ? saved.context : saved.output;
    multiply_into(of_fed, flat(d_x_l.slice(0, 1)).t(), flat(source.slice(0, 0, T_ - 1)),
                  std::nullopt, /*accumulate=*/true);
  }
  return {weight, bias};
}

// What the loop left per step becomes the weights' gradients in one product each.
std::vector<Tensor> layer_gradients(const DecodeArguments& args, const DecodeTensors& saved,
                                    const DecodeBackwardBuffers& all) {
  const int64_t steps = args.shape.steps;
  std::vector<Tensor> gradients;
  for (int64_t l = 0; l < args.shape.layers; ++l) {
    const Tensor d_x_l = all.d_x_gates.select(0, l), d_r_l = all.d_r_gates.select(0, l);
    std::pair<Tensor, Tensor> of_input;
    if (l == 0) {
      of_input = first_layer_gradient(args, saved, d_x_l);
    } else {
      Tensor below = saved.states.select(0, l - 1).narrow(0, 1, steps);
      if (args.masks.has_value()) below = below * args.masks->select(0, l - 1);
      of_input = weight_gradient(flat(d_x_l), flat(below));
    }
    const auto [d_w_hh, d_b_hh] =
        weight_gradient(flat(d_r_l), flat(saved.states.select(0, l).narrow(0, 0, steps)));
    gradients.insert(gradients.end(), {of_input.first, d_w_hh, of_input.second, d_b_hh});
  }
  return gradients;
}

}  // namespace

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
  const DecodeArguments args = check_decode(
      {x,        layers,     keys,          memory,         combine,         weight_query,
       weight_v, h_0,        c_0,           feed,           lengths,         dropout_masks,
       cell,     score,      input_feeding, weight_history, weight_position, weight_position_v,
       step,     past,       heads,         window,         history,         order,
       fed,      memory_rows});
  return run_decode(args, /*save=*/false, need_weights).results;
}

std::vector<Tensor> decode_forward(
    const Tensor& x, at::TensorList layers, const Tensor& keys, const Tensor& memory,
    const Tensor& combine, const OptionalTensor& weight_query, const OptionalTensor& weight_v,
    const OptionalTensor& h_0, const OptionalTensor& c_0, const OptionalTensor& feed,
    const OptionalTensor& lengths, const OptionalTensor& dropout_masks, std::string_view cell,
    std::string_view score, bool input_feeding, const OptionalTensor& weight_history,
    const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
    const OptionalTensor& step, const OptionalTensor& past, int64_t heads, int64_t window,
    std::string_view history, std::string_view order, std::string_view fed) {
  const DecodeArguments args = check_decode(
      {x,        layers, keys,          memory,         combine,         weight_query,
       weight_v, h_0,    c_0,           feed,           lengths,         dropout_masks,
       cell,     score,  input_feeding, weight_history, weight_position, weight_position_v,
       step,     past,   heads,         window,         history,         order,
       fed});
  check_differentiable(combine);
  const DecodeRun run = run_decode(args, /*save=*/true, /*keep_attn=*/true);
  std::vector<Tensor> results =
      std::apply([](const auto&... each) { return std::vector<Tensor>{each...}; }, run.results);
  const std::vector<Tensor> saved = packed(args, run.all);
  results.insert(results.end(), saved.begin(), saved.end());
  return results;
}

DecodeGradients decode_backward(
    const OptionalTensor& d_output, const OptionalTensor& d_attn, const OptionalTensor& d_h_n,
    const OptionalTensor& d_c_n, const OptionalTensor& d_feed_n, const OptionalTensor& d_past_n,
    const Tensor& x, at::TensorList layers, const Tensor& keys, const Tensor& memory,
    const Tensor& combine, const OptionalTensor& weight_query, const OptionalTensor& weight_v,
    const OptionalTensor& h_0, const OptionalTensor& c_0, const OptionalTensor& feed,
    const OptionalTensor& lengths, const OptionalTensor& dropout_masks, const Tensor& output,
    const Tensor& attn, at::TensorList saved, std::string_view cell, std::string_view score,
    bool input_feeding, bool needs_x, const OptionalTensor& weight_history,
    const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
    const OptionalTensor& step, const OptionalTensor& past, int64_t heads, int64_t window,
    std::string_view history, std::string_view order, std::string_view fed) {
  const DecodeArguments args = check_decode(
      {x,        layers, keys,          memory,         combine,         weight_query,
       weight_v, h_0,    c_0,           feed,           lengths,         dropout_masks,
       cell,     score,  input_feeding, weight_history, weight_position, weight_position_v,
       step,     past,   heads,         window,         history,         order,
       fed});
  const auto& [cell_shape, additive, T_, B, I, H, L, S, A, M, N, F, K, P] = args.shape;
  const std::vector<int64_t> weights_size = attn_sizes(T_, B, N, S);
  check_tensor(d_output, "d_output", "(T, B, H)", {T_, B, H}, x, "x");
  check_tensor(d_attn, "d_attn", N == 1 ? "(T, B, S)" : "(T, B, N, S)", weights_size, x, "x");
  check_tensor(d_h_n, "d_h_n", "(L, B, H)", {L, B, H}, x, "x");
  check_tensor(d_c_n, "d_c_n", "(L, B, H)", {L, B, H}, x, "x");
  check_tensor(d_feed_n, "d_feed_n", "(B, M)", {B, M}, x, "x");
  check_tensor(d_past_n, "d_past_n", "(B, N, S)", {B, N, S}, x, "x");
  DecodeTensors kept = unpacked(args, output, attn, saved);
  complete(args, kept);

  const auto options = x.options();
  const Tensor wide = wide_like(x);
  const bool inside = args.keys_inside();
  const Tensor none, d_x_gates = fresh({L, T_, B, args.shape.rows()}, x);
  const DecodeBackwardBuffers all{
      .d_output = or_zero(d_output, {T_, B, H}, x),
      .d_attn = contiguous(d_attn),
      .d_fed = contiguous(d_feed_n),
      .d_h = copy_or_zero(d_h_n, {L, B, H}, wide),
      .d_c = cell_shape.has_cell ? copy_or_zero(d_c_n, {L, B, H}, wide) : none,
      .d_x_gates = d_x_gates,
      .d_r_gates = cell_shape.has_apart ? at::empty_like(d_x_gates) : d_x_gates,
      .d_sum = fresh({T_, B, H}, x),
      .d_context = fresh({T_, B, M}, x),
      .d_scores = inside && x.is_cpu() ? none : fresh({T_, B * N, S}, x),
      .d_query = additive ? fresh({T_, B, A}, x) : none,
      .d_keys = inside ? at::zeros({B * N, S, A / N}, options) : none,
      .d_memory = args.windows() ? at::zeros({B * N, S, M / N}, options) : none,
      .d_v = additive ? at::zeros({B, A}, options) : none,
      .d_feed = fresh({B, F}, x),
      .d_positions = args.predicts ? fresh({T_, B, P}, x) : none,
      .d_shares = args.predicts ? fresh({T_, B}, x) : none,
      .d_taps = args.remembers ? at::zeros({B, N, K, A / N}, options) : none,
      .d_past = args.remembers ? copy_or_zero(d_past_n, {B, N, S}, wide) : none,
  };
  launch_backward(args, kept, all);

  const Tensor top = kept.states.select(0, L - 1), h_top = top.narrow(0, 1, T_);
  // The states that asked, whose attention is the step's.
  const Tensor asking = args.attends_first ? top.narrow(0, 0, T_) : h_top;
  const Tensor d_combine = fresh({H, M + H}, x), d_sum_rows = flat(all.d_sum).t();
  multiply_into(d_combine.slice(1, 0, M), d_sum_rows, flat(kept.context));
  multiply_into(d_combine.slice(1, M), d_sum_rows, flat(h_top));
  const Tensor d_keys = inside ? all.d_keys : summed_over_steps(all.d_scores, asking, N);
  const Tensor d_memory = args.windows()
                              ? all.d_memory
                              : summed_over_steps(kept.attn.view({T_, B * N, S}), all.d_context, N);
  const auto times_asking = [&](const Tensor& rows) {
    return matrix_product(flat(rows).t(), flat(asking));
  };
  return {needs_x ? matrix_product(flat(d_x_gates.select(0, 0)), args.w_ih[0].slice(1, 0, I))
                        .view({T_, B, I})
                  : nothing(x),
          layer_gradients(args, kept, all),
          steps_first(d_keys, N),
          steps_first(d_memory, N),
          d_combine,
          weight_query.has_value() ? times_asking(all.d_query) : nothing(x),
          additive ? all.d_v.sum(0) : nothing(x),
          rounded(all.d_h, x.scalar_type()),
          rounded(or_nothing(all.d_c, x), x.scalar_type()),
          all.d_feed,
          args.remembers ? sum_by_tap(all.d_taps.flatten(0, 1), N) : nothing(x),
          args.predicts ? times_asking(all.d_positions) : nothing(x),
          args.predicts
              ? matrix_product(flat(kept.positions).t(), all.d_shares.view({T_ * B, 1})).view({P})
              : nothing(x),
          rounded(or_nothing(all.d_past, x), x.scalar_type())};
}

}  // namespace pyseq
