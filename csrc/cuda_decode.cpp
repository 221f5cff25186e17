// SPDX-License-Identifier: Apache-2.0
#include "cuda_decode.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <optional>

#include "cuda/decode.h"
#include "cuda_context.h"

namespace pyseq {

namespace {

using at::Tensor;

// How a persistent launch shares the work out, or nothing where steps alternate with products.
template <class T>
std::optional<cuda::DecodeTiles> decode_tiles(const cpu::Decode<T>& args, bool backward) {
  TORCH_CHECK(args.layer_count <= cuda::kMostDecoderLayers, "on CUDA layers must be at most ",
              cuda::kMostDecoderLayers, ", got ", args.layer_count);
  const cuda::Choice choice = cuda::choice_from_environment();
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
  int blocks = 0;
  C10_CUDA_CHECK(backward ? cuda::decode_backward_resident(args, &blocks)
                          : cuda::decode_forward_resident(args, &blocks));
  const auto bytes = [&](int64_t units, int64_t rows) {
    return cuda::block_bytes(shape, units, rows);
  };
  const int64_t each = std::max<int64_t>(1, blocks / facts.multiprocessors);
  const cuda::StepPlan plan = cuda::plan_step(facts, shape, choice, bytes, each);
  if (plan.path == cuda::Path::kAlternating) return std::nullopt;
  if (plan.grid <= blocks) {
    return cuda::DecodeTiles{static_cast<int>(plan.tiles), static_cast<int>(plan.groups)};
  }
  TORCH_CHECK(choice != cuda::Choice::kPersistent,
              "PYSEQ_CUDA_PATH asks for the persistent kernel, whose blocks must run at once, ",
              blocks, " of them on this device, got ", plan.grid);
  return std::nullopt;
}

// A product inside the loop, by torch's library on the current stream.
template <class T>
void multiply(const cuda::StepProduct<T>& of) {
  const cuda::Product<T>& product = of.product;
  Tensor sums = on_cuda::view(of.sums, {of.rows, of.units});
  const Tensor numbers = on_cuda::view(product.from, {of.rows, product.count}, {product.stride, 1});
  const Tensor weights =
      of.across
          ? on_cuda::view(product.weights, {product.count, of.units}, {product.weight_stride, 1})
          : on_cuda::view(product.weights, {of.units, product.count}, {product.weight_stride, 1})
                .t();
  of.add ? at::addmm_out(sums, sums, numbers, weights) : at::mm_out(sums, numbers, weights);
}

}  // namespace

template <class T>
void cuda_decode_forward(const cpu::Decode<T>& call) {
  if (call.batch == 0) return;
  const std::optional<cuda::DecodeTiles> tiles = decode_tiles(call, /*backward=*/false);
  if (!tiles.has_value()) {
    const Tensor work = on_cuda::scratch(cuda::decode_alternate_forward_workspace(call));
    C10_CUDA_CHECK(
        cuda::decode_alternate_forward<T>(call, work.data_ptr(), multiply<T>, on_cuda::stream()));
    return;
  }
  const cuda::DecodeNeeds needs = cuda::decode_forward_needs(call, *tiles);
  const Tensor counters = on_cuda::counters(needs.counters),
               work = on_cuda::scratch(needs.workspace);
  C10_CUDA_CHECK(cuda::decode_forward(call, *tiles, on_cuda::as_counters(counters), work.data_ptr(),
                                      on_cuda::stream()));
}

template <class T>
void cuda_decode_backward(const cpu::DecodeBackward<T>& call) {
  const cpu::Decode<T>& forward = call.forward;
  if (forward.batch == 0) return;
  const std::optional<cuda::DecodeTiles> tiles = decode_tiles(forward, /*backward=*/true);
  if (!tiles.has_value()) {
    const Tensor work = on_cuda::scratch(cuda::decode_alternate_backward_workspace(forward));
    C10_CUDA_CHECK(
        cuda::decode_alternate_backward<T>(call, work.data_ptr(), multiply<T>, on_cuda::stream()));
    return;
  }
  const cuda::DecodeNeeds needs = cuda::decode_backward_needs(forward, *tiles);
  const Tensor counters = on_cuda::counters(needs.counters),
               work = on_cuda::scratch(needs.workspace);
  C10_CUDA_CHECK(cuda::decode_backward(call, *tiles, on_cuda::as_counters(counters),
                                       work.data_ptr(), on_cuda::stream()));
}

template void cuda_decode_forward<float>(const cpu::Decode<float>&);
template void cuda_decode_forward<double>(const cpu::Decode<double>&);
template void cuda_decode_backward<float>(const cpu::DecodeBackward<float>&);
template void cuda_decode_backward<double>(const cpu::DecodeBackward<double>&);

}  // namespace pyseq
