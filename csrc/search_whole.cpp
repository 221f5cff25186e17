// SPDX-License-Identifier: Apache-2.0
#include "search_whole.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mean.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "arguments.h"
#include "layers.h"
#include "search.h"
#include "straight.h"

namespace pyseq {

namespace {

const OptionalTensor kNone;

// Whether the operators would do no more than what is done here, if they take the arguments. The
// encoder's layers are asked about by scan_layers.
bool is_straight(const SearchWholeInputs& in) {
  const StraightCall call;
  bool takes_all = call.is_open() && call.computes_in(in.embedding) &&
                   call.computes_in(in.source_embedding) && call.takes(in.source) &&
                   call.takes(in.lengths) && call.takes(in.output_weight);
  for (const OptionalTensor* each : {&in.output_bias, &in.combine, &in.weight_query, &in.weight_v,
                                     &in.weight_keys, &in.choices.prefix, &in.bridge.weight_h,
                                     &in.bridge.bias_h, &in.bridge.weight_c, &in.bridge.bias_c}) {
    takes_all = takes_all && call.takes(*each);
  }
  for (const Tensor& weight : in.layers) takes_all = takes_all && call.takes(weight);
  return takes_all;
}

// Whether the arguments have the layout that a model takes; sizes are the operators' affair.
bool has_layout(const SearchWholeInputs& in) {
  const at::ScalarType ids = in.source.scalar_type();
  return in.source.dim() == 2 && (ids == at::kLong || ids == at::kInt) &&
         in.source_embedding.dim() == 2;
}

// (S, B, E'), steps first.
Tensor embedded(const SearchWholeInputs& in) {
  const Tensor ids = in.source.transpose(0, 1);
  const Tensor rows = at::index_select(in.source_embedding, 0, ids.reshape({-1}));
  return rows.view({ids.size(0), ids.size(1), rows.size(1)});
}

// (L * 2, B, P) with the directions of each layer side by side: (L, B, 2 * P).
Tensor join_directions(const Tensor& part) {
  const int64_t layers = part.size(0) / 2, batch = part.size(1), size = part.size(2);
  const Tensor joined = fresh({layers, batch, 2 * size}, part);
  const size_t bytes = static_cast<size_t>(size) * part.element_size();
  const char* from = static_cast<const char*>(part.const_data_ptr());
  char* const to = static_cast<char*>(joined.data_ptr());
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t direction = 0; direction < 2; ++direction) {
      for (int64_t row = 0; row < batch; ++row, from += bytes) {
        std::memcpy(to + ((layer * batch + row) * 2 + direction) * bytes, from, bytes);
      }
    }
  }
  return joined;
}

// One part of the encoder's state (L', B, P') as one of the decoder's, (L, B, H).
Tensor bridged(const BridgeInputs& bridge, const Tensor& part, const OptionalTensor& weight,
               const OptionalTensor& bias) {
  const int64_t batch = part.size(1);
  Tensor rows = at::linear(part.transpose(0, 1).flatten(1), *weight, bias);
  if (bridge.kind == "tanh") rows = rows.tanh();
  if (bridge.kind == "relu") rows = rows.relu();
  return rows.reshape({batch, bridge.layers, bridge.size}).transpose(0, 1).contiguous();
}

struct Start {
  Tensor h;
  OptionalTensor c;
};

// None for a bridge that a module has a word to say about.
std::optional<Start> start_from(const SearchWholeInputs& in, LayersResult&& last) {
  const bool has_cell = in.cell == "lstm";
  if (in.encoder.bidirectional) {
    last.h_n = join_directions(last.h_n);
    if (last.c_n.defined()) last.c_n = join_directions(last.c_n);
  }
  const BridgeInputs& bridge = in.bridge;
  if (bridge.kind == "copy") {
    const bool copies_c = has_cell && last.c_n.defined();
    return Start{std::move(last.h_n),
                 copies_c ? OptionalTensor(std::move(last.c_n)) : std::nullopt};
  }
  if (!bridge.weight_h.has_value() || !bridge.bias_h.has_value() ||
      (has_cell && (!bridge.weight_c.has_value() || !bridge.bias_c.has_value()))) {
    return std::nullopt;
  }
  Start start{bridged(bridge, last.h_n, bridge.weight_h, bridge.bias_h), std::nullopt};
  if (has_cell) {
    const Tensor& from = last.c_n.defined() && !bridge.c_from_h ? last.c_n : last.h_n;
    start.c = bridged(bridge, from, bridge.weight_c, bridge.bias_c);
  }
  return start;
}

