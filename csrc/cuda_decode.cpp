// SPDX-License-Identifier: Apache-2.0
#include "cuda_decode.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/decode.h"
#include "cuda_context.h"

namespace pyseq {

namespace {

using at::Tensor;

// The call as kernels take it, with its layers.
template <class T>
struct NativeLayers {
  std::vector<cpu::DecoderLayer<on_cuda::Native<T>>> layers;

  cpu::Decode<on_cuda::Native<T>> of(const cpu::Decode<T>& call) {
    for (int64_t l = 0; l < call.layer_count; ++l) {
      layers.push_back(on_cuda::native(call.layers[l]));
    }
    cpu::Decode<on_cuda::Native<T>> own = on_cuda::native(call);
    own.layers = layers.data();
    return own;
  }
};

// How a persistent launch shares the work out, or nothing where steps alternate with products.
template <class T>
std::optional<cuda::DecodeTiles> decode_tiles(const cpu::Decode<on_cuda::Native<T>>& args,
                                              bool backward) {
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
                                                  on_cuda::storage<T>());
  const cuda::StepPlan plan = cuda::plan_step(facts, shape, choice);
  if (plan.path == cuda::Path::kAlternating) return std::nullopt;
  int each = 0;
  C10_CUDA_CHECK(backward ? cuda::decode_backward_resident(args, &each)
                          : cuda::decode_forward_resident(args, &each));
  if (!on_cuda::run_at_once(plan.grid, each, facts, choice)) return std::nullopt;
  return cuda::DecodeTiles{static_cast<int>(plan.tiles), static_cast<int>(plan.groups)};
}

// A product inside the loop, by torch's library on the current stream.
template <class T>
void multiply(const cuda::StepProduct<on_cuda::Native<T>>& of) {
  const auto& product = of.product;
  const auto matrix = [](const on_cuda::Native<T>* numbers, int64_t rows, int64_t columns,
                         int64_t stride) {
    return on_cuda::view(reinterpret_cast<const T*>(numbers), {rows, columns}, {stride, 1});
  };
  Tensor sums = on_cuda::view(of.sums, {of.rows, of.units});
  const Tensor numbers = matrix(product.from, of.rows, product.count, product.stride);
  const Tensor weights =
      of.across ? matrix(product.weights, product.count, of.units, product.weight_stride)
                : matrix(product.weights, of.units, product.count, product.weight_stride).t();
  if constexpr (std::is_same_v<T, cpu::Accumulate<T>>) {
    of.add ? at::addmm_out(sums, sums, numbers, weights) : at::mm_out(sums, numbers, weights);
  } else if (of.add) {
    sums.add_(on_cuda::wide_product(numbers, weights));
  } else {
    at::mm_out(sums, numbers, weights, at::kFloat);
  }
}

}  // namespace

template <class T>
void cuda_decode_forward(const cpu::Decode<T>& call) {
  using S = on_cuda::Native<T>;
  if (call.batch == 0) return;
  NativeLayers<T> layers;
  const cpu::Decode<S> own = layers.of(call);
  const std::optional<cuda::DecodeTiles> tiles = decode_tiles<T>(own, /*backward=*/false);
  if (!tiles.has_value()) {
    const Tensor work = on_cuda::scratch(cuda::decode_alternate_forward_workspace(own));
    C10_CUDA_CHECK(
        cuda::decode_alternate_forward<S>(own, work.data_ptr(), multiply<T>, on_cuda::stream()));
    return;
  }
  const cuda::DecodeNeeds needs = cuda::decode_forward_needs(own, *tiles);
  const Tensor counters = on_cuda::counters(needs.counters),
               work = on_cuda::scratch(needs.workspace);
  C10_CUDA_CHECK(cuda::decode_forward(own, *tiles, on_cuda::as_counters(counters), work.data_ptr(),
                                      on_cuda::stream()));
}

template <class T>
void cuda_decode_backward(const cpu::DecodeBackward<T>& call) {
  using S = on_cuda::Native<T>;
  if (call.forward.batch == 0) return;
  NativeLayers<T> layers;
  cpu::DecodeBackward<S> own = on_cuda::native(call);
  own.forward = layers.of(call.forward);
  const cpu::Decode<S>& forward = own.forward;
  const std::optional<cuda::DecodeTiles> tiles = decode_tiles<T>(forward, /*backward=*/true);
  if (!tiles.has_value()) {
    const Tensor work = on_cuda::scratch(cuda::decode_alternate_backward_workspace(forward));
    C10_CUDA_CHECK(
        cuda::decode_alternate_backward<S>(own, work.data_ptr(), multiply<T>, on_cuda::stream()));
    return;
  }
  const cuda::DecodeNeeds needs = cuda::decode_backward_needs(forward, *tiles);
  const Tensor counters = on_cuda::counters(needs.counters),
               work = on_cuda::scratch(needs.workspace);
  C10_CUDA_CHECK(cuda::decode_backward(own, *tiles, on_cuda::as_counters(counters), work.data_ptr(),
                                       on_cuda::stream()));
}

#define PYSEQ_INSTANTIATE(T)                                   \
  template void cuda_decode_forward<T>(const cpu::Decode<T>&); \
  template void cuda_decode_backward<T>(const cpu::DecodeBackward<T>&);
PYSEQ_INSTANTIATE(float)
PYSEQ_INSTANTIATE(double)
PYSEQ_INSTANTIATE(at::Half)
PYSEQ_INSTANTIATE(at::BFloat16)
#undef PYSEQ_INSTANTIATE

}  // namespace pyseq
