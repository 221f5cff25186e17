// SPDX-License-Identifier: Apache-2.0
#include "decode_whole.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include "layers.h"
#include "straight.h"

namespace pyseq {

namespace {

const OptionalTensor kNone;

// Whether the operators would do no more than what is done here, if they take the arguments.
bool is_straight(const WholeInputs& in) {
  const StraightCall call;
  bool takes_all = call.is_open() && call.computes_in(in.x) && call.takes(in.memory) &&
                   call.takes(in.combine) && !(in.training && is_quantized(in.combine));
  for (const OptionalTensor* each :
       {&in.keys, &in.weight_keys, &in.feed, &in.lengths, &in.weight_query, &in.weight_v}) {
    takes_all = takes_all && call.takes(*each);
  }
  for (const Tensor& part : in.state) takes_all = takes_all && call.takes(part);
  for (const Tensor& weight : in.layers) takes_all = takes_all && call.takes(weight);
  return takes_all;
}

// Whether the arguments have the dimensions that a module takes; sizes are the operator's affair.
bool has_layout(const WholeInputs& in) {
  const size_t parts = cell_shape(in.cell).has_cell ? 2 : 1;
  return in.x.dim() == 3 && in.memory.dim() == 3 && (!in.keys.has_value() || in.keys->dim() == 3) &&
         (in.state.empty() || in.state.size() == parts);
}

OptionalTensor part_of(const std::vector<Tensor>& state, size_t part) {
  return part < state.size() ? OptionalTensor(state[part]) : std::nullopt;
}

}  // namespace

std::optional<Decoded> decode_whole(const WholeInputs& in) {
  if (!has_layout(in) || !is_straight(in)) return std::nullopt;
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto steps_first = [&](const Tensor& tensor) {
    return in.batch_first ? tensor.transpose(0, 1) : tensor;
  };
  // As the kernels read it: copied once for the keys and for itself.
  const Tensor rows = in.batch_first ? in.memory.contiguous() : rows_first(in.memory);
  Tensor keys = rows;
  if (in.keys.has_value()) {
    keys = in.batch_first ? *in.keys : in.keys->transpose(0, 1);
  } else if (in.weight_keys.has_value()) {
    // Keys of padding are read by nobody, whatever it holds.
    keys = linear(rows, *in.weight_keys, kNone);
  }
  const std::string_view score = in.weight_v.has_value() ? "concat" : "dot";
  return decode(steps_first(in.x), in.layers, keys.transpose(0, 1), rows.transpose(0, 1),
                in.combine, in.weight_query, in.weight_v, part_of(in.state, 0),
                part_of(in.state, 1), in.feed, in.lengths, /*dropout_masks=*/kNone, in.cell, score,
                in.feeding, in.need_weights, /*weight_history=*/kNone, /*weight_position=*/kNone,
                /*weight_position_v=*/kNone, /*step=*/kNone, /*past=*/kNone, in.heads,
                /*window=*/0, /*history=*/"none", in.order, in.fed, /*memory_rows=*/kNone);
}

}  // namespace pyseq
