// SPDX-License-Identifier: Apache-2.0
// The decoder on a CUDA device, for its table of kernels: one persistent launch, or products and
// launches that alternate, as the plan says.
#pragma once

#include "cpu/kernels.h"

namespace pyseq {

// For every type, on the current device and stream.
template <class T>
void cuda_decode_forward(const cpu::Decode<T>& call);
template <class T>
void cuda_decode_backward(const cpu::DecodeBackward<T>& call);

}  // namespace pyseq
