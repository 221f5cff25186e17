// SPDX-License-Identifier: Apache-2.0
#include "cuda_scan.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>

#include "cuda/scan.h"
#include "cuda_context.h"
#include "devices.h"

namespace pyseq {

namespace {

using at::Tensor;

using on_cuda::native;
using on_cuda::Native;

template <class T>
cuda::Strided<Native<T>> strided(const cpu::Strided<T>& from) {
  return {native(from.data), from.step, from.row};
}

// Into the arguments of either direction: what both have.
template <class Call, class Args>
void share(const Call& call, Args& args) {
  args.cell = call.cell;
  args.steps = call.steps;
  args.batch = call.batch;
  args.hidden = call.hidden;
  args.state_size = call.state_size;
  args.heads = std::max<int64_t>(1, call.heads);
  args.reverse = call.reverse;
  args.w_hh = native(call.w_hh);
  args.w_hr = native(call.w_hr);
  args.unit_weights = native(call.unit_weights);
  args.unit_weights_stride = call.unit_weights_stride;
  args.lengths = call.lengths;
  args.resets = call.resets;
  args.gates = native(call.gates);
  args.apart = native(call.apart);
  args.states = native(call.states);
  args.cells = call.cells;
  args.h_mask = native(call.h_mask);
  args.zoneout_h = strided(call.zoneout_h);
  args.zoneout_c = strided(call.zoneout_c);
}

template <class T>
cuda::ScanNorm<Native<T>> norm_of(const cpu::ScanNorm<T>& norm, const T* bias) {
  return {native(norm.gain_ih), native(norm.gain_hh), native(norm.gain_c),
          native(norm.bias_c),  native(bias),         native(norm.x_sums),
          norm.r_sums,          norm.c_sums,          norm.moments};
}

// How a persistent launch shares the work out, or nothing where steps alternate with products.
template <class T>
std::optional<cuda::ScanTiles> scan_tiles(const cuda::ScanSizes& sizes, int64_t steps, bool norm,
                                          bool backward) {
  const CellShape cell = cell_shape(sizes.cell);
  const cuda::Choice choice = cuda::choice_from_environment();
  if (norm) {
    TORCH_CHECK(choice != cuda::Choice::kPersistent,
                "PYSEQ_CUDA_PATH must be auto or alternating for layer normalisation, got "
                "persistent");
    return std::nullopt;
  }
  const auto tiles_of = [&](int64_t units, int64_t rows) {
    return cuda::ScanTiles{static_cast<int>(std::min(units, sizes.hidden / sizes.heads)),
                           static_cast<int>(rows), cuda::kScanThreads};
  };
  const auto needs_of = [&](const cuda::ScanTiles& tiles) {
    return backward ? cuda::scan_backward_needs<Native<T>>(sizes, tiles)
                    : cuda::scan_forward_needs<Native<T>>(sizes, tiles);
  };
  const auto bytes = [&](int64_t units, int64_t rows) -> std::optional<int64_t> {
    const cuda::ScanNeeds needs = needs_of(tiles_of(units, rows));
    return needs.possible ? std::optional<int64_t>(needs.shared) : std::nullopt;
  };
  const cuda::StepShape shape = cuda::scan_step({.steps = steps,
                                                 .batch = sizes.batch,
                                                 .hidden = sizes.hidden,
                                                 .state_size = sizes.state_size,
                                                 .gates = cell.gates,
                                                 .sums = cell.gates + (cell.has_apart ? 1 : 0),
                                                 .states = cell.states,
                                                 .heads = sizes.heads,
                                                 .directions = loops_at_once,
                                                 .recurrent = cell.recurrent,
                                                 .gates_state = cell.gates_state,
                                                 .backward = backward},
                                                on_cuda::storage<T>());
  const cuda::DeviceFacts facts = on_cuda::facts();
  const cuda::StepPlan plan = cuda::plan_step(facts, shape, choice, bytes);
  if (plan.path == cuda::Path::kAlternating) return std::nullopt;
  const cuda::ScanTiles tiles = tiles_of(plan.tile_units, plan.group_rows);
  if (!cell.recurrent) return tiles;
  int each = 0;
  C10_CUDA_CHECK(backward ? cuda::scan_backward_resident<Native<T>>(sizes, tiles, &each)
                          : cuda::scan_forward_resident<Native<T>>(sizes, tiles, &each));
  const int64_t blocks = needs_of(tiles).blocks * loops_at_once;
  return on_cuda::run_at_once(blocks, each, facts, choice) ? std::optional(tiles) : std::nullopt;
}

// All steps in one launch, or false where they alternate with products.
template <class T, class Args>
bool launch_persistent(const Args& args, bool backward,
                       cuda::ScanNeeds (*needs)(const cuda::ScanSizes&, const cuda::ScanTiles&),
                       cudaError_t (*launch)(const Args&, const cuda::ScanTiles&, unsigned*,
                                             cudaStream_t)) {
  const bool norm = args.norm.gain_ih != nullptr;
  const cuda::ScanSizes sizes = cuda::sizes_of(args);
  const std::optional<cuda::ScanTiles> tiles = scan_tiles<T>(sizes, args.steps, norm, backward);
  if (!tiles.has_value()) return false;
  const Tensor counters = on_cuda::counters(needs(sizes, *tiles).barrier);
  C10_CUDA_CHECK(launch(args, *tiles, on_cuda::as_counters(counters), on_cuda::stream()));
  return true;
}

// As wide_product, for each head.
Tensor wide_products(const Tensor& a, const Tensor& b) {
  return is_short(a.scalar_type()) ? at::bmm(a, b, at::kFloat) : at::bmm(a, b);
}

// The products inside the loop.
struct StepProducts {
  Tensor w_hh;  // (heads, G*D, D), or (1, G*H, P)
  Tensor w_hr;  // (P, H) or nothing
  int64_t gates, heads;

