// SPDX-License-Identifier: Apache-2.0
// Names for Python, nothing else: the operators' schemas and kernels for the dispatcher
// (torch.ops.pyseq), and the pybind11 module _C.
#include <ATen/ops/linear.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "arguments.h"
#include "autocast.h"
#include "autograd.h"
#include "build_info.h"
#include "call_decoder.h"
#include "call_layers.h"
#include "call_search.h"
#include "check.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cuda_plan.h"
#include "dispatcher.h"
#include "loss.h"
#include "ops.h"
#include "quantized.h"
#include "scan_both.h"
#include "scan_layers.h"
#include "search.h"
#include "widened.h"
#include "without_gradient.h"

TORCH_LIBRARY(pyseq, m) {
  m.def(
      "scan(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
      "Tensor? h_0, Tensor? c_0, Tensor? lengths, Tensor? resets, str cell, bool reverse, "
      "int keep_every=1, bool return_states=False, Tensor? w_ch=None, Tensor? h_mask=None, Tensor? "
      "zoneout_h=None, "
      "Tensor? zoneout_c=None, Tensor? reset_h=None, Tensor? reset_c=None, Tensor? gain_ih=None, "
      "Tensor? gain_hh=None, Tensor? gain_c=None, Tensor? bias_c=None) -> (Tensor y, Tensor h_n, "
      "Tensor c_n, Tensor c_steps)");
  m.def(
      "scan_forward(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? w_hr, Tensor? h_0, Tensor? c_0, Tensor? lengths, Tensor? resets, str cell, "
      "bool reverse, int keep_every=1, bool return_states=False, Tensor? w_ch=None, "
      "Tensor?[]? extras=None) -> Tensor[] results");
  m.def(
      "scan_backward(Tensor? d_y, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_c_steps, Tensor x, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? h_0, "
      "Tensor? c_0, Tensor? lengths, Tensor? resets, Tensor[] saved, str cell, bool reverse, "
      "int keep_every, bool needs_x, Tensor? w_ch=None, Tensor?[]? extras=None) -> (Tensor d_x, "
      "Tensor d_w_ih, Tensor d_w_hh, Tensor d_b_ih, Tensor d_b_hh, Tensor d_w_hr, Tensor d_h_0, "
      "Tensor d_c_0, Tensor d_w_ch, Tensor[] d_extras)");
  m.def(
      "attend(Tensor query, Tensor keys, Tensor memory, Tensor? weight_v, Tensor? lengths, "
      "str score, Tensor? positions=None, int window=0, int heads=1, Tensor? step=None, "
      "bool need_weights=True) -> (Tensor context, Tensor attn)");
  m.def(
      "attend_backward(Tensor? d_context, Tensor? d_attn, Tensor query, Tensor keys, "
      "Tensor memory, Tensor? weight_v, Tensor? lengths, Tensor? attn, str score, "
      "Tensor? positions=None, int window=0, int heads=1, Tensor? step=None) -> "
      "(Tensor d_query, Tensor d_keys, Tensor d_memory, Tensor d_weight_v, Tensor d_positions)");
  m.def(
      "attend_history(Tensor query, Tensor keys, Tensor memory, Tensor weight_v, "
      "Tensor weight_history, Tensor? lengths=None, Tensor? past=None, Tensor? positions=None, "
      "int window=0, int heads=1, Tensor? step=None, str history=\"previous\", "
      "bool need_weights=True) -> (Tensor context, Tensor attn, Tensor past_n)");
  m.def(
      "attend_history_backward(Tensor? d_context, Tensor? d_attn, Tensor? d_past_n, "
      "Tensor query, Tensor keys, Tensor memory, Tensor weight_v, Tensor weight_history, "
      "Tensor? lengths, Tensor? past, Tensor attn, Tensor? positions, int window, int heads, "
      "Tensor? step, str history) -> (Tensor d_query, Tensor d_keys, Tensor d_memory, "
      "Tensor d_weight_v, Tensor d_weight_history, Tensor d_past, Tensor d_positions)");
  m.def(
      "decode(Tensor x, Tensor[] layers, Tensor keys, Tensor memory, Tensor combine, "
      "Tensor? weight_query, Tensor? weight_v, Tensor? h_0, Tensor? c_0, Tensor? feed, "
      "Tensor? lengths, Tensor? dropout_masks, str cell, str score, bool input_feeding, "
      "bool need_weights, "
      "Tensor? weight_history=None, Tensor? weight_position=None, Tensor? weight_position_v=None, "
      "Tensor? step=None, Tensor? past=None, int heads=1, int window=0, str history=\"none\", "
      "str order=\"luong\", str fed=\"output\", Tensor? memory_rows=None) -> (Tensor output, "
      "Tensor attn, Tensor h_n, Tensor c_n, Tensor feed_n, Tensor past_n)");
  m.def(
      "decode_forward(Tensor x, Tensor[] layers, Tensor keys, Tensor memory, Tensor combine, "
      "Tensor? weight_query, Tensor? weight_v, Tensor? h_0, Tensor? c_0, Tensor? feed, "
      "Tensor? lengths, Tensor? dropout_masks, str cell, str score, bool input_feeding, "
      "Tensor? weight_history=None, Tensor? weight_position=None, Tensor? weight_position_v=None, "
      "Tensor? step=None, Tensor? past=None, int heads=1, int window=0, str history=\"none\", "
      "str order=\"luong\", str fed=\"output\") -> Tensor[] results");
  m.def(
      "decode_backward(Tensor? d_output, Tensor? d_attn, Tensor? d_h_n, Tensor? d_c_n, "
      "Tensor? d_feed_n, Tensor? d_past_n, Tensor x, Tensor[] layers, Tensor keys, "
      "Tensor memory, Tensor combine, Tensor? weight_query, Tensor? weight_v, Tensor? h_0, "
      "Tensor? c_0, Tensor? feed, Tensor? lengths, Tensor? dropout_masks, Tensor output, "
      "Tensor attn, Tensor[] saved, str cell, str score, bool input_feeding, bool needs_x, "
      "Tensor? weight_history=None, Tensor? weight_position=None, Tensor? weight_position_v=None, "
      "Tensor? step=None, Tensor? past=None, int heads=1, int window=0, str history=\"none\", "
      "str order=\"luong\", str fed=\"output\") -> "
      "(Tensor d_x, Tensor[] d_layers, Tensor d_keys, Tensor d_memory, Tensor d_combine, "
      "Tensor d_weight_query, Tensor d_weight_v, Tensor d_h_0, Tensor d_c_0, Tensor d_feed, "
      "Tensor d_weight_history, Tensor d_weight_position, Tensor d_weight_position_v, "
      "Tensor d_past)");
  m.def(
      "scan_both(Tensor x, Tensor?[] weights, Tensor? h_0, Tensor? c_0, Tensor? lengths, "
      "Tensor? resets, str cell) -> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def(
      "generate(Tensor embedding, Tensor[] layers, Tensor? keys, Tensor? memory, "
      "Tensor? combine, Tensor output_weight, Tensor? output_bias, Tensor? weight_query, "
      "Tensor? weight_v, Tensor h_0, Tensor? c_0, Tensor? feed, Tensor? lengths, str cell, "
      "str score, bool input_feeding, int max_length, int beam_size, float length_penalty, "
      "bool need_weights, int min_length=0, int n_best=1, int block_ngrams=0, "
      "Tensor? prefix=None, Tensor? weight_history=None, Tensor? weight_position=None, "
      "Tensor? weight_position_v=None, Tensor? step=None, Tensor? past=None, int heads=1, "
      "int window=0, str history=\"none\", str order=\"luong\", str fed=\"output\", "
      "float coverage_penalty=0, bool sample=False, float temperature=1, int top_k=0, "
      "float top_p=1, int seed=0) -> "
      "(Tensor tokens, Tensor lengths, Tensor scores, Tensor attn)");
  m.def(
      "scheduled_inputs(Tensor tokens, Tensor coins, Tensor? draws, Tensor embedding, "
      "Tensor[] layers, Tensor? keys, Tensor? memory, Tensor? combine, Tensor output_weight, "
      "Tensor? output_bias, Tensor? weight_query, Tensor? weight_v, Tensor h_0, Tensor? c_0, "
      "Tensor? feed, Tensor? lengths, Tensor? embedding_masks, Tensor? dropout_masks, "
      "Tensor? output_masks, str cell, str score, bool input_feeding, "
      "Tensor? weight_history=None, Tensor? weight_position=None, Tensor? weight_position_v=None, "
      "Tensor? step=None, Tensor? past=None, int heads=1, int window=0, str history=\"none\", "
      "str order=\"luong\", str fed=\"output\") -> Tensor");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "int ignore_index, float label_smoothing) -> Tensor");
  m.def(
      "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "int ignore_index, float label_smoothing, bool needs_hidden, bool needs_weight, "
      "bool needs_bias) -> (Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("sigmoid(Tensor x) -> Tensor");
  m.def("tanh(Tensor x) -> Tensor");
}

