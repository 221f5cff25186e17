// SPDX-License-Identifier: Apache-2.0
// The operators as the dispatcher knows them: check, allocate, choose the device. The
// schemas are in bindings.cpp; what the arguments mean is said once, in pyseq/functional/.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace pyseq {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A result that a call cannot have (c_n of a GRU, say) is a tensor without elements:
// operators may return neither nothing nor the same memory twice.

// What acts on a scan besides its weights; pyseq/functional/ says how. The arguments of `scan`
// after return_states; where they come as one list they are in this order, and it may be left out.
enum ScanExtra : size_t {
  kHMask,
  kZoneoutH,
  kZoneoutC,
  kResetH,
  kResetC,
  kGainIh,
  kGainHh,
  kGainC,
  kBiasC,
  kScanExtras
};
using ScanExtraList = std::optional<c10::List<OptionalTensor>>;

// (y, h_n, c_n, c_steps): the last, c after every step, only with `return_states`.
using ScanResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
ScanResult scan(
    const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
    const OptionalTensor& b_hh, const OptionalTensor& w_hr, const OptionalTensor& h_0,
    const OptionalTensor& c_0, const OptionalTensor& lengths, const OptionalTensor& resets,
    std::string_view cell, bool reverse, int64_t keep_every, bool return_states,
    const OptionalTensor& w_ch = std::nullopt, const OptionalTensor& h_mask = std::nullopt,
    const OptionalTensor& zoneout_h = std::nullopt, const OptionalTensor& zoneout_c = std::nullopt,
    const OptionalTensor& reset_h = std::nullopt, const OptionalTensor& reset_c = std::nullopt,
    const OptionalTensor& gain_ih = std::nullopt, const OptionalTensor& gain_hh = std::nullopt,
    const OptionalTensor& gain_c = std::nullopt, const OptionalTensor& bias_c = std::nullopt);

// The results of `scan`, and then what backward needs of the steps; of all, or with `keep_every`
// above 1 only the state before every so many, from which backward runs forward once more. A
// list, because how many there are depends on the cell and on what acts on it.
std::vector<Tensor> scan_forward(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                                 const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                 const OptionalTensor& w_hr, const OptionalTensor& h_0,
                                 const OptionalTensor& c_0, const OptionalTensor& lengths,
                                 const OptionalTensor& resets, std::string_view cell, bool reverse,
                                 int64_t keep_every, bool return_states, const OptionalTensor& w_ch,
                                 const ScanExtraList& extras);

// (d_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_h_0, d_c_0, d_w_ch, d_extras), of the last a
// tensor for each element of the argument, without elements where there is no gradient.
using ScanGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, std::vector<Tensor>>;
ScanGradients scan_backward(const OptionalTensor& d_y, const OptionalTensor& d_h_n,
                            const OptionalTensor& d_c_n, const OptionalTensor& d_c_steps,
                            const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                            const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                            const OptionalTensor& w_hr, const OptionalTensor& h_0,
                            const OptionalTensor& c_0, const OptionalTensor& lengths,
                            const OptionalTensor& resets, at::TensorList saved,
                            std::string_view cell, bool reverse, int64_t keep_every, bool needs_x,
                            const OptionalTensor& w_ch, const ScanExtraList& extras);

// (context, attn), the last with `need_weights` only.
std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& keys, const Tensor& memory,
                                  const OptionalTensor& weight_v, const OptionalTensor& lengths,
                                  std::string_view score, const OptionalTensor& positions,
                                  int64_t window, int64_t heads, const OptionalTensor& step,
                                  bool need_weights);

// Of windows attn may be missing, and is made once more.
// (d_query, d_keys, d_memory, d_weight_v, d_positions)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_backward(
    const OptionalTensor& d_context, const OptionalTensor& d_attn, const Tensor& query,
    const Tensor& keys, const Tensor& memory, const OptionalTensor& weight_v,
    const OptionalTensor& lengths, const OptionalTensor& attn, std::string_view score,
    const OptionalTensor& positions, int64_t window, int64_t heads, const OptionalTensor& step);

