// SPDX-License-Identifier: Apache-2.0
// Products of matrices for what the operators multiply outside their loops: by the CPU's kernels,
// on other devices by torch's library.
#pragma once

#include <utility>

#include "ops.h"

namespace pyseq {

// (T, B, D) as (T * B, D); the product is spelled out because D may be 0.
inline Tensor flat(const Tensor& tensor) {
  return tensor.reshape({tensor.size(0) * tensor.size(1), tensor.size(2)});
}

// c = a b (+ bias), or c += a b, for matrices; c's rows are contiguous. With `a_sums` also the
// sums of a's rows.
void multiply_into(const Tensor& c, const Tensor& a, const Tensor& b,
                   const OptionalTensor& bias = std::nullopt, bool accumulate = false,
                   const OptionalTensor& a_sums = std::nullopt);

Tensor matrix_product(const Tensor& a, const Tensor& b, const OptionalTensor& bias = std::nullopt);

// x W^T + bias for all steps at once, of weights of either kind: (T, B, I) to (T, B, G*H), which is
// `into`, contiguous, or fresh.
Tensor project_input(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const Tensor& into = {});

// The gradients of a weight and its bias from those of its outputs, (N, rows), and its inputs.
std::pair<Tensor, Tensor> weight_gradient(const Tensor& d_rows, const Tensor& inputs);

}  // namespace pyseq