  // (B, P) to (B, G*H), whose rows are (gate, head, unit).
  Tensor of_state(const Tensor& h) const {
    if (heads == 1) return on_cuda::wide_product(h, w_hh.select(0, 0).t());
    const int64_t batch = h.size(0), size = w_hh.size(2);
    const Tensor sums =
        wide_products(h.view({batch, heads, size}).transpose(0, 1), w_hh.transpose(1, 2));
    return sums.view({heads, batch, gates, size}).permute({1, 2, 0, 3}).reshape({batch, -1});
  }

  // The inverse way, (B, G*H) to (B, P).
  Tensor of_gates(const Tensor& rows) const {
    if (heads == 1) return on_cuda::wide_product(rows, w_hh.select(0, 0));
    const int64_t batch = rows.size(0), size = w_hh.size(2);
    const Tensor by_head =
        rows.view({batch, gates, heads, size}).permute({2, 0, 1, 3}).reshape({heads, batch, -1});
    return wide_products(by_head, w_hh).transpose(0, 1).reshape({batch, -1});
  }

  // Of the last gate alone, of a cell that gates its state.
  Tensor last_rows() const {
    const Tensor rows = w_hh.select(0, 0);
    const int64_t hidden = rows.size(1);
    return rows.narrow(0, (gates - 1) * hidden, hidden);
  }
};

template <class T, class Call>
StepProducts products_of(const Call& call, const CellShape& cell) {
  const int64_t heads = std::max<int64_t>(1, call.heads);
  return {
      on_cuda::view(call.w_hh, {heads, cell.gates * call.hidden / heads, call.state_size / heads}),
      on_cuda::view(call.w_hr, {call.state_size, call.hidden}), cell.gates, heads};
}

// Sums, for a kernel of type T.
template <class T>
const cpu::Accumulate<T>* numbers(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<cpu::Accumulate<T>>() : nullptr;
}

template <class T>
void alternate_forward(const cpu::ScanForward<T>& call, const cuda::ScanForward<Native<T>>& args,
                       const CellShape& cell) {
  const int64_t T_ = call.steps, B = call.batch, H = call.hidden, P = call.state_size;
  const StepProducts products = products_of<T>(call, cell);
  const Tensor states = on_cuda::view(call.states, {call.save ? T_ + 1 : 2, B, P});
  const Tensor masked = on_cuda::view(call.masked, {2, B, P});
  const Tensor inner = on_cuda::view(call.inner, {call.save ? T_ : 1, B, H});
  const Tensor r_sums = on_cuda::view(call.norm.r_sums, {call.save ? T_ : 1, B, cell.gates * H});
  const cudaStream_t stream = on_cuda::stream();
  for (int64_t n = 0; n < T_; ++n) {
    const int64_t t = call.reverse ? T_ - 1 - n : n, kept = call.save ? t : 0;
    const int64_t before = call.save ? (call.reverse ? T_ - n : n) : n & 1;
    Tensor sums;
    if (cell.recurrent) {
      sums =
          products.of_state(masked.defined() ? masked.select(0, n & 1) : states.select(0, before));
    }
    if (cell.gates_state) {
      C10_CUDA_CHECK(cuda::scan_gate_forward(args, n, numbers<T>(sums), stream));
      Tensor last = sums.narrow(1, (cell.gates - 1) * H, H);
      last.copy_(on_cuda::wide_product(inner.select(0, kept), products.last_rows().t()));
    }
    if (call.norm) r_sums.select(0, kept).copy_(sums);
    C10_CUDA_CHECK(cuda::scan_step_forward(args, n, numbers<T>(sums), stream));
    if (call.w_hr != nullptr) {
      const Tensor projected = on_cuda::wide_product(inner.select(0, kept), products.w_hr.t());
      C10_CUDA_CHECK(cuda::scan_project_forward(args, n, numbers<T>(projected), stream));
    }
  }
}

// What the loop left of each step, for the products afterwards.
struct GateGradients {
  Tensor x, r;       // (T, B, G*H)
  Tensor projected;  // (T, B, P) or nothing
};

template <class T>
void alternate_backward(const cpu::ScanBackward<T>& call, const cuda::ScanBackward<Native<T>>& args,
                        const CellShape& cell, const GateGradients& d) {
  const int64_t T_ = call.steps, H = call.hidden;
  const StepProducts products = products_of<T>(call, cell);
  const cudaStream_t stream = on_cuda::stream();
  for (int64_t n = T_ - 1; n >= -1; --n) {
    const int64_t t = call.reverse ? T_ - 1 - n : n;
    Tensor sums;
    if (cell.recurrent && n + 1 < T_) {
      const Tensor after = d.r.select(0, call.reverse ? t - 1 : t + 1);
      const int64_t first_rows = (cell.gates - 1) * H;
      sums = cell.gates_state
                 ? on_cuda::wide_product(after.narrow(1, 0, first_rows),
                                         products.w_hh.select(0, 0).narrow(0, 0, first_rows))
                 : products.of_gates(after);
    }
    C10_CUDA_CHECK(cuda::scan_state_backward(args, n, numbers<T>(sums), stream));
    if (call.w_hr != nullptr) {
      const Tensor back =
          n >= 0 ? on_cuda::wide_product(d.projected.select(0, t), products.w_hr) : Tensor();
      C10_CUDA_CHECK(cuda::scan_project_backward(args, n, numbers<T>(back), stream));
    }
    if (cell.gates_state && n >= 0) {
      const Tensor last = on_cuda::wide_product(d.r.select(0, t).narrow(1, (cell.gates - 1) * H, H),
                                                products.last_rows());
      C10_CUDA_CHECK(cuda::scan_gate_backward(args, n, numbers<T>(last), stream));
    }
  }
}

// (T, B, N) as (T * B, N).
Tensor flat(const Tensor& tensor) { return tensor.reshape({-1, tensor.size(2)}); }

// The gradient of W_hh, in the layout in which the loop reads it.
template <class T>
void recurrent_gradient(const cpu::ScanBackward<T>& call, const CellShape& cell, const Tensor& d_r,
                        const Tensor& inner) {
  const int64_t T_ = call.steps, B = call.batch, P = call.state_size, G = cell.gates;
  const int64_t heads = std::max<int64_t>(1, call.heads), rows = G * call.hidden;
  const Tensor states = on_cuda::view(call.states, {T_ + 1, B, P});
  Tensor before = states.narrow(0, call.reverse ? 1 : 0, T_);
  if (call.h_mask != nullptr) before = before * on_cuda::view(call.h_mask, {B, P});
  before = flat(before.contiguous());
  Tensor d_w = on_cuda::view(call.d_w_hh, {rows, P / heads});
  if (heads > 1) {
    const int64_t size = P / heads;
    const Tensor by_head =
        d_r.view({T_ * B, G, heads, size}).permute({2, 1, 3, 0}).reshape({heads, G * size, T_ * B});
    Tensor to = d_w.view({heads, G * size, size});
    to.copy_(at::bmm(by_head, before.view({T_ * B, heads, size}).transpose(0, 1)));
  } else if (cell.gates_state) {
    const int64_t first = rows - call.hidden;
    d_w.narrow(0, 0, first).copy_(at::mm(flat(d_r).narrow(1, 0, first).t(), before));
    d_w.narrow(0, first, call.hidden)
        .copy_(at::mm(flat(d_r).narrow(1, first, call.hidden).t(), flat(inner)));
  } else {
    at::mm_out(d_w, flat(d_r).t(), before);
  }
}

// Of a normalised layer: what each row adds to its weights' gradients.
struct NormRows {
  Tensor gain_ih, gain_hh, bias, apart, gain_c, bias_c;
};

}  // namespace

template <class T>
void cuda_scan_forward(const cpu::ScanForward<T>& call) {
  using S = Native<T>;
  if (call.batch == 0) return;
  cuda::ScanForward<S> args{};
  share(call, args);
  args.save = call.save;
  args.apart_bias = native(call.apart_bias);
  args.inner = native(call.inner);
  args.y = native(call.y);
  args.c_steps = call.c_steps;
  args.masked = native(call.masked);
  args.reset_h = strided(call.reset_h);
  args.reset_c = strided(call.reset_c);
  args.norm = norm_of(call.norm, call.bias);
  const bool persistent = launch_persistent<T>(args, /*backward=*/false,
                                               cuda::scan_forward_needs<S>, cuda::scan_forward<S>);
  if (!persistent) alternate_forward(call, args, cell_shape(call.cell));
}

template <class T>
void cuda_scan_backward(const cpu::ScanBackward<T>& call) {
  using S = Native<T>;
  using A = cpu::Accumulate<T>;
  const CellShape cell = cell_shape(call.cell);
  const int64_t T_ = call.steps, B = call.batch, H = call.hidden, P = call.state_size,
                rows = cell.gates * H;
  const at::TensorOptions options = on_cuda::options(c10::CppTypeToScalarType<T>::value);
  GateGradients d;
  d.x = at::empty({T_, B, rows}, options);
  d.r = cell.has_apart || call.norm ? at::empty({T_, B, rows}, options) : d.x;
  if (call.w_hr != nullptr) d.projected = at::empty({T_, B, P}, options);
  const at::TensorOptions wide = on_cuda::options(c10::CppTypeToScalarType<A>::value);
  const auto each_row = [&](int64_t size) {
    return call.norm ? at::zeros({B, size}, wide) : Tensor();
  };
  const NormRows norm{each_row(rows), each_row(rows), each_row(rows),
                      each_row(H),    each_row(H),    each_row(H)};
  const Tensor work = call.norm ? at::empty({B, (2 * cell.gates + 2) * H}, wide) : Tensor();
  const auto to = [](const Tensor& tensor) {
    return tensor.defined() ? native(tensor.data_ptr<T>()) : nullptr;
  };
  const auto to_wide = [](const Tensor& tensor) {
    return tensor.defined() ? tensor.data_ptr<A>() : nullptr;
  };
  cuda::ScanBackward<S> args{};
  share(call, args);
  args.d_y = native(call.d_y);
  args.d_c_steps = call.d_c_steps;
  args.d_h = call.d_h;
  args.d_c = call.d_c;
  args.d_x_gates = to(d.x);
  args.d_r_gates = to(d.r);
  args.d_projected = to(d.projected);
  args.d_unit_weights = call.d_unit_weights;
  args.d_reset_h = call.d_reset_h;
  args.d_reset_c = call.d_reset_c;
  args.norm = norm_of(call.norm, static_cast<const T*>(nullptr));
  args.row_gain_ih = to_wide(norm.gain_ih);
  args.row_gain_hh = to_wide(norm.gain_hh);
  args.row_bias = to_wide(norm.bias);
  args.row_apart = to_wide(norm.apart);
  args.row_gain_c = to_wide(norm.gain_c);
  args.row_bias_c = to_wide(norm.bias_c);
  args.scratch = to_wide(work);
  if (B > 0 && !launch_persistent<T>(args, /*backward=*/true, cuda::scan_backward_needs<S>,
                                     cuda::scan_backward<S>)) {
    alternate_backward(call, args, cell, d);
  }

  const Tensor inner = on_cuda::view(call.inner, {T_, B, H});
  const int64_t I = call.input;
  const Tensor x = on_cuda::view(call.x, {T_ * B, I});
  const auto out = [](T* data, at::IntArrayRef sizes) { return on_cuda::view(data, sizes); };
  if (call.d_x != nullptr) {
    Tensor d_x = out(call.d_x, {T_ * B, I});
    at::mm_out(d_x, flat(d.x), on_cuda::view(call.w_ih, {rows, I}));
  }
  Tensor d_w_ih = out(call.d_w_ih, {rows, I});
  at::mm_out(d_w_ih, flat(d.x).t(), x);
  Tensor d_b_ih = out(call.d_b_ih, {rows}), d_b_hh = out(call.d_b_hh, {rows});
  if (call.norm) {
    d_b_ih.copy_(norm.bias.sum(0));
    d_b_hh.copy_(d_b_ih);
    if (cell.has_apart) d_b_hh.narrow(0, rows - H, H).copy_(norm.apart.sum(0));
    out(call.d_gain_ih, {rows}).copy_(norm.gain_ih.sum(0));
    out(call.d_gain_hh, {rows}).copy_(norm.gain_hh.sum(0));
    if (call.d_gain_c != nullptr) {
      out(call.d_gain_c, {H}).copy_(norm.gain_c.sum(0));
      out(call.d_bias_c, {H}).copy_(norm.bias_c.sum(0));
    }
  } else {
    d_b_ih.copy_(flat(d.x).sum(0));
    d_b_hh.copy_(flat(d.r).sum(0));
  }
  if (call.d_w_hh != nullptr) recurrent_gradient(call, cell, d.r, inner);
  if (call.d_w_hr != nullptr) {
    Tensor d_w_hr = out(call.d_w_hr, {P, H});
    at::mm_out(d_w_hr, flat(d.projected).t(), flat(inner));
  }
}

#define PYSEQ_INSTANTIATE(T)                                      \
  template void cuda_scan_forward<T>(const cpu::ScanForward<T>&); \
  template void cuda_scan_backward<T>(const cpu::ScanBackward<T>&);
PYSEQ_INSTANTIATE(float)
PYSEQ_INSTANTIATE(double)
PYSEQ_INSTANTIATE(at::Half)
PYSEQ_INSTANTIATE(at::BFloat16)
#undef PYSEQ_INSTANTIATE

}  // namespace pyseq
