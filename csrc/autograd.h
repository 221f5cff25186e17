// SPDX-License-Identifier: Apache-2.0
// The operators of ops.h as the dispatcher's Autograd key runs them: autograd Functions.
#pragma once

#include <ATen/core/List.h>

#include "ops.h"

namespace pyseq::autograd {

ScanResult scan(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                const OptionalTensor& b_hh, const OptionalTensor& w_hr, const OptionalTensor& h_0,
                const OptionalTensor& c_0, const OptionalTensor& lengths,
                const OptionalTensor& resets, std::string_view cell, bool reverse,
                int64_t keep_every, bool return_states, const OptionalTensor& w_ch,
                const OptionalTensor& h_mask, const OptionalTensor& zoneout_h,
                const OptionalTensor& zoneout_c, const OptionalTensor& reset_h,
                const OptionalTensor& reset_c, const OptionalTensor& gain_ih,
                const OptionalTensor& gain_hh, const OptionalTensor& gain_c,
                const OptionalTensor& bias_c);

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& keys, const Tensor& memory,
                                  const OptionalTensor& weight_v, const OptionalTensor& lengths,
                                  std::string_view score, const OptionalTensor& positions,
                                  int64_t window, int64_t heads, const OptionalTensor& step,
                                  bool need_weights);

std::tuple<Tensor, Tensor, Tensor> attend_history(
    const Tensor& query, const Tensor& keys, const Tensor& memory, const Tensor& weight_v,
    const Tensor& weight_history, const OptionalTensor& lengths, const OptionalTensor& past,
    const OptionalTensor& positions, int64_t window, int64_t heads, const OptionalTensor& step,
    std::string_view history, bool need_weights);

Decoded decode(const Tensor& x, at::TensorList layers, const Tensor& keys, const Tensor& memory,
               const Tensor& combine, const OptionalTensor& weight_query,
               const OptionalTensor& weight_v, const OptionalTensor& h_0, const OptionalTensor& c_0,
               const OptionalTensor& feed, const OptionalTensor& lengths,
               const OptionalTensor& dropout_masks, std::string_view cell, std::string_view score,
               bool input_feeding, bool need_weights, const OptionalTensor& weight_history,
               const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
               const OptionalTensor& step, const OptionalTensor& past, int64_t heads,
               int64_t window, std::string_view history, std::string_view order,
               std::string_view fed, const OptionalTensor& memory_rows);

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                            const OptionalTensor& bias, int64_t ignore_index,
                            double label_smoothing);

// With gradients a `scan` of each direction, which has them.
std::tuple<Tensor, Tensor, Tensor> scan_both(const Tensor& x,
                                             const c10::List<OptionalTensor>& weights,
                                             const OptionalTensor& h_0, const OptionalTensor& c_0,
                                             const OptionalTensor& lengths,
                                             const OptionalTensor& resets, std::string_view cell);

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

}  // namespace pyseq::autograd
