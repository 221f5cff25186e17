// SPDX-License-Identifier: Apache-2.0
// The arguments of a decoder, checked once and handed on.
#pragma once

#include <vector>

#include "layers.h"

namespace pyseq {

// The arguments as the operators get them; functional/decoding.py says what they are.
struct DecodeInputs {
  const Tensor& x;
  at::TensorList layers;
  const Tensor &keys, &memory, &combine;
  const OptionalTensor &weight_query, &weight_v, &h_0, &c_0, &feed, &lengths, &dropout_masks;
  std::string_view cell, score;
  bool input_feeding;
  const OptionalTensor &weight_history, &weight_position, &weight_position_v, &step, &past;
  int64_t heads, window;
  std::string_view history, order, fed;
  OptionalTensor memory_rows = std::nullopt;

  bool remembers() const { return history != "none"; }
  bool feeds_context() const { return fed == "context"; }
  bool attends_first() const { return order == "bahdanau"; }
  bool predicts() const { return weight_position.has_value(); }
};

struct DecodeShape {
  CellShape cell;
  bool additive;
  int64_t steps, batch, input, hidden, layers, source, key_size, memory_size;
  int64_t heads, fed_size, taps, position_size;

  int64_t rows() const { return cell.gates * hidden; }
};

// The arguments checked, and as the kernels read them. x and the states may have any strides.
struct DecodeArguments {
  DecodeShape shape;
  bool feeding, feeds_context, attends_first, remembers, predicts, cumulative;
  int64_t window;
  Tensor x;
  std::vector<Tensor> w_ih, w_hh;
  std::vector<Bias> bias;
  Tensor keys, memory;  // (B*N, S, .)
  Tensor combine;
  OptionalTensor weight_query, weight_v, h_0, c_0, lengths, masks;
  OptionalTensor weight_history;  // tap by tap, (N, K, A/N)
  OptionalTensor weight_position, weight_position_v, step, past;
  Tensor feed;
  OptionalTensor source_rows;  // (B,) int32: the row of keys, memory and lengths that each reads

  // Whether the gradients of keys and memory are added up in the loop; else each is one product for
  // all steps. With windows that would multiply mostly zeros.
  bool windows() const { return window > 0; }
  bool keys_inside() const { return shape.additive || windows(); }
  // Whether forward keeps the states of every step, which on the CPU the gates give once more, and
  // the contexts, which without windows are one product.
  bool keeps_states() const { return !x.is_cpu(); }
  bool keeps_context() const { return windows() || !x.is_cpu(); }
  // Whether the loop multiplies the input itself.
  bool reads_input() const;
};

DecodeArguments check_decode(const DecodeInputs& inputs);

// What of that must hold before anybody takes the `memory_rows` of keys, memory and lengths.
void check_shared_rows(const DecodeInputs& inputs);

// The same of what does not depend on the steps, for an operator that makes its own: `x` then
// gives no more than dtype and device, and is called `like`.
DecodeShape check_decoder(const DecodeInputs& inputs, int64_t batch, int64_t input,
                          const char* like);

}  // namespace pyseq
