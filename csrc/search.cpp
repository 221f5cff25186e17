// SPDX-License-Identifier: Apache-2.0
#include "search.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "layers.h"

namespace pyseq {

namespace {

constexpr int64_t kSpecialTokens = 3;  // <pad>, <start> and <stop>

struct GenerateShape {
  CellShape cell;
  bool attends, additive;
  int64_t batch, hidden, layers, vocab, embedding, source, key_size, memory_size;
};

GenerateShape check_generate(const Tensor& embedding, at::TensorList layers,
                             const OptionalTensor& keys, const OptionalTensor& memory,
                             const OptionalTensor& combine, const Tensor& output_weight,
                             const OptionalTensor& output_bias, const OptionalTensor& weight_query,
                             const OptionalTensor& weight_v, const Tensor& h_0,
                             const OptionalTensor& c_0, const OptionalTensor& feed,
                             std::string_view cell_name, std::string_view score,
                             bool input_feeding) {
  const CellShape cell = cell_shape(cell_name);
  const char* const like = "embedding";
  check_floating(embedding, like);
  check_dim(embedding, like, 2, "(V, E)");
  check_dim(h_0, "h_0", 3, "(L, B, H)");
  const int64_t vocab = embedding.size(0), batch = h_0.size(1), hidden = h_0.size(2);
  TORCH_CHECK(vocab >= kSpecialTokens && vocab <= std::numeric_limits<int32_t>::max(),
              "embedding must be (V, E) with V at least ", kSpecialTokens, ", got ",
              shape_text(embedding.sizes()));
  TORCH_CHECK(hidden > 0, "h_0 must be (L, B, H) with H at least 1, got ", shape_text(h_0.sizes()));
  const int64_t count = check_layers(layers, cell, embedding.size(1), input_feeding ? hidden : 0,
                                     hidden, embedding, like);
  check_tensor(h_0, "h_0", "(L, B, H)", {count, batch, hidden}, embedding, like);
  check_tensor(c_0, "c_0", "(L, B, H)", {count, batch, hidden}, embedding, like);
  check_tensor(feed, "feed", "(B, H)", {batch, hidden}, embedding, like);
  check_tensor(output_weight, "output_weight", "(V, H)", {vocab, hidden}, embedding, like);
  check_tensor(output_bias, "output_bias", "(V,)", {vocab}, embedding, like);

  if (score == "none") {
    TORCH_CHECK_VALUE(!keys.has_value() && !memory.has_value() && !combine.has_value() &&
                          !weight_query.has_value() && !weight_v.has_value() && !input_feeding,
                      "keys, memory, combine, weights and input_feeding go with a score, got none");
    return {cell, false, false, batch, hidden, count, vocab, embedding.size(1), 0, 0, 0};
  }
  const bool additive = is_additive(score);
  TORCH_CHECK(keys.has_value() && memory.has_value() && combine.has_value(),
              "keys, memory and combine must be given for score ", score);
  check_attention({*keys, *memory, *combine, weight_query, weight_v}, additive, batch, hidden,
                  embedding, like);
  check_attention_kind(*combine, weight_query, layers[1]);
  return {cell,           true,  additive,          batch,           hidden,
          count,          vocab, embedding.size(1), memory->size(0), keys->size(2),
          memory->size(2)};
}

void check_options(int64_t batch, int64_t max_length, int64_t beam_size, double length_penalty) {
  TORCH_CHECK_VALUE(max_length >= 1, "max_length must be at least 1 token, got ", max_length);
  const int64_t most = std::numeric_limits<int32_t>::max() / std::max<int64_t>(batch, 1) / 2;
  TORCH_CHECK_VALUE(beam_size >= 1 && beam_size <= most, "beam_size must be between 1 and ", most,
                    " for ", batch, " rows, got ", beam_size);
  TORCH_CHECK_VALUE(
      length_penalty >= 0 && std::isfinite(std::pow((5.0 + max_length) / 6, length_penalty)),
      "length_penalty must be at least 0 and ((5 + max_length) / 6) ** length_penalty finite, got ",
      length_penalty);
}

// The steps of a search, freed with it.
template <class T>
struct Trace {
  Trace() = default;
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;
  ~Trace() {
    while (last != nullptr) {
      cpu::GenerateStep<T>* const before = last->before;
      std::free(last);
      last = before;
    }
  }

  cpu::GenerateStep<T>* last = nullptr;
};

// Checked and contiguous arguments of an operator that runs a decoder on its own tokens.
struct Prepared {
  GenerateShape shape;
  bool input_feeding;
  Tensor embedding, output_weight, h_0, c_0, feed;
  OptionalTensor keys, memory, combine, output_bias, weight_query, weight_v, lengths;
  std::vector<Tensor> weights;  // of each layer w_ih and w_hh
  std::vector<Bias> biases;

