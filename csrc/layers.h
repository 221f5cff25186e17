// SPDX-License-Identifier: Apache-2.0
// What the operators of recurrent layers share: cells by name, biases as the kernels want
// them, and the checks of layers and memory.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/bmm.h>

#include <algorithm>
#include <string>
#include <utility>

#include "arguments.h"
#include "check.h"
#include "cpu/kernels.h"
#include "ops.h"
#include "quantized.h"

namespace pyseq {

// The cells that decoders take.
inline std::optional<CellKind> decoder_cell(std::string_view name) {
  if (name == "lstm") return CellKind::kLstm;
  if (name == "gru") return CellKind::kGru;
  if (name == "rnn_tanh") return CellKind::kRnnTanh;
  if (name == "rnn_relu") return CellKind::kRnnRelu;
  return std::nullopt;
}

inline CellShape cell_shape(std::string_view name) {
  const std::optional<CellKind> cell = decoder_cell(name);
  TORCH_CHECK_VALUE(cell.has_value(), "cell must be one of rnn_tanh, rnn_relu, gru, lstm, got ",
                    name);
  return cell_shape(*cell);
}

// The cells of a scan: those and more.
inline std::optional<CellKind> scan_cell(std::string_view name, bool peepholes) {
  if (name == "lstm" && peepholes) return CellKind::kLstmPeephole;
  if (name == "indrnn_tanh") return CellKind::kIndRnnTanh;
  if (name == "indrnn_relu") return CellKind::kIndRnnRelu;
  if (name == "gru_reset_before") return CellKind::kGruResetBefore;
  if (name == "slstm_sigmoid") return CellKind::kSlstmSigmoid;
  if (name == "slstm_exp") return CellKind::kSlstmExp;
  return decoder_cell(name);
}

inline CellShape scan_cell_shape(std::string_view name, bool peepholes) {
  const std::optional<CellKind> cell = scan_cell(name, peepholes);
  TORCH_CHECK_VALUE(cell.has_value(),
                    "cell must be one of rnn_tanh, rnn_relu, gru, lstm, indrnn_tanh, indrnn_relu, "
                    "gru_reset_before, slstm_sigmoid, slstm_exp, got ",
                    name);
  return cell_shape(*cell);
}

inline void check_choice(const char* name, std::string_view value,
                         std::initializer_list<std::string_view> allowed) {
  std::string text;
  for (const std::string_view choice : allowed) {
    if (choice == value) return;
    text += (text.empty() ? "" : ", ") + std::string(choice);
  }
  TORCH_CHECK_VALUE(false, name, " must be one of ", text, ", got ", value);
}

inline bool is_additive(std::string_view score) {
  TORCH_CHECK_VALUE(score == "dot" || score == "concat", "score must be dot or concat, got ",
                    score);
  return score == "concat";
}

// (S, B, D) as contiguous (B, S, D): a row's positions side by side, whatever the batch. Heads are
// rows of their own: (B*N, S, D/N).
inline Tensor rows_first(const Tensor& tensor, int64_t heads = 1) {
  if (heads == 1) return tensor.transpose(0, 1).contiguous();
  const int64_t source = tensor.size(0), batch = tensor.size(1), size = tensor.size(2) / heads;
  return tensor.view({source, batch, heads, size})
      .permute({1, 2, 0, 3})
      .contiguous()
      .view({batch * heads, source, size});
}

// The inverse, as a view of one head and a copy of several.
inline Tensor steps_first(const Tensor& rows, int64_t heads) {
  if (heads == 1) return rows.transpose(0, 1);
  const int64_t batch = rows.size(0) / heads, source = rows.size(1), size = rows.size(2);
  return rows.view({batch, heads, source, size})
      .permute({2, 0, 1, 3})
      .contiguous()
      .view({source, batch, heads * size});
}

// sum_t weights_t[s] * rows_t, (B*N, S, D/N), for weights (T, B*N, S) and rows (T, B, D) in memory.
// In the dtype of both, even where backward is called under autocast.
inline Tensor summed_over_steps(const Tensor& weights, const Tensor& rows, int64_t heads) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t steps = rows.size(0), count = rows.size(1) * heads;
  return at::bmm(weights.permute({1, 2, 0}),
                 rows.view({steps, count, rows.size(2) / heads}).transpose(0, 1));
}

