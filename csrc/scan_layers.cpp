// SPDX-License-Identifier: Apache-2.0
#include "scan_layers.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/as_strided_native.h>

#include "arguments.h"
#include "dispatcher.h"
#include "quantized.h"
#include "scan.h"
#include "scan_both.h"
#include "straight.h"

namespace pyseq {

namespace {

const OptionalTensor kNone;
const ScanExtraList kNoExtras;

// Whether the operators would do no more than what is done here, if they take the arguments.
bool is_straight(const LayersInputs& in) {
  const StraightCall call;
  bool takes_all = call.is_open() && call.computes_in(in.x) && call.takes(in.lengths);
  for (const Tensor& part : in.state) takes_all = takes_all && call.takes(part);
  for (const DirectionWeights& own : in.weights) {
    takes_all = takes_all && call.takes(own.w_ih) && call.takes(own.w_hh) && call.takes(own.b_ih) &&
                call.takes(own.b_hh) && call.takes(own.w_hr) &&
                !(in.training && is_quantized(own.w_hh));
  }
  return takes_all;
}

int64_t directions(const LayersInputs& in) { return in.bidirectional ? 2 : 1; }

// Whether the arguments have the dimensions that a module takes; sizes are the operators' affair.
bool has_layout(const LayersInputs& in, const CellShape& cell) {
  const int64_t dim = in.x.dim(), count = static_cast<int64_t>(in.weights.size());
  const size_t parts = cell.has_cell ? 2 : 1;
  bool fits = cell.states <= 1 && (dim == 2 || dim == 3) && count > 0 &&
              count % directions(in) == 0 && (in.state.empty() || in.state.size() == parts) &&
              !(dim == 2 && in.lengths.has_value());
  for (const Tensor& part : in.state) fits = fits && part.dim() == dim && part.size(0) == count;
  return fits;
}

// A view that no one but the kernels sees.
Tensor viewed(const Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides,
              int64_t offset = 0) {
  return at::native::as_strided_tensorimpl(tensor, sizes, strides,
                                           tensor.storage_offset() + offset);
}

// The input as (T, B, I).
Tensor time_major(const LayersInputs& in) {
  const Tensor& x = in.x;
  if (x.dim() == 2) return viewed(x, {x.size(0), 1, x.size(1)}, {x.stride(0), 0, x.stride(1)});
  if (!in.batch_first) return x;
  return viewed(x, {x.size(1), x.size(0), x.size(2)}, {x.stride(1), x.stride(0), x.stride(2)});
}

// What a layer or direction starts from, (B, .) or of `count` of them (count, B, .).
OptionalTensor state_of(const LayersInputs& in, size_t part, size_t first, int64_t count) {
  if (part >= in.state.size()) return std::nullopt;
  const Tensor& all = in.state[part];
  const int64_t batch = all.dim() == 2 ? 1 : all.size(1), width = all.size(-1);
  const int64_t row = all.dim() == 2 ? 0 : all.stride(1), offset = first * all.stride(0);
  return count == 1
             ? viewed(all, {batch, width}, {row, all.stride(-1)}, offset)
             : viewed(all, {count, batch, width}, {all.stride(0), row, all.stride(-1)}, offset);
}

struct LayerRun {
  Tensor y, h_n, c_n;
};

LayerRun run_layer(const LayersInputs& in, const Tensor& x, size_t first) {
  const OptionalTensor h_0 = state_of(in, 0, first, directions(in)),
                       c_0 = state_of(in, 1, first, directions(in));
  const DirectionWeights& own = in.weights[first];
  if (!in.bidirectional) {
    ScanRun run = run_inference(
        check_scan({x, own.w_ih, own.w_hh, own.b_ih, own.b_hh, own.w_hr, h_0, c_0, in.lengths,
                    /*resets=*/kNone, /*w_ch=*/kNone, kNoExtras, in.cell, /*reverse=*/false}),
        /*return_states=*/false);
    return {std::move(run.y), std::move(run.h_n), std::move(run.c_n)};
  }
  c10::List<OptionalTensor> weights;
  for (size_t direction = 0; direction < 2; ++direction) {
    const DirectionWeights& each = in.weights[first + direction];
    weights.push_back(each.w_ih);
    weights.push_back(each.w_hh);
    for (const OptionalTensor* weight : {&each.b_ih, &each.b_hh, &each.w_hr}) {
      weights.push_back(*weight);
    }
  }
  auto [y, h_n, c_n] = scan_both(x, weights, h_0, c_0, in.lengths, kNone, in.cell);
  return {std::move(y), std::move(h_n), std::move(c_n)};
}

// The last states of all layers as they come from one: (L, .) of the shape of `like`.
Tensor room_for(const Tensor& like, int64_t layers) {
  at::DimVector sizes{layers};
  sizes.append(like.sizes().begin(), like.sizes().end());
  return fresh(sizes, like);
}

bool fits_slot(const Tensor& slots, const Tensor& from) {
  return slots.sizes().slice(1) == from.sizes();
}

// The shape of a contiguous result that nobody has seen yet.
void reshape(const Tensor& own, at::IntArrayRef sizes) {
  own.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
}

}  // namespace

std::optional<LayersResult> scan_layers(const LayersInputs& in) {
  const CellShape cell = scan_cell_shape(in.cell, /*peepholes=*/false);
  if (!has_layout(in, cell) || !is_straight(in)) return std::nullopt;
  const at::AutoDispatchBelowADInplaceOrView below;
  const bool one = in.x.dim() == 2;  // sequence, without a dimension for the batch
  const int64_t count = static_cast<int64_t>(in.weights.size()), each = directions(in);
  const int64_t layers = count / each;
  Tensor y = time_major(in), h_n, c_n;
  for (int64_t layer = 0; layer < layers; ++layer) {
    LayerRun run = run_layer(in, y, static_cast<size_t>(layer * each));
    y = std::move(run.y);
    if (layers == 1) {
      h_n = std::move(run.h_n);
      c_n = std::move(run.c_n);
      break;
    }
    if (layer == 0) {
      h_n = room_for(run.h_n, layers);
      if (cell.has_cell) c_n = room_for(run.c_n, layers);
    }
    // Of weights that were exchanged for others, whose states the module cannot put together.
    if (!fits_slot(h_n, run.h_n) || (cell.has_cell && !fits_slot(c_n, run.c_n))) {
      return std::nullopt;
    }
    fill_slot(h_n, layer, run.h_n);
    if (cell.has_cell) fill_slot(c_n, layer, run.c_n);
  }
  const int64_t steps = y.size(0), batch = y.size(1), width = y.size(2);
  if (one) {
    reshape(y, {steps, width});
  } else if (in.batch_first) {
    y.unsafeGetTensorImpl()->set_sizes_and_strides(at::IntArrayRef{batch, steps, width},
                                                   at::IntArrayRef{width, batch * width, 1});
  }
  const auto with_layers = [&](const Tensor& state) {
    const int64_t own = state.size(-1);
    one ? reshape(state, {count, own}) : reshape(state, {count, batch, own});
  };
  with_layers(h_n);
  if (cell.has_cell) with_layers(c_n);
  return LayersResult{std::move(y), std::move(h_n), cell.has_cell ? std::move(c_n) : Tensor()};
}

std::pair<Tensor, Tensor> scan_step(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                                    const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                    const OptionalTensor& h, const OptionalTensor& c,
                                    std::string_view cell, const OptionalTensor& w_ch) {
  check_dim(x, "x", 2, "(B, I)");
  const StraightCall call;
  if (call.is_open() && call.computes_in(x) && call.takes(w_ih) && call.takes(w_hh) &&
      call.takes(b_ih) && call.takes(b_hh) && call.takes(h) && call.takes(c) && call.takes(w_ch)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor one_step = viewed(x, {1, x.size(0), x.size(1)}, {0, x.stride(0), x.stride(1)});
    const ScanRun run =
        run_inference(check_scan({one_step, w_ih, w_hh, b_ih, b_hh, /*w_hr=*/kNone, h, c,
                                  /*lengths=*/kNone, /*resets=*/kNone, w_ch, kNoExtras, cell,
                                  /*reverse=*/false}),
                      /*return_states=*/false);
    return {run.h_n, or_nothing(run.c_n, x)};
  }
  static const auto op = find_operator<&scan>("pyseq::scan");
  const auto [y, h_n, c_n, c_steps] =
      op.call(x.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, /*w_hr=*/kNone, h, c, /*lengths=*/kNone,
              /*resets=*/kNone, cell, /*reverse=*/false, /*keep_every=*/1, /*return_states=*/false,
              w_ch, kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone);
  return {h_n, c_n};
}

}  // namespace pyseq