// The same with past weights in the additive score, of queries that are steps in order:
// (context, attn, past_n).
std::tuple<Tensor, Tensor, Tensor> attend_history(
    const Tensor& query, const Tensor& keys, const Tensor& memory, const Tensor& weight_v,
    const Tensor& weight_history, const OptionalTensor& lengths, const OptionalTensor& past,
    const OptionalTensor& positions, int64_t window, int64_t heads, const OptionalTensor& step,
    std::string_view history, bool need_weights);

// (d_query, d_keys, d_memory, d_weight_v, d_weight_history, d_past, d_positions)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_history_backward(
    const OptionalTensor& d_context, const OptionalTensor& d_attn, const OptionalTensor& d_past_n,
    const Tensor& query, const Tensor& keys, const Tensor& memory, const Tensor& weight_v,
    const Tensor& weight_history, const OptionalTensor& lengths, const OptionalTensor& past,
    const Tensor& attn, const OptionalTensor& positions, int64_t window, int64_t heads,
    const OptionalTensor& step, std::string_view history);

// (output, attn, h_n, c_n, feed_n, past_n): the last but one where the context is fed, the last
// where past weights enter the score.
using Decoded = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Decoded decode(const Tensor& x, at::TensorList layers, const Tensor& keys, const Tensor& memory,
               const Tensor& combine, const OptionalTensor& weight_query,
               const OptionalTensor& weight_v, const OptionalTensor& h_0, const OptionalTensor& c_0,
               const OptionalTensor& feed, const OptionalTensor& lengths,
               const OptionalTensor& dropout_masks, std::string_view cell, std::string_view score,
               bool input_feeding, bool need_weights, const OptionalTensor& weight_history,
               const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
               const OptionalTensor& step, const OptionalTensor& past, int64_t heads,
               int64_t window, std::string_view history, std::string_view order,
               std::string_view fed, const OptionalTensor& memory_rows = std::nullopt);

// The same, attn always, and then what backward needs besides.
std::vector<Tensor> decode_forward(
    const Tensor& x, at::TensorList layers, const Tensor& keys, const Tensor& memory,
    const Tensor& combine, const OptionalTensor& weight_query, const OptionalTensor& weight_v,
    const OptionalTensor& h_0, const OptionalTensor& c_0, const OptionalTensor& feed,
    const OptionalTensor& lengths, const OptionalTensor& dropout_masks, std::string_view cell,
    std::string_view score, bool input_feeding, const OptionalTensor& weight_history,
    const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
    const OptionalTensor& step, const OptionalTensor& past, int64_t heads, int64_t window,
    std::string_view history, std::string_view order, std::string_view fed);

// (d_x, d_layers, d_keys, d_memory, d_combine, d_weight_query, d_weight_v, d_h_0, d_c_0,
// d_feed, d_weight_history, d_weight_position, d_weight_position_v, d_past)
using DecodeGradients = std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor,
                                   Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
DecodeGradients decode_backward(
    const OptionalTensor& d_output, const OptionalTensor& d_attn, const OptionalTensor& d_h_n,
    const OptionalTensor& d_c_n, const OptionalTensor& d_feed_n, const OptionalTensor& d_past_n,
    const Tensor& x, at::TensorList layers, const Tensor& keys, const Tensor& memory,
    const Tensor& combine, const OptionalTensor& weight_query, const OptionalTensor& weight_v,
    const OptionalTensor& h_0, const OptionalTensor& c_0, const OptionalTensor& feed,
    const OptionalTensor& lengths, const OptionalTensor& dropout_masks, const Tensor& output,
    const Tensor& attn, at::TensorList saved, std::string_view cell, std::string_view score,
    bool input_feeding, bool needs_x, const OptionalTensor& weight_history,
    const OptionalTensor& weight_position, const OptionalTensor& weight_position_v,
    const OptionalTensor& step, const OptionalTensor& past, int64_t heads, int64_t window,
    std::string_view history, std::string_view order, std::string_view fed);

// x W^T + bias for x (..., I).
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

// The activations of the CPU tier in use, for the tests of their accuracy.
Tensor sigmoid(const Tensor& x);
Tensor tanh(const Tensor& x);

// What the machine can do at most in float32, per second of all threads; see cpu/peak.h. For the
// benchmarks.
double multiply_add_rate(int64_t threads, int64_t rounds);
double read_rate(int64_t threads, int64_t bytes, int64_t passes);

}  // namespace pyseq