// The shape of the weights: those of one head come without a dimension for it.
inline std::vector<int64_t> attn_sizes(int64_t steps, int64_t batch, int64_t heads,
                                       int64_t source) {
  if (heads == 1) return {steps, batch, source};
  return {steps, batch, heads, source};
}

inline void check_heads(int64_t heads, const Tensor& keys, const Tensor& memory) {
  TORCH_CHECK_VALUE(heads >= 1, "heads must be at least 1, got ", heads);
  for (const auto& [name, size] : {std::pair{"A", keys.size(2)}, {"M", memory.size(2)}}) {
    TORCH_CHECK_VALUE(size % heads == 0, "heads must divide ", name, " = ", size, ", got ", heads);
  }
}

inline void check_window(int64_t window) {
  TORCH_CHECK_VALUE(window >= 0, "window must be at least 1 position, or 0 for none, got ", window);
}

// How many steps of a loop each row has behind it.
inline void check_step(const OptionalTensor& step, int64_t batch, const Tensor& like,
                       const char* like_name) {
  if (!step.has_value()) return;
  TORCH_CHECK(step->scalar_type() == at::kLong && step->sizes().equals({batch}),
              "step must be int64 (B,) = (", batch, ",), got ", step->scalar_type(), " ",
              shape_text(step->sizes()));
  TORCH_CHECK(step->device() == like.device(), "step must be on the device of ", like_name, ", ",
              like.device(), ", got ", step->device());
}

// The convolution of past weights, and these themselves. Returns K.
inline int64_t check_history(const Tensor& weight_history, const OptionalTensor& past,
                             int64_t key_size, c10::IntArrayRef past_sizes, const Tensor& like,
                             const char* like_name) {
  check_dim(weight_history, "weight_history", 2, "(A, K)");
  const int64_t taps = weight_history.size(1);
  TORCH_CHECK(taps % 2 == 1, "weight_history must be (A, K) with an odd K, got ",
              shape_text(weight_history.sizes()));
  check_tensor(weight_history, "weight_history", "(A, K)", {key_size, taps}, like, like_name);
  check_tensor(past, "past", "(B, N, S)", past_sizes, like, like_name);
  return taps;
}

// weight_history tap by tap, (N, K, A/N): the kernels add up what the taps of a position say.
inline Tensor by_tap(const Tensor& weight_history, int64_t heads) {
  return weight_history.unflatten(0, {heads, weight_history.size(0) / heads})
      .transpose(1, 2)
      .contiguous();
}

// The inverse for its gradient, summands (B*N, K, A/N) of each row.
inline Tensor sum_by_tap(const Tensor& summands, int64_t heads) {
  return summands.unflatten(0, {summands.size(0) / heads, heads})
      .sum(0)
      .transpose(1, 2)
      .flatten(0, 1);
}

// Both biases as the kernels want them: `sum` for the sums that input and recurrent part
// share, `apart` for the recurrent part that stays apart (the GRU's candidate).
struct Bias {
  OptionalTensor sum;
  OptionalTensor apart;
};

// The sum of both in memory of the CPU, b_ih maybe undefined, and, unless `apart` is null, the last
// `hidden` of b_hh in that instead.
inline void add_biases(const Tensor& b_ih, const Tensor& b_hh, int64_t hidden, void* sum,
                       void* apart) {
  const Tensor recurrent = b_hh.contiguous(), input = b_ih.defined() ? b_ih.contiguous() : b_ih;
  const int64_t rows = b_hh.size(0), shared = apart == nullptr ? rows : rows - hidden;
  AT_DISPATCH_FLOATING_TYPES(recurrent.scalar_type(), "bias", [&] {
    const scalar_t* const from = recurrent.const_data_ptr<scalar_t>();
    const scalar_t* const beside = input.defined() ? input.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* const to = static_cast<scalar_t*>(sum);
    for (int64_t i = 0; i < rows; ++i) {
      const scalar_t own = i < shared ? from[i] : 0;
      to[i] = beside == nullptr ? own : beside[i] + own;
    }
    if (apart != nullptr) std::copy_n(from + shared, hidden, static_cast<scalar_t*>(apart));
  });
}

