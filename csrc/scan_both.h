// SPDX-License-Identifier: Apache-2.0
// The operator of both directions of a layer, as the dispatcher knows it.
#pragma once

#include <ATen/core/List.h>

#include "ops.h"

namespace pyseq {

// (y, h_n, c_n) of a scan in each direction, side by side. Weights are w_ih, w_hh, b_ih, b_hh
// and w_hr of the one direction, then of the other.
std::tuple<Tensor, Tensor, Tensor> scan_both(const Tensor& x,
                                             const c10::List<OptionalTensor>& weights,
                                             const OptionalTensor& h_0, const OptionalTensor& c_0,
                                             const OptionalTensor& lengths,
                                             const OptionalTensor& resets, std::string_view cell);

// The same with autograd, by the operator of one scan. On a device backward runs side by side, too,
// since autograd calls it where forward was called; not so under torch.compile and torch.func.
using OneScan = decltype(&scan);
std::tuple<Tensor, Tensor, Tensor> scan_both_recorded(
    OneScan scan, const Tensor& x, const c10::List<OptionalTensor>& weights,
    const OptionalTensor& h_0, const OptionalTensor& c_0, const OptionalTensor& lengths,
    const OptionalTensor& resets, std::string_view cell);

}  // namespace pyseq