namespace {

constexpr size_t kEmbedding = 3;  // the argument whose type scheduled_inputs computes in

}  // namespace

TORCH_LIBRARY_IMPL(pyseq, CPU, m) {
  m.impl("scan", pyseq::Widened<&pyseq::scan>::of("pyseq::scan"));
  m.impl("scan_forward", &pyseq::scan_forward);
  m.impl("scan_backward", &pyseq::scan_backward);
  m.impl("attend", pyseq::Widened<&pyseq::attend>::of("pyseq::attend"));
  m.impl("attend_backward", &pyseq::attend_backward);
  m.impl("attend_history", pyseq::Widened<&pyseq::attend_history>::of("pyseq::attend_history"));
  m.impl("attend_history_backward", &pyseq::attend_history_backward);
  m.impl("decode", pyseq::Widened<&pyseq::decode>::of("pyseq::decode"));
  m.impl("decode_forward", &pyseq::decode_forward);
  m.impl("decode_backward", &pyseq::decode_backward);
  m.impl("linear_cross_entropy",
         pyseq::Widened<&pyseq::linear_cross_entropy>::of("pyseq::linear_cross_entropy"));
  m.impl("linear_cross_entropy_forward", &pyseq::linear_cross_entropy_forward);
  m.impl("scan_both", pyseq::Widened<&pyseq::scan_both>::of("pyseq::scan_both"));
  m.impl("generate", pyseq::Widened<&pyseq::generate>::of("pyseq::generate"));
  m.impl("scheduled_inputs",
         pyseq::Widened<&pyseq::scheduled_inputs, pyseq::TakesShort::kNowhere, kEmbedding>::of(
             "pyseq::scheduled_inputs"));
  m.impl("linear", pyseq::Widened<&pyseq::linear>::of("pyseq::linear"));
  m.impl("sigmoid", &pyseq::sigmoid);
  m.impl("tanh", &pyseq::tanh);
}

