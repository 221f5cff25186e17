// SPDX-License-Identifier: Apache-2.0
// The arguments of scan and decode: checked once, and brought into the layout that kernels read.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include <initializer_list>
#include <limits>
#include <string>

#include "decode.h"
#include "scan.h"
#include "widened.h"

namespace pyseq {

// ---- Scan ------------------------------------------------------------------------------

namespace {

ScanShape check_shape(const ScanInputs& in) {
  const Tensor &x = in.x, &w_ih = in.w_ih, &w_hh = in.w_hh;
  const OptionalTensor &w_hr = in.w_hr, &w_ch = in.w_ch, &resets = in.resets;
  const std::string_view name = in.cell;
  const CellShape cell = scan_cell_shape(name, w_ch.has_value());
  check_floating(x, "x");
  check_dim(x, "x", 3, "(T, B, I)");
  if (cell.recurrent) {
    check_dim(w_hh, "w_hh", 2, "(G*H, P)");
  } else {
    check_dim(w_hh, "w_hh", 1, "(H,)");
  }
  const int64_t steps = x.size(0), batch = x.size(1), input = x.size(2);
  TORCH_CHECK(steps > 0, "x must be (T, B, I) with T at least 1, got ", shape_text(x.sizes()));
  TORCH_CHECK(w_hh.size(0) > 0 && w_hh.size(0) % cell.gates == 0, "w_hh must be (G*H, P) with ",
              cell.gates, "*H rows for ", name, ", got ", shape_text(w_hh.sizes()));
  const int64_t hidden = w_hh.size(0) / cell.gates;
  const bool projects = w_hr.has_value();
  TORCH_CHECK_VALUE(!projects || name == "lstm", "w_hr goes with cell lstm, got ", name);
  TORCH_CHECK_VALUE(!w_ch.has_value() || name == "lstm", "w_ch goes with cell lstm, got ", name);
  if (projects) check_dim(*w_hr, "w_hr", 2, "(P, H)");
  const int64_t state_size = projects ? w_hr->size(0) : hidden;
  TORCH_CHECK(state_size > 0, "w_hr must be (P, H) with P at least 1, got ",
              shape_text(w_hr.value_or(w_hh).sizes()));
  const int64_t rows = cell.gates * hidden;
  int64_t heads = 1;
  if (cell.has_heads) {
    TORCH_CHECK(w_hh.size(1) > 0 && hidden % w_hh.size(1) == 0,
                "w_hh must be (G*H, H / heads) with a number of columns that divides H = ", hidden,
                ", got ", shape_text(w_hh.sizes()));
    heads = hidden / w_hh.size(1);
    check_tensor(w_hh, "w_hh", "(G*H, H / heads)", {rows, hidden / heads}, x, "x");
  } else if (cell.gates_state) {
    check_tensor(w_hh, "w_hh", "(G*H, H)", {rows, hidden}, x, "x");
  } else if (cell.recurrent) {
    check_weight(w_hh, "w_hh", "(G*H, P)", rows, cell.gates, {state_size}, x, "x");
  } else {
    check_tensor(w_hh, "w_hh", "(H,)", {hidden}, x, "x");
  }
  check_tensor(w_ch, "w_ch", "(3*H,)", {cell.unit_weights * hidden}, x, "x");
  check_weight(w_ih, "w_ih", "(G*H, I)", rows, cell.gates, {input}, x, "x");
  check_same_kind(w_ih, "w_ih", w_hh, "w_hh");
  check_tensor(in.b_ih, "b_ih", "(G*H,)", {rows}, x, "x");
  check_tensor(in.b_hh, "b_hh", "(G*H,)", {rows}, x, "x");
  if (projects) {
    check_weight(*w_hr, "w_hr", "(P, H)", state_size, 1, {hidden}, x, "x");
    check_same_kind(*w_hr, "w_hr", w_hh, "w_hh");
  }
  check_tensor(in.h_0, "h_0", "(B, P)", {batch, state_size}, x, "x");
  check_tensor(in.c_0, "c_0", "(B, H)", {batch, cell.states * hidden}, x, "x");
  if (resets.has_value()) {
    TORCH_CHECK(resets->scalar_type() == at::kBool, "resets must be bool, got ",
                resets->scalar_type());
    TORCH_CHECK(resets->sizes() == (c10::IntArrayRef{steps, batch}),
                "resets must be (T, B) = ", shape_text({steps, batch}), ", got ",
                shape_text(resets->sizes()));
  }
  return {cell, steps, batch, input, hidden, state_size, projects, heads};
}

ScanExtras check_extras(const ScanExtraList& list, const ScanShape& shape, const Tensor& x,
                        std::string_view name) {
  const auto& [cell, T_, B, I, H, P, projects, heads] = shape;
  if (!list.has_value()) return {};
  const size_t count = list->size();
  TORCH_CHECK(count <= kScanExtras, "extras must be at most ", static_cast<int64_t>(kScanExtras),
              " tensors, got ", count);
  const auto take = [&](ScanExtra extra) {
    return extra < count ? contiguous(list->get(extra)) : std::nullopt;
  };
  const ScanExtras extras{
      take(kHMask),  take(kZoneoutH), take(kZoneoutC), take(kResetH), take(kResetC),
      take(kGainIh), take(kGainHh),   take(kGainC),    take(kBiasC),  count};
  check_tensor(extras.h_mask, "h_mask", "(B, P)", {B, P}, x, "x");
  // Sizes of 1 serve all steps, or all rows.
  const auto check_share = [&](const OptionalTensor& share, const char* share_name,
                               const char* letters, int64_t size) {
    if (!share.has_value()) return;
    check_dim(*share, share_name, 3, letters);
    const int64_t steps = share->size(0) == 1 ? 1 : T_, rows = share->size(1) == 1 ? 1 : B;
    check_tensor(share, share_name, letters, {steps, rows, size}, x, "x");
  };
  check_share(extras.zoneout_h, "zoneout_h", "(T or 1, B or 1, P)", P);
  check_share(extras.zoneout_c, "zoneout_c", "(T or 1, B or 1, H)", H);
  const auto check_reset = [&](const OptionalTensor& reset, const char* reset_name,
                               const char* letters, int64_t size) {
    if (!reset.has_value()) return;
    const bool one = reset->dim() == 1;
    check_tensor(reset, reset_name, letters,
                 one ? std::vector<int64_t>{size} : std::vector<int64_t>{B, size}, x, "x");
  };
  check_reset(extras.reset_h, "reset_h", "(B, P) or (P,)", P);
  check_reset(extras.reset_c, "reset_c", "(B, H) or (H,)", cell.states * H);
  TORCH_CHECK_VALUE(!extras.reset_c.has_value() || cell.has_cell,
                    "reset_c goes with a cell that has a c, got ", name);
  TORCH_CHECK_VALUE(!extras.zoneout_c.has_value() || cell.states == 1,
                    "zoneout_c goes with cell lstm, got ", name);
  const bool plain =
      cell.recurrent && cell.unit_weights == 0 && !cell.gates_state && !cell.has_heads;
  TORCH_CHECK_VALUE(!extras.normalises() || plain,
                    "layer normalisation goes with cells rnn_tanh, rnn_relu, gru and lstm without "
                    "peepholes, got ",
                    name, cell.unit_weights > 1 ? " with peepholes" : "");
  check_tensor(extras.gain_ih, "gain_ih", "(G*H,)", {cell.gates * H}, x, "x");
  check_tensor(extras.gain_hh, "gain_hh", "(G*H,)", {cell.gates * H}, x, "x");
  check_tensor(extras.gain_c, "gain_c", "(H,)", {H}, x, "x");
  check_tensor(extras.bias_c, "bias_c", "(H,)", {H}, x, "x");
  const bool of_c = extras.normalises() && cell.has_cell;
  TORCH_CHECK_VALUE(extras.gain_hh.has_value() == extras.normalises() &&
                        extras.gain_c.has_value() == of_c && extras.bias_c.has_value() == of_c,
                    "layer normalisation takes gain_ih and gain_hh, and for cell lstm gain_c and "
                    "bias_c, got ",
                    extras.gain_ih.has_value() ? "" : "no ", "gain_ih, ",
                    extras.gain_hh.has_value() ? "" : "no ", "gain_hh, ",
                    extras.gain_c.has_value() ? "" : "no ", "gain_c, ",
                    extras.bias_c.has_value() ? "" : "no ", "bias_c for cell ", name);
  return extras;
}

// w_hh as the kernels want it: rows (gate, unit), or with heads (head, gate, unit).
Tensor by_head(const Tensor& w_hh, const CellShape& cell, int64_t heads) {
  if (heads == 1) return w_hh.contiguous();
  const int64_t size = w_hh.size(1);
  return w_hh.reshape({cell.gates, heads, size, size}).transpose(0, 1).contiguous();
}

// The weights of the units themselves.
OptionalTensor own_weights(const CellShape& cell, const Tensor& w_hh, const OptionalTensor& w_ch,
                           const ScanExtras& extras) {
  if (cell.recurrent) return contiguous(w_ch);
  return extras.h_mask.has_value() ? w_hh * *extras.h_mask : w_hh;
}

// The same for a run of steps.
OptionalTensor narrowed(const OptionalTensor& tensor, int64_t begin, int64_t steps) {
  return tensor.has_value() ? OptionalTensor(tensor->narrow(0, begin, steps)) : std::nullopt;
}

}  // namespace

ScanArguments check_scan(const ScanInputs& in) {
  const ScanShape shape = check_shape(in);
  ScanExtras extras = check_extras(in.extras, shape, in.x, in.cell);
  TORCH_CHECK_VALUE(
      in.resets.has_value() || !(extras.reset_h.has_value() || extras.reset_c.has_value()),
      "reset_h and reset_c go with resets, got none of these");
  extras.reset_c = at_least_float(extras.reset_c);  // as c is carried
  Tensor w_hh = by_head(in.w_hh, shape.cell, shape.heads);
  OptionalTensor unit_weights = own_weights(shape.cell, w_hh, in.w_ch, extras);
  return {.shape = shape,
          .reverse = in.reverse,
          .x = in.x,
          .w_ih = in.w_ih.contiguous(),
          .w_hh = std::move(w_hh),
          .b_ih = in.b_ih,
          .b_hh = in.b_hh,
          .w_hr = contiguous(in.w_hr),
          .h_0 = in.h_0,
          .c_0 = in.c_0,
          .lengths = check_lengths(in.lengths, shape.batch, shape.steps, "T"),
          .resets = contiguous(in.resets),
          .unit_weights = std::move(unit_weights),
          .extras = std::move(extras)};
}

ScanArguments ScanArguments::stretch(int64_t begin, int64_t steps, const Tensor& h,
                                     const Tensor& c) const {
  ScanArguments part = *this;
  part.shape.steps = steps;
  part.x = x.narrow(0, begin, steps);
  part.h_0 = h;
  part.c_0 = c.defined() ? OptionalTensor(c) : std::nullopt;
  if (lengths.has_value()) part.lengths = (*lengths - begin).clamp(0, steps);
  part.resets = narrowed(resets, begin, steps);
  for (OptionalTensor* share : {&part.extras.zoneout_h, &part.extras.zoneout_c}) {
    if (share->has_value() && (*share)->size(0) > 1) *share = narrowed(*share, begin, steps);
  }
  return part;
}

bool ScanArguments::keeps_gates() const {
  const bool are_states =
      shape.cell.gates == 1 && x.is_cpu() && !resets.has_value() && !extras.zoneout_h.has_value();
  return !are_states;
}

bool ScanArguments::keeps_states() const {
  const bool replayed = shape.cell.replays() && x.is_cpu() && !shape.projects &&
                        !extras.normalises() && !resets.has_value() &&
                        !extras.zoneout_h.has_value() && !extras.zoneout_c.has_value();
  return !replayed;
}

ScanIncoming ScanIncoming::checked(const ScanArguments& args) const {
  const auto& [cell, T_, B, I, H, P, projects, heads] = args.shape;
  const int64_t cell_size = args.shape.cell_size();
  check_tensor(y, "d_y", "(T, B, P)", {T_, B, P}, args.x, "x");
  check_tensor(h_n, "d_h_n", "(B, P)", {B, P}, args.x, "x");
  check_tensor(c_n, "d_c_n", "(B, H)", {B, cell_size}, args.x, "x");
  check_tensor(c_steps, "d_c_steps", "(T, B, H)", {T_, B, cell_size}, args.x, "x");
  return *this;
}

// ---- Decode ----------------------------------------------------------------------------

namespace {

// What goes with one another, and the tensors of what was chosen.
void check_attending(const DecodeInputs& how, DecodeShape& shape, const char* like) {
  const Tensor& x = how.x;
  check_choice("history", how.history, {"none", "previous", "cumulative"});
  check_choice("order", how.order, {"luong", "bahdanau"});
  check_choice("fed", how.fed, {"output", "context"});
  check_heads(how.heads, how.keys, how.memory);
  check_window(how.window);
  TORCH_CHECK_VALUE(!how.attends_first() || (how.input_feeding && how.feeds_context()),
                    "order bahdanau needs the context as what is fed, got ",
                    how.input_feeding ? how.fed : "no feeding");
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
                 {shape.position_size, shape.hidden}, x, like);
    check_tensor(*how.weight_position_v, "weight_position_v", "(P,)", {shape.position_size}, x,
                 like);
  }
  if (how.remembers()) {
    shape.taps = check_history(*how.weight_history, how.past, shape.key_size,
                               {shape.batch, shape.heads, shape.source}, x, like);
  }
  check_step(how.step, shape.batch, x, like);
}

