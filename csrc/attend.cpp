// SPDX-License-Identifier: Apache-2.0
#include <ATen/Dispatch.h>

#include "devices.h"
#include "layers.h"

namespace pyseq {

namespace {

struct AttendShape {
  int64_t steps, batch, source, key_size, memory_size, heads, window;
};

AttendShape check_attend(const Tensor& query, const Tensor& keys, const Tensor& memory,
                         const OptionalTensor& weight_v, bool additive,
                         const OptionalTensor& positions, int64_t window, int64_t heads,
                         const OptionalTensor& step) {
  check_floating(query, "query");
  check_dim(query, "query", 3, "(T, B, A)");
  const int64_t steps = query.size(0), batch = query.size(1);
  check_memory(keys, memory, weight_v, batch, additive, query, "query");
  check_tensor(query, "query", "(T, B, A)", {steps, batch, keys.size(2)}, keys, "keys");
  check_heads(heads, keys, memory);
  check_window(window);
  TORCH_CHECK_VALUE(!positions.has_value() || window > 0,
                    "positions must come with a window around them, got none");
  check_tensor(positions, "positions", "(T, B)", {steps, batch}, query, "query");
  TORCH_CHECK_VALUE(!step.has_value() || (window > 0 && !positions.has_value()),
                    "step goes with a window without positions, got ",
                    window > 0 ? "positions" : "no window");
  check_step(step, batch, query, "query");
  return {steps, batch, memory.size(0), keys.size(2), memory.size(2), heads, window};
}

template <class T>
cpu::Attend<T> attend_arguments(const AttendShape& shape, bool additive, const Tensor& query,
                                const Tensor& keys, const Tensor& memory, const OptionalTensor& v,
                                const OptionalTensor& lengths, const OptionalTensor& positions,
                                const OptionalTensor& step, const Tensor& attn, T* context) {
  return {
      .additive = additive,
      .steps = shape.steps,
      .batch = shape.batch * shape.heads,
      .heads = shape.heads,
      .source = shape.source,
      .key_size = shape.key_size / shape.heads,
      .memory_size = shape.memory_size / shape.heads,
      .threads = thread_count(),
      .query = query.const_data_ptr<T>(),
      .keys = keys.const_data_ptr<T>(),
      .memory = memory.const_data_ptr<T>(),
      .v = data<T>(v),
      .lengths = data<int64_t>(lengths),
      .window = shape.window,
      .centers = data<T>(positions),
      .step = data<int64_t>(step),
      .attn = data_if<T>(attn),
      .context = context,
  };
}

// What goes with past weights. Returns K.
int64_t check_remembering(const AttendShape& shape, std::string_view history,
                          const Tensor& weight_history, const OptionalTensor& past,
                          const Tensor& query) {
  check_choice("history", history, {"previous", "cumulative"});
  return check_history(weight_history, past, shape.key_size,
                       {shape.batch, shape.heads, shape.source}, query, "query");
}

}  // namespace

std::tuple<Tensor, Tensor> attend(const Tensor& query_in, const Tensor& keys_in,
                                  const Tensor& memory_in, const OptionalTensor& weight_v,
                                  const OptionalTensor& lengths_in, std::string_view score,
                                  const OptionalTensor& positions_in, int64_t window, int64_t heads,
                                  const OptionalTensor& step_in, bool need_weights) {
  const bool additive = is_additive(score);
  const AttendShape shape = check_attend(query_in, keys_in, memory_in, weight_v, additive,
                                         positions_in, window, heads, step_in);
  const OptionalTensor lengths = check_lengths(lengths_in, shape.batch, shape.source, "S");
  const OptionalTensor v = contiguous(weight_v), positions = contiguous(positions_in),
                       step = contiguous(step_in);
  const Tensor query = query_in.contiguous(), keys = rows_first(keys_in, heads),
               memory = rows_first(memory_in, heads);
  const Tensor attn = need_weights
                          ? fresh(attn_sizes(shape.steps, shape.batch, heads, shape.source), query)
                          : Tensor();
  const Tensor context = fresh({shape.steps, shape.batch, shape.memory_size}, query);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "attend", [&] {
    kernels_of<scalar_t>(query).attend_forward(
        attend_arguments<scalar_t>(shape, additive, query, keys, memory, v, lengths, positions,
                                   step, attn, context.data_ptr<scalar_t>()));
  });
  return {context, need_weights ? attn : nothing(query)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_backward(
    const OptionalTensor& d_context_in, const OptionalTensor& d_attn_in, const Tensor& query_in,
    const Tensor& keys_in, const Tensor& memory_in, const OptionalTensor& weight_v,
    const OptionalTensor& lengths_in, const OptionalTensor& attn_in, std::string_view score,
    const OptionalTensor& positions_in, int64_t window, int64_t heads,
    const OptionalTensor& step_in) {
  const bool additive = is_additive(score);
  const AttendShape shape = check_attend(query_in, keys_in, memory_in, weight_v, additive,
                                         positions_in, window, heads, step_in);
  const auto [T_, B, S, A, M, N, D] = shape;
  const std::vector<int64_t> sizes = attn_sizes(T_, B, N, S);
  TORCH_CHECK(attn_in.has_value() || (window > 0 && query_in.is_cpu()),
              "attn must be given, but for windows on the CPU, got none");
  const Tensor attn =
      attn_in.has_value() ? check_saved(*attn_in, "attn", sizes, query_in) : Tensor();
  check_tensor(d_context_in, "d_context", "(T, B, M)", {T_, B, M}, query_in, "query");
  check_tensor(d_attn_in, "d_attn", N == 1 ? "(T, B, S)" : "(T, B, N, S)", sizes, query_in,
               "query");
  const OptionalTensor lengths = check_lengths(lengths_in, B, S, "S");
  const OptionalTensor v = contiguous(weight_v), d_attn = contiguous(d_attn_in),
                       positions = contiguous(positions_in), step = contiguous(step_in);
  const Tensor query = query_in.contiguous(), keys = rows_first(keys_in, N),
               memory = rows_first(memory_in, N);
  const Tensor d_context = or_zero(d_context_in, {T_, B, M}, query);
  const Tensor d_query = fresh({T_, B, A}, query);
  // With windows the loop makes what is otherwise one product for all steps: it would multiply
  // mostly zeros.
  const bool windows = D > 0, keys_inside = additive || windows;
  const Tensor d_scores = windows && query.is_cpu() ? Tensor() : fresh({T_, B * N, S}, query);
  Tensor d_keys = keys_inside ? fresh({B * N, S, A / N}, query) : Tensor();
  Tensor d_memory = windows ? fresh({B * N, S, M / N}, query) : Tensor();
  const Tensor d_v = additive ? fresh({B, A}, query) : nothing(query);
  const Tensor d_centers = positions.has_value() ? fresh({T_, B, N}, query) : nothing(query);

  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "attend_backward", [&] {
        kernels_of<scalar_t>(query).attend_backward({
            .forward = attend_arguments<scalar_t>(shape, additive, query, keys, memory, v, lengths,
                                                  positions, step, attn, nullptr),
            .d_context = d_context.const_data_ptr<scalar_t>(),
            .d_attn = data<scalar_t>(d_attn),
            .d_scores = data_if<scalar_t>(d_scores),
            .d_query = d_query.data_ptr<scalar_t>(),
            .d_keys = data_if<scalar_t>(d_keys),
            .d_v = data_or_null<scalar_t>(d_v, additive),
            .d_memory = data_if<scalar_t>(d_memory),
            .d_centers = data_or_null<scalar_t>(d_centers, positions.has_value()),
        });
      });
  if (!keys_inside) d_keys = summed_over_steps(d_scores, query, N);
  if (!windows) d_memory = summed_over_steps(attn.view({T_, B * N, S}), d_context, N);
  return {d_query, steps_first(d_keys, N), steps_first(d_memory, N),
          additive ? d_v.sum(0) : nothing(query),
          positions.has_value() ? d_centers.sum(2) : nothing(query)};
}

std::tuple<Tensor, Tensor, Tensor> attend_history(
    const Tensor& query_in, const Tensor& keys_in, const Tensor& memory_in, const Tensor& weight_v,
    const Tensor& weight_history, const OptionalTensor& lengths_in, const OptionalTensor& past_in,
    const OptionalTensor& positions_in, int64_t window, int64_t heads,
    const OptionalTensor& step_in, std::string_view history, bool need_weights) {
  const AttendShape shape = check_attend(query_in, keys_in, memory_in, weight_v, /*additive=*/true,
                                         positions_in, window, heads, step_in);
  const auto [T_, B, S, A, M, N, D] = shape;
  const int64_t taps = check_remembering(shape, history, weight_history, past_in, query_in);
  const OptionalTensor lengths = check_lengths(lengths_in, B, S, "S");
  const OptionalTensor v = weight_v.contiguous(), positions = contiguous(positions_in),
                       step = contiguous(step_in);
  const Tensor query = query_in.contiguous(), keys = rows_first(keys_in, N),
               memory = rows_first(memory_in, N), w_history = by_tap(weight_history, N);
  const Tensor attn = need_weights ? fresh(attn_sizes(T_, B, N, S), query) : Tensor();
  const Tensor context = fresh({T_, B, M}, query), past = copy_or_zero(past_in, {B, N, S}, query);
  AT_DISPATCH_FLOATING_TYPES(query.scalar_type(), "attend_history", [&] {
    auto call =
        attend_arguments<scalar_t>(shape, /*additive=*/true, query, keys, memory, v, lengths,
                                   positions, step, attn, context.data_ptr<scalar_t>());
    call.taps = taps;
    call.w_history = w_history.const_data_ptr<scalar_t>();
    call.cumulative = history == "cumulative";
    call.past = past.data_ptr<scalar_t>();
    kernels_of<scalar_t>(query).attend_forward(call);
  });
  return {context, need_weights ? attn : nothing(query), past};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_history_backward(
    const OptionalTensor& d_context_in, const OptionalTensor& d_attn_in,
    const OptionalTensor& d_past_n, const Tensor& query_in, const Tensor& keys_in,
    const Tensor& memory_in, const Tensor& weight_v, const Tensor& weight_history,
    const OptionalTensor& lengths_in, const OptionalTensor& past_in, const Tensor& attn_in,
    const OptionalTensor& positions_in, int64_t window, int64_t heads,
    const OptionalTensor& step_in, std::string_view history) {
  const AttendShape shape = check_attend(query_in, keys_in, memory_in, weight_v, /*additive=*/true,
                                         positions_in, window, heads, step_in);
  const auto [T_, B, S, A, M, N, D] = shape;
  const int64_t taps = check_remembering(shape, history, weight_history, past_in, query_in);
  const std::vector<int64_t> sizes = attn_sizes(T_, B, N, S);
  const Tensor attn = check_saved(attn_in, "attn", sizes, query_in);
  check_tensor(d_context_in, "d_context", "(T, B, M)", {T_, B, M}, query_in, "query");
  check_tensor(d_attn_in, "d_attn", N == 1 ? "(T, B, S)" : "(T, B, N, S)", sizes, query_in,
               "query");
  check_tensor(d_past_n, "d_past_n", "(B, N, S)", {B, N, S}, query_in, "query");
  const OptionalTensor lengths = check_lengths(lengths_in, B, S, "S");
  const OptionalTensor v = weight_v.contiguous(), d_attn = contiguous(d_attn_in),
                       positions = contiguous(positions_in), step = contiguous(step_in);
  const Tensor query = query_in.contiguous(), keys = rows_first(keys_in, N),
               memory = rows_first(memory_in, N), w_history = by_tap(weight_history, N);
  const Tensor past = copy_or_zero(past_in, {B, N, S}, query),
               d_past = copy_or_zero(d_past_n, {B, N, S}, query),
               d_context = or_zero(d_context_in, {T_, B, M}, query);
  const bool windows = D > 0, predicts = positions.has_value();
  const Tensor d_query = fresh({T_, B, A}, query), d_keys = fresh({B * N, S, A / N}, query),
               d_v = fresh({B, A}, query), d_taps = fresh({B * N, taps, A / N}, query),
               d_centers = predicts ? fresh({T_, B, N}, query) : nothing(query);
  Tensor d_memory = windows ? fresh({B * N, S, M / N}, query) : Tensor();
  AT_DISPATCH_FLOATING_TYPES(query.scalar_type(), "attend_history_backward", [&] {
    auto call = attend_arguments<scalar_t>(shape, /*additive=*/true, query, keys, memory, v,
                                           lengths, positions, step, attn, nullptr);
    call.taps = taps;
    call.w_history = w_history.const_data_ptr<scalar_t>();
    call.cumulative = history == "cumulative";
    call.past = past.data_ptr<scalar_t>();
    kernels_of<scalar_t>(query).attend_backward({
        .forward = call,
        .d_context = d_context.const_data_ptr<scalar_t>(),
        .d_attn = data<scalar_t>(d_attn),
        .d_scores = nullptr,
        .d_query = d_query.data_ptr<scalar_t>(),
        .d_keys = d_keys.data_ptr<scalar_t>(),
        .d_v = d_v.data_ptr<scalar_t>(),
        .d_memory = data_if<scalar_t>(d_memory),
        .d_centers = data_or_null<scalar_t>(d_centers, predicts),
        .d_past = d_past.data_ptr<scalar_t>(),
        .d_w_history = d_taps.data_ptr<scalar_t>(),
    });
  });
  if (!windows) d_memory = summed_over_steps(attn.view({T_, B * N, S}), d_context, N);
  return {d_query,
          steps_first(d_keys, N),
          steps_first(d_memory, N),
          d_v.sum(0),
          sum_by_tap(d_taps, N),
          d_past,
          predicts ? d_centers.sum(2) : nothing(query)};
}

}  // namespace pyseq
