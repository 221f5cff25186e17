// SPDX-License-Identifier: Apache-2.0
// The pass over a sequence back.
#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>

#include "devices.h"
#include "products.h"
#include "scan.h"
#include "widened.h"

namespace pyseq {

namespace {

// x with zeros at padded steps. Their gates have zero gradients, but zero times whatever
// padding holds may be NaN.
Tensor without_padding(const Tensor& x, const OptionalTensor& lengths) {
  if (!lengths.has_value()) return x;
  const Tensor steps = at::arange(x.size(0), lengths->options());
  return x.masked_fill(steps.unsqueeze(1).ge(*lengths).unsqueeze(2), 0);
}

// What the loop back reads and writes beside its arguments and what was saved.
struct ScanBackwardBuffers {
  Tensor x, d_y, d_h, d_c, d_x, d_w_ih, d_w_hh, d_w_hr, d_b_ih, d_b_hh, d_unit_weights;
  OptionalTensor d_c_steps;
  Tensor d_reset_h, d_reset_c, d_gain_ih, d_gain_hh, d_gain_c, d_bias_c;
};

void launch_backward(const ScanArguments& args, const ScanSaved& saved,
                     const ScanBackwardBuffers& all) {
  const auto& [cell, T_, B, I, H, P, projects, heads] = args.shape;
  const ScanExtras& extras = args.extras;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, args.x.scalar_type(), "scan_backward", [&] {
        using Wide = cpu::Accumulate<scalar_t>;
        kernels_of<scalar_t>(args.x).scan_backward({
            .cell = cell.kind,
            .steps = T_,
            .batch = B,
            .input = I,
            .hidden = H,
            .state_size = P,
            .reverse = args.reverse,
            .threads = thread_count(),
            .x = all.x.const_data_ptr<scalar_t>(),
            .w_ih = args.w_ih.const_data_ptr<scalar_t>(),
            .w_hh = cell.recurrent ? args.w_hh.const_data_ptr<scalar_t>() : nullptr,
            .w_hr = data<scalar_t>(args.w_hr),
            .lengths = data<int64_t>(args.lengths),
            .resets = data<bool>(args.resets),
            .gates = saved.gates.const_data_ptr<scalar_t>(),
            .apart = data_if<scalar_t>(saved.apart),
            .states = saved.states.const_data_ptr<scalar_t>(),
            .cells = data_if<Wide>(saved.cells),
            .inner = data_if<scalar_t>(saved.inner),
            .d_y = all.d_y.const_data_ptr<scalar_t>(),
            .d_h = all.d_h.data_ptr<Wide>(),
            .d_c = data_if<Wide>(all.d_c),
            .d_x = data_if<scalar_t>(all.d_x),
            .d_w_ih = all.d_w_ih.data_ptr<scalar_t>(),
            .d_w_hh = data_if<scalar_t>(all.d_w_hh),
            .d_w_hr = data_if<scalar_t>(all.d_w_hr),
            .d_b_ih = all.d_b_ih.data_ptr<scalar_t>(),
            .d_b_hh = all.d_b_hh.data_ptr<scalar_t>(),
            .d_c_steps = data<Wide>(all.d_c_steps),
            .unit_weights = data<scalar_t>(args.unit_weights),
            .unit_weights_stride = args.masks_own() ? H : 0,
            .d_unit_weights = data_if<Wide>(all.d_unit_weights),
            .heads = heads,
            .h_mask = args.masks_state() ? data<scalar_t>(extras.h_mask) : nullptr,
            .zoneout_h = strided<scalar_t>(extras.zoneout_h),
            .zoneout_c = strided<scalar_t>(extras.zoneout_c),
            .d_reset_h = data_if<Wide>(all.d_reset_h),
            .d_reset_c = data_if<Wide>(all.d_reset_c),
            .norm = scan_norm<scalar_t>(extras, saved),
            .d_gain_ih = data_if<scalar_t>(all.d_gain_ih),
            .d_gain_hh = data_if<scalar_t>(all.d_gain_hh),
            .d_gain_c = data_if<scalar_t>(all.d_gain_c),
            .d_bias_c = data_if<scalar_t>(all.d_bias_c),
        });
      });
}

}  // namespace

