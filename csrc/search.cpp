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
  const int64_t count =
      check_layers(layers, cell, embedding.size(1), input_feeding, hidden, embedding, like);
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
  check_memory(*keys, *memory, weight_v, batch, additive, embedding, like);
  const int64_t source = memory->size(0), key_size = keys->size(2), memory_size = memory->size(2);
  check_weight(*combine, "combine", "(H, M + H)", hidden, 1, {memory_size, hidden}, embedding,
               like);
  check_same_kind(*combine, "combine", layers[1], "w_hh");
  TORCH_CHECK_VALUE(!weight_query.has_value() || additive,
                    "weight_query goes with score concat, got ", score);
  if (weight_query.has_value()) {
    check_weight(*weight_query, "weight_query", "(A, H)", key_size, 1, {hidden}, embedding, like);
    check_same_kind(*weight_query, "weight_query", layers[1], "w_hh");
  } else {
    check_tensor(keys, "keys", "(S, B, H)", {source, batch, hidden}, embedding, like);
  }
  return {cell,   true,     additive,   batch, hidden, count, vocab, embedding.size(1),
          source, key_size, memory_size};
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> generate(
    const Tensor& embedding_in, at::TensorList layers_in, const OptionalTensor& keys_in,
    const OptionalTensor& memory_in, const OptionalTensor& combine_in,
    const Tensor& output_weight_in, const OptionalTensor& output_bias_in,
    const OptionalTensor& weight_query_in, const OptionalTensor& weight_v_in, const Tensor& h_0_in,
    const OptionalTensor& c_0_in, const OptionalTensor& feed_in, const OptionalTensor& lengths_in,
    std::string_view cell_name, std::string_view score, bool input_feeding, int64_t max_length,
    int64_t beam_size, double length_penalty, bool need_weights) {
  const GenerateShape shape = check_generate(
      embedding_in, layers_in, keys_in, memory_in, combine_in, output_weight_in, output_bias_in,
      weight_query_in, weight_v_in, h_0_in, c_0_in, feed_in, cell_name, score, input_feeding);
  const auto& [cell, attends, additive, B, H, L, V, E, S, A, M] = shape;
  check_options(B, max_length, beam_size, length_penalty);
  const OptionalTensor lengths = check_lengths(lengths_in, B, S, "S");
  const bool keeps = need_weights && attends;
  const auto options = embedding_in.options(), integers = options.dtype(at::kLong);
  const auto result = [&](int64_t longest) {
    return std::tuple{at::zeros({B, longest}, integers), at::zeros({B}, integers),
                      at::full({B}, std::numeric_limits<double>::quiet_NaN(), options),
                      keeps ? at::zeros({B, longest, S}, options) : nothing(embedding_in)};
  };
  if (B == 0) return result(0);

  const Tensor embedding = embedding_in.contiguous(), output_weight = output_weight_in.contiguous();
  const Tensor h_0 = h_0_in.contiguous();
  const Tensor c_0 = !cell.has_cell       ? nothing(h_0)
                     : c_0_in.has_value() ? c_0_in->contiguous()
                                          : at::zeros({L, B, H}, options);
  const Tensor feed = feed_in.has_value() ? feed_in->contiguous() : at::zeros({B, H}, options);
  const OptionalTensor keys = attends ? OptionalTensor(rows_first(*keys_in)) : std::nullopt;
  const OptionalTensor memory = attends ? OptionalTensor(rows_first(*memory_in)) : std::nullopt;
  const OptionalTensor combine = contiguous(combine_in), output_bias = contiguous(output_bias_in),
                       weight_query = contiguous(weight_query_in),
                       weight_v = contiguous(weight_v_in);
  std::vector<Tensor> weights;
  std::vector<Bias> biases;
  for (int64_t l = 0; l < L; ++l) {
    const Tensor* const layer = &layers_in[l * kPerLayer];
    weights.push_back(layer[0].contiguous());
    weights.push_back(layer[1].contiguous());
    biases.push_back(fold_bias(layer[2], layer[3], cell, H));
  }

  return AT_DISPATCH_FLOATING_TYPES(embedding.scalar_type(), "generate", [&] {
    std::vector<cpu::DecoderLayer<scalar_t>> layers(L);
    for (int64_t l = 0; l < L; ++l) {
      const Tensor &w_ih = weights[2 * l], &w_hh = weights[2 * l + 1];
      if (l > 0 || input_feeding) {
        if (is_quantized(w_ih)) {
          layers[l].quantized_in = quantized_run(w_ih, l > 0 ? 0 : 1);
        } else {
          layers[l].w_in = w_ih.const_data_ptr<scalar_t>() + (w_ih.size(1) - H);
          layers[l].w_in_stride = w_ih.size(1);
        }
      }
      layers[l].w_hh = values<scalar_t>(w_hh);
      layers[l].quantized_hh = quantized_run(w_hh);
      layers[l].bias = data<scalar_t>(biases[l].sum);
      layers[l].apart_bias = data<scalar_t>(biases[l].apart);
    }
    std::vector<cpu::GenerateResult<scalar_t>> found(B);
    Trace<scalar_t> trace;
    cpu::Decode<scalar_t> decoder{};
    decoder.cell = cell.kind;
    decoder.additive = additive;
    decoder.feeding = input_feeding;
    decoder.batch = B * beam_size;
    decoder.hidden = H;
    decoder.layer_count = L;
    decoder.source = S;
    decoder.key_size = A;
    decoder.memory_size = M;
    decoder.threads = thread_count();
    decoder.layers = layers.data();
    decoder.keys = data<scalar_t>(keys);
    decoder.memory = data<scalar_t>(memory);
    decoder.combine = values<scalar_t>(combine);
    decoder.w_query = values<scalar_t>(weight_query);
    decoder.quantized_context = quantized(combine, 0);
    decoder.quantized_hidden = quantized(combine, 1);
    decoder.quantized_query = quantized(weight_query);
    decoder.v = data<scalar_t>(weight_v);
    decoder.lengths = data<int64_t>(lengths);
    const cpu::GenerateStatus status = cpu::kernels<scalar_t>().generate({
        .decoder = decoder,
        .rows = B,
        .vocab = V,
        .embedding_size = E,
        .max_length = max_length,
        .beam_size = beam_size,
        .length_penalty = length_penalty,
        .need_weights = keeps,
        .h_0 = h_0.const_data_ptr<scalar_t>(),
        .c_0 = c_0.const_data_ptr<scalar_t>(),
        .feed = feed.const_data_ptr<scalar_t>(),
        .embedding = embedding.const_data_ptr<scalar_t>(),
        .w_x = values<scalar_t>(weights[0]),
        .w_x_stride = weights[0].size(1),
        .quantized_x = quantized_run(weights[0]),
        .w_output = output_weight.const_data_ptr<scalar_t>(),
        .output_bias = data<scalar_t>(output_bias),
        .results = found.data(),
        .trace = &trace.last,
    });
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
    for (int64_t row = 0; row < B; ++row) {
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

}  // namespace pyseq