// The rows of keys and memory that rows attend to, (B,), as the kernels read them.
Tensor check_memory_rows(const Tensor& rows, int64_t batch, int64_t sources, const Tensor& x) {
  TORCH_CHECK(rows.scalar_type() == at::kLong && rows.sizes().equals({batch}),
              "memory_rows must be int64 (B,) = (", batch, ",), got ", rows.scalar_type(), " ",
              shape_text(rows.sizes()));
  TORCH_CHECK(rows.device() == x.device(), "memory_rows must be on the device of x, ", x.device(),
              ", got ", rows.device());
  TORCH_CHECK(sources <= std::numeric_limits<int32_t>::max(),
              "memory must have at most 2^31 - 1 rows, got ", sources);
  if (!rows.is_cpu()) return rows;
  const Tensor own = rows.contiguous(), narrow = at::empty({batch}, rows.options().dtype(at::kInt));
  const int64_t* const from = own.const_data_ptr<int64_t>();
  int32_t* const to = narrow.data_ptr<int32_t>();
  for (int64_t row = 0; row < batch; ++row) {
    TORCH_CHECK(from[row] >= 0 && from[row] < sources, "memory_rows must be between 0 and ",
                sources - 1, ", got ", from[row], " at row ", row);
    to[row] = static_cast<int32_t>(from[row]);
  }
  return narrow;
}

}  // namespace

