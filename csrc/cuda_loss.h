// SPDX-License-Identifier: Apache-2.0
// The output layer with its loss on a CUDA device. Compiled only against a torch that has CUDA.
#pragma once

#include "ops.h"

namespace pyseq {

// As linear_cross_entropy_by_torch and its forward, with one kernel for the rows of logits.
Tensor linear_cross_entropy_on_cuda(const Tensor& hidden, const Tensor& weight,
                                    const Tensor& target, const OptionalTensor& bias,
                                    int64_t ignore_index, double label_smoothing);
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward_on_cuda(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    int64_t ignore_index, double label_smoothing, bool needs_hidden, bool needs_weight,
    bool needs_bias);

}  // namespace pyseq
