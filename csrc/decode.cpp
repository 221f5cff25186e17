// SPDX-License-Identifier: Apache-2.0
#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <string>

#include "devices.h"
#include "layers.h"
#include "products.h"

namespace pyseq {

namespace {

// How a decoder attends, beside its score; see functional.py.
struct Attending {
  const OptionalTensor &weight_history, &weight_position, &weight_position_v, &step, &past;
  int64_t heads, window;
  std::string_view history, order, fed;

  bool remembers() const { return history != "none"; }
  bool feeds_context() const { return fed == "context"; }
  bool attends_first() const { return order == "bahdanau"; }
  bool predicts() const { return weight_position.has_value(); }
};

struct DecodeShape {
  CellShape cell;
  bool additive;
  int64_t steps, batch, input, hidden, layers, source, key_size, memory_size;
  int64_t heads, fed_size, taps, position_size;
};

void check_choice(const char* name, std::string_view value,
                  std::initializer_list<std::string_view> allowed) {
  std::string text;
  for (const std::string_view choice : allowed) {
    if (choice == value) return;
    text += (text.empty() ? "" : ", ") + std::string(choice);
  }
  TORCH_CHECK_VALUE(false, name, " must be one of ", text, ", got ", value);
}

// What goes with one another, and the tensors of what was chosen.
void check_attending(const Attending& how, DecodeShape& shape, bool input_feeding,
                     const Tensor& keys, const Tensor& memory, const Tensor& x) {
  check_choice("history", how.history, {"none", "previous", "cumulative"});
  check_choice("order", how.order, {"luong", "bahdanau"});
  check_choice("fed", how.fed, {"output", "context"});
  check_heads(how.heads, keys, memory);
  check_window(how.window);
  TORCH_CHECK_VALUE(!how.attends_first() || (input_feeding && how.feeds_context()),
                    "order bahdanau needs the context as what is fed, got ",
                    input_feeding ? how.fed : "no feeding");
  TORCH_CHECK_VALUE(
      how.predicts() == how.weight_position_v.has_value() && (!how.predicts() || how.window > 0),
      "weight_position and weight_position_v must come together and with a window");
  TORCH_CHECK_VALUE(
      how.remembers() == how.weight_history.has_value() && (!how.remembers() || shape.additive),
      "weight_history must come with a history and score concat, got history ", how.history);
  TORCH_CHECK_VALUE(how.remembers() || !how.past.has_value(),
                    "past weights go with a history, got none");
  shape.heads = how.heads;
  if (how.predicts()) {
    check_dim(*how.weight_position, "weight_position", 2, "(P, H)");
    shape.position_size = how.weight_position->size(0);
    check_tensor(*how.weight_position, "weight_position", "(P, H)",
                 {shape.position_size, shape.hidden}, x, "x");
    check_tensor(*how.weight_position_v, "weight_position_v", "(P,)", {shape.position_size}, x,
                 "x");
  }
  if (how.remembers()) {
    check_dim(*how.weight_history, "weight_history", 2, "(A, K)");
    shape.taps = how.weight_history->size(1);
    TORCH_CHECK(shape.taps % 2 == 1, "weight_history must be (A, K) with an odd K, got ",
                shape_text(how.weight_history->sizes()));
    check_tensor(*how.weight_history, "weight_history", "(A, K)", {shape.key_size, shape.taps}, x,
                 "x");
    check_tensor(how.past, "past", "(B, N, S)", {shape.batch, shape.heads, shape.source}, x, "x");
  }
  check_step(how.step, shape.batch, x, "x");
}

DecodeShape check_decode(const Tensor& x, at::TensorList layers, const Tensor& keys,
                         const Tensor& memory, const Tensor& combine,
                         const OptionalTensor& weight_query, const OptionalTensor& weight_v,
                         const OptionalTensor& h_0, const OptionalTensor& c_0,
                         const OptionalTensor& feed, const OptionalTensor& dropout_masks,
                         std::string_view cell_name, std::string_view score, bool input_feeding,
                         const Attending& how) {
  const CellShape cell = cell_shape(cell_name);
  const bool additive = is_additive(score);
  check_floating(x, "x");
  check_dim(x, "x", 3, "(T, B, I)");
  check_dim(combine, "combine", 2, "(H, M + H)");
  const int64_t steps = x.size(0), batch = x.size(1), input = x.size(2);
  TORCH_CHECK(steps > 0, "x must be (T, B, I) with T at least 1, got ", shape_text(x.sizes()));
  check_memory(keys, memory, weight_v, batch, additive, x, "x");
  const int64_t hidden = combine.size(0), source = memory.size(0), key_size = keys.size(2),
                memory_size = memory.size(2);
  TORCH_CHECK(hidden > 0, "combine must be (H, M + H) with H at least 1, got ",
              shape_text(combine.sizes()));
  check_weight(combine, "combine", "(H, M + H)", hidden, 1, {memory_size, hidden}, x, "x");

  const int64_t fed_size = how.feeds_context() ? memory_size : hidden;
  const int64_t count =
      check_layers(layers, cell, input, input_feeding ? fed_size : 0, hidden, x, "x");
  check_same_kind(combine, "combine", layers[1], "w_hh");
  TORCH_CHECK_VALUE(!weight_query.has_value() || additive,
                    "weight_query goes with score concat, got ", score);
  if (weight_query.has_value()) {
    check_weight(*weight_query, "weight_query", "(A, H)", key_size, 1, {hidden}, x, "x");
    check_same_kind(*weight_query, "weight_query", layers[1], "w_hh");
  } else {
    check_tensor(keys, "keys", "(S, B, H)", {source, batch, hidden}, x, "x");
  }
  check_tensor(h_0, "h_0", "(L, B, H)", {count, batch, hidden}, x, "x");
  check_tensor(c_0, "c_0", "(L, B, H)", {count, batch, hidden}, x, "x");
  check_tensor(feed, "feed", how.feeds_context() ? "(B, M)" : "(B, H)", {batch, fed_size}, x, "x");
  check_tensor(dropout_masks, "dropout_masks", "(L - 1, T, B, H)",
               {count - 1, steps, batch, hidden}, x, "x");
  DecodeShape shape{cell,   additive, steps,       batch, input,    hidden, count,
                    source, key_size, memory_size, 1,     fed_size, 0,      0};
  check_attending(how, shape, input_feeding, keys, memory, x);
  return shape;
}

// Every tensor that one call of the decoder's kernels reads or writes, kept alive for it.
struct DecodeTensors {
  std::vector<Tensor> w_ih, w_hh;
  std::vector<Bias> bias;
  Tensor keys, memory, combine;
  OptionalTensor weight_query, weight_v, lengths, masks;
  OptionalTensor weight_history, weight_position, weight_position_v, step;
  Tensor feed;
  Tensor gates_first, gates_above, apart, states, cells, query, context, attn, output;
  Tensor positions, centers, pasts;
};

DecodeTensors decode_inputs(const DecodeShape& shape, const Tensor& x, at::TensorList layers,
                            const Tensor& keys, const Tensor& memory, const Tensor& combine,
                            const OptionalTensor& weight_query, const OptionalTensor& weight_v,
                            const OptionalTensor& feed, const OptionalTensor& lengths,
                            const OptionalTensor& dropout_masks, const Attending& how) {
  DecodeTensors all;
  for (int64_t l = 0; l < shape.layers; ++l) {
    const Tensor* weights = &layers[l * kPerLayer];
    all.w_ih.push_back(weights[0].contiguous());
    all.w_hh.push_back(weights[1].contiguous());
    all.bias.push_back(fold_bias(weights[2], weights[3], shape.cell, shape.hidden));
  }
  all.keys = rows_first(keys, shape.heads);
  all.memory = rows_first(memory, shape.heads);
  all.combine = combine.contiguous();
  all.weight_query = contiguous(weight_query);
  all.weight_v = contiguous(weight_v);
  all.lengths = check_lengths(lengths, shape.batch, shape.source, "S");
  all.masks = contiguous(dropout_masks);
  all.feed =
      feed.has_value() ? feed->contiguous() : at::zeros({shape.batch, shape.fed_size}, x.options());
  if (how.remembers()) {
    // Tap by tap, (N, K, A/N): the kernels add up what the taps of a position say.
    all.weight_history =
        how.weight_history->reshape({shape.heads, -1, shape.taps}).transpose(1, 2).contiguous();
  }
  all.weight_position = contiguous(how.weight_position);
  all.weight_position_v = contiguous(how.weight_position_v);
  all.step = contiguous(how.step);
  return all;
}

template <class T>
std::vector<cpu::DecoderLayer<T>> decoder_layers(const DecodeShape& shape, const DecodeTensors& all,
                                                 bool input_feeding) {
  std::vector<cpu::DecoderLayer<T>> layers(shape.layers);
  for (int64_t l = 0; l < shape.layers; ++l) {
    cpu::DecoderLayer<T>& layer = layers[l];
    const int64_t columns = all.w_ih[l].size(1);
    if (l > 0 || input_feeding) {
      // Of the first layer's columns [x; fed] the loop needs only the second part.
      if (is_quantized(all.w_ih[l])) {
        layer.quantized_in = quantized_run(all.w_ih[l], l > 0 ? 0 : 1);
      } else {
        layer.w_in =
            all.w_ih[l].const_data_ptr<T>() + (columns - (l > 0 ? shape.hidden : shape.fed_size));
        layer.w_in_stride = columns;
      }
    }
    layer.w_hh = values<T>(all.w_hh[l]);
    layer.quantized_hh = quantized_run(all.w_hh[l]);
    layer.bias = data<T>(all.bias[l].sum);
    layer.apart_bias = data<T>(all.bias[l].apart);
    layer.gates =
        l == 0 ? all.gates_first.data_ptr<T>() : all.gates_above.select(0, l - 1).data_ptr<T>();
    if (all.apart.numel() > 0) layer.apart = all.apart.select(0, l).data_ptr<T>();
    layer.states = all.states.select(0, l).data_ptr<T>();
    if (shape.cell.has_cell) layer.cells = all.cells.select(0, l).data_ptr<T>();
    if (all.masks.has_value() && l + 1 < shape.layers) {
      layer.mask = all.masks->select(0, l).const_data_ptr<T>();
    }
  }
  return layers;
}

template <class T>
cpu::Decode<T> decode_arguments(const DecodeShape& shape, const DecodeTensors& all,
                                const std::vector<cpu::DecoderLayer<T>>& layers, bool input_feeding,
                                bool save, const Attending& how) {
  return {
      .cell = shape.cell.kind,
      .additive = shape.additive,
      .feeding = input_feeding,
      .save = save,
      .feeds_context = how.feeds_context(),
      .attends_first = how.attends_first(),
      .steps = shape.steps,
      .batch = shape.batch,
      .hidden = shape.hidden,
      .layer_count = shape.layers,
      .source = shape.source,
      .key_size = shape.key_size,
      .memory_size = shape.memory_size,
      .threads = thread_count(),
      .layers = layers.data(),
      .feed = all.feed.const_data_ptr<T>(),
      .keys = all.keys.const_data_ptr<T>(),
      .memory = all.memory.const_data_ptr<T>(),
      .combine = values<T>(all.combine),
      .w_query = values<T>(all.weight_query),
      .quantized_context = quantized(all.combine, 0),
      .quantized_hidden = quantized(all.combine, 1),
      .quantized_query = quantized(all.weight_query),
      .v = data<T>(all.weight_v),
      .lengths = data<int64_t>(all.lengths),
      .attn_step = all.attn.size(0) == 1 ? 0 : shape.batch * shape.heads * shape.source,
      .attn = all.attn.data_ptr<T>(),
      .query = data_or_null<T>(all.query, all.weight_query.has_value()),
      .context = all.context.data_ptr<T>(),
      .output = all.output.data_ptr<T>(),
      .heads = shape.heads,
      .window = how.window,
      .first_step = data<int64_t>(all.step),
      .position_size = shape.position_size,
      .w_position = data<T>(all.weight_position),
      .position_v = data<T>(all.weight_position_v),
      .taps = shape.taps,
      .w_history = data<T>(all.weight_history),
      .cumulative = how.history == "cumulative",
      .positions = data_or_null<T>(all.positions, how.predicts()),
      .centers = data_or_null<T>(all.centers, how.predicts()),
      .past = data_or_null<T>(all.pasts, how.remembers()),
  };
}

DecodeSaved run_decode(const Tensor& x, at::TensorList layers_in, const Tensor& keys,
                       const Tensor& memory, const Tensor& combine,
                       const OptionalTensor& weight_query, const OptionalTensor& weight_v,
                       const OptionalTensor& h_0, const OptionalTensor& c_0,
                       const OptionalTensor& feed, const OptionalTensor& lengths,
                       const OptionalTensor& dropout_masks, std::string_view cell_name,
                       std::string_view score, bool input_feeding, const Attending& how, bool save,
                       bool keep_attn) {
  const DecodeShape shape =
      check_decode(x, layers_in, keys, memory, combine, weight_query, weight_v, h_0, c_0, feed,
                   dropout_masks, cell_name, score, input_feeding, how);
  const auto& [cell, additive, T_, B, I, H, L, S, A, M, N, F, K, P] = shape;
  if (save) check_differentiable(combine);
  DecodeTensors all = decode_inputs(shape, x, layers_in, keys, memory, combine, weight_query,
                                    weight_v, feed, lengths, dropout_masks, how);
  const int64_t rows = cell.gates * H, slots = save ? T_ + 1 : 2, kept = save ? T_ : 1;
  all.gates_first = project_input(x, all.w_ih[0], all.bias[0].sum);
  all.gates_above = fresh({L - 1, kept, B, rows}, x);
  all.apart = save && cell.has_apart ? fresh({L, T_, B, H}, x) : nothing(x);
  const auto stack = [&](const OptionalTensor& initial) {
    Tensor states = fresh({L, slots, B, H}, x);
    Tensor first = states.select(1, 0);
    initial.has_value() ? first.copy_(*initial) : first.zero_();
    return states;
  };
  all.states = stack(h_0);
  all.cells = cell.has_cell ? stack(c_0) : nothing(x);
  all.query = weight_query.has_value() ? fresh({kept, B, A}, x) : nothing(x);
  all.context = fresh({kept, B, M}, x);
  all.attn = fresh(attn_sizes(save || keep_attn ? T_ : 1, B, N, S), x);
  all.output = fresh({T_, B, H}, x);
  all.positions = how.predicts() ? fresh({kept, B, P}, x) : nothing(x);
  all.centers = how.predicts() ? fresh({kept, B}, x) : nothing(x);
  all.pasts = how.remembers() ? fresh({slots, B, N, S}, x) : nothing(x);
  if (how.remembers()) fill_slot(all.pasts, 0, how.past);

  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "decode", [&] {
    const auto layers = decoder_layers<scalar_t>(shape, all, input_feeding);
    kernels_of<scalar_t>(x).decode_forward(
        decode_arguments<scalar_t>(shape, all, layers, input_feeding, save, how));
  });
  const int64_t last = save ? T_ : T_ % 2;
  return {all.output,
          save || keep_attn ? all.attn : nothing(x),
          all.states.select(1, last).clone(),
          cell.has_cell ? all.cells.select(1, last).clone() : nothing(x),
          how.feeds_context() ? copy_slot(all.context, kept - 1) : nothing(x),
          how.remembers() ? copy_slot(all.pasts, last) : nothing(x),
          all.gates_first,
          all.gates_above,
          all.apart,
          all.states,
          all.cells,
          all.query,
          all.context,
          all.positions,
          all.centers,
          all.pasts};
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
               std::string_view fed) {
  const Attending how{weight_history, weight_position, weight_position_v, step,  past,
                      heads,          window,          history,           order, fed};
  const DecodeSaved all =
      run_decode(x, layers, keys, memory, combine, weight_query, weight_v, h_0, c_0, feed, lengths,
                 dropout_masks, cell, score, input_feeding, how, /*save=*/false, need_weights);
  return {std::get<0>(all), std::get<1>(all), std::get<2>(all),
          std::get<3>(all), std::get<4>(all), std::get<5>(all)};
}

DecodeSaved decode_forward(
    const Tensor& x, at::TensorList layers, const Tensor& keys, const Tensor& memory,
    const Tensor& combine, const OptionalTensor& weight_query, const OptionalTensor& weight_v,
    const OptionalTensor& h_0, const OptionalTensor& c_0, const OptionalTensor& feed,
    const OptionalTensor& lengths, const OptionalTensor& dropout_masks, std::string_view cell,
    std::string_view score, bool input_feeding, const OptionalTensor& weight_history,
    const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
    const OptionalTensor& step, const OptionalTensor& past, int64_t heads, int64_t window,
    std::string_view history, std::string_view order, std::string_view fed) {
  const Attending how{weight_history, weight_position, weight_position_v, step,  past,
                      heads,          window,          history,           order, fed};
  return run_decode(x, layers, keys, memory, combine, weight_query, weight_v, h_0, c_0, feed,
                    lengths, dropout_masks, cell, score, input_feeding, how, /*save=*/true,
                    /*keep_attn=*/true);
}

DecodeGradients decode_backward(
    const OptionalTensor& d_output_in, const OptionalTensor& d_attn_in, const OptionalTensor& d_h_n,
    const OptionalTensor& d_c_n, const Tensor& x, at::TensorList layers_in, const Tensor& keys,
    const Tensor& memory, const Tensor& combine, const OptionalTensor& weight_query,
    const OptionalTensor& weight_v, const OptionalTensor& feed, const OptionalTensor& lengths,
    const OptionalTensor& dropout_masks, const Tensor& output, const Tensor& attn,
    const Tensor& gates_first, const Tensor& gates_above, const Tensor& apart, const Tensor& states,
    const Tensor& cells, const Tensor& query, const Tensor& context, std::string_view cell_name,
    std::string_view score, bool input_feeding, bool needs_x, const OptionalTensor& weight_history,
    const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
    const OptionalTensor& step, const OptionalTensor& past, int64_t heads, int64_t window,
    std::string_view history, std::string_view order, std::string_view fed,
    const OptionalTensor& d_feed_n, const OptionalTensor& d_past_n, const OptionalTensor& positions,
    const OptionalTensor& centers, const OptionalTensor& pasts) {
  const Attending how{weight_history, weight_position, weight_position_v, step,  past,
                      heads,          window,          history,           order, fed};
  const DecodeShape shape =
      check_decode(x, layers_in, keys, memory, combine, weight_query, weight_v, d_h_n, d_c_n, feed,
                   dropout_masks, cell_name, score, input_feeding, how);
  const auto& [cell, additive, T_, B, I, H, L, S, A, M, N, F, K, P] = shape;
  const auto options = x.options();
  DecodeTensors all = decode_inputs(shape, x, layers_in, keys, memory, combine, weight_query,
                                    weight_v, feed, lengths, dropout_masks, how);
  const int64_t rows = cell.gates * H;
  const std::vector<int64_t> none{0}, slots{L, T_ + 1, B, H}, apart_size{L, T_, B, H},
      query_size{T_, B, A};
  all.gates_first = check_saved(gates_first, "gates_first", {T_, B, rows}, x);
  all.gates_above = check_saved(gates_above, "gates_above", {L - 1, T_, B, rows}, x);
  all.apart = check_saved(apart, "apart", cell.has_apart ? apart_size : none, x);
  all.states = check_saved(states, "states", slots, x);
  all.cells = check_saved(cells, "cells", cell.has_cell ? slots : none, x);
  all.query = check_saved(query, "query", weight_query.has_value() ? query_size : none, x);
  all.context = check_saved(context, "context", {T_, B, M}, x);
  const std::vector<int64_t> weights_size = attn_sizes(T_, B, N, S);
  all.attn = check_saved(attn, "attn", weights_size, x);
  all.output = check_saved(output, "output", {T_, B, H}, x);
  if (how.predicts()) {
    TORCH_CHECK(positions.has_value() && centers.has_value(),
                "positions and centers must be as forward gave them, got none");
    all.positions = check_saved(*positions, "positions", {T_, B, P}, x);
    all.centers = check_saved(*centers, "centers", {T_, B}, x);
  }
  if (how.remembers()) {
    TORCH_CHECK(pasts.has_value(), "pasts must be as forward gave them, got none");
    all.pasts = check_saved(*pasts, "pasts", {T_ + 1, B, N, S}, x);
  }
  check_tensor(d_output_in, "d_output", "(T, B, H)", {T_, B, H}, x, "x");
  check_tensor(d_attn_in, "d_attn", N == 1 ? "(T, B, S)" : "(T, B, N, S)", weights_size, x, "x");
  check_tensor(d_feed_n, "d_feed_n", "(B, M)", {B, M}, x, "x");
  check_tensor(d_past_n, "d_past_n", "(B, N, S)", {B, N, S}, x, "x");
  const Tensor d_output =
      d_output_in.has_value() ? d_output_in->contiguous() : at::zeros({T_, B, H}, options);
  const OptionalTensor d_attn = contiguous(d_attn_in), d_fed = contiguous(d_feed_n);
  const auto last_gradient = [&](const OptionalTensor& given) {
    Tensor d = fresh({L, B, H}, x);
    given.has_value() ? d.copy_(*given) : d.zero_();
    return d;
  };
  const Tensor d_h = last_gradient(d_h_n);
  const Tensor d_c = cell.has_cell ? last_gradient(d_c_n) : nothing(x);
  const Tensor d_x_gates = fresh({L, T_, B, rows}, x);
  const Tensor d_r_gates = cell.has_apart ? at::empty_like(d_x_gates) : d_x_gates;
  const Tensor d_sum = fresh({T_, B, H}, x);
  const Tensor d_context = fresh({T_, B, M}, x);
  const Tensor d_scores = fresh({T_, B * N, S}, x);
  const Tensor d_query = additive ? fresh({T_, B, A}, x) : nothing(x);
  // With windows the loop makes what is otherwise one product for all steps: it would multiply
  // mostly zeros.
  const bool windows = how.window > 0, keys_inside = additive || windows;
  Tensor d_keys = keys_inside ? at::zeros({B * N, S, A / N}, options) : Tensor();
  Tensor d_memory = windows ? at::zeros({B * N, S, M / N}, options) : Tensor();
  const Tensor d_v = additive ? at::zeros({B, A}, options) : nothing(x);
  const Tensor d_feed = fresh({B, F}, x);
  const Tensor d_positions = how.predicts() ? fresh({T_, B, P}, x) : nothing(x);
  const Tensor d_shares = how.predicts() ? fresh({T_, B}, x) : nothing(x);
  const Tensor d_taps = how.remembers() ? at::zeros({B, N, K, A / N}, options) : nothing(x);
  const Tensor d_past = how.remembers() ? fresh({B, N, S}, x) : nothing(x);
  if (how.remembers()) d_past_n.has_value() ? d_past.copy_(*d_past_n) : d_past.zero_();

  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "decode_backward", [&] {
    auto layers = decoder_layers<scalar_t>(shape, all, input_feeding);
    for (int64_t l = 0; l < L; ++l) {
      layers[l].d_x_gates = d_x_gates.select(0, l).data_ptr<scalar_t>();
      layers[l].d_r_gates = d_r_gates.select(0, l).data_ptr<scalar_t>();
      layers[l].d_h = d_h.select(0, l).data_ptr<scalar_t>();
      if (cell.has_cell) layers[l].d_c = d_c.select(0, l).data_ptr<scalar_t>();
    }
    kernels_of<scalar_t>(x).decode_backward({
        .forward =
            decode_arguments<scalar_t>(shape, all, layers, input_feeding, /*save=*/true, how),
        .d_output = d_output.const_data_ptr<scalar_t>(),
        .d_attn = data<scalar_t>(d_attn),
        .d_sum = d_sum.data_ptr<scalar_t>(),
        .d_context = d_context.data_ptr<scalar_t>(),
        .d_scores = d_scores.data_ptr<scalar_t>(),
        .d_query = data_or_null<scalar_t>(d_query, additive),
        .d_keys = keys_inside ? d_keys.data_ptr<scalar_t>() : nullptr,
        .d_v = data_or_null<scalar_t>(d_v, additive),
        .d_feed = d_feed.data_ptr<scalar_t>(),
        .d_fed = data<scalar_t>(d_fed),
        .d_memory = windows ? d_memory.data_ptr<scalar_t>() : nullptr,
        .d_positions = data_or_null<scalar_t>(d_positions, how.predicts()),
        .d_shares = data_or_null<scalar_t>(d_shares, how.predicts()),
        .d_past = data_or_null<scalar_t>(d_past, how.remembers()),
        .d_w_history = data_or_null<scalar_t>(d_taps, how.remembers()),
    });
  });

