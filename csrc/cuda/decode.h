// SPDX-License-Identifier: Apache-2.0
// A whole attention decoder on a CUDA device, all steps in one launch: what the launchers in
// decode_forward.cu and decode_backward.cu take. Arguments are those of the CPU kernels, without
// quantized weights; every pointer but `layers` is to the device's memory. S is the storage
// type: float, double, Half, Bfloat16.
#pragma once

#include "../cpu/kernels.h"
#include "types.h"

namespace pyseq::cuda {

// So many layers fit in a kernel's arguments.
constexpr int64_t kMostDecoderLayers = 16;

// How the work is shared out: the batch over groups of blocks that never wait for one another,
// what a step computes over the blocks of a group.
struct DecodeTiles {
  int tiles, groups;
  int threads = 256;  // of a block, at most kDecodeThreads
};
constexpr int kDecodeThreads = 256;

// Bytes that a launch works in: counters, which must be zero and of this launch alone, and numbers.
struct DecodeNeeds {
  int64_t counters, workspace;
};

template <class S>
DecodeNeeds decode_forward_needs(const cpu::Decode<S>& args, const DecodeTiles& tiles);
template <class S>
DecodeNeeds decode_backward_needs(const cpu::Decode<S>& args, const DecodeTiles& tiles);

// How many blocks can be resident at once on the current device: tiles * groups at most.
template <class S>
cudaError_t decode_forward_resident(const cpu::Decode<S>& args, int* blocks);
template <class S>
cudaError_t decode_backward_resident(const cpu::Decode<S>& args, int* blocks);

template <class S>
cudaError_t decode_forward(const cpu::Decode<S>& args, const DecodeTiles& tiles, unsigned* counters,
                           void* workspace, cudaStream_t stream);
template <class S>
cudaError_t decode_backward(const cpu::DecodeBackward<S>& args, const DecodeTiles& tiles,
                            unsigned* counters, void* workspace, cudaStream_t stream);

}  // namespace pyseq::cuda
