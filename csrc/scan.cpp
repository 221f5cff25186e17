// SPDX-License-Identifier: Apache-2.0
#include "scan.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "devices.h"
#include "products.h"

namespace pyseq {

ScanShape check_scan(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                     const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                     const OptionalTensor& w_hr, const OptionalTensor& h_0,
                     const OptionalTensor& c_0, const OptionalTensor& resets, std::string_view name,
                     const OptionalTensor& w_ch) {
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
  check_tensor(b_ih, "b_ih", "(G*H,)", {rows}, x, "x");
  check_tensor(b_hh, "b_hh", "(G*H,)", {rows}, x, "x");
  if (projects) {
    check_weight(*w_hr, "w_hr", "(P, H)", state_size, 1, {hidden}, x, "x");
    check_same_kind(*w_hr, "w_hr", w_hh, "w_hh");
  }
  check_tensor(h_0, "h_0", "(B, P)", {batch, state_size}, x, "x");
  check_tensor(c_0, "c_0", "(B, H)", {batch, cell.states * hidden}, x, "x");
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

namespace {

// x with zeros at padded steps. Their gates have zero gradients, but zero times whatever
// padding holds may be NaN.
Tensor without_padding(const Tensor& x, const OptionalTensor& lengths) {
  if (!lengths.has_value()) return x;
  const Tensor steps = at::arange(x.size(0), lengths->options());
  return x.masked_fill(steps.unsqueeze(1).ge(*lengths).unsqueeze(2), 0);
}

ScanExtraList join_extras(std::initializer_list<const OptionalTensor*> extras) {
  const bool none = std::none_of(extras.begin(), extras.end(),
                                 [](const OptionalTensor* extra) { return extra->has_value(); });
  if (none) return std::nullopt;
  c10::List<OptionalTensor> list;
  for (const OptionalTensor* extra : extras) list.push_back(*extra);
  return list;
}

// What a scan with layer normalisation works on; r_sums, c_sums and moments are written.
template <class T>
cpu::ScanNorm<T> scan_norm(const ScanExtras& extras, const Tensor& x_sums, const Tensor& r_sums,
                           const Tensor& c_sums, const Tensor& moments) {
  if (!extras.normalises()) return {};
  return {.gain_ih = data<T>(extras.gain_ih),
          .gain_hh = data<T>(extras.gain_hh),
          .gain_c = data<T>(extras.gain_c),
          .bias_c = data<T>(extras.bias_c),
          .x_sums = x_sums.const_data_ptr<T>(),
          .r_sums = r_sums.data_ptr<T>(),
          .c_sums = data_or_null<T>(c_sums, extras.gain_c.has_value()),
          .moments = data_or_null<T>(moments, moments.defined())};
}

template <class T>
cpu::Strided<T> strided(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  const auto stride = [&](int64_t from_last) {
    const int64_t dim = tensor->dim() - 1 - from_last;
    return dim < 0 || tensor->size(dim) == 1 ? 0 : tensor->stride(dim);
  };
  return {tensor->const_data_ptr<T>(), stride(2), stride(1)};
}

// The buffer of states with its first slot filled: with `reset`, or zero, where the first step
// resets.
Tensor first_state(const OptionalTensor& initial, const Tensor& like, int64_t slots, int64_t slot,
                   int64_t batch, int64_t size, const Tensor& cleared,
                   const OptionalTensor& reset) {
  const Tensor states = fresh({slots, batch, size}, like);
  fill_slot(states, slot, initial);
  if (!cleared.defined()) return states;
  Tensor first = states.select(0, slot);
  if (reset.has_value()) {
    first.copy_(at::where(cleared, *reset, first));
  } else if (initial.has_value()) {
    first.masked_fill_(cleared, 0);
  }
  return states;
}

// w_hh as the kernels want it: rows (gate, unit), or with heads (head, gate, unit).
Tensor by_head(const Tensor& w_hh, const CellShape& cell, int64_t heads) {
  if (heads == 1) return w_hh;
  const int64_t size = w_hh.size(1);
  return w_hh.reshape({cell.gates, heads, size, size}).transpose(0, 1);
}

// Whether h_mask scales each row's own weights, of a cell without a recurrent product.
bool masks_own(const CellShape& cell, const ScanExtras& extras) {
  return !cell.recurrent && extras.h_mask.has_value();
}

// The weights of the units themselves, (U*H,), or (B, H) of each row.
OptionalTensor own_weights(const CellShape& cell, const Tensor& w_hh, const OptionalTensor& w_ch,
                           const ScanExtras& extras) {
  if (cell.recurrent) return contiguous(w_ch);
  return masks_own(cell, extras) ? w_hh * *extras.h_mask : w_hh;
}

}  // namespace

ScanSaved run_scan(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                   const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                   const OptionalTensor& w_hr_in, const OptionalTensor& h_0,
                   const OptionalTensor& c_0, const OptionalTensor& lengths_in,
                   const OptionalTensor& resets_in, std::string_view name, bool reverse, bool save,
                   bool return_states, const OptionalTensor& w_ch,
                   const ScanExtraList& extra_list) {
  const ScanShape shape =
      check_scan(x, w_ih, w_hh, b_ih, b_hh, w_hr_in, h_0, c_0, resets_in, name, w_ch);
  const auto& [cell, T_, B, I, H, P, projects, heads] = shape;
  const ScanExtras extras = check_extras(extra_list, shape, x, name);
  const OptionalTensor lengths = check_lengths(lengths_in, B, T_, "T");
  const OptionalTensor resets = contiguous(resets_in), w_hr = contiguous(w_hr_in);
  const Tensor w_hh_rows = by_head(w_hh, cell, heads).contiguous();
  const OptionalTensor unit_weights = own_weights(cell, w_hh_rows, w_ch, extras);
  const Bias bias = fold_bias(b_ih, b_hh, cell, H);

  if (save) check_differentiable(w_hh);
  // Where the loop does not multiply all gates at once, the input is multiplied ahead; so it is on
  // other devices.
  const bool normalises = extras.normalises();
  const bool at_once =
      x.is_cpu() && !is_quantized(w_hh) && !cell.gates_state && !cell.has_heads && !normalises;
  const int64_t weight_bytes = static_cast<int64_t>(w_ih.nbytes() + w_hh.nbytes());
  const bool reads_input = cpu::reads_input(T_, B, weight_bytes) && I > 0 && at_once;
  const Tensor x_rows = x.contiguous(), w_ih_rows = w_ih.contiguous();
  const int64_t kept = save ? T_ : 1, rows = cell.gates * H;
  const Tensor gates = normalises     ? fresh({kept, B, rows}, x)
                       : !reads_input ? project_input(x, w_ih, bias.sum)
                       : save         ? fresh({T_, B, rows}, x)
                                      : nothing(x);
  // What there is not is returned for backward only.
  const auto or_nothing = [&](bool there, at::IntArrayRef sizes) {
    return there ? fresh(sizes, x) : save ? nothing(x) : Tensor();
  };
  const Tensor x_sums = normalises ? project_input(x, w_ih, std::nullopt) : or_nothing(false, {});
  const Tensor r_sums = or_nothing(normalises, {kept, B, rows});
  const Tensor c_sums = or_nothing(normalises && cell.has_cell, {kept, B, H});
  const Tensor moments = or_nothing(normalises && save, {T_, B, 3, 2});
  const int64_t slots = save ? T_ + 1 : 2, first = save && reverse ? T_ : 0;
  const int64_t last = save ? (reverse ? 0 : T_) : T_ % 2, first_step = reverse ? T_ - 1 : 0;
  Tensor cleared;
  if (resets.has_value()) {
    cleared = resets->select(0, first_step);
    if (lengths.has_value()) cleared = cleared.logical_and(lengths->gt(first_step));
    cleared = cleared.unsqueeze(1);
  }
  const Tensor states = first_state(h_0, x, slots, first, B, P, cleared, extras.reset_h);
  const Tensor cells =
      cell.has_cell ? first_state(c_0, x, slots, first, B, cell.states * H, cleared, extras.reset_c)
                    : nothing(x);
  const bool masks = cell.recurrent && extras.h_mask.has_value();
  const Tensor masked = masks ? fresh({2, B, P}, x) : Tensor();
  if (masks) masked.select(0, 0).copy_(states.select(0, first) * *extras.h_mask);
  const Tensor apart = save && cell.has_apart ? fresh({T_, B, H}, x) : nothing(x);
  const bool has_inner = projects || cell.gates_state;
  const Tensor inner = has_inner ? fresh({save ? T_ : 1, B, H}, x) : nothing(x);
  const Tensor y = fresh({T_, B, P}, x);
  const bool keeps_c = return_states && cell.has_cell;
  const Tensor c_steps = keeps_c ? fresh({T_, B, cell.states * H}, x) : nothing(x);

  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scan", [&] {
    kernels_of<scalar_t>(x).scan_forward({
        .cell = cell.kind,
        .steps = T_,
        .batch = B,
        .input = I,
        .hidden = H,
        .state_size = P,
        .reverse = reverse,
        .save = save,
        .threads = thread_count(),
        .x = x_rows.const_data_ptr<scalar_t>(),
        .w_ih = reads_input ? w_ih_rows.const_data_ptr<scalar_t>() : nullptr,
        .bias = data<scalar_t>(bias.sum),
        .w_hh = cell.recurrent ? values<scalar_t>(w_hh_rows) : nullptr,
        .w_hr = values<scalar_t>(w_hr),
        .quantized_hh = quantized(w_hh_rows),
        .quantized_hr = quantized(w_hr),
        .apart_bias = data<scalar_t>(bias.apart),
        .lengths = data<int64_t>(lengths),
        .resets = data<bool>(resets),
        .gates = data_or_null<scalar_t>(gates, save || !reads_input),
        .apart = data_or_null<scalar_t>(apart, save && cell.has_apart),
        .states = states.data_ptr<scalar_t>(),
        .cells = data_or_null<scalar_t>(cells, cell.has_cell),
        .inner = data_or_null<scalar_t>(inner, has_inner),
        .y = y.data_ptr<scalar_t>(),
        .c_steps = data_or_null<scalar_t>(c_steps, keeps_c),
        .unit_weights = data<scalar_t>(unit_weights),
        .unit_weights_stride = masks_own(cell, extras) ? H : 0,
        .heads = heads,
        .h_mask = masks ? data<scalar_t>(extras.h_mask) : nullptr,
        .masked = data_or_null<scalar_t>(masked, masks),
        .zoneout_h = strided<scalar_t>(extras.zoneout_h),
        .zoneout_c = strided<scalar_t>(extras.zoneout_c),
        .reset_h = strided<scalar_t>(extras.reset_h),
        .reset_c = strided<scalar_t>(extras.reset_c),
        .norm = scan_norm<scalar_t>(extras, x_sums, r_sums, c_sums, moments),
    });
  });
  return {y,
          copy_slot(states, last),
          cell.has_cell ? copy_slot(cells, last) : nothing(x),
          gates,
          apart,
          states,
          cells,
          inner,
          c_steps,
          x_sums,
          r_sums,
          c_sums,
          moments};
}