  // What the loop left per step becomes the weights' gradients in one product each.
  const Tensor h_after = all.states.narrow(1, 1, T_), h_top = h_after.select(0, L - 1);
  std::vector<Tensor> d_layers;
  for (int64_t l = 0; l < L; ++l) {
    const Tensor d_x_l = d_x_gates.select(0, l), d_r_l = d_r_gates.select(0, l);
    const Tensor d_rows = flat(d_x_l);
    Tensor d_w_ih, d_b_ih;
    if (l > 0) {
      Tensor below = h_after.select(0, l - 1);
      if (all.masks.has_value()) below = below * all.masks->select(0, l - 1);
      std::tie(d_w_ih, d_b_ih) = weight_gradient(d_rows, flat(below));
    } else if (input_feeding) {
      d_w_ih = fresh({rows, I + F}, x);
      d_b_ih = fresh({rows}, x);
      Tensor d_w_x = d_w_ih.slice(1, 0, I), d_w_feed = d_w_ih.slice(1, I);
      multiply_into(d_w_x, d_rows.t(), flat(x), std::nullopt, /*accumulate=*/false, d_b_ih);
      if (how.attends_first()) {
        multiply_into(d_w_feed, d_rows.t(), flat(all.context));
      } else {
        const Tensor d_first = d_x_l.select(0, 0).t();
        multiply_into(d_w_feed, d_first, all.feed);
        if (T_ > 1) {
          const Tensor& source = how.feeds_context() ? all.context : all.output;
          multiply_into(d_w_feed, flat(d_x_l.slice(0, 1)).t(), flat(source.slice(0, 0, T_ - 1)),
                        std::nullopt, /*accumulate=*/true);
        }
      }
    } else {
      std::tie(d_w_ih, d_b_ih) = weight_gradient(d_rows, flat(x));
    }
    const auto [d_w_hh, d_b_hh] =
        weight_gradient(flat(d_r_l), flat(all.states.select(0, l).narrow(0, 0, T_)));
    d_layers.push_back(d_w_ih);
    d_layers.push_back(d_w_hh);
    d_layers.push_back(d_b_ih);
    d_layers.push_back(d_b_hh);
  }
  const Tensor d_combine = fresh({H, M + H}, x);
  const Tensor d_sum_rows = flat(d_sum).t();
  Tensor d_combine_context = d_combine.slice(1, 0, M), d_combine_hidden = d_combine.slice(1, M);
  multiply_into(d_combine_context, d_sum_rows, flat(all.context));
  multiply_into(d_combine_hidden, d_sum_rows, flat(h_top));
  // The states that asked, whose attention is the step's.
  const Tensor asking = how.attends_first() ? all.states.select(0, L - 1).narrow(0, 0, T_) : h_top;
  if (!keys_inside) d_keys = summed_over_steps(d_scores, asking, N);
  if (!windows) d_memory = summed_over_steps(all.attn.view({T_, B * N, S}), d_context, N);
  return {needs_x ? matrix_product(flat(d_x_gates.select(0, 0)), all.w_ih[0].slice(1, 0, I))
                        .view({T_, B, I})
                  : nothing(x),
          d_layers,
          steps_first(d_keys, N),
          steps_first(d_memory, N),
          d_combine,
          weight_query.has_value() ? matrix_product(flat(d_query).t(), flat(asking)) : nothing(x),
          additive ? d_v.sum(0) : nothing(x),
          d_h,
          d_c,
          d_feed,
          how.remembers() ? d_taps.sum(0).transpose(1, 2).reshape({A, K}) : nothing(x),
          how.predicts() ? matrix_product(flat(d_positions).t(), flat(asking)) : nothing(x),
          how.predicts()
              ? matrix_product(flat(all.positions).t(), d_shares.view({T_ * B, 1})).view({P})
              : nothing(x),
          d_past};
}

}  // namespace pyseq
