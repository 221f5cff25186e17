// SPDX-License-Identifier: Apache-2.0
// The scan on a CUDA device, for its table of kernels: one persistent launch, or products and
// launches that alternate, as the plan says.
#pragma once

#include "cpu/kernels.h"

namespace pyseq {

// For every type, on the current device and stream.
template <class T>
void cuda_scan_forward(const cpu::ScanForward<T>& call);
template <class T>
void cuda_scan_backward(const cpu::ScanBackward<T>& call);

}  // namespace pyseq
