// SPDX-License-Identifier: Apache-2.0
// The output layer with its loss as the dispatcher knows it; see pyseq/functional/.
#pragma once

#include "ops.h"

namespace pyseq {

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                            const OptionalTensor& bias, int64_t ignore_index,
                            double label_smoothing);

// (loss, d_hidden, d_weight, d_bias): the gradients for a gradient of 1 of the loss, without
// elements where they are not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    int64_t ignore_index, double label_smoothing, bool needs_hidden, bool needs_weight,
    bool needs_bias);

struct LossShape {
  int64_t rows, hidden, vocab;
};

// Raises unless the arguments go together.
LossShape check_loss(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                     const OptionalTensor& bias);

// The same on any device, of torch's operators. Nothing waits for the device: where a target is no
// symbol, and on the CPU an error, the loss is NaN.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward_by_torch(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    int64_t ignore_index, double label_smoothing, bool needs_hidden, bool needs_weight,
    bool needs_bias);
Tensor linear_cross_entropy_by_torch(const Tensor& hidden, const Tensor& weight,
                                     const Tensor& target, const OptionalTensor& bias,
                                     int64_t ignore_index, double label_smoothing);

// The logits of some rows, and what to make of them.
struct LossRows {
  int64_t ignore_index;
  double label_smoothing;
  bool differentiates;
  Tensor count;   // (), int64: rows of all chunks that are not ignored
  Tensor target;  // (n,) int64
  Tensor logits;  // (n, V), contiguous; where it differentiates their gradient is written over them
  Tensor losses;  // (n,), to be written: of each row, zero of ignored ones
};

// The loss on a device: the logits of some rows at a time by torch's products, and of those what
// `rows` makes of them.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_in_chunks(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    int64_t ignore_index, double label_smoothing, bool needs_hidden, bool needs_weight,
    bool needs_bias, void (*rows)(const LossRows&));

}  // namespace pyseq
