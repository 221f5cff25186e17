// SPDX-License-Identifier: Apache-2.0
#include "call_search.h"

#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "bare_module.h"
#include "call_layers.h"
#include "python_values.h"
#include "search_whole.h"

namespace pyseq {

namespace {

using pybind11::handle;
using pybind11::list;
using pybind11::object;
using pybind11::tuple;

// (embedding, layers): the modules, and the names of the layers' weights.
bool read_encoder(const tuple& modules, const list& names, SearchWholeInputs& to) {
  const BareModule embedding(modules[0]), layers(modules[1]);
  return embedding.is_bare() && layers.is_bare() &&
         embedding.read_weight("weight", to.source_embedding) &&
         read_layers(modules[1], layers.parameters(), names, /*may_make=*/false,
                     to.encoder.weights);
}

bool read_bridge(handle module, BridgeInputs& to) {
  const BareModule bridge(module);
  return bridge.is_bare() &&
         (to.kind == "copy" ||
          (bridge.read_weight("weight_h", to.weight_h) && bridge.read_weight("bias_h", to.bias_h) &&
           bridge.read_weight("weight_c", to.weight_c) && bridge.read_weight("bias_c", to.bias_c)));
}

// (embedding, layers, output), and (score, combine) where it attends.
bool read_decoder(const tuple& modules, const list& names, SearchWholeInputs& to) {
  constexpr size_t kPlain = 3;
  const BareModule embedding(modules[0]), layers(modules[1]), output(modules[2]);
  if (!embedding.is_bare() || !layers.is_bare() || !output.is_bare() ||
      !embedding.read_weight("weight", to.embedding) || !layers.read_weights(names, to.layers) ||
      !output.read_weight("weight", to.output_weight) ||
      !output.read_weight("bias", to.output_bias)) {
    return false;
  }
  to.attends = modules.size() > kPlain;
  if (!to.attends) return true;
  const BareModule score(modules[kPlain]), combine(modules[kPlain + 1]);
  OptionalTensor weight, weight_memory;
  if (!score.is_bare() || !combine.is_bare() || !score.read_weight("weight", weight) ||
      !score.read_weight("weight_memory", weight_memory) ||
      !score.read_weight("weight_query", to.weight_query) ||
      !score.read_weight("weight_v", to.weight_v) || !combine.read_weight("weight", to.combine)) {
    return false;
  }
  to.weight_keys = weight_memory.has_value() ? std::move(weight_memory) : std::move(weight);
  return true;
}

// A list of (tokens, score, weights or None), or None.
object call_search_whole(const tuple& others, const tuple& encoder, const list& encoder_names,
                         handle bridge, const tuple& decoder, const list& decoder_names,
                         handle source, handle lengths, std::string_view encoder_cell,
                         bool bidirectional, std::string_view bridge_kind, bool c_from_h,
                         int64_t decoder_layers, int64_t hidden_size, std::string_view cell,
                         std::string_view order, std::string_view fed, int64_t heads,
                         bool input_feeding, int64_t max_length, int64_t beam_size,
                         double length_penalty, bool need_weights, int64_t min_length,
                         int64_t n_best, int64_t block_ngrams, handle prefix,
                         double coverage_penalty, bool sample, double temperature, int64_t top_k,
                         double top_p, int64_t seed) {
  SearchWholeInputs in{.encoder = {.cell = encoder_cell,
                                   .bidirectional = bidirectional,
                                   .batch_first = false,
                                   .training = false},
                       .bridge = {.kind = bridge_kind,
                                  .c_from_h = c_from_h,
                                  .layers = decoder_layers,
                                  .size = hidden_size},
                       .cell = cell,
                       .order = order,
                       .fed = fed,
                       .heads = heads,
                       .attends = false,
                       .feeding = input_feeding,
                       .choices = {.max_length = max_length,
                                   .beam_size = beam_size,
                                   .min_length = min_length,
                                   .n_best = n_best,
                                   .block_ngrams = block_ngrams,
                                   .top_k = top_k,
                                   .seed = seed,
                                   .length_penalty = length_penalty,
                                   .coverage_penalty = coverage_penalty,
                                   .temperature = temperature,
                                   .top_p = top_p,
                                   .need_weights = need_weights,
                                   .sample = sample}};
  for (const handle module : others) {
    if (!BareModule(module).is_bare()) return pybind11::none();
  }
  if (!read(source, in.source) || !read(lengths, in.lengths) || !read(prefix, in.choices.prefix) ||
      !read_encoder(encoder, encoder_names, in) || !read_bridge(bridge, in.bridge) ||
      !read_decoder(decoder, decoder_names, in)) {
    return pybind11::none();
  }
  std::optional<std::vector<Found>> found;
  try {
    const pybind11::gil_scoped_release without_gil;
    found = search_whole(std::move(in));
  } catch (const c10::Error&) {
    // A model has its own words for what the operators refuse.
    return pybind11::none();
  }
  if (!found.has_value()) return pybind11::none();
  list results(found->size());
  for (size_t i = 0; i < found->size(); ++i) {
    Found& one = (*found)[i];
    list tokens(one.tokens.size());
    for (size_t t = 0; t < one.tokens.size(); ++t) tokens[t] = pybind11::int_(one.tokens[t]);
    results[i] = pybind11::make_tuple(
        std::move(tokens), one.score,
        one.weights.defined() ? wrapped(std::move(one.weights)) : pybind11::none());
  }
  return results;
}

}  // namespace

void define_search_whole(pybind11::module_& m) {
  using pybind11::arg;
  m.def("search_whole", &call_search_whole, arg("others"), arg("encoder"), arg("encoder_names"),
        arg("bridge"), arg("decoder"), arg("decoder_names"), arg("source"), arg("lengths"),
        arg("encoder_cell"), arg("bidirectional"), arg("bridge_kind"), arg("c_from_h"),
        arg("decoder_layers"), arg("hidden_size"), arg("cell"), arg("order"), arg("fed"),
        arg("heads"), arg("input_feeding"), arg("max_length"), arg("beam_size"),
        arg("length_penalty"), arg("need_weights"), arg("min_length"), arg("n_best"),
        arg("block_ngrams"), arg("prefix"), arg("coverage_penalty"), arg("sample"),
        arg("temperature"), arg("top_k"), arg("top_p"), arg("seed"),
        "What a search of pyseq.seq2seq finds, or None: see search_whole.h.");
}

}  // namespace pyseq