ScanResult scan(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                const OptionalTensor& b_hh, const OptionalTensor& w_hr, const OptionalTensor& h_0,
                const OptionalTensor& c_0, const OptionalTensor& lengths,
                const OptionalTensor& resets, std::string_view cell, bool reverse,
                int64_t /*keep_every*/, bool return_states, const OptionalTensor& w_ch,
                const OptionalTensor& h_mask, const OptionalTensor& zoneout_h,
                const OptionalTensor& zoneout_c, const OptionalTensor& reset_h,
                const OptionalTensor& reset_c, const OptionalTensor& gain_ih,
                const OptionalTensor& gain_hh, const OptionalTensor& gain_c,
                const OptionalTensor& bias_c) {
  const ScanExtraList extras = join_extras(
      {&h_mask, &zoneout_h, &zoneout_c, &reset_h, &reset_c, &gain_ih, &gain_hh, &gain_c, &bias_c});
  // With few rows the input is multiplied ahead. Of a long sequence a stretch at a time, so that
  // what is written is read again from the cache.
  constexpr int64_t kAhead = 1 << 19, kLeast = 64;  // numbers; steps
  if (x.is_cpu() && x.dim() == 3 && w_hh.dim() > 0 &&
      !cpu::reads_input(x.size(0), x.size(1),
                        static_cast<int64_t>(w_ih.nbytes() + w_hh.nbytes()))) {
    const int64_t stretch =
        std::max(kLeast, kAhead / std::max<int64_t>(1, x.size(1) * w_hh.size(0)));
    if (x.size(0) > 2 * stretch) {
      const auto [y, h_n, c_n, h_kept, c_kept, c_steps] =
          scan_kept_forward(x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, cell,
                            reverse, stretch, return_states, w_ch, extras);
      return {y, h_n, c_n, c_steps};
    }
  }
  const ScanSaved all = run_scan(x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, cell,
                                 reverse, /*save=*/false, return_states, w_ch, extras);
  return {std::get<0>(all), std::get<1>(all), std::get<2>(all), std::get<8>(all)};
}