inline Bias fold_bias(const OptionalTensor& b_ih, const OptionalTensor& b_hh, const CellShape& cell,
                      int64_t hidden) {
  if (!b_hh.has_value()) return {contiguous(b_ih), std::nullopt};
  const Tensor recurrent = b_hh->contiguous(),
               input = b_ih.has_value() ? b_ih->contiguous() : Tensor();
  if (!cell.has_apart && !input.defined()) return {recurrent, std::nullopt};
  const int64_t rows = cell.gates * hidden, shared = cell.has_apart ? rows - hidden : rows;
  if (!recurrent.is_cpu()) {
    Tensor sum = recurrent.clone();
    if (cell.has_apart) sum.narrow(0, shared, hidden).zero_();
    if (input.defined()) sum.add_(input);
    return {sum, cell.has_apart ? OptionalTensor(recurrent.narrow(0, shared, hidden).clone())
                                : std::nullopt};
  }
  const Tensor sum = fresh({rows}, recurrent);
  const Tensor apart = cell.has_apart ? fresh({hidden}, recurrent) : Tensor();
  add_biases(input, recurrent, hidden, sum.data_ptr(),
             apart.defined() ? apart.data_ptr() : nullptr);
  return {sum, apart.defined() ? OptionalTensor(apart) : std::nullopt};
}

inline void check_memory(const Tensor& keys, const Tensor& memory, const OptionalTensor& weight_v,
                         int64_t batch, bool additive, const Tensor& like, const char* like_name) {
  check_dim(keys, "keys", 3, "(S, B, A)");
  check_dim(memory, "memory", 3, "(S, B, M)");
  const int64_t source = memory.size(0);
  check_tensor(keys, "keys", "(S, B, A)", {source, batch, keys.size(2)}, like, like_name);
  check_tensor(memory, "memory", "(S, B, M)", {source, batch, memory.size(2)}, like, like_name);
  TORCH_CHECK_VALUE(weight_v.has_value() == additive,
                    "weight_v must be given for score concat and no other");
  check_tensor(weight_v, "weight_v", "(A,)", {keys.size(2)}, like, like_name);
}

// What attends, of a decoder.
struct AttentionTensors {
  const Tensor &keys, &memory, &combine;
  const OptionalTensor &weight_query, &weight_v;
};

inline void check_attention(const AttentionTensors& of, bool additive, int64_t batch,
                            int64_t hidden, const Tensor& like, const char* like_name) {
  check_memory(of.keys, of.memory, of.weight_v, batch, additive, like, like_name);
  const int64_t source = of.memory.size(0), key_size = of.keys.size(2);
  check_weight(of.combine, "combine", "(H, M + H)", hidden, 1, {of.memory.size(2), hidden}, like,
               like_name);
  TORCH_CHECK_VALUE(!of.weight_query.has_value() || additive,
                    "weight_query goes with score concat, got dot");
  if (of.weight_query.has_value()) {
    check_weight(*of.weight_query, "weight_query", "(A, H)", key_size, 1, {hidden}, like,
                 like_name);
  } else {
    check_tensor(of.keys, "keys", "(S, B, H)", {source, batch, hidden}, like, like_name);
  }
}

// Quantized weights have no values of the type that is computed in.
template <class T>
const T* values(const Tensor& weight) {
  return is_quantized(weight) ? nullptr : weight.const_data_ptr<T>();
}
template <class T>
const T* values(const OptionalTensor& weight) {
  return weight.has_value() ? values<T>(*weight) : nullptr;
}
inline const QuantizedWeights* quantized(const OptionalTensor& weight, size_t run = 0) {
  return weight.has_value() ? quantized_run(*weight, run) : nullptr;
}

inline void check_differentiable(const Tensor& weight) {
  TORCH_CHECK(!is_quantized(weight),
              "quantized weights are for inference and give no gradients, got a tensor that "
              "requires one: call under torch.no_grad()");
}

// All weights of a layer are of one kind.
inline void check_same_kind(const Tensor& weight, const char* name, const Tensor& like,
                            const char* like_name) {
  TORCH_CHECK(is_quantized(weight) == is_quantized(like), name, " must be ",
              is_quantized(like) ? "quantized like " : "floating-point like ", like_name, ", got ",
              weight.scalar_type());
}

inline void check_attention_kind(const Tensor& combine, const OptionalTensor& weight_query,
                                 const Tensor& w_hh) {
  check_same_kind(combine, "combine", w_hh, "w_hh");
  if (weight_query.has_value()) check_same_kind(*weight_query, "weight_query", w_hh, "w_hh");
}

constexpr size_t kPerLayer = 4;  // w_ih, w_hh, b_ih, b_hh

