// SPDX-License-Identifier: Apache-2.0
// Attention of all queries at once on a CUDA device: what attend.cu launches. Arguments are those
// of the CPU kernels; every pointer is to the device's memory. Host code includes this without the
// compiler for devices.
#pragma once

#include "../cpu/kernels.h"
#include "types.h"

namespace pyseq::cuda {

// Bytes of device memory that a launch works in; 0 where shared memory is enough.
template <class S>
int64_t attend_workspace(const cpu::Attend<S>& args);

template <class S>
cudaError_t attend_forward(const cpu::Attend<S>& args, void* workspace, cudaStream_t stream);

template <class S>
cudaError_t attend_backward(const cpu::AttendBackward<S>& args, void* workspace,
                            cudaStream_t stream);

// The gradients of keys, memory and v over all steps of a call, from those of the scores; pointers
// that are null are not wanted. Also the end of the decoder's backward, whose score may hold the
// past weights.
template <class S>
struct KeyGradients {
  using A = Accumulate<S>;
  cpu::Attend<S> forward;
  const S* d_scores;   // (T, B, S)
  const S* d_context;  // (T, B, M)
  int64_t taps;        // K, or 0
  const S* w_history;  // (N, K, A)
  const A* past;       // (T, B, S), before each step
  S* d_keys;           // (B, S, A)
  S* d_v;              // (B, A)
  S* d_memory;         // (B, S, M)
  S* d_w_history;      // (B, K, A)
};

template <class S>
cudaError_t key_gradients(const KeyGradients<S>& args, cudaStream_t stream);

}  // namespace pyseq::cuda