// On devices that have nothing of their own. Those that run a decoder on its own tokens are added
// by pyseq/search/operators.py.
TORCH_LIBRARY_IMPL(pyseq, CompositeExplicitAutograd, m) {
  m.impl("linear_cross_entropy",
         pyseq::Widened<&pyseq::linear_cross_entropy_by_torch>::of("pyseq::linear_cross_entropy"));
  m.impl("linear_cross_entropy_forward", &pyseq::linear_cross_entropy_forward_by_torch);
  m.impl("linear", &at::linear);
  m.impl("sigmoid", &at::sigmoid);
  m.impl("tanh", &at::tanh);
}

namespace {

// On CUDA the kernels know the short types.
template <auto Kernel>
auto of_every_type(const char* name) {
  return pyseq::Widened<Kernel, pyseq::TakesShort::kOnCuda>::of(name);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyseq, Autograd, m) {
  m.impl("scan", of_every_type<&pyseq::autograd::scan>("pyseq::scan"));
  m.impl("attend", of_every_type<&pyseq::autograd::attend>("pyseq::attend"));
  m.impl("attend_history",
         pyseq::Widened<&pyseq::autograd::attend_history>::of("pyseq::attend_history"));
  m.impl("decode", of_every_type<&pyseq::autograd::decode>("pyseq::decode"));
  m.impl("linear_cross_entropy",
         pyseq::Widened<&pyseq::autograd::linear_cross_entropy>::of("pyseq::linear_cross_entropy"));
  m.impl("scan_both", of_every_type<&pyseq::autograd::scan_both>("pyseq::scan_both"));
  m.impl("generate", pyseq::WithoutGradient<&pyseq::generate>::of("pyseq::generate"));
  m.impl("scheduled_inputs", pyseq::WithoutGradient<&pyseq::scheduled_inputs, kEmbedding>::of(
                                 "pyseq::scheduled_inputs"));
  m.impl("linear", of_every_type<&pyseq::autograd::linear>("pyseq::linear"));
}

namespace {

template <c10::DispatchKey Key>
void register_autocast(torch::Library& m) {
  m.impl("scan", pyseq::Autocast<Key, &pyseq::scan>::of("pyseq::scan"));
  m.impl("attend", pyseq::Autocast<Key, &pyseq::attend>::of("pyseq::attend"));
  m.impl("attend_history",
         pyseq::Autocast<Key, &pyseq::attend_history>::of("pyseq::attend_history"));
  m.impl("decode", pyseq::Autocast<Key, &pyseq::decode>::of("pyseq::decode"));
  m.impl("linear", pyseq::Autocast<Key, &pyseq::linear>::of("pyseq::linear"));
  m.impl("linear_cross_entropy",
         pyseq::Autocast<Key, &pyseq::linear_cross_entropy>::of("pyseq::linear_cross_entropy"));
  m.impl("scan_both", pyseq::Autocast<Key, &pyseq::scan_both>::of("pyseq::scan_both"));
  m.impl("generate", pyseq::Autocast<Key, &pyseq::generate>::of("pyseq::generate"));
  m.impl("scheduled_inputs",
         pyseq::Autocast<Key, &pyseq::scheduled_inputs>::of("pyseq::scheduled_inputs"));
}

}  // namespace

TORCH_LIBRARY_IMPL(pyseq, AutocastCPU, m) { register_autocast<c10::DispatchKey::AutocastCPU>(m); }
TORCH_LIBRARY_IMPL(pyseq, AutocastCUDA, m) { register_autocast<c10::DispatchKey::AutocastCUDA>(m); }

namespace {

// pybind11 hands over lists as vectors.
template <class Argument>
struct FromPython {
  using type = Argument;
};
template <>
struct FromPython<at::TensorList> {
  using type = std::vector<at::Tensor>;
};
template <auto Kernel>
struct Bound;

template <class Return, class... Args, Return (*Kernel)(Args...)>
struct Bound<Kernel> {
  static auto to(const char* name) {
    const auto op = pyseq::find_operator<Kernel>(name);
    return [op](typename FromPython<Args>::type... args) -> Return { return op.call(args...); };
  }
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of pyseq; its operators are under torch.ops.pyseq.";
  pyseq::cpu::poison_workspaces_if(&pyseq::poisons_memory);
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  m.def("scan", Bound<&pyseq::scan>::to("pyseq::scan"), pybind11::arg("x"), pybind11::arg("w_ih"),
        pybind11::arg("w_hh"), pybind11::arg("b_ih"), pybind11::arg("b_hh"), pybind11::arg("w_hr"),
        pybind11::arg("h_0"), pybind11::arg("c_0"), pybind11::arg("lengths"),
        pybind11::arg("resets"), pybind11::arg("cell"), pybind11::arg("reverse"),
        pybind11::arg("keep_every") = 1, pybind11::arg("return_states") = false,
        pybind11::arg("w_ch") = pybind11::none(), pybind11::arg("h_mask") = pybind11::none(),
        pybind11::arg("zoneout_h") = pybind11::none(),
        pybind11::arg("zoneout_c") = pybind11::none(), pybind11::arg("reset_h") = pybind11::none(),
        pybind11::arg("reset_c") = pybind11::none(), pybind11::arg("gain_ih") = pybind11::none(),
        pybind11::arg("gain_hh") = pybind11::none(), pybind11::arg("gain_c") = pybind11::none(),
        pybind11::arg("bias_c") = pybind11::none(), without_gil, "torch.ops.pyseq.scan");
  m.def("step", &pyseq::scan_step, pybind11::arg("x"), pybind11::arg("w_ih"), pybind11::arg("w_hh"),
        pybind11::arg("b_ih"), pybind11::arg("b_hh"), pybind11::arg("h"), pybind11::arg("c"),
        pybind11::arg("cell"), pybind11::arg("w_ch"), without_gil,
        "torch.ops.pyseq.scan of one step, without its T.");
  pyseq::define_scan_layers(m);
  pyseq::define_decode_whole(m);
  pyseq::define_search_whole(m);
  m.def("attend", Bound<&pyseq::attend>::to("pyseq::attend"), pybind11::arg("query"),
        pybind11::arg("keys"), pybind11::arg("memory"), pybind11::arg("weight_v"),
        pybind11::arg("lengths"), pybind11::arg("score"), pybind11::arg("positions") = std::nullopt,
        pybind11::arg("window") = 0, pybind11::arg("heads") = 1,
        pybind11::arg("step") = std::nullopt, pybind11::arg("need_weights") = true, without_gil,
        "torch.ops.pyseq.attend");
  using pybind11::arg;
  m.def("decode", Bound<&pyseq::decode>::to("pyseq::decode"), arg("x"), arg("layers"), arg("keys"),
        arg("memory"), arg("combine"), arg("weight_query"), arg("weight_v"), arg("h_0"), arg("c_0"),
        arg("feed"), arg("lengths"), arg("dropout_masks"), arg("cell"), arg("score"),
        arg("input_feeding"), arg("need_weights"), arg("weight_history") = std::nullopt,
        arg("weight_position") = std::nullopt, arg("weight_position_v") = std::nullopt,
        arg("step") = std::nullopt, arg("past") = std::nullopt, arg("heads") = 1, arg("window") = 0,
        arg("history") = "none", arg("order") = "luong", arg("fed") = "output",
        arg("memory_rows") = std::nullopt, without_gil, "torch.ops.pyseq.decode");
  m.def("linear_cross_entropy",
        Bound<&pyseq::linear_cross_entropy>::to("pyseq::linear_cross_entropy"), without_gil,
        "torch.ops.pyseq.linear_cross_entropy");
  m.def("quantize_weight", &pyseq::quantize_weight, pybind11::arg("weight"), pybind11::kw_only(),
        pybind11::arg("gates"), pybind11::arg("columns"), pybind11::arg("kind"), without_gil,
        "A matrix as quantized weights in uint8.");
  m.def("quantized_values", &pyseq::quantized_values, without_gil,
        "The numbers and scales of quantized weights.");
  m.def("cuda_plan", &pyseq::cuda_plan, pybind11::arg("operator"), pybind11::arg("device"),
        pybind11::arg("sizes"), pybind11::kw_only(), pybind11::arg("dtype"), pybind11::arg("path"),
        "How a loop would run on a CUDA device.");
  m.def("cuda_device", &pyseq::cuda_device, "What a plan asks of the current CUDA device.");
  m.def("build_info", &pyseq::build_info, "What the extension was built with and for.");
  m.def("compiled_tiers", &pyseq::cpu::compiled_tiers, "The CPU tiers compiled in.");
  m.def("has_lost_threads", &pyseq::cpu::has_lost_threads,
        "Whether this thread is a forked child's, and had led others before.");
  m.def("cpu_tier", [] { return pyseq::cpu::tier().name; }, "The CPU tier in use.");
  m.def("multiply_add_rate", &pyseq::multiply_add_rate, pybind11::kw_only(),
        pybind11::arg("threads"), pybind11::arg("rounds"), without_gil,
        "Float32 operations per second of the multiply-add units.");
  m.def("read_rate", &pyseq::read_rate, pybind11::kw_only(), pybind11::arg("threads"),
        pybind11::arg("bytes"), pybind11::arg("passes"), without_gil,
        "Bytes per second read by threads that each read `bytes` of their own.");
}