DecodeShape check_decoder(const DecodeInputs& in, int64_t batch, int64_t input, const char* like) {
  const Tensor& x = in.x;
  const CellShape cell = cell_shape(in.cell);
  const bool additive = is_additive(in.score);
  check_dim(in.combine, "combine", 2, "(H, M + H)");
  const int64_t hidden = in.combine.size(0);
  TORCH_CHECK(hidden > 0, "combine must be (H, M + H) with H at least 1, got ",
              shape_text(in.combine.sizes()));
  check_dim(in.memory, "memory", 3, "(S, B, M)");
  const int64_t sources = in.memory_rows.has_value() ? in.memory.size(1) : batch;
  check_attention({in.keys, in.memory, in.combine, in.weight_query, in.weight_v}, additive, sources,
                  hidden, x, like);
  const int64_t source = in.memory.size(0), key_size = in.keys.size(2),
                memory_size = in.memory.size(2);
  const int64_t fed_size = in.feeds_context() ? memory_size : hidden;
  const int64_t count =
      check_layers(in.layers, cell, input, in.input_feeding ? fed_size : 0, hidden, x, like);
  check_attention_kind(in.combine, in.weight_query, in.layers[1]);
  check_tensor(in.h_0, "h_0", "(L, B, H)", {count, batch, hidden}, x, like);
  check_tensor(in.c_0, "c_0", "(L, B, H)", {count, batch, hidden}, x, like);
  check_tensor(in.feed, "feed", in.feeds_context() ? "(B, M)" : "(B, H)", {batch, fed_size}, x,
               like);
  DecodeShape shape{cell,   additive, 0,           batch, input,    hidden, count,
                    source, key_size, memory_size, 1,     fed_size, 0,      0};
  check_attending(in, shape, like);
  return shape;
}