ScanSaved scan_forward(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                       const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                       const OptionalTensor& w_hr, const OptionalTensor& h_0,
                       const OptionalTensor& c_0, const OptionalTensor& lengths,
                       const OptionalTensor& resets, std::string_view cell, bool reverse,
                       bool return_states, const OptionalTensor& w_ch,
                       const ScanExtraList& extras) {
  return run_scan(x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, cell, reverse,
                  /*save=*/true, return_states, w_ch, extras);
}

ScanGradients scan_backward(const OptionalTensor& d_y, const OptionalTensor& d_h_n,
                            const OptionalTensor& d_c_n, const Tensor& x, const Tensor& w_ih,
                            const Tensor& w_hh, const OptionalTensor& w_hr_in,
                            const OptionalTensor& lengths_in, const OptionalTensor& resets_in,
                            const Tensor& gates_in, const Tensor& apart_in, const Tensor& states_in,
                            const Tensor& cells_in, const Tensor& inner_in, std::string_view name,
                            bool reverse, bool needs_x, const OptionalTensor& d_c_steps_in,
                            const OptionalTensor& w_ch, const ScanExtraList& extra_list,
                            const OptionalTensor& x_sums_in, const OptionalTensor& r_sums_in,
                            const OptionalTensor& c_sums_in, const OptionalTensor& moments_in) {
  const ScanShape shape = check_scan(x, w_ih, w_hh, std::nullopt, std::nullopt, w_hr_in, d_h_n,
                                     d_c_n, resets_in, name, w_ch);
  const auto& [cell, T_, B, I, H, P, projects, heads] = shape;
  const ScanExtras extras = check_extras(extra_list, shape, x, name);
  const OptionalTensor lengths = check_lengths(lengths_in, B, T_, "T");
  const OptionalTensor resets = contiguous(resets_in), w_hr = contiguous(w_hr_in);
  const Tensor w_hh_rows = by_head(w_hh, cell, heads).contiguous();
  const OptionalTensor unit_weights = own_weights(cell, w_hh_rows, w_ch, extras);
  const int64_t rows = cell.gates * H, cell_size = cell.states * H;
  const std::vector<int64_t> none{0}, steps_hidden{T_, B, H}, slots_cells{T_ + 1, B, cell_size};
  const Tensor gates = check_saved(gates_in, "gates", {T_, B, rows}, x);
  const Tensor apart = check_saved(apart_in, "apart", cell.has_apart ? steps_hidden : none, x);
  const Tensor states = check_saved(states_in, "states", {T_ + 1, B, P}, x);
  const Tensor cells = check_saved(cells_in, "cells", cell.has_cell ? slots_cells : none, x);
  const bool has_inner = projects || cell.gates_state;
  const Tensor inner = check_saved(inner_in, "inner", has_inner ? steps_hidden : none, x);
  check_tensor(d_y, "d_y", "(T, B, P)", {T_, B, P}, x, "x");
  check_tensor(d_c_steps_in, "d_c_steps", "(T, B, H)", {T_, B, cell_size}, x, "x");
  const OptionalTensor d_c_steps = contiguous(d_c_steps_in);

  const Tensor d_output = d_y.has_value() ? d_y->contiguous() : at::zeros({T_, B, P}, x.options());
  const Tensor d_h = fresh({B, P}, x);
  d_h_n.has_value() ? d_h.copy_(*d_h_n) : d_h.zero_();
  Tensor d_c = nothing(x);
  if (cell.has_cell) {
    d_c = fresh({B, cell_size}, x);
    d_c_n.has_value() ? d_c.copy_(*d_c_n) : d_c.zero_();
  }
  const Tensor x_rows = without_padding(x, lengths).contiguous(), w_ih_rows = w_ih.contiguous();
  const Tensor d_x = needs_x ? fresh({T_, B, I}, x) : nothing(x);
  const Tensor d_w_ih = fresh({rows, I}, x);
  Tensor d_w_hh = cell.recurrent ? fresh({rows, P / heads}, x) : nothing(x);
  const Tensor d_w_hr = projects ? fresh({P, H}, x) : nothing(x);
  const Tensor d_b_ih = fresh({rows}, x), d_b_hh = fresh({rows}, x);
  const bool has_own = cell.unit_weights > 0;
  const Tensor d_own = has_own ? at::zeros({B, cell.unit_weights * H}, x.options()) : nothing(x);
  const auto each_row = [&](const OptionalTensor& reset, int64_t size) {
    return reset.has_value() ? at::zeros({B, size}, x.options()) : nothing(x);
  };
  const Tensor d_reset_h = each_row(extras.reset_h, P),
               d_reset_c = each_row(extras.reset_c, cell_size);
  const auto saved = [&](const OptionalTensor& tensor, const char* tensor_name,
                         const std::vector<int64_t>& sizes) {
    if (!extras.normalises()) return nothing(x);
    TORCH_CHECK(tensor.has_value(), tensor_name, " must be as forward gave it, got none");
    return check_saved(*tensor, tensor_name, sizes, x);
  };
  const Tensor x_sums = saved(x_sums_in, "x_sums", {T_, B, rows});
  const Tensor r_sums = saved(r_sums_in, "r_sums", {T_, B, rows});
  const Tensor c_sums = saved(c_sums_in, "c_sums", cell.has_cell ? steps_hidden : none);
  const Tensor moments = saved(moments_in, "moments", {T_, B, 3, 2});
  const auto like = [&](const OptionalTensor& gain) {
    return gain.has_value() ? fresh(gain->sizes(), x) : nothing(x);
  };
  const Tensor d_gain_ih = like(extras.gain_ih), d_gain_hh = like(extras.gain_hh),
               d_gain_c = like(extras.gain_c), d_bias_c = like(extras.bias_c);

  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scan_backward", [&] {
    kernels_of<scalar_t>(x).scan_backward({
        .cell = cell.kind,
        .steps = T_,
        .batch = B,
        .input = I,
        .hidden = H,
        .state_size = P,
        .reverse = reverse,
        .threads = thread_count(),
        .x = x_rows.const_data_ptr<scalar_t>(),
        .w_ih = w_ih_rows.const_data_ptr<scalar_t>(),
        .w_hh = cell.recurrent ? w_hh_rows.const_data_ptr<scalar_t>() : nullptr,
        .w_hr = data<scalar_t>(w_hr),
        .lengths = data<int64_t>(lengths),
        .resets = data<bool>(resets),
        .gates = gates.const_data_ptr<scalar_t>(),
        .apart = data_or_null<scalar_t>(apart, cell.has_apart),
        .states = states.const_data_ptr<scalar_t>(),
        .cells = data_or_null<scalar_t>(cells, cell.has_cell),
        .inner = data_or_null<scalar_t>(inner, has_inner),
        .d_y = d_output.const_data_ptr<scalar_t>(),
        .d_h = d_h.data_ptr<scalar_t>(),
        .d_c = data_or_null<scalar_t>(d_c, cell.has_cell),
        .d_x = data_or_null<scalar_t>(d_x, needs_x),
        .d_w_ih = d_w_ih.data_ptr<scalar_t>(),
        .d_w_hh = data_or_null<scalar_t>(d_w_hh, cell.recurrent),
        .d_w_hr = data_or_null<scalar_t>(d_w_hr, projects),
        .d_b_ih = d_b_ih.data_ptr<scalar_t>(),
        .d_b_hh = d_b_hh.data_ptr<scalar_t>(),
        .d_c_steps = data<scalar_t>(d_c_steps),
        .unit_weights = data<scalar_t>(unit_weights),
        .unit_weights_stride = masks_own(cell, extras) ? H : 0,
        .d_unit_weights = data_or_null<scalar_t>(d_own, has_own),
        .heads = heads,
        .h_mask = cell.recurrent ? data<scalar_t>(extras.h_mask) : nullptr,
        .zoneout_h = strided<scalar_t>(extras.zoneout_h),
        .zoneout_c = strided<scalar_t>(extras.zoneout_c),
        .d_reset_h = data_or_null<scalar_t>(d_reset_h, extras.reset_h.has_value()),
        .d_reset_c = data_or_null<scalar_t>(d_reset_c, extras.reset_c.has_value()),
        .norm = scan_norm<scalar_t>(extras, x_sums, r_sums, c_sums, moments),
        .d_gain_ih = data_or_null<scalar_t>(d_gain_ih, extras.normalises()),
        .d_gain_hh = data_or_null<scalar_t>(d_gain_hh, extras.normalises()),
        .d_gain_c = data_or_null<scalar_t>(d_gain_c, extras.gain_c.has_value()),
        .d_bias_c = data_or_null<scalar_t>(d_bias_c, extras.bias_c.has_value()),
    });
  });
  if (heads > 1) {
    const int64_t size = P / heads;
    d_w_hh = d_w_hh.view({heads, cell.gates, size, size}).transpose(0, 1).reshape({rows, size});
  }
  if (masks_own(cell, extras)) d_own.mul_(*extras.h_mask);
  Tensor d_w_ch = has_own ? d_own.sum(0) : nothing(x);
  if (!cell.recurrent) {
    std::swap(d_w_hh, d_w_ch);
    d_b_hh.copy_(d_b_ih);
  }
  const auto of_rows = [&](const OptionalTensor& reset, const Tensor& d_rows) {
    return reset.has_value() && reset->dim() == 1 ? d_rows.sum(0) : d_rows;
  };
  std::vector<Tensor> d_extras{nothing(x),
                               nothing(x),
                               nothing(x),
                               of_rows(extras.reset_h, d_reset_h),
                               of_rows(extras.reset_c, d_reset_c),
                               d_gain_ih,
                               d_gain_hh,
                               d_gain_c,
                               d_bias_c};
  d_extras.resize(extras.count);
  return {d_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_h, d_c, d_w_ch, d_extras};
}

}  // namespace pyseq
