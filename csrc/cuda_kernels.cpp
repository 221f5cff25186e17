// SPDX-License-Identifier: Apache-2.0
#include "cuda_kernels.h"

#include <algorithm>

#include "cuda/attend.h"
#include "cuda/decode.h"
#include "cuda_context.h"
#include "cuda_scan.h"
#include "devices.h"

namespace pyseq {

namespace {

using at::Tensor;
using on_cuda::as_counters;

// ---- Attention -------------------------------------------------------------------------

template <class T>
void attend_forward(const cpu::Attend<T>& args) {
  const Tensor work = on_cuda::scratch(cuda::attend_workspace(args));
  C10_CUDA_CHECK(cuda::attend_forward(args, work.data_ptr(), on_cuda::stream()));
}

template <class T>
void attend_backward(const cpu::AttendBackward<T>& args) {
  const Tensor work = on_cuda::scratch(cuda::attend_workspace(args.forward));
  C10_CUDA_CHECK(cuda::attend_backward(args, work.data_ptr(), on_cuda::stream()));
}

// ---- Decoder ---------------------------------------------------------------------------

// `blocks` can run at once.
template <class T>
cuda::DecodeTiles decode_tiles(const cpu::Decode<T>& args, int blocks, bool backward) {
  TORCH_CHECK(args.layer_count <= cuda::kMostDecoderLayers, "on CUDA layers must be at most ",
              cuda::kMostDecoderLayers, ", got ", args.layer_count);
  TORCH_CHECK(cuda::choice_from_environment() != cuda::Choice::kAlternating,
              "PYSEQ_CUDA_PATH must be auto or persistent for decoders, which have no other path, "
              "got alternating");
  const cuda::DeviceFacts facts = on_cuda::facts();
  const cuda::StepShape shape = cuda::decode_step({.steps = args.steps,
                                                   .batch = args.batch,
                                                   .hidden = args.hidden,
                                                   .layers = args.layer_count,
                                                   .gates = cell_shape(args.cell).gates,
                                                   .source = args.source,
                                                   .key_size = args.key_size,
                                                   .memory_size = args.memory_size,
                                                   .additive = args.additive,
                                                   .projects_query = args.w_query != nullptr,
                                                   .feeding = args.feeding,
                                                   .backward = backward},
                                                  on_cuda::kStorage<T>);
  const auto bytes = [&](int64_t units, int64_t rows) {
    return cuda::block_bytes(shape, units, rows);
  };
  const int64_t each = std::max<int64_t>(1, blocks / facts.multiprocessors);
  const cuda::StepPlan plan = cuda::plan_step(facts, shape, cuda::Choice::kPersistent, bytes, each);
  TORCH_CHECK(plan.grid <= blocks, "the decoder's blocks must run at once, ", blocks,
              " of them on this device, got ", plan.grid);
  return {static_cast<int>(plan.tiles), static_cast<int>(plan.groups)};
}

template <class T>
void decode_forward(const cpu::Decode<T>& args) {
  if (args.batch == 0) return;
  int blocks = 0;
  C10_CUDA_CHECK(cuda::decode_forward_resident(args, &blocks));
  const cuda::DecodeTiles tiles = decode_tiles(args, blocks, /*backward=*/false);
  const cuda::DecodeNeeds needs = cuda::decode_forward_needs(args, tiles);
  const Tensor counters = on_cuda::counters(needs.counters),
               work = on_cuda::scratch(needs.workspace);
  C10_CUDA_CHECK(
      cuda::decode_forward(args, tiles, as_counters(counters), work.data_ptr(), on_cuda::stream()));
}

template <class T>
void decode_backward(const cpu::DecodeBackward<T>& args) {
  const cpu::Decode<T>& forward = args.forward;
  if (forward.batch == 0) return;
  int blocks = 0;
  C10_CUDA_CHECK(cuda::decode_backward_resident(forward, &blocks));
  const cuda::DecodeTiles tiles = decode_tiles(forward, blocks, /*backward=*/true);
  const cuda::DecodeNeeds needs = cuda::decode_backward_needs(forward, tiles);
  const Tensor counters = on_cuda::counters(needs.counters),
               work = on_cuda::scratch(needs.workspace);
  C10_CUDA_CHECK(cuda::decode_backward(args, tiles, as_counters(counters), work.data_ptr(),
                                       on_cuda::stream()));
}

template <class T>
const cpu::Kernels<T> kTable{
    .gemm = nullptr,
    .scan_forward = &cuda_scan_forward<T>,
    .replay = nullptr,
    .scan_backward = &cuda_scan_backward<T>,
    .attend_forward = &attend_forward<T>,
    .attend_backward = &attend_backward<T>,
    .decode_forward = &decode_forward<T>,
    .decode_backward = &decode_backward<T>,
    .linear_cross_entropy = nullptr,
    .generate = nullptr,
    .sigmoid = nullptr,
    .tanh = nullptr,
    .multiply_add_rate = nullptr,
    .read_rate = nullptr,
};

}  // namespace

void enter_cuda_kernels() {
  cuda_kernels<float> = &kTable<float>;
  cuda_kernels<double> = &kTable<double>;
}

}  // namespace pyseq