namespace {

DecodeShape check_shape(const DecodeInputs& in) {
  const Tensor& x = in.x;
  check_floating(x, "x");
  check_dim(x, "x", 3, "(T, B, I)");
  const int64_t steps = x.size(0), batch = x.size(1);
  TORCH_CHECK(steps > 0, "x must be (T, B, I) with T at least 1, got ", shape_text(x.sizes()));
  DecodeShape shape = check_decoder(in, batch, x.size(2), "x");
  shape.steps = steps;
  check_tensor(in.dropout_masks, "dropout_masks", "(L - 1, T, B, H)",
               {shape.layers - 1, steps, batch, shape.hidden}, x, "x");
  return shape;
}

}  // namespace

void check_shared_rows(const DecodeInputs& in) {
  const DecodeShape shape = check_shape(in);
  const int64_t sources = in.memory.size(1);
  check_memory_rows(*in.memory_rows, shape.batch, sources, in.x);
  check_lengths(in.lengths, sources, shape.source, "S");
}

bool DecodeArguments::reads_input() const {
  if (!x.is_cpu() || shape.input == 0 || is_quantized(w_ih[0])) return false;
  size_t bytes = combine.nbytes();
  for (size_t l = 0; l < w_ih.size(); ++l) bytes += w_ih[l].nbytes() + w_hh[l].nbytes();
  return cpu::reads_input(shape.steps, shape.batch, static_cast<int64_t>(bytes));
}

