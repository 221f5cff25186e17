// SPDX-License-Identifier: Apache-2.0
// Stacked recurrent layers in one call, past the dispatcher, where nothing looks on: what else
// surrounds a step of a small layer takes several times as long as the step.
#pragma once

#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "ops.h"

namespace pyseq {

// As `scan` takes them.
struct DirectionWeights {
  Tensor w_ih, w_hh;
  OptionalTensor b_ih, b_hh, w_hr;
};

// A call of a module, in the layout that the module takes.
struct LayersInputs {
  Tensor x = {};                               // (T, B, I), (B, T, I) with batch_first, or (T, I)
  std::vector<Tensor> state = {};              // none, h, or h and c: (L*D, B, .), or (L*D, .)
  OptionalTensor lengths = {};                 // (B,)
  std::vector<DirectionWeights> weights = {};  // L*D
  std::string_view cell;
  bool bidirectional, batch_first, training;
};

// In the same layout; c_n is undefined where the cell has no c.
struct LayersResult {
  Tensor y, h_n, c_n;
};

// The same numbers as the operators give. None where the call must go through them: something looks
// on, or the arguments are such that somebody has a word to say about them.
std::optional<LayersResult> scan_layers(const LayersInputs& in);

// (h_n, c_n) of `scan` for one step, of x (B, I): straight where it can be, else by the operator.
std::pair<Tensor, Tensor> scan_step(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                                    const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                    const OptionalTensor& h, const OptionalTensor& c,
                                    std::string_view cell, const OptionalTensor& w_ch);

}  // namespace pyseq
