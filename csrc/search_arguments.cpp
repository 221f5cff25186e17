// SPDX-License-Identifier: Apache-2.0
#include "search_arguments.h"

#include <ATen/ops/zeros.h>

#include <limits>

namespace pyseq {

namespace {

struct GenerateShape {
  DecodeShape decoder;
  int64_t vocab;
};

// A decoder without attention: stacked cells.
DecodeShape check_stack(const OwnTokensInputs& in, int64_t batch, int64_t hidden,
                        const char* like) {
  const Tensor& embedding = in.embedding;
  TORCH_CHECK_VALUE(!in.keys.has_value() && !in.memory.has_value() && !in.combine.has_value() &&
                        !in.weight_query.has_value() && !in.weight_v.has_value() &&
                        !in.input_feeding,
                    "keys, memory, combine, weights and input_feeding go with a score, got none");
  TORCH_CHECK_VALUE(!in.weight_history.has_value() && !in.weight_position.has_value() &&
                        !in.weight_position_v.has_value() && !in.past.has_value() &&
                        in.heads == 1 && in.window == 0 && in.history == "none" &&
                        in.order == "luong" && in.fed == "output",
                    "heads, window, history, order and what is fed go with a score, got none");
  const CellShape cell = cell_shape(in.cell);
  const int64_t count =
      check_layers(in.layers, cell, embedding.size(1), 0, hidden, embedding, like);
  check_tensor(in.h_0, "h_0", "(L, B, H)", {count, batch, hidden}, embedding, like);
  check_tensor(in.c_0, "c_0", "(L, B, H)", {count, batch, hidden}, embedding, like);
  check_tensor(in.feed, "feed", "(B, H)", {batch, hidden}, embedding, like);
  DecodeShape shape{};
  shape.cell = cell;
  shape.batch = batch;
  shape.input = embedding.size(1);
  shape.hidden = hidden;
  shape.layers = count;
  shape.heads = 1;
  shape.fed_size = hidden;
  return shape;
}

GenerateShape check_generate(const OwnTokensInputs& in) {
  const Tensor& embedding = in.embedding;
  const char* const like = "embedding";
  check_floating(embedding, like);
  check_dim(embedding, like, 2, "(V, E)");
  check_dim(in.h_0, "h_0", 3, "(L, B, H)");
  const int64_t vocab = embedding.size(0), batch = in.h_0.size(1), hidden = in.h_0.size(2);
  TORCH_CHECK(vocab >= kSpecialTokens && vocab <= std::numeric_limits<int32_t>::max(),
              "embedding must be (V, E) with V at least ", kSpecialTokens, ", got ",
              shape_text(embedding.sizes()));
  TORCH_CHECK(hidden > 0, "h_0 must be (L, B, H) with H at least 1, got ",
              shape_text(in.h_0.sizes()));
  DecodeShape decoder;
  if (in.attends()) {
    TORCH_CHECK(in.keys.has_value() && in.memory.has_value() && in.combine.has_value(),
                "keys, memory and combine must be given for score ", in.score);
    const OptionalTensor h_0(in.h_0), no_masks;
    const DecodeInputs inputs{embedding,
                              in.layers,
                              *in.keys,
                              *in.memory,
                              *in.combine,
                              in.weight_query,
                              in.weight_v,
                              h_0,
                              in.c_0,
                              in.feed,
                              in.lengths,
                              no_masks,
                              in.cell,
                              in.score,
                              in.input_feeding,
                              in.weight_history,
                              in.weight_position,
                              in.weight_position_v,
                              in.step,
                              in.past,
                              in.heads,
                              in.window,
                              in.history,
                              in.order,
                              in.fed};
    decoder = check_decoder(inputs, batch, embedding.size(1), like);
  } else {
    decoder = check_stack(in, batch, hidden, like);
  }
  check_tensor(in.output_weight, "output_weight", "(V, H)", {vocab, hidden}, embedding, like);
  check_tensor(in.output_bias, "output_bias", "(V,)", {vocab}, embedding, like);
  return {decoder, vocab};
}

}  // namespace

Prepared prepare(const OwnTokensInputs& in) {
  const auto [shape, vocab] = check_generate(in);
  const int64_t L = shape.layers, B = shape.batch, H = shape.hidden;
  const auto options = in.embedding.options();
  const auto by_rows = [&](const OptionalTensor& tensor) {
    return in.attends() ? OptionalTensor(rows_first(*tensor, shape.heads)) : std::nullopt;
  };
  Prepared all{
      .shape = shape,
      .vocab = vocab,
      .input_feeding = in.input_feeding,
      .feeds_context = in.fed == "context",
      .attends_first = in.order == "bahdanau",
      .cumulative = in.history == "cumulative",
      .window = in.window,
      .embedding = in.embedding.contiguous(),
      .output_weight = in.output_weight.contiguous(),
      .h_0 = in.h_0.contiguous(),
      .c_0 = !shape.cell.has_cell ? nothing(in.h_0)
             : in.c_0.has_value() ? in.c_0->contiguous()
                                  : at::zeros({L, B, H}, options),
      .feed = or_zero(in.feed, {B, shape.fed_size}, in.embedding),
      .keys = by_rows(in.keys),
      .memory = by_rows(in.memory),
      .combine = contiguous(in.combine),
      .output_bias = contiguous(in.output_bias),
      .weight_query = contiguous(in.weight_query),
      .weight_v = contiguous(in.weight_v),
      .lengths = check_lengths(in.lengths, B, shape.source, "S"),
      .weight_history = in.weight_history.has_value()
                            ? OptionalTensor(by_tap(*in.weight_history, shape.heads))
                            : std::nullopt,
      .weight_position = contiguous(in.weight_position),
      .weight_position_v = contiguous(in.weight_position_v),
      .step = contiguous(in.step),
      .past = contiguous(in.past),
      .weights = {},
      .biases = {},
  };
  for (int64_t l = 0; l < L; ++l) {
    const Tensor* const layer = &in.layers[l * kPerLayer];
    all.weights.push_back(layer[0].contiguous());
    all.weights.push_back(layer[1].contiguous());
    all.biases.push_back(fold_bias(layer[2], layer[3], shape.cell, H));
  }
  return all;
}

}  // namespace pyseq
