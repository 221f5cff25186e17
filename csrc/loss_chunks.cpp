// SPDX-License-Identifier: Apache-2.0
// The output layer with its loss on devices whose products are torch's.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <limits>

#include "arguments.h"
#include "check.h"
#include "loss.h"

namespace pyseq {

namespace {

// Rows of logits at a time: enough of them that the products fill a device, few enough that they
// take little memory beside a model's.
int64_t rows_at_once(int64_t rows, int64_t vocab, int64_t element_size) {
  constexpr int64_t kBytes = 64 << 20, kFewest = 256;
  return std::clamp<int64_t>(kBytes / (vocab * element_size) / kFewest * kFewest, kFewest,
                             std::max(rows, kFewest));
}

void rows_by_torch(const LossRows& args) {
  const int64_t vocab = args.logits.size(1);
  const double smoothing = args.label_smoothing, share = smoothing / static_cast<double>(vocab);
  const Tensor ignored = args.target == args.ignore_index;
  const Tensor unknown = ((args.target < 0) | (args.target >= vocab)) & ~ignored;
  const Tensor symbols = args.target.masked_fill(ignored | unknown, 0).unsqueeze(1);
  const Tensor log_probs = at::log_softmax(args.logits, 1);
  Tensor losses = log_probs.gather(1, symbols).squeeze(1) * (smoothing - 1);
  if (smoothing > 0) losses = losses - log_probs.sum(1) * share;
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  args.losses.copy_(losses.masked_fill(ignored, 0).masked_fill(unknown, kNaN));
  if (!args.differentiates) return;
  Tensor gradient = log_probs.exp() - share;
  gradient.scatter_add_(1, symbols,
                        at::empty_like(symbols, gradient.options()).fill_(smoothing - 1));
  gradient.div_(args.count).masked_fill_(ignored.unsqueeze(1), 0);
  args.logits.copy_(gradient.masked_fill_(unknown.unsqueeze(1), kNaN));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_in_chunks(
    const Tensor& hidden_in, const Tensor& weight, const Tensor& target_in,
    const OptionalTensor& bias, int64_t ignore_index, double label_smoothing, bool needs_hidden,
    bool needs_weight, bool needs_bias, void (*rows)(const LossRows&)) {
  const auto [count, size, vocab] = check_loss(hidden_in, weight, target_in, bias);
  const c10::OptionalDeviceGuard guard(hidden_in.device());
  const Tensor target = target_in.contiguous();
  const Tensor ignored = target == ignore_index, counted = (~ignored).sum();
  // What ignored rows hold, NaN even, must not matter, and a product would let it through.
  const Tensor hidden = hidden_in.masked_fill(ignored.unsqueeze(1), 0);
  const auto options = hidden.options();
  const Tensor losses = at::empty({count}, options);
  const Tensor d_hidden = needs_hidden ? at::empty_like(hidden) : nothing(hidden);
  const Tensor d_weight = needs_weight ? at::zeros({vocab, size}, options) : nothing(hidden);
  const Tensor d_bias = needs_bias ? at::zeros({vocab}, options) : nothing(hidden);
  const int64_t most = rows_at_once(count, vocab, hidden.element_size());
  const Tensor buffer = at::empty({std::min(most, count), vocab}, options);
  for (int64_t begin = 0; begin < count; begin += most) {
    const int64_t some = std::min(most, count - begin);
    const auto part = [&](const Tensor& of_rows) { return of_rows.narrow(0, begin, some); };
    Tensor logits = buffer.narrow(0, 0, some);
    at::mm_out(logits, part(hidden), weight.t());
    if (bias.has_value()) logits.add_(*bias);
    rows({.ignore_index = ignore_index,
          .label_smoothing = label_smoothing,
          .differentiates = needs_hidden || needs_weight || needs_bias,
          .count = counted,
          .target = part(target),
          .logits = logits,
          .losses = part(losses)});
    if (needs_hidden) {
      Tensor d_some = part(d_hidden);
      at::mm_out(d_some, logits, weight);
    }
    if (needs_weight) Tensor(d_weight).addmm_(logits.t(), part(hidden));
    if (needs_bias) Tensor(d_bias).add_(logits.sum(0));
  }
  return {losses.sum() / counted, d_hidden, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward_by_torch(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    int64_t ignore_index, double label_smoothing, bool needs_hidden, bool needs_weight,
    bool needs_bias) {
  return linear_cross_entropy_in_chunks(hidden, weight, target, bias, ignore_index, label_smoothing,
                                        needs_hidden, needs_weight, needs_bias, &rows_by_torch);
}

Tensor linear_cross_entropy_by_torch(const Tensor& hidden, const Tensor& weight,
                                     const Tensor& target, const OptionalTensor& bias,
                                     int64_t ignore_index, double label_smoothing) {
  return std::get<0>(linear_cross_entropy_forward_by_torch(
      hidden, weight, target, bias, ignore_index, label_smoothing, /*needs_hidden=*/false,
      /*needs_weight=*/false, /*needs_bias=*/false));
}

}  // namespace pyseq