ScanGradients run_scan_backward(const ScanArguments& args, const ScanSaved& saved,
                                const ScanIncoming& incoming, bool needs_x) {
  const auto& [cell, T_, B, I, H, P, projects, heads] = args.shape;
  const Tensor &x = args.x, wide = wide_like(x);
  const ScanExtras& extras = args.extras;
  const int64_t rows = args.shape.rows(), cell_size = args.shape.cell_size();
  const auto like = [&](const OptionalTensor& gain) {
    return gain.has_value() ? fresh(gain->sizes(), x) : Tensor();
  };
  const auto each_row = [&](const OptionalTensor& reset, int64_t size) {
    return reset.has_value() ? at::zeros({B, size}, wide.options()) : Tensor();
  };
  ScanBackwardBuffers all{
      .x = without_padding(x, args.lengths).contiguous(),
      .d_y = or_zero(incoming.y, {T_, B, P}, x),
      .d_h = copy_or_zero(incoming.h_n, {B, P}, wide),
      .d_c = cell.has_cell ? copy_or_zero(incoming.c_n, {B, cell_size}, wide) : Tensor(),
      .d_x = needs_x ? fresh({T_, B, I}, x) : Tensor(),
      .d_w_ih = fresh({rows, I}, x),
      .d_w_hh = cell.recurrent ? fresh({rows, P / heads}, x) : Tensor(),
      .d_w_hr = projects ? fresh({P, H}, x) : Tensor(),
      .d_b_ih = fresh({rows}, x),
      .d_b_hh = fresh({rows}, x),
      .d_unit_weights =
          cell.unit_weights > 0 ? at::zeros({B, cell.unit_weights * H}, wide.options()) : Tensor(),
      .d_c_steps = contiguous(at_least_float(incoming.c_steps)),
      .d_reset_h = each_row(extras.reset_h, P),
      .d_reset_c = each_row(extras.reset_c, cell_size),
      .d_gain_ih = like(extras.gain_ih),
      .d_gain_hh = like(extras.gain_hh),
      .d_gain_c = like(extras.gain_c),
      .d_bias_c = like(extras.bias_c)};
  launch_backward(args, saved, all);

  const auto or_nothing = [&](const Tensor& tensor) {
    return tensor.defined() ? tensor : nothing(x);
  };
  Tensor d_w_hh = all.d_w_hh;
  if (heads > 1) {
    const int64_t size = P / heads;
    d_w_hh = d_w_hh.view({heads, cell.gates, size, size}).transpose(0, 1).reshape({rows, size});
  }
  if (args.masks_own()) all.d_unit_weights.mul_(*extras.h_mask);
  Tensor d_w_ch = all.d_unit_weights.defined() ? all.d_unit_weights.sum(0) : nothing(x);
  if (!cell.recurrent) {
    d_w_hh = d_w_ch;
    d_w_ch = nothing(x);
    all.d_b_hh.copy_(all.d_b_ih);
  }
  const auto of_rows = [&](const OptionalTensor& reset, const Tensor& d_rows) {
    return reset.has_value() && reset->dim() == 1 ? d_rows.sum(0) : or_nothing(d_rows);
  };
  std::vector<Tensor> d_extras;
  if (extras.count > 0) {
    d_extras = {nothing(x),
                nothing(x),
                nothing(x),
                of_rows(extras.reset_h, all.d_reset_h),
                of_rows(extras.reset_c, all.d_reset_c),
                or_nothing(all.d_gain_ih),
                or_nothing(all.d_gain_hh),
                or_nothing(all.d_gain_c),
                or_nothing(all.d_bias_c)};
    d_extras.resize(extras.count);
  }
  return {or_nothing(all.d_x),
          all.d_w_ih,
          d_w_hh,
          all.d_b_ih,
          all.d_b_hh,
          or_nothing(all.d_w_hr),
          all.d_h,
          or_nothing(all.d_c),
          d_w_ch,
          d_extras};
}

}  // namespace pyseq
