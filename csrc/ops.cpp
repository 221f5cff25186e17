// SPDX-License-Identifier: Apache-2.0
#include "ops.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <string>

#include "layers.h"

namespace pyseq {

namespace {

// (T, B, D) as (T * B, D); the product is spelled out because D may be 0.
Tensor flat(const Tensor& tensor) {
  return tensor.reshape({tensor.size(0) * tensor.size(1), tensor.size(2)});
}

// c = a b (+ bias), or c += a b, for matrices; c's rows are contiguous. With `a_sums` also the
// sums of a's rows.
void multiply_into(const Tensor& c, const Tensor& a, const Tensor& b,
                   const OptionalTensor& bias = std::nullopt, bool accumulate = false,
                   const OptionalTensor& a_sums = std::nullopt) {
  AT_DISPATCH_FLOATING_TYPES(c.scalar_type(), "gemm", [&] {
    cpu::kernels<scalar_t>().gemm({
        .m = c.size(0),
        .n = c.size(1),
        .k = a.size(1),
        .threads = thread_count(),
        .a = a.const_data_ptr<scalar_t>(),
        .a_row = a.stride(0),
        .a_column = a.stride(1),
        .b = b.const_data_ptr<scalar_t>(),
        .b_row = b.stride(0),
        .b_column = b.stride(1),
        .bias = data<scalar_t>(bias),
        .c = c.data_ptr<scalar_t>(),
        .c_row = c.stride(0),
        .accumulate = accumulate,
        .a_sums = a_sums.has_value() ? a_sums->data_ptr<scalar_t>() : nullptr,
    });
  });
}

Tensor matrix_product(const Tensor& a, const Tensor& b, const OptionalTensor& bias = std::nullopt) {
  const Tensor c = fresh({a.size(0), b.size(1)}, a);
  multiply_into(c, a, b, bias);
  return c;
}

// x W^T + bias for rows x (N, I), which takes the first I columns of W. Contiguous, because how
// few rows are multiplied depends on the layout.
Tensor multiply_weight(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return matrix_product(x.contiguous(), weight.contiguous().slice(1, 0, x.size(1)).t(), bias);
}

// The same for all steps at once: (T, B, I) to a fresh (T, B, G*H).
Tensor project_input(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor product = is_quantized(weight)
                             ? quantized_product(flat(x), weight, /*index=*/0, bias)
                             : multiply_weight(flat(x), weight, bias);
  return product.view({x.size(0), x.size(1), weight.size(0)});
}

// x with zeros at padded steps. Their gates have zero gradients, but zero times whatever
// padding holds may be NaN.
Tensor without_padding(const Tensor& x, const OptionalTensor& lengths) {
  if (!lengths.has_value()) return x;
  const Tensor steps = at::arange(x.size(0), lengths->options());
  return x.masked_fill(steps.unsqueeze(1).ge(*lengths).unsqueeze(2), 0);
}

// The gradients of a weight and its bias from those of its outputs, (N, rows), and its inputs.
std::pair<Tensor, Tensor> weight_gradient(const Tensor& d_rows, const Tensor& inputs) {
  const Tensor weight = fresh({d_rows.size(1), inputs.size(1)}, d_rows);
  const Tensor bias = fresh({d_rows.size(1)}, d_rows);
  multiply_into(weight, d_rows.t(), inputs, std::nullopt, /*accumulate=*/false, bias);
  return {weight, bias};
}

struct ScanShape {
  CellShape cell;
  int64_t steps, batch, input, hidden, state_size;
  bool projects;
  int64_t heads;
};

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

ScanExtraList join_extras(std::initializer_list<const OptionalTensor*> extras) {
  const bool none = std::none_of(extras.begin(), extras.end(),
                                 [](const OptionalTensor* extra) { return extra->has_value(); });
  if (none) return std::nullopt;
  c10::List<OptionalTensor> list;
  for (const OptionalTensor* extra : extras) list.push_back(*extra);
  return list;
}

// The extras of a call, checked and contiguous.
struct ScanExtras {
  OptionalTensor h_mask, zoneout_h, zoneout_c, reset_h, reset_c, gain_ih, gain_hh, gain_c, bias_c;
  size_t count = 0;  // elements of the argument

