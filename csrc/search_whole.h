// SPDX-License-Identifier: Apache-2.0
// A search with the encoder, the bridge and the keys in one call, past the dispatcher, where
// nothing looks on: what else surrounds a search for one short sentence takes longer than it does.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "ops.h"
#include "scan_layers.h"

namespace pyseq {

// What the decoder starts from, of h and c that have the directions of a layer side by side.
struct BridgeInputs {
  // "copy", or what an affine map of all layers side by side goes through: "linear", "tanh",
  // "relu".
  std::string_view kind;
  bool c_from_h;
  int64_t layers, size;  // of the decoder
  OptionalTensor weight_h = {}, bias_h = {}, weight_c = {}, bias_c = {};
};

// See SearchOptions in pyseq/search/.
struct SearchChoices {
  int64_t max_length, beam_size, min_length, n_best, block_ngrams, top_k, seed;
  double length_penalty, coverage_penalty, temperature, top_p;
  bool need_weights, sample;
  OptionalTensor prefix = {};  // (B, P)
};

struct SearchWholeInputs {
  Tensor source = {}, lengths = {};  // (B, S) token ids, (B,)
  Tensor source_embedding = {};      // (V', E')
  LayersInputs encoder;              // steps first; x is made here
  BridgeInputs bridge;
  // As `generate` takes them.
  Tensor embedding = {}, output_weight = {};
  OptionalTensor output_bias = {};
  std::vector<Tensor> layers = {};
  OptionalTensor combine = {}, weight_query = {}, weight_v = {};
  OptionalTensor weight_keys = {};  // (A, M), which makes keys of the memory, or none
  std::string_view cell, order, fed;
  int64_t heads;
  bool attends, feeding;
  SearchChoices choices;
};

// One of n_best results for each row, those of a row together.
struct Found {
  std::vector<int64_t> tokens;
  double score;
  Tensor weights;  // (length, S of the row), or undefined
};

// The same numbers as the operators give. None where the call must go through them: something looks
// on, or the arguments or results are such that somebody has a word to say about them.
std::optional<std::vector<Found>> search_whole(SearchWholeInputs&& in);

}  // namespace pyseq
