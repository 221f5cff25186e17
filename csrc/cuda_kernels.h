// SPDX-License-Identifier: Apache-2.0
// The table of the CUDA kernels; see devices.h. Compiled only against a torch that has CUDA.
#pragma once

namespace pyseq {

// Enters the tables of all types. Functions that no operator on the device needs are null.
void enter_cuda_kernels();

}  // namespace pyseq
