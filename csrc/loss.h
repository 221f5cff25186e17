// SPDX-License-Identifier: Apache-2.0
// The output layer with its loss as the dispatcher knows it; see functional.py.
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

}  // namespace pyseq