std::optional<std::vector<Found>> read_results(
    const SearchWholeInputs& in, const std::tuple<Tensor, Tensor, Tensor, Tensor>& results) {
  const auto& [tokens, sizes, scores, attn] = results;
  const int64_t count = tokens.size(0), longest = tokens.size(1);
  const int64_t* const ids = tokens.const_data_ptr<int64_t>();
  const int64_t* const length = sizes.const_data_ptr<int64_t>();
  const Tensor widths = in.lengths.to(at::kLong).contiguous();
  const int64_t* const width = widths.const_data_ptr<int64_t>();
  const bool has_weights = in.choices.need_weights && in.attends;
  const Tensor weights = has_weights && attn.dim() == 4 ? attn.mean(2) : attn;  // over the heads
  std::vector<Found> found(count);
  return AT_DISPATCH_FLOATING_TYPES(
      scores.scalar_type(), "search_whole", [&]() -> std::optional<std::vector<Found>> {
        const scalar_t* const score = scores.const_data_ptr<scalar_t>();
        for (int64_t place = 0; place < count; ++place) {
          if (std::isnan(score[place])) return std::nullopt;
          const int64_t* const own = ids + place * longest;
          Found& to = found[place];
          to.tokens.assign(own, own + length[place]);
          to.score = score[place];
          if (has_weights) {
            to.weights = weights.select(0, place)
                             .narrow(0, 0, length[place])
                             .narrow(1, 0, width[place / in.choices.n_best]);
          }
        }
        return std::move(found);
      });
}

}  // namespace

std::optional<std::vector<Found>> search_whole(SearchWholeInputs&& in) {
  const at::NoGradGuard no_grad;
  if (!has_layout(in) || !is_straight(in)) return std::nullopt;
  const at::AutoDispatchBelowADInplaceOrView below;
  in.encoder.x = embedded(in);
  in.encoder.lengths = in.lengths;
  std::optional<LayersResult> read = scan_layers(in.encoder);
  if (!read.has_value()) return std::nullopt;
  OptionalTensor memory, keys, lengths;
  if (in.attends) {
    const Tensor rows = rows_first(read->y);
    memory = rows.transpose(0, 1);
    // Keys of padding are read by nobody, and the memory is zero there.
    keys = in.weight_keys.has_value() ? pyseq::linear(rows, *in.weight_keys, kNone).transpose(0, 1)
                                      : *memory;
    lengths = in.lengths;
  }
  const std::optional<Start> start = start_from(in, std::move(*read));
  if (!start.has_value()) return std::nullopt;
  const std::string_view score = !in.attends ? "none" : in.weight_v.has_value() ? "concat" : "dot";
  const SearchChoices& how = in.choices;
  return read_results(
      in,
      generate(in.embedding, in.layers, keys, memory, in.combine, in.output_weight, in.output_bias,
               in.weight_query, in.weight_v, start->h, start->c,
               /*feed=*/kNone, lengths, in.cell, score, in.feeding, how.max_length, how.beam_size,
               how.length_penalty, how.need_weights, how.min_length, how.n_best, how.block_ngrams,
               how.prefix, /*weight_history=*/kNone,
               /*weight_position=*/kNone, /*weight_position_v=*/kNone, /*step=*/kNone,
               /*past=*/kNone, in.heads, /*window=*/0, /*history=*/"none", in.order, in.fed,
               how.coverage_penalty, how.sample, how.temperature, how.top_k, how.top_p, how.seed));
}

}  // namespace pyseq
