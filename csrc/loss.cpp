// SPDX-License-Identifier: Apache-2.0
#include "loss.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>

#include "arguments.h"
#include "check.h"
#include "cpu/kernels.h"

namespace pyseq {

namespace {

// Rows of logits at a time. More of them share one pass over the weight and its gradient;
// fewer stay in the cache until they have been multiplied on. Measured with 10,000 symbols of
// float32: 64 rows take a third longer than 256, 512 are no faster.
int64_t chunk_rows(int64_t rows, int64_t vocab, int64_t element_size) {
  constexpr int64_t kBytes = 12 << 20, kFew = 64;
  const int64_t fitting = kBytes / (vocab * element_size) / kFew * kFew;
  return std::min(rows, std::clamp(fitting, kFew, cpu::kMaxLossRows));
}

// The rows that count: those whose target is not ignore_index. Every other target must be a
// symbol.
std::vector<int64_t> kept_rows(const Tensor& target, int64_t vocab, int64_t ignore_index) {
  const int64_t* const symbols = target.const_data_ptr<int64_t>();
  std::vector<int64_t> kept;
  kept.reserve(target.numel());
  for (int64_t row = 0; row < target.numel(); ++row) {
    if (symbols[row] == ignore_index) continue;
    TORCH_CHECK(symbols[row] >= 0 && symbols[row] < vocab,
                "target must be from 0 to V - 1 = ", vocab - 1,
                ", or ignore_index = ", ignore_index, ", got ", symbols[row], " at row ", row);
    kept.push_back(row);
  }
  return kept;
}

}  // namespace

LossShape check_loss(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                     const OptionalTensor& bias) {
  check_floating(hidden, "hidden");
  check_dim(hidden, "hidden", 2, "(N, H)");
  check_dim(weight, "weight", 2, "(V, H)");
  const int64_t rows = hidden.size(0), size = hidden.size(1), vocab = weight.size(0);
  TORCH_CHECK(vocab > 0, "weight must be (V, H) with V at least 1, got ",
              shape_text(weight.sizes()));
  check_tensor(weight, "weight", "(V, H)", {vocab, size}, hidden, "hidden");
  check_tensor(bias, "bias", "(V,)", {vocab}, hidden, "hidden");
  TORCH_CHECK(target.scalar_type() == at::kLong, "target must be int64, got ",
              target.scalar_type());
  TORCH_CHECK(target.sizes() == c10::IntArrayRef{rows}, "target must be (N,) = (", rows, ",), got ",
              shape_text(target.sizes()));
  TORCH_CHECK(target.device() == hidden.device(), "target must be on the device of hidden, ",
              hidden.device(), ", got ", target.device());
  return {rows, size, vocab};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& hidden, const Tensor& weight_in, const Tensor& target_in,
    const OptionalTensor& bias_in, int64_t ignore_index, double label_smoothing, bool needs_hidden,
    bool needs_weight, bool needs_bias) {
  const auto [rows, size, vocab] = check_loss(hidden, weight_in, target_in, bias_in);

  Tensor target = target_in.contiguous(), kept_hidden = hidden.contiguous();
  const Tensor weight = weight_in.contiguous();
  const OptionalTensor bias = contiguous(bias_in);
  const auto options = hidden.options();
  std::vector<int64_t> kept = kept_rows(target, vocab, ignore_index);
  const int64_t count = static_cast<int64_t>(kept.size());
  if (count == 0) {
    return {at::full({}, std::numeric_limits<double>::quiet_NaN(), options),
            needs_hidden ? at::zeros_like(kept_hidden) : nothing(hidden),
            needs_weight ? at::zeros_like(weight) : nothing(hidden),
            needs_bias ? at::zeros_like(*bias) : nothing(hidden)};
  }
  Tensor index;
  if (count < rows) {
    index = at::from_blob(kept.data(), {count}, target.options());
    target = target.index_select(0, index);
    kept_hidden = kept_hidden.index_select(0, index);
  }
  const Tensor loss = at::empty({}, options);
  const Tensor d_kept = needs_hidden ? at::empty_like(kept_hidden) : nothing(hidden);
  const Tensor d_weight = needs_weight ? at::empty_like(weight) : nothing(hidden);
  const Tensor d_bias = needs_bias ? at::empty_like(*bias) : nothing(hidden);
  const int64_t chunk = chunk_rows(count, vocab, hidden.element_size());
  const Tensor logits = at::empty({vocab, chunk}, options);

  AT_DISPATCH_FLOATING_TYPES(hidden.scalar_type(), "linear_cross_entropy", [&] {
    cpu::kernels<scalar_t>().linear_cross_entropy({
        .rows = count,
        .vocab = vocab,
        .hidden_size = size,
        .chunk = chunk,
        .threads = thread_count(),
        .label_smoothing = label_smoothing,
        .hidden = kept_hidden.const_data_ptr<scalar_t>(),
        .weight = weight.const_data_ptr<scalar_t>(),
        .bias = data<scalar_t>(bias),
        .target = target.const_data_ptr<int64_t>(),
        .logits = logits.data_ptr<scalar_t>(),
        .loss = loss.data_ptr<scalar_t>(),
        .d_hidden = data_or_null<scalar_t>(d_kept, needs_hidden),
        .d_weight = data_or_null<scalar_t>(d_weight, needs_weight),
        .d_bias = data_or_null<scalar_t>(d_bias, needs_bias),
    });
  });
  Tensor d_hidden = d_kept;
  if (needs_hidden && count < rows) {
    d_hidden = at::zeros({rows, size}, options).index_copy_(0, index, d_kept);
  }
  return {loss, d_hidden, d_weight, d_bias};
}

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                            const OptionalTensor& bias, int64_t ignore_index,
                            double label_smoothing) {
  return std::get<0>(linear_cross_entropy_forward(hidden, weight, target, bias, ignore_index,
                                                  label_smoothing, /*needs_hidden=*/false,
                                                  /*needs_weight=*/false, /*needs_bias=*/false));
}

}  // namespace pyseq
