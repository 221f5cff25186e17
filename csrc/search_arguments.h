// SPDX-License-Identifier: Apache-2.0
// The arguments of a decoder that runs on its own tokens, checked once and handed on.
#pragma once

#include <vector>

#include "decode.h"

namespace pyseq {

constexpr int64_t kSpecialTokens = 3;  // <pad>, <start> and <stop>

// What both operators get of a decoder that runs on its own tokens.
struct OwnTokensInputs {
  const Tensor& embedding;
  at::TensorList layers;
  const OptionalTensor &keys, &memory, &combine;
  const Tensor& output_weight;
  const OptionalTensor &output_bias, &weight_query, &weight_v;
  const Tensor& h_0;
  const OptionalTensor &c_0, &feed, &lengths;
  std::string_view cell, score;
  bool input_feeding;
  const OptionalTensor &weight_history, &weight_position, &weight_position_v, &step, &past;
  int64_t heads, window;
  std::string_view history, order, fed;

  bool attends() const { return score != "none"; }
};

// Checked and contiguous arguments of an operator that runs a decoder on its own tokens.
struct Prepared {
  DecodeShape shape;
  int64_t vocab;
  bool input_feeding, feeds_context, attends_first, cumulative;
  int64_t window;
  Tensor embedding, output_weight, h_0, c_0, feed;
  OptionalTensor keys, memory, combine, output_bias, weight_query, weight_v, lengths;
  OptionalTensor weight_history, weight_position, weight_position_v, step, past;
  std::vector<Tensor> weights;  // of each layer w_ih and w_hh
  std::vector<Bias> biases;

  // What the kernel needs for up to `beam_size` hypotheses a row. `layers` must outlive it.
  template <class T>
  cpu::Generate<T> arguments(std::vector<cpu::DecoderLayer<T>>& layers, int64_t beam_size) const {
    const int64_t H = shape.hidden;
    layers.clear();
    for (int64_t l = 0; l < shape.layers; ++l) {
      const int64_t below = l > 0 ? H : input_feeding ? shape.fed_size : 0;
      layers.push_back(layer_weights<T>(weights[2 * l], weights[2 * l + 1], biases[l], below,
                                        /*run=*/l > 0 ? 0 : 1));
    }
    cpu::Decode<T> decoder{};
    decoder.cell = shape.cell.kind;
    decoder.additive = shape.additive;
    decoder.feeding = input_feeding;
    decoder.feeds_context = feeds_context;
    decoder.attends_first = attends_first;
    decoder.batch = shape.batch * beam_size;
    decoder.hidden = H;
    decoder.layer_count = shape.layers;
    decoder.source = shape.source;
    decoder.key_size = shape.key_size;
    decoder.memory_size = shape.memory_size;
    decoder.threads = thread_count();
    decoder.layers = layers.data();
    decoder.keys = data<T>(keys);
    decoder.memory = data<T>(memory);
    decoder.combine = values<T>(combine);
    decoder.w_query = values<T>(weight_query);
    decoder.quantized_context = quantized(combine, 0);
    decoder.quantized_hidden = quantized(combine, 1);
    decoder.quantized_query = quantized(weight_query);
    decoder.v = data<T>(weight_v);
    decoder.lengths = data<int64_t>(lengths);
    decoder.heads = shape.heads;
    decoder.window = window;
    decoder.first_step = data<int64_t>(step);
    decoder.position_size = shape.position_size;
    decoder.w_position = data<T>(weight_position);
    decoder.position_v = data<T>(weight_position_v);
    decoder.taps = shape.taps;
    decoder.w_history = data<T>(weight_history);
    decoder.cumulative = cumulative;
    cpu::Generate<T> args{};
    args.decoder = decoder;
    args.rows = shape.batch;
    args.vocab = vocab;
    args.embedding_size = shape.input;
    args.beam_size = beam_size;
    args.n_best = 1;
    args.h_0 = h_0.const_data_ptr<T>();
    args.c_0 = c_0.const_data_ptr<T>();
    args.feed = feed.const_data_ptr<T>();
    args.past = data<T>(past);
    args.embedding = embedding.const_data_ptr<T>();
    args.w_x = values<T>(weights[0]);
    args.w_x_stride = weights[0].size(1);
    args.quantized_x = quantized_run(weights[0]);
    args.w_output = output_weight.const_data_ptr<T>();
    args.output_bias = data<T>(output_bias);
    return args;
  }
};

Prepared prepare(const OwnTokensInputs& inputs);

}  // namespace pyseq
