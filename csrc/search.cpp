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

#include "search_arguments.h"

namespace pyseq {

namespace {

// Of what is called `name`: so many hypotheses or draws are followed in each row.
void check_followed(const char* name, int64_t count, int64_t batch) {
  const int64_t most = std::numeric_limits<int32_t>::max() / std::max<int64_t>(batch, 1) / 2;
  TORCH_CHECK_VALUE(count >= 1 && count <= most, name, " must be between 1 and ", most, " for ",
                    batch, " rows, got ", count);
}

void check_options(int64_t batch, int64_t max_length, int64_t beam_size, double length_penalty) {
  TORCH_CHECK_VALUE(max_length >= 1, "max_length must be at least 1 token, got ", max_length);
  check_followed("beam_size", beam_size, batch);
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
    int64_t block_ngrams, const OptionalTensor& prefix_in, const OptionalTensor& weight_history,
    const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
    const OptionalTensor& step, const OptionalTensor& past, int64_t heads, int64_t window,
    std::string_view history, std::string_view order, std::string_view fed, double coverage_penalty,
    bool sample, double temperature, int64_t top_k, double top_p, int64_t seed) {
  const Prepared prepared = prepare({embedding,
                                     layers_in,
                                     keys,
                                     memory,
                                     combine,
                                     output_weight,
                                     output_bias,
                                     weight_query,
                                     weight_v,
                                     h_0,
                                     c_0,
                                     feed,
                                     lengths,
                                     cell,
                                     score,
                                     input_feeding,
                                     weight_history,
                                     weight_position,
                                     weight_position_v,
                                     step,
                                     past,
                                     heads,
                                     window,
                                     history,
                                     order,
                                     fed});
  const int64_t B = prepared.shape.batch, S = prepared.shape.source, N = prepared.shape.heads;
  check_options(B, max_length, beam_size, length_penalty);
  TORCH_CHECK_VALUE(min_length >= 0 && min_length <= max_length,
                    "min_length must be between 0 and max_length = ", max_length, ", got ",
                    min_length);
  TORCH_CHECK_VALUE(coverage_penalty >= 0 && std::isfinite(coverage_penalty),
                    "coverage_penalty must be a number of at least 0, got ", coverage_penalty);
  TORCH_CHECK_VALUE(coverage_penalty == 0 || score != "none",
                    "coverage_penalty goes with a score, got none");
  const cpu::Sampling sampling{temperature, top_k, top_p, static_cast<uint64_t>(seed)};
  if (sample) {
    TORCH_CHECK_VALUE(beam_size == 1 && length_penalty == 0 && coverage_penalty == 0,
                      "beam_size must be 1 and the penalties 0 for sampling, got ", beam_size, ", ",
                      length_penalty, " and ", coverage_penalty);
    check_followed("n_best", n_best, B);
  } else {
    TORCH_CHECK_VALUE(n_best >= 1 && n_best <= beam_size,
                      "n_best must be between 1 and beam_size = ", beam_size, ", got ", n_best);
  }
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature),
                    "temperature must be a positive number, got ", temperature);
  TORCH_CHECK_VALUE(top_k >= 0, "top_k must be at least 1, or 0 for all, got ", top_k);
  TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, "top_p must be in (0, 1], got ", top_p);
  TORCH_CHECK_VALUE(block_ngrams >= 0, "block_ngrams must be at least 0, got ", block_ngrams);
  const OptionalTensor prefix = check_prefix(prefix_in, B, prepared.vocab);
  const bool keeps = need_weights && score != "none";
  const int64_t results = B * n_best, followed = sample ? n_best : beam_size;
  const auto options = embedding.options(), integers = options.dtype(at::kLong);
  const auto result = [&](int64_t longest) {
    return std::tuple{
        at::zeros({results, longest}, integers), at::zeros({results}, integers),
        at::full({results}, std::numeric_limits<double>::quiet_NaN(), options),
        keeps ? at::zeros(attn_sizes(results, longest, N, S), options) : nothing(embedding)};
  };
  if (B == 0) return result(0);

  return AT_DISPATCH_FLOATING_TYPES(embedding.scalar_type(), "generate", [&] {
    std::vector<cpu::DecoderLayer<scalar_t>> layers;
    std::vector<cpu::GenerateResult<scalar_t>> found(results);
    Trace<scalar_t> trace;
    cpu::Generate<scalar_t> args = prepared.arguments<scalar_t>(layers, followed);
    args.max_length = max_length;
    args.coverage_penalty = coverage_penalty;
    args.sampling = sample ? &sampling : nullptr;
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
                     "no memory for the steps of a search of ", B, " rows with ",
                     sample ? "n_best " : "beam_size ", followed);

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
      const cpu::GenerateStep<scalar_t>* one = best.last;
      int64_t slot = best.slot;
      for (int64_t t = row * longest + best.length; t-- > row * longest;) {
        tokens[t] = one->tokens[slot];
        slot = one->parents[slot];
        if (keeps) std::copy_n(one->attn + slot * N * S, N * S, attn + t * N * S);
        one = one->before;
      }
    }
    return all;
  });
}

Tensor scheduled_inputs(
    const Tensor& tokens, const Tensor& coins, const OptionalTensor& draws, const Tensor& embedding,
    at::TensorList layers_in, const OptionalTensor& keys, const OptionalTensor& memory,
    const OptionalTensor& combine, const Tensor& output_weight, const OptionalTensor& output_bias,
    const OptionalTensor& weight_query, const OptionalTensor& weight_v, const Tensor& h_0,
    const OptionalTensor& c_0, const OptionalTensor& feed, const OptionalTensor& lengths,
    const OptionalTensor& embedding_masks, const OptionalTensor& dropout_masks,
    const OptionalTensor& output_masks, std::string_view cell, std::string_view score,
    bool input_feeding, const OptionalTensor& weight_history, const OptionalTensor& weight_position,
    const OptionalTensor& weight_position_v, const OptionalTensor& step, const OptionalTensor& past,
    int64_t heads, int64_t window, std::string_view history, std::string_view order,
    std::string_view fed_name) {
  const Prepared prepared = prepare({embedding,
                                     layers_in,
                                     keys,
                                     memory,
                                     combine,
                                     output_weight,
                                     output_bias,
                                     weight_query,
                                     weight_v,
                                     h_0,
                                     c_0,
                                     feed,
                                     lengths,
                                     cell,
                                     score,
                                     input_feeding,
                                     weight_history,
                                     weight_position,
                                     weight_position_v,
                                     step,
                                     past,
                                     heads,
                                     window,
                                     history,
                                     order,
                                     fed_name});
  const DecodeShape& shape = prepared.shape;
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
  check_tensor(embedding_masks, "embedding_masks", "(T, B, E)", {steps, B, shape.input}, embedding,
               "embedding");
  check_tensor(dropout_masks, "dropout_masks", "(L - 1, T, B, H)", {L - 1, steps, B, H}, embedding,
               "embedding");
  check_tensor(output_masks, "output_masks", "(T, B, H)", {steps, B, H}, embedding, "embedding");
  const Tensor truth = tokens.contiguous(), thrown = coins.contiguous();
  const int64_t* const ids = truth.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < truth.numel(); ++i) {
    TORCH_CHECK(ids[i] >= 0 && ids[i] < prepared.vocab, "tokens must be between 0 and ",
                prepared.vocab - 1, ", got ", ids[i]);
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
