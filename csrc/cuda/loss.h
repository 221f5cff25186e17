// SPDX-License-Identifier: Apache-2.0
// The cross entropy of logits on a CUDA device, and their gradient: what loss.cu launches. Every
// pointer is to the device's memory. Host code includes this without the compiler for devices.
#pragma once

#include <cstdint>

#include "types.h"

namespace pyseq::cuda {

template <class S>
struct LossRows {
  int64_t rows, vocab;
  int64_t ignore_index;
  double label_smoothing;
  bool differentiates;
  const int64_t* target;  // (rows,)
  const int64_t* count;   // rows, of all launches of a loss, that are not ignored
  S* logits;              // (rows, V); where it differentiates their gradient is written over them
  S* losses;              // (rows,)
};

// For float and double. Of a target that is no symbol the loss and the gradient are NaN.
template <class S>
cudaError_t loss_rows(const LossRows<S>& args, cudaStream_t stream);

}  // namespace pyseq::cuda
