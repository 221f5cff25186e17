// SPDX-License-Identifier: Apache-2.0
// A decoder with its keys in one call, past the dispatcher, where nothing looks on: what else
// surrounds a small decoder takes as long as all of its steps.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "ops.h"

namespace pyseq {

// A call of a decoder with dot or concat scores on what is its key: the memory, a product of it,
// or what the caller has made.
struct WholeInputs {
  Tensor x = {}, memory = {};        // (T, B, I), (S, B, M); with batch_first B comes first
  OptionalTensor keys = {};          // (S, B, A), likewise
  OptionalTensor weight_keys = {};   // (A, M), which makes them of the memory, or none
  std::vector<Tensor> state = {};    // none, h, or h and c: (L, B, H)
  OptionalTensor feed = {};          // (B, F)
  OptionalTensor lengths = {};       // (B,)
  std::vector<Tensor> layers = {};   // w_ih, w_hh, b_ih, b_hh of each
  Tensor combine = {};               // (H, M + H)
  OptionalTensor weight_query = {};  // (A, H)
  OptionalTensor weight_v = {};      // (A,)
  std::string_view cell, order, fed;
  int64_t heads;
  bool feeding, batch_first, training, need_weights;
};

// The same numbers as the operators give, steps first; see Decoded. None where the call must go
// through them: something looks on, or the arguments are such that somebody has a word to say about
// them.
std::optional<Decoded> decode_whole(const WholeInputs& in);

}  // namespace pyseq
