// SPDX-License-Identifier: Apache-2.0
// The operators that run a decoder on its own tokens, as the dispatcher knows them.
#pragma once

#include "ops.h"

namespace pyseq {

// (tokens, lengths, scores, attn): the best hypotheses of each row; pyseq/functional/ says what
// the arguments mean. Has no derivative. Scores are NaN if the logits were not finite.
std::tuple<Tensor, Tensor, Tensor, Tensor> generate(
    const Tensor& embedding, at::TensorList layers, const OptionalTensor& keys,
    const OptionalTensor& memory, const OptionalTensor& combine, const Tensor& output_weight,
    const OptionalTensor& output_bias, const OptionalTensor& weight_query,
    const OptionalTensor& weight_v, const Tensor& h_0, const OptionalTensor& c_0,
    const OptionalTensor& feed, const OptionalTensor& lengths, std::string_view cell,
    std::string_view score, bool input_feeding, int64_t max_length, int64_t beam_size,
    double length_penalty, bool need_weights, int64_t min_length, int64_t n_best,
    int64_t block_ngrams, const OptionalTensor& prefix, const OptionalTensor& weight_history,
    const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
    const OptionalTensor& step, const OptionalTensor& past, int64_t heads, int64_t window,
    std::string_view history, std::string_view order, std::string_view fed, double coverage_penalty,
    bool sample, double temperature, int64_t top_k, double top_p, int64_t seed);

// What scheduled sampling reads, (T, B); pyseq/functional/ says what the arguments mean. Has no
// derivative.
Tensor scheduled_inputs(const Tensor& tokens, const Tensor& coins, const OptionalTensor& draws,
                        const Tensor& embedding, at::TensorList layers, const OptionalTensor& keys,
                        const OptionalTensor& memory, const OptionalTensor& combine,
                        const Tensor& output_weight, const OptionalTensor& output_bias,
                        const OptionalTensor& weight_query, const OptionalTensor& weight_v,
                        const Tensor& h_0, const OptionalTensor& c_0, const OptionalTensor& feed,
                        const OptionalTensor& lengths, const OptionalTensor& embedding_masks,
                        const OptionalTensor& dropout_masks, const OptionalTensor& output_masks,
                        std::string_view cell, std::string_view score, bool input_feeding,
                        const OptionalTensor& weight_history, const OptionalTensor& weight_position,
                        const OptionalTensor& weight_position_v, const OptionalTensor& step,
                        const OptionalTensor& past, int64_t heads, int64_t window,
                        std::string_view history, std::string_view order, std::string_view fed);

}  // namespace pyseq
