// SPDX-License-Identifier: Apache-2.0
// A whole attention decoder on a CUDA device: what the launchers in decode_forward.cu,
// decode_backward.cu and decode_alternate.cu take. Arguments are those of the CPU kernels, without
// quantized weights; every pointer but `layers` is to the device's memory. S is the storage type:
// float, double, Half, Bfloat16.
#pragma once

#include <functional>

#include "../cpu/kernels.h"
#include "types.h"

namespace pyseq::cuda {

// So many layers fit in a kernel's arguments.
constexpr int64_t kMostDecoderLayers = 16;

// Bytes that a launch works in: counters, which must be zero and of this launch alone, and numbers.
struct DecodeNeeds {
  int64_t counters, workspace;
};

// ---- All steps in one launch -----------------------------------------------------------

// How the work is shared out: the batch over groups of blocks that never wait for one another,
// what a step computes over the blocks of a group.
struct DecodeTiles {
  int tiles, groups;
  int threads = 256;  // of a block, at most kDecodeThreads
};
constexpr int kDecodeThreads = 256;

template <class S>
DecodeNeeds decode_forward_needs(const cpu::Decode<S>& args, const DecodeTiles& tiles);
template <class S>
DecodeNeeds decode_backward_needs(const cpu::Decode<S>& args, const DecodeTiles& tiles);

// How many blocks a multiprocessor of the current device can hold at once: all tiles * groups must
// be resident.
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

// ---- Launches for every step, and products between them --------------------------------

// Numbers and weights, both by rows so far apart.
template <class S>
struct Product {
  const S* from;
  int64_t stride;
  const S* weights;  // null: there is no such product
  int64_t weight_stride;
  int64_t count;  // numbers that are multiplied
};

// sums (rows, units) = numbers (rows, count) times weights (units, count) transposed, or `across`
// times weights (count, units); added to what is there with `add`.
template <class S>
struct StepProduct {
  Product<S> product;
  int64_t rows, units;
  bool across, add;
  Accumulate<S>* sums;
};
// Makes it on the stream of the launches, by whatever library there is.
template <class S>
using Multiply = std::function<void(const StepProduct<S>&)>;

template <class S>
int64_t decode_alternate_forward_workspace(const cpu::Decode<S>& args);
template <class S>
int64_t decode_alternate_backward_workspace(const cpu::Decode<S>& args);
template <class S>
cudaError_t decode_alternate_forward(const cpu::Decode<S>& args, void* workspace,
                                     const Multiply<S>& multiply, cudaStream_t stream);
template <class S>
cudaError_t decode_alternate_backward(const cpu::DecodeBackward<S>& args, void* workspace,
                                      const Multiply<S>& multiply, cudaStream_t stream);

}  // namespace pyseq::cuda