// The weights of stacked cells for `input` features, and `fed` numbers of the last step beside
// them. Returns the number of layers.
inline int64_t check_layers(at::TensorList layers, const CellShape& cell, int64_t input,
                            int64_t fed, int64_t hidden, const Tensor& like,
                            const char* like_name) {
  TORCH_CHECK(!layers.empty() && layers.size() % kPerLayer == 0,
              "layers must hold w_ih, w_hh, b_ih, b_hh of each layer, got ", layers.size(),
              " tensors");
  const int64_t count = static_cast<int64_t>(layers.size() / kPerLayer);
  TORCH_CHECK(count <= cpu::kMaxLayers, "layers must be at most ", cpu::kMaxLayers, ", got ",
              count);
  const int64_t rows = cell.gates * hidden;
  for (int64_t l = 0; l < count; ++l) {
    const auto name = [&](const char* weight) {
      return std::string(weight) + " of layer " + std::to_string(l);
    };
    const Tensor* weights = &layers[l * kPerLayer];
    const char* letters = l > 0           ? "(G*H, H)"
                          : fed == 0      ? "(G*H, I)"
                          : fed == hidden ? "(G*H, I + H)"
                                          : "(G*H, I + M)";
    std::vector<int64_t> runs{l > 0 ? hidden : input};
    if (l == 0 && fed > 0) runs.push_back(fed);
    check_weight(weights[0], name("w_ih").c_str(), letters, rows, cell.gates, runs, like,
                 like_name);
    check_weight(weights[1], name("w_hh").c_str(), "(G*H, H)", rows, cell.gates, {hidden}, like,
                 like_name);
    check_same_kind(weights[0], name("w_ih").c_str(), layers[1], "w_hh of layer 0");
    check_same_kind(weights[1], name("w_hh").c_str(), layers[1], "w_hh of layer 0");
    check_tensor(weights[2], name("b_ih").c_str(), "(G*H,)", {rows}, like, like_name);
    check_tensor(weights[3], name("b_hh").c_str(), "(G*H,)", {rows}, like, like_name);
  }
  return count;
}

// The weights of a stacked cell as the loop reads them: of w_ih the last columns, for the `below`
// numbers that the loop makes, which of quantized weights are the run `run`.
template <class T>
cpu::DecoderLayer<T> layer_weights(const Tensor& w_ih, const Tensor& w_hh, const Bias& bias,
                                   int64_t below, size_t run) {
  cpu::DecoderLayer<T> layer{};
  if (below > 0 && is_quantized(w_ih)) {
    layer.quantized_in = quantized_run(w_ih, run);
  } else if (below > 0) {
    layer.w_in = w_ih.const_data_ptr<T>() + (w_ih.size(1) - below);
    layer.w_in_stride = w_ih.size(1);
  }
  layer.w_hh = values<T>(w_hh);
  layer.quantized_hh = quantized_run(w_hh);
  layer.bias = data<T>(bias.sum);
  layer.apart_bias = data<T>(bias.apart);
  return layer;
}

// The tensors that forward saved, taken in its order and checked.
class SavedList {
 public:
  SavedList(at::TensorList list, const Tensor& like)
      : list_(list), like_(like), wide_(wide_like(like)) {}

  Tensor take(bool is_kept, const char* name, at::IntArrayRef sizes) {
    return is_kept ? check_saved(next(name), name, sizes, like_) : Tensor();
  }
  // Of what is float32 for short types.
  Tensor take_wide(bool is_kept, const char* name, at::IntArrayRef sizes) {
    return is_kept ? check_saved(next(name), name, sizes, wide_) : Tensor();
  }
  void check_end() const {
    TORCH_CHECK(next_ == list_.size(), "saved must be as forward gave it, ", next_,
                " tensors, got ", list_.size());
  }

 private:
  const Tensor& next(const char* name) {
    TORCH_CHECK(next_ < list_.size(), "saved must be as forward gave it, with ", name, ", got ",
                list_.size(), " tensors");
    return list_[next_++];
  }

  const at::TensorList list_;
  const Tensor like_, wide_;
  size_t next_ = 0;
};

// A result that a call does not have.
inline Tensor or_nothing(const Tensor& tensor, const Tensor& like) {
  return tensor.defined() ? tensor : nothing(like);
}
template <class T>
T* data_if(const Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr<T>() : nullptr;
}

}  // namespace pyseq