  bool normalises() const { return gain_ih.has_value(); }
};

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
  TORCH_CHECK_VALUE(!extras.h_mask.has_value() || (cell.recurrent && !cell.gates_state),
                    "h_mask goes with a cell that multiplies the whole state with a matrix, got ",
                    name);
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

// The weights of the units themselves, (U*H,).
OptionalTensor own_weights(const CellShape& cell, const Tensor& w_hh, const OptionalTensor& w_ch) {
  return cell.recurrent ? contiguous(w_ch) : OptionalTensor(w_hh);
}

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
  const OptionalTensor unit_weights = own_weights(cell, w_hh_rows, w_ch);
  const Bias bias = fold_bias(b_ih, b_hh, cell, H);

  if (save) check_differentiable(w_hh);
  // Where the loop does not multiply all gates at once, the input is multiplied ahead.
  const bool normalises = extras.normalises();
  const bool at_once = !is_quantized(w_hh) && !cell.gates_state && !cell.has_heads && !normalises;
  const bool reads_input = (B >= cpu::kRowsToReadInput || T_ == 1) && I > 0 && at_once;
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
  const Tensor masked = extras.h_mask.has_value() ? fresh({2, B, P}, x) : Tensor();
  if (extras.h_mask.has_value()) {
    masked.select(0, 0).copy_(states.select(0, first) * *extras.h_mask);
  }
  const Tensor apart = save && cell.has_apart ? fresh({T_, B, H}, x) : nothing(x);
  const bool has_inner = projects || cell.gates_state;
  const Tensor inner = has_inner ? fresh({save ? T_ : 1, B, H}, x) : nothing(x);
  const Tensor y = fresh({T_, B, P}, x);
  const bool keeps_c = return_states && cell.has_cell;
  const Tensor c_steps = keeps_c ? fresh({T_, B, cell.states * H}, x) : nothing(x);

  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scan", [&] {
    cpu::kernels<scalar_t>().scan_forward({
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
        .heads = heads,
        .h_mask = data<scalar_t>(extras.h_mask),
        .masked = data_or_null<scalar_t>(masked, extras.h_mask.has_value()),
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

}  // namespace

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
  if (x.dim() == 3 && w_hh.dim() > 0 && x.size(1) < cpu::kRowsToReadInput) {
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
  const OptionalTensor unit_weights = own_weights(cell, w_hh_rows, w_ch);
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
    cpu::kernels<scalar_t>().scan_backward({
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
        .d_unit_weights = data_or_null<scalar_t>(d_own, has_own),
        .heads = heads,
        .h_mask = data<scalar_t>(extras.h_mask),
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

namespace {

// A stretch of steps between two kept states.
struct Stretch {
  int64_t begin;  // the first of its time steps
  int64_t steps;

  Tensor of(const Tensor& tensor) const { return tensor.narrow(0, begin, steps); }
  OptionalTensor of(const OptionalTensor& tensor) const {
    return tensor.has_value() ? OptionalTensor(of(*tensor)) : std::nullopt;
  }
  OptionalTensor lengths(const OptionalTensor& all) const {
    return all.has_value() ? OptionalTensor((*all - begin).clamp(0, steps)) : std::nullopt;
  }
  ScanExtraList extras(const ScanExtraList& all) const {
    if (!all.has_value()) return std::nullopt;
    c10::List<OptionalTensor> own = all->copy();
    for (const size_t extra : {kZoneoutH, kZoneoutC}) {
      if (extra >= own.size()) break;
      const OptionalTensor share = own.get(extra);
      if (share.has_value() && share->size(0) > 1) own.set(extra, of(*share));
    }
    return own;
  }
};

// In the order of processing.
std::vector<Stretch> stretches(int64_t steps, int64_t keep_every, bool reverse) {
  std::vector<Stretch> list;
  for (int64_t n = 0; n < steps; n += keep_every) {
    const int64_t count = std::min(keep_every, steps - n);
    list.push_back({reverse ? steps - n - count : n, count});
  }
  return list;
}

}  // namespace

ScanKept scan_kept_forward(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                           const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                           const OptionalTensor& w_hr, const OptionalTensor& h_0,
                           const OptionalTensor& c_0, const OptionalTensor& lengths_in,
                           const OptionalTensor& resets, std::string_view name, bool reverse,
                           int64_t keep_every, bool return_states, const OptionalTensor& w_ch,
                           const ScanExtraList& extras) {
  const ScanShape shape = check_scan(x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, resets, name, w_ch);
  const auto& [cell, T_, B, I, H, P, projects, heads] = shape;
  check_extras(extras, shape, x, name);
  TORCH_CHECK_VALUE(keep_every > 0, "keep_every must be at least 1, got ", keep_every);
  const OptionalTensor lengths = check_lengths(lengths_in, B, T_, "T");
  const std::vector<Stretch> list = stretches(T_, keep_every, reverse);
  const int64_t count = static_cast<int64_t>(list.size());
  const Tensor y = fresh({T_, B, P}, x);
  const Tensor h_kept = fresh({count, B, P}, x);
  const Tensor c_kept = cell.has_cell ? fresh({count, B, cell.states * H}, x) : nothing(x);
  const bool keeps_c = return_states && cell.has_cell;
  const Tensor c_steps = keeps_c ? fresh({T_, B, cell.states * H}, x) : nothing(x);
  const auto first = [&](const Tensor& kept, const OptionalTensor& given) {
    given.has_value() ? kept.select(0, 0).copy_(*given) : kept.select(0, 0).zero_();
  };
  first(h_kept, h_0);
  if (cell.has_cell) first(c_kept, c_0);
  Tensor h_n, c_n;
  for (int64_t i = 0; i < count; ++i) {
    const Stretch& stretch = list[i];
    const OptionalTensor c = cell.has_cell ? OptionalTensor(c_kept.select(0, i)) : std::nullopt;
    const ScanSaved run = run_scan(stretch.of(x), w_ih, w_hh, b_ih, b_hh, w_hr, h_kept.select(0, i),
                                   c, stretch.lengths(lengths), stretch.of(resets), name, reverse,
                                   /*save=*/false, return_states, w_ch, stretch.extras(extras));
    stretch.of(y).copy_(std::get<0>(run));
    if (keeps_c) stretch.of(c_steps).copy_(std::get<8>(run));
    h_n = std::get<1>(run);
    c_n = std::get<2>(run);
    if (i + 1 < count) {
      h_kept.select(0, i + 1).copy_(h_n);
      if (cell.has_cell) c_kept.select(0, i + 1).copy_(c_n);
    }
  }
  return {y, h_n, c_n, h_kept, c_kept, c_steps};
}

ScanGradients scan_kept_backward(const OptionalTensor& d_y, const OptionalTensor& d_h_n,
                                 const OptionalTensor& d_c_n, const Tensor& x, const Tensor& w_ih,
                                 const Tensor& w_hh, const OptionalTensor& b_ih,
                                 const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                                 const OptionalTensor& lengths_in, const OptionalTensor& resets,
                                 const Tensor& h_kept, const Tensor& c_kept, std::string_view name,
                                 bool reverse, int64_t keep_every, bool needs_x,
                                 const OptionalTensor& d_c_steps, const OptionalTensor& w_ch,
                                 const ScanExtraList& extras) {
  const ScanShape shape =
      check_scan(x, w_ih, w_hh, b_ih, b_hh, w_hr, d_h_n, d_c_n, resets, name, w_ch);
  const auto& [cell, T_, B, I, H, P, projects, heads] = shape;
  check_extras(extras, shape, x, name);
  TORCH_CHECK_VALUE(keep_every > 0, "keep_every must be at least 1, got ", keep_every);
  const OptionalTensor lengths = check_lengths(lengths_in, B, T_, "T");
  check_tensor(d_y, "d_y", "(T, B, P)", {T_, B, P}, x, "x");
  const int64_t cell_size = cell.states * H;
  check_tensor(d_c_steps, "d_c_steps", "(T, B, H)", {T_, B, cell_size}, x, "x");
  const std::vector<Stretch> list = stretches(T_, keep_every, reverse);
  const int64_t count = static_cast<int64_t>(list.size());
  check_saved(h_kept, "h_kept", {count, B, P}, x);
  if (cell.has_cell) check_saved(c_kept, "c_kept", {count, B, cell_size}, x);
  const Tensor d_x = needs_x ? fresh({T_, B, I}, x) : nothing(x);
  std::array<Tensor, 6> weights;  // w_ih, w_hh, b_ih, b_hh, w_hr, w_ch
  std::vector<Tensor> d_extras;
  OptionalTensor d_h = d_h_n, d_c = d_c_n;
  for (int64_t i = count - 1; i >= 0; --i) {
    const Stretch& stretch = list[i];
    const OptionalTensor c = cell.has_cell ? OptionalTensor(c_kept.select(0, i)) : std::nullopt;
    const OptionalTensor own_lengths = stretch.lengths(lengths), own_resets = stretch.of(resets);
    const Tensor own_x = stretch.of(x);
    const ScanExtraList own_extras = stretch.extras(extras);
    const auto [y, h_n, c_n, gates, apart, states, cells, inner, c_steps, x_sums, r_sums, c_sums,
                moments] = run_scan(own_x, w_ih, w_hh, b_ih, b_hh, w_hr, h_kept.select(0, i), c,
                                    own_lengths, own_resets, name, reverse, /*save=*/true,
                                    /*return_states=*/false, w_ch, own_extras);
    const auto [d_own_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_h_0, d_c_0, d_w_ch,
                d_own_extras] =
        scan_backward(stretch.of(d_y), d_h, d_c, own_x, w_ih, w_hh, w_hr, own_lengths, own_resets,
                      gates, apart, states, cells, inner, name, reverse, needs_x,
                      stretch.of(d_c_steps), w_ch, own_extras, x_sums, r_sums, c_sums, moments);
    if (needs_x) stretch.of(d_x).copy_(d_own_x);
    const std::array<Tensor, 6> own{d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_w_ch};
    for (size_t w = 0; w < own.size(); ++w) {
      i + 1 == count ? weights[w] = own[w] : weights[w].add_(own[w]);
    }
    if (d_extras.empty()) {
      d_extras = d_own_extras;
    } else {
      for (size_t extra = 0; extra < d_extras.size(); ++extra) {
        d_extras[extra].add_(d_own_extras[extra]);
      }
    }
    d_h = d_h_0;
    d_c = cell.has_cell ? OptionalTensor(d_c_0) : std::nullopt;
  }
  return {d_x,        weights[0], weights[1], weights[2],
          weights[3], weights[4], *d_h,       cell.has_cell ? *d_c : nothing(x),
          weights[5], d_extras};
}

namespace {

struct AttendShape {
  int64_t steps, batch, source, key_size, memory_size, heads, window;
};

AttendShape check_attend(const Tensor& query, const Tensor& keys, const Tensor& memory,
                         const OptionalTensor& weight_v, bool additive,
                         const OptionalTensor& positions, int64_t window, int64_t heads) {
  check_floating(query, "query");
  check_dim(query, "query", 3, "(T, B, A)");
  const int64_t steps = query.size(0), batch = query.size(1);
  check_memory(keys, memory, weight_v, batch, additive, query, "query");
  check_tensor(query, "query", "(T, B, A)", {steps, batch, keys.size(2)}, keys, "keys");
  check_heads(heads, keys, memory);
  check_window(window);
  TORCH_CHECK_VALUE(!positions.has_value() || window > 0,
                    "positions must come with a window around them, got none");
  check_tensor(positions, "positions", "(T, B)", {steps, batch}, query, "query");
  return {steps, batch, memory.size(0), keys.size(2), memory.size(2), heads, window};
}

template <class T>
cpu::Attend<T> attend_arguments(const AttendShape& shape, bool additive, const Tensor& query,
                                const Tensor& keys, const Tensor& memory, const OptionalTensor& v,
                                const OptionalTensor& lengths, const OptionalTensor& positions,
                                const Tensor& attn, T* context) {
  return {
      .additive = additive,
      .steps = shape.steps,
      .batch = shape.batch * shape.heads,
      .heads = shape.heads,
      .source = shape.source,
      .key_size = shape.key_size / shape.heads,
      .memory_size = shape.memory_size / shape.heads,
      .threads = thread_count(),
      .query = query.const_data_ptr<T>(),
      .keys = keys.const_data_ptr<T>(),
      .memory = memory.const_data_ptr<T>(),
      .v = data<T>(v),
      .lengths = data<int64_t>(lengths),
      .window = shape.window,
      .centers = data<T>(positions),
      .attn = attn.data_ptr<T>(),
      .context = context,
  };
}

// The shape of the weights: those of one head come without a dimension for it.
std::vector<int64_t> attn_sizes(int64_t steps, int64_t batch, int64_t heads, int64_t source) {
  if (heads == 1) return {steps, batch, source};
  return {steps, batch, heads, source};
}

}  // namespace

std::tuple<Tensor, Tensor> attend(const Tensor& query_in, const Tensor& keys_in,
                                  const Tensor& memory_in, const OptionalTensor& weight_v,
                                  const OptionalTensor& lengths_in, std::string_view score,
                                  const OptionalTensor& positions_in, int64_t window,
                                  int64_t heads) {
  const bool additive = is_additive(score);
  const AttendShape shape =
      check_attend(query_in, keys_in, memory_in, weight_v, additive, positions_in, window, heads);
  const OptionalTensor lengths = check_lengths(lengths_in, shape.batch, shape.source, "S");
  const OptionalTensor v = contiguous(weight_v), positions = contiguous(positions_in);
  const Tensor query = query_in.contiguous(), keys = rows_first(keys_in, heads),
               memory = rows_first(memory_in, heads);
  const Tensor attn = fresh(attn_sizes(shape.steps, shape.batch, heads, shape.source), query);
  const Tensor context = fresh({shape.steps, shape.batch, shape.memory_size}, query);
  AT_DISPATCH_FLOATING_TYPES(query.scalar_type(), "attend", [&] {
    cpu::kernels<scalar_t>().attend_forward(
        attend_arguments<scalar_t>(shape, additive, query, keys, memory, v, lengths, positions,
                                   attn, context.data_ptr<scalar_t>()));
  });
  return {context, attn};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_backward(
    const OptionalTensor& d_context_in, const OptionalTensor& d_attn_in, const Tensor& query_in,
    const Tensor& keys_in, const Tensor& memory_in, const OptionalTensor& weight_v,
    const OptionalTensor& lengths_in, const Tensor& attn_in, std::string_view score,
    const OptionalTensor& positions_in, int64_t window, int64_t heads) {
  const bool additive = is_additive(score);
  const AttendShape shape =
      check_attend(query_in, keys_in, memory_in, weight_v, additive, positions_in, window, heads);
  const auto [T_, B, S, A, M, N, D] = shape;
  const std::vector<int64_t> sizes = attn_sizes(T_, B, N, S);
  const Tensor attn = check_saved(attn_in, "attn", sizes, query_in);
  check_tensor(d_context_in, "d_context", "(T, B, M)", {T_, B, M}, query_in, "query");
  check_tensor(d_attn_in, "d_attn", N == 1 ? "(T, B, S)" : "(T, B, N, S)", sizes, query_in,
               "query");
  const OptionalTensor lengths = check_lengths(lengths_in, B, S, "S");
  const OptionalTensor v = contiguous(weight_v), d_attn = contiguous(d_attn_in),
                       positions = contiguous(positions_in);
  const Tensor query = query_in.contiguous(), keys = rows_first(keys_in, N),
               memory = rows_first(memory_in, N);
  const Tensor d_context = d_context_in.has_value() ? d_context_in->contiguous()
                                                    : at::zeros({T_, B, M}, query.options());
  const Tensor d_scores = fresh({T_, B * N, S}, query);
  const Tensor d_query = fresh({T_, B, A}, query);
  // With windows the loop makes what is otherwise one product for all steps: it would multiply
  // mostly zeros.
  const bool windows = D > 0, keys_inside = additive || windows;
  Tensor d_keys = keys_inside ? fresh({B * N, S, A / N}, query) : Tensor();
  Tensor d_memory = windows ? fresh({B * N, S, M / N}, query) : Tensor();
  const Tensor d_v = additive ? fresh({B, A}, query) : nothing(query);
  const Tensor d_centers = positions.has_value() ? fresh({T_, B, N}, query) : nothing(query);

  AT_DISPATCH_FLOATING_TYPES(query.scalar_type(), "attend_backward", [&] {
    cpu::kernels<scalar_t>().attend_backward({
        .forward = attend_arguments<scalar_t>(shape, additive, query, keys, memory, v, lengths,
                                              positions, attn, nullptr),
        .d_context = d_context.const_data_ptr<scalar_t>(),
        .d_attn = data<scalar_t>(d_attn),
        .d_scores = d_scores.data_ptr<scalar_t>(),
        .d_query = d_query.data_ptr<scalar_t>(),
        .d_keys = keys_inside ? d_keys.data_ptr<scalar_t>() : nullptr,
        .d_v = data_or_null<scalar_t>(d_v, additive),
        .d_memory = windows ? d_memory.data_ptr<scalar_t>() : nullptr,
        .d_centers = data_or_null<scalar_t>(d_centers, positions.has_value()),
    });
  });
  if (!keys_inside) d_keys = summed_over_steps(d_scores, query, N);
  if (!windows) d_memory = summed_over_steps(attn.view({T_, B * N, S}), d_context, N);
  return {d_query, steps_first(d_keys, N), steps_first(d_memory, N),
          additive ? d_v.sum(0) : nothing(query),
          positions.has_value() ? d_centers.sum(2) : nothing(query)};
}

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
  if (how.step.has_value()) {
    TORCH_CHECK(how.step->scalar_type() == at::kLong && how.step->sizes().equals({shape.batch}),
                "step must be int64 (B,) = (", shape.batch, ",), got ", how.step->scalar_type(),
                " ", shape_text(how.step->sizes()));
    TORCH_CHECK(how.step->device() == x.device(), "step must be on the device of x, ", x.device(),
                ", got ", how.step->device());
  }
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
    cpu::kernels<scalar_t>().decode_forward(
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
    cpu::kernels<scalar_t>().decode_backward({
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

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_floating(x, "x");
  TORCH_CHECK(x.dim() > 0, "x must be (..., I), got a tensor without dimensions");
  check_dim(weight, "weight", 2, "(O, I)");
  const int64_t inputs = x.size(-1), outputs = weight.size(0);
  check_tensor(weight, "weight", "(O, I)", {outputs, inputs}, x, "x");
  check_tensor(bias, "bias", "(O,)", {outputs}, x, "x");
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.pop_back();
  const Tensor rows = x.reshape({c10::multiply_integers(sizes), inputs});
  sizes.push_back(outputs);
  return multiply_weight(rows, weight, contiguous(bias)).view(sizes);
}

namespace {

Tensor map_activation(const Tensor& x_in, bool is_tanh) {
  check_floating(x_in, "x");
  const Tensor x = x_in.contiguous();
  const Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "activation", [&] {
    const auto& kernels = cpu::kernels<scalar_t>();
    (is_tanh ? kernels.tanh : kernels.sigmoid)(x.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>(),
                                               x.numel());
  });
  return y;
}

}  // namespace

Tensor sigmoid(const Tensor& x) { return map_activation(x, false); }

Tensor tanh(const Tensor& x) { return map_activation(x, true); }

namespace {

void check_positive(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value > 0, name, " must be positive, got ", value);
}

}  // namespace

double multiply_add_rate(int64_t threads, int64_t rounds) {
  check_positive("threads", threads);
  check_positive("rounds", rounds);
  return cpu::kernels<float>().multiply_add_rate(static_cast<int>(threads), rounds);
}

double read_rate(int64_t threads, int64_t bytes, int64_t passes) {
  check_positive("threads", threads);
  check_positive("bytes", bytes);
  check_positive("passes", passes);
  return cpu::kernels<float>().read_rate(static_cast<int>(threads), bytes, passes);
}

}  // namespace pyseq