  // What the kernel needs for up to `beam_size` hypotheses a row. `layers` must outlive it.
  template <class T>
  cpu::Generate<T> arguments(std::vector<cpu::DecoderLayer<T>>& layers, int64_t beam_size) const {
    const int64_t H = shape.hidden;
    layers.clear();
    for (int64_t l = 0; l < shape.layers; ++l) {
      const int64_t below = l > 0 || input_feeding ? H : 0;
      layers.push_back(layer_weights<T>(weights[2 * l], weights[2 * l + 1], biases[l], below,
                                        /*run=*/l > 0 ? 0 : 1));
    }
    cpu::Decode<T> decoder{};
    decoder.cell = shape.cell.kind;
    decoder.additive = shape.additive;
    decoder.feeding = input_feeding;
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
    cpu::Generate<T> args{};
    args.decoder = decoder;
    args.rows = shape.batch;
    args.vocab = shape.vocab;
    args.embedding_size = shape.embedding;
    args.beam_size = beam_size;
    args.n_best = 1;
    args.h_0 = h_0.const_data_ptr<T>();
    args.c_0 = c_0.const_data_ptr<T>();
    args.feed = feed.const_data_ptr<T>();
    args.embedding = embedding.const_data_ptr<T>();
    args.w_x = values<T>(weights[0]);
    args.w_x_stride = weights[0].size(1);
    args.quantized_x = quantized_run(weights[0]);
    args.w_output = output_weight.const_data_ptr<T>();
    args.output_bias = data<T>(output_bias);
    return args;
  }
};

Prepared prepare(const Tensor& embedding, at::TensorList layers, const OptionalTensor& keys,
                 const OptionalTensor& memory, const OptionalTensor& combine,
                 const Tensor& output_weight, const OptionalTensor& output_bias,
                 const OptionalTensor& weight_query, const OptionalTensor& weight_v,
                 const Tensor& h_0, const OptionalTensor& c_0, const OptionalTensor& feed,
                 const OptionalTensor& lengths, std::string_view cell_name, std::string_view score,
                 bool input_feeding) {
  const GenerateShape shape =
      check_generate(embedding, layers, keys, memory, combine, output_weight, output_bias,
                     weight_query, weight_v, h_0, c_0, feed, cell_name, score, input_feeding);
  const int64_t L = shape.layers, B = shape.batch, H = shape.hidden;
  const auto options = embedding.options();
  Prepared all{
      .shape = shape,
      .input_feeding = input_feeding,
      .embedding = embedding.contiguous(),
      .output_weight = output_weight.contiguous(),
      .h_0 = h_0.contiguous(),
      .c_0 = !shape.cell.has_cell ? nothing(h_0)
             : c_0.has_value()    ? c_0->contiguous()
                                  : at::zeros({L, B, H}, options),
      .feed = feed.has_value() ? feed->contiguous() : at::zeros({B, H}, options),
      .keys = shape.attends ? OptionalTensor(rows_first(*keys)) : std::nullopt,
      .memory = shape.attends ? OptionalTensor(rows_first(*memory)) : std::nullopt,
      .combine = contiguous(combine),
      .output_bias = contiguous(output_bias),
      .weight_query = contiguous(weight_query),
      .weight_v = contiguous(weight_v),
      .lengths = check_lengths(lengths, B, shape.source, "S"),
      .weights = {},
      .biases = {},
  };
  for (int64_t l = 0; l < L; ++l) {
    const Tensor* const layer = &layers[l * kPerLayer];
    all.weights.push_back(layer[0].contiguous());
    all.weights.push_back(layer[1].contiguous());
    all.biases.push_back(fold_bias(layer[2], layer[3], shape.cell, H));
  }
  return all;
}

// The tokens that each row begins with, (B, P), contiguous.
OptionalTensor check_prefix(const OptionalTensor& prefix, int64_t rows, int64_t vocab) {
  if (!prefix.has_value()) return std::nullopt;
  check_dim(*prefix, "prefix", 2, "(B, P)");
  TORCH_CHECK(prefix->scalar_type() == at::kLong && prefix->is_cpu(),
              "prefix must be int64 on the CPU, got ", prefix->scalar_type(), " on ",
              prefix->device());
  TORCH_CHECK(prefix->size(0) == rows, "prefix must be (B, P) with B = ", rows, ", got ",
              shape_text(prefix->sizes()));
  const Tensor checked = prefix->contiguous();
  const int64_t* const tokens = checked.const_data_ptr<int64_t>();
  const int64_t length = checked.size(1);
  for (int64_t i = 0; i < checked.numel(); ++i) {
    TORCH_CHECK_VALUE(tokens[i] == 0 || i % length == 0 || tokens[i - 1] != 0,
                      "prefix must hold 0 only beyond the end of a row's tokens, got ", tokens[i],
                      " after it in row ", i / length);
    TORCH_CHECK_VALUE(tokens[i] == 0 || (tokens[i] >= kSpecialTokens && tokens[i] < vocab),
                      "prefix must hold token ids from ", kSpecialTokens, " to ", vocab - 1,
                      ", or 0 beyond the end of a row's, got ", tokens[i]);
  }
  return checked;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> generate(
    const Tensor& embedding, at::TensorList layers_in, const OptionalTensor& keys,
    const OptionalTensor& memory, const OptionalTensor& combine, const Tensor& output_weight,
    const OptionalTensor& output_bias, const OptionalTensor& weight_query,
    const OptionalTensor& weight_v, const Tensor& h_0, const OptionalTensor& c_0,
    const OptionalTensor& feed, const OptionalTensor& lengths, std::string_view cell,
    std::string_view score, bool input_feeding, int64_t max_length, int64_t beam_size,
    double length_penalty, bool need_weights, int64_t min_length, int64_t n_best,
    int64_t block_ngrams, const OptionalTensor& prefix_in) {
  const Prepared prepared =
      prepare(embedding, layers_in, keys, memory, combine, output_weight, output_bias, weight_query,
              weight_v, h_0, c_0, feed, lengths, cell, score, input_feeding);
  const int64_t B = prepared.shape.batch, S = prepared.shape.source;
  check_options(B, max_length, beam_size, length_penalty);
  TORCH_CHECK_VALUE(min_length >= 0 && min_length <= max_length,
                    "min_length must be between 0 and max_length = ", max_length, ", got ",
                    min_length);
  TORCH_CHECK_VALUE(n_best >= 1 && n_best <= beam_size,
                    "n_best must be between 1 and beam_size = ", beam_size, ", got ", n_best);
  TORCH_CHECK_VALUE(block_ngrams >= 0, "block_ngrams must be at least 0, got ", block_ngrams);
  const OptionalTensor prefix = check_prefix(prefix_in, B, prepared.shape.vocab);
  const bool keeps = need_weights && prepared.shape.attends;
  const int64_t results = B * n_best;
  const auto options = embedding.options(), integers = options.dtype(at::kLong);
  const auto result = [&](int64_t longest) {
    return std::tuple{at::zeros({results, longest}, integers), at::zeros({results}, integers),
                      at::full({results}, std::numeric_limits<double>::quiet_NaN(), options),
                      keeps ? at::zeros({results, longest, S}, options) : nothing(embedding)};
  };
  if (B == 0) return result(0);

  return AT_DISPATCH_FLOATING_TYPES(embedding.scalar_type(), "generate", [&] {
    std::vector<cpu::DecoderLayer<scalar_t>> layers;
    std::vector<cpu::GenerateResult<scalar_t>> found(results);
    Trace<scalar_t> trace;
    cpu::Generate<scalar_t> args = prepared.arguments<scalar_t>(layers, beam_size);
    args.max_length = max_length;
    args.min_length = min_length;
    args.n_best = n_best;
    args.block_ngrams = block_ngrams;
    args.prefix = data<int64_t>(prefix);
    args.prefix_length = prefix.has_value() ? prefix->size(1) : 0;
    args.length_penalty = length_penalty;
    args.need_weights = keeps;
    args.results = found.data();
    args.trace = &trace.last;
    const cpu::GenerateStatus status = cpu::kernels<scalar_t>().generate(args);
    if (status == cpu::GenerateStatus::kNotFinite) return result(0);
    TORCH_CHECK_WITH(OutOfMemoryError, status == cpu::GenerateStatus::kDone,
                     "no memory for the steps of a search of ", B, " rows with beam_size ",
                     beam_size);

    int64_t longest = 0;
    for (const auto& best : found) longest = std::max(longest, best.length);
    const auto all = result(longest);
    int64_t* const tokens = std::get<0>(all).template data_ptr<int64_t>();
    int64_t* const sizes = std::get<1>(all).template data_ptr<int64_t>();
    scalar_t* const scores = std::get<2>(all).template data_ptr<scalar_t>();
    scalar_t* const attn = std::get<3>(all).template data_ptr<scalar_t>();
    for (int64_t row = 0; row < results; ++row) {
      const auto& best = found[row];
      sizes[row] = best.length;
      scores[row] = best.score;
      const cpu::GenerateStep<scalar_t>* step = best.last;
      int64_t slot = best.slot;
      for (int64_t t = row * longest + best.length; t-- > row * longest;) {
        tokens[t] = step->tokens[slot];
        slot = step->parents[slot];
        if (keeps) std::copy_n(step->attn + slot * S, S, attn + t * S);
        step = step->before;
      }
    }
    return all;
  });
}

Tensor scheduled_inputs(const Tensor& tokens, const Tensor& coins, const OptionalTensor& draws,
                        const Tensor& embedding, at::TensorList layers_in,
                        const OptionalTensor& keys, const OptionalTensor& memory,
                        const OptionalTensor& combine, const Tensor& output_weight,
                        const OptionalTensor& output_bias, const OptionalTensor& weight_query,
                        const OptionalTensor& weight_v, const Tensor& h_0,
                        const OptionalTensor& c_0, const OptionalTensor& feed,
                        const OptionalTensor& lengths, const OptionalTensor& embedding_masks,
                        const OptionalTensor& dropout_masks, const OptionalTensor& output_masks,
                        std::string_view cell, std::string_view score, bool input_feeding) {
  const Prepared prepared =
      prepare(embedding, layers_in, keys, memory, combine, output_weight, output_bias, weight_query,
              weight_v, h_0, c_0, feed, lengths, cell, score, input_feeding);
  const GenerateShape& shape = prepared.shape;
  const int64_t B = shape.batch, H = shape.hidden, L = shape.layers;
  check_dim(tokens, "tokens", 2, "(T, B)");
  const int64_t steps = tokens.size(0);
  const auto check_each = [&](const Tensor& tensor, const char* name, at::ScalarType type) {
    TORCH_CHECK(tensor.sizes() == at::IntArrayRef({steps, B}), name, " must be (T, B) = (", steps,
                ", ", B, "), got ", shape_text(tensor.sizes()));
    TORCH_CHECK(tensor.scalar_type() == type && tensor.is_cpu(), name, " must be ", type,
                " on the CPU, got ", tensor.scalar_type(), " on ", tensor.device());
  };
  check_each(tokens, "tokens", at::kLong);
  check_each(coins, "coins", at::kBool);
  check_tensor(draws, "draws", "(T, B)", {steps, B}, embedding, "embedding");
  check_tensor(embedding_masks, "embedding_masks", "(T, B, E)", {steps, B, shape.embedding},
               embedding, "embedding");
  check_tensor(dropout_masks, "dropout_masks", "(L - 1, T, B, H)", {L - 1, steps, B, H}, embedding,
               "embedding");
  check_tensor(output_masks, "output_masks", "(T, B, H)", {steps, B, H}, embedding, "embedding");
  const Tensor truth = tokens.contiguous(), thrown = coins.contiguous();
  const int64_t* const ids = truth.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < truth.numel(); ++i) {
    TORCH_CHECK(ids[i] >= 0 && ids[i] < shape.vocab, "tokens must be between 0 and ",
                shape.vocab - 1, ", got ", ids[i]);
  }
  Tensor fed = truth.clone();
  if (fed.numel() == 0) return fed;

  const OptionalTensor own_draws = contiguous(draws), of_embedding = contiguous(embedding_masks),
                       of_layers = contiguous(dropout_masks), of_output = contiguous(output_masks);
  AT_DISPATCH_FLOATING_TYPES(embedding.scalar_type(), "scheduled_inputs", [&] {
    const cpu::ScheduledInputs<scalar_t> scheduled{
        .steps = steps,
        .tokens = ids,
        .coins = thrown.const_data_ptr<bool>(),
        .draws = data<scalar_t>(own_draws),
        .embedding_masks = data<scalar_t>(of_embedding),
        .output_masks = data<scalar_t>(of_output),
        .fed = fed.data_ptr<int64_t>(),
    };
    std::vector<cpu::DecoderLayer<scalar_t>> layers;
    cpu::Generate<scalar_t> args = prepared.arguments<scalar_t>(layers, /*beam_size=*/1);
    if (of_layers.has_value()) {
      const scalar_t* const masks = of_layers->const_data_ptr<scalar_t>();
      for (int64_t l = 0; l + 1 < L; ++l) layers[l].mask = masks + l * steps * B * H;
    }
    args.max_length = steps;
    cpu::GenerateStep<scalar_t>* no_trace = nullptr;
    args.trace = &no_trace;
    args.scheduled = &scheduled;
    cpu::kernels<scalar_t>().generate(args);
  });
  return fed;
}

}  // namespace pyseq