DecodeArguments check_decode(const DecodeInputs& in) {
  const DecodeShape shape = check_shape(in);
  OptionalTensor source_rows, lengths = in.lengths;
  Tensor keys = in.keys, memory = in.memory;
  if (in.memory_rows.has_value()) {
    source_rows = check_memory_rows(*in.memory_rows, shape.batch, memory.size(1), in.x);
    if (!in.x.is_cpu()) {  // whose kernels give every row its own
      keys = keys.index_select(1, *source_rows);
      memory = memory.index_select(1, *source_rows);
      if (lengths.has_value()) lengths = lengths->index_select(0, *source_rows);
      source_rows = std::nullopt;
    }
  }
  DecodeArguments all{
      .shape = shape,
      .feeding = in.input_feeding,
      .feeds_context = in.feeds_context(),
      .attends_first = in.attends_first(),
      .remembers = in.remembers(),
      .predicts = in.predicts(),
      .cumulative = in.history == "cumulative",
      .window = in.window,
      .x = in.x,
      .w_ih = {},
      .w_hh = {},
      .bias = {},
      .keys = rows_first(keys, shape.heads),
      .memory = rows_first(memory, shape.heads),
      .combine = in.combine.contiguous(),
      .weight_query = contiguous(in.weight_query),
      .weight_v = contiguous(in.weight_v),
      .h_0 = in.h_0,
      .c_0 = in.c_0,
      .lengths = check_lengths(lengths, memory.size(1), shape.source, "S"),
      .masks = contiguous(in.dropout_masks),
      .weight_history = {},
      .weight_position = contiguous(in.weight_position),
      .weight_position_v = contiguous(in.weight_position_v),
      .step = contiguous(in.step),
      .past = in.past,
      .feed = or_zero(in.feed, {shape.batch, shape.fed_size}, in.x),
      .source_rows = source_rows,
  };
  for (int64_t l = 0; l < shape.layers; ++l) {
    const Tensor* weights = &in.layers[l * kPerLayer];
    all.w_ih.push_back(weights[0].contiguous());
    all.w_hh.push_back(weights[1].contiguous());
    all.bias.push_back(fold_bias(weights[2], weights[3], shape.cell, shape.hidden));
  }
  if (all.remembers) all.weight_history = by_tap(*in.weight_history, shape.heads);
  return all;
}

}  // namespace pyseq
