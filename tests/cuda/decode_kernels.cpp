// SPDX-License-Identifier: Apache-2.0
// The decoder's kernels for the tests: sizes and pointers in the order of the structs.
#include <vector>

#include "cuda/attend.cu"
#include "cuda/decode_alternate.cu"
#include "cuda/decode_backward.cu"
#include "cuda/decode_forward.cu"
#include "exports.h"

namespace {

using namespace pyseq;

constexpr int kPerLayer = 13, kSizes = 20;

template <class S>
cpu::DecoderLayer<S> layer_of(void* const* data, int64_t stride) {
  const auto at = [&](int i) { return static_cast<S*>(data[i]); };
  const auto carried = [&](int i) { return static_cast<cuda::Accumulate<S>*>(data[i]); };
  cpu::DecoderLayer<S> layer{};
  layer.w_in = at(0);
  layer.w_in_stride = stride;
  layer.w_hh = at(1);
  layer.bias = at(2);
  layer.apart_bias = at(3);
  layer.gates = at(4);
  layer.apart = at(5);
  layer.states = at(6);
  layer.cells = carried(7);
  layer.mask = at(8);
  layer.d_x_gates = at(9);
  layer.d_r_gates = at(10);
  layer.d_h = carried(11);
  layer.d_c = carried(12);
  return layer;
}

template <class S>
cpu::Decode<S> decode_of(const int64_t* sizes, void* const* data,
                         const std::vector<cpu::DecoderLayer<S>>& layers) {
  const auto at = [&](int i) { return static_cast<S*>(data[i]); };
  cpu::Decode<S> args{};
  args.cell = static_cast<CellKind>(sizes[0]);
  args.additive = sizes[1] != 0;
  args.feeding = sizes[2] != 0;
  args.save = sizes[3] != 0;
  args.feeds_context = sizes[4] != 0;
  args.attends_first = sizes[5] != 0;
  args.steps = sizes[6];
  args.batch = sizes[7];
  args.hidden = sizes[8];
  args.layer_count = sizes[9];
  args.source = sizes[10];
  args.key_size = sizes[11];
  args.memory_size = sizes[12];
  args.attn_step = sizes[13];
  args.heads = sizes[14];
  args.window = sizes[15];
  args.position_size = sizes[16];
  args.taps = sizes[17];
  args.cumulative = sizes[18] != 0;
  args.layers = layers.data();
  args.feed = at(0);
  args.keys = at(1);
  args.memory = at(2);
  args.combine = at(3);
  args.w_query = at(4);
  args.v = at(5);
  args.lengths = static_cast<const int64_t*>(data[6]);
  args.attn = at(7);
  args.query = at(8);
  args.context = at(9);
  args.output = at(10);
  args.first_step = static_cast<const int64_t*>(data[11]);
  args.w_position = at(12);
  args.position_v = at(13);
  args.w_history = at(14);
  args.positions = at(15);
  args.centers = static_cast<cuda::Accumulate<S>*>(data[16]);
  args.past = static_cast<cuda::Accumulate<S>*>(data[17]);
  return args;
}

template <class S>
cpu::DecodeBackward<S> backward_of(const cpu::Decode<S>& forward, void* const* data) {
  const auto at = [&](int i) { return static_cast<S*>(data[i]); };
  return {forward, at(0),  at(1),  at(2),  at(3),
          at(4),   at(5),  at(6),  at(7),  at(8),
          at(9),   at(10), at(11), at(12), static_cast<cuda::Accumulate<S>*>(data[13]),
          at(14)};
}

struct Workspace {
  std::vector<unsigned> counters;
  std::vector<double> numbers;

  explicit Workspace(const cuda::DecodeNeeds& needs)
      : counters(static_cast<size_t>(needs.counters) / sizeof(unsigned)),
        numbers(static_cast<size_t>(needs.workspace) / sizeof(double) + 1, __builtin_nan("")) {}
};

// What a library makes on a device.
template <class S>
void multiply(const cuda::StepProduct<S>& of) {
  const auto& [product, rows, units, across, add, sums] = of;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t unit = 0; unit < units; ++unit) {
      cuda::Accumulate<S> sum = 0;
      for (int64_t k = 0; k < product.count; ++k) {
        const int64_t weight =
            across ? k * product.weight_stride + unit : unit * product.weight_stride + k;
        sum += cuda::widen(product.from[row * product.stride + k]) *
               cuda::widen(product.weights[weight]);
      }
      cuda::Accumulate<S>& to = sums[row * units + unit];
      to = add ? to + sum : sum;
    }
  }
}

// Without tiles the launches of steps.
template <class S>
int decode(const int64_t* sizes, int tiles, int groups, void* const* data, void* const* of_layers,
           void* const* backward) {
  std::vector<cpu::DecoderLayer<S>> layers;
  for (int64_t l = 0; l < sizes[9]; ++l) {
    const int64_t stride = l == 0 ? sizes[kSizes - 1] : sizes[8];
    layers.push_back(layer_of<S>(of_layers + l * kPerLayer, stride));
  }
  const cpu::Decode<S> args = decode_of<S>(sizes, data, layers);
  const cuda::DecodeTiles share{tiles, groups, /*threads=*/64};
  if (backward == nullptr) {
    if (tiles == 0) {
      Workspace work({0, cuda::decode_alternate_forward_workspace(args)});
      return cuda::decode_alternate_forward<S>(args, work.numbers.data(), multiply<S>, nullptr);
    }
    Workspace work(cuda::decode_forward_needs(args, share));
    return cuda::decode_forward(args, share, work.counters.data(), work.numbers.data(), nullptr);
  }
  const cpu::DecodeBackward<S> all = backward_of<S>(args, backward);
  if (tiles == 0) {
    Workspace work({0, cuda::decode_alternate_backward_workspace(args)});
    return cuda::decode_alternate_backward<S>(all, work.numbers.data(), multiply<S>, nullptr);
  }
  Workspace work(cuda::decode_backward_needs(args, share));
  return cuda::decode_backward(all, share, work.counters.data(), work.numbers.data(), nullptr);
}

}  // namespace

#define PYSEQ_EXPORT_DECODE(S, name)                                                             \
  PYSEQ_EXPORT int decode_##name(const int64_t* sizes, int tiles, int groups, void* const* data, \
                                 void* const* layers, void* const* backward) {                   \
    return decode<S>(sizes, tiles, groups, data, layers, backward);                              \
  }
PYSEQ_EXPORT_DECODE(float, float32)
PYSEQ_EXPORT_DECODE(double, float64)
PYSEQ_EXPORT_DECODE(cuda::Half, float16)
PYSEQ_EXPORT_DECODE(cuda::Bfloat16, bfloat16)
