// SPDX-License-Identifier: Apache-2.0
// The decoder's loops as launches for every step, between products that the caller makes: for sizes
// at which a library's products cost less than waiting. A thread has one unit of one row, a block
// some rows of attention. Nothing waits for the device, so that a CUDA graph can hold a whole loop.
#include <initializer_list>

#include "decode_backward.h"
#include "decode_forward.h"

namespace pyseq::cuda {

namespace {

// More blocks than this take turns.
constexpr int64_t kMostAttentionBlocks = 2048;

template <class S>
int attention_blocks(const cpu::Decode<S>& call) {
  const int64_t rows = call.batch * (call.w_position == nullptr ? call.head_count() : 1);
  return static_cast<int>(rows < kMostAttentionBlocks ? rows : kMostAttentionBlocks);
}

template <class S>
Grid attention_grid(const cpu::Decode<S>& call) {
  return {attention_blocks(call), 1, kDecodeThreads, decode_shared(call)};
}

// ---- Kernels ---------------------------------------------------------------------------

// Sums are null where there is no product.

template <class S>
PYSEQ_KERNEL(kPointwiseThreads)
store_kernel(const Accumulate<S>* sums, int64_t count, bool tanh, S* to) {
  using A = Accumulate<S>;
  each_number(count, [&](int64_t i) {
    const A sum = sums == nullptr ? A(0) : sums[i];
    to[i] = narrow<S>(tanh ? Math<A>::tanh(sum) : sum);
  });
}

template <class S, class Cell>
PYSEQ_KERNEL(kPointwiseThreads)
decode_cell_kernel(cpu::Decode<S> call, cpu::DecoderLayer<S> layer, bool first, ForwardStep<S> step,
                   S* masked_to, const Accumulate<S>* of_below, const Accumulate<S>* of_state) {
  constexpr int G = Cell::kGates;
  const int64_t H = call.hidden;
  each_unit(call.batch, H, [&](int64_t row, int64_t unit) {
    Accumulate<S> sums[Cell::kPre] = {};
    PYSEQ_UNROLL
    for (int g = 0; g < G; ++g) {
      const int64_t gate = (row * G + g) * H + unit;
      if (of_below != nullptr) sums[g] += of_below[gate];
      sums[Cell::recurrent_slot(g)] += of_state[gate];
    }
    cell_step<S, Cell>(call, layer, first, step, masked_to, row, unit, sums);
  });
}

template <class S, class Score>
PYSEQ_KERNEL(kDecodeThreads)
decode_attend_kernel(cpu::Decode<S> call, ForwardStep<S> step, const S* queries,
                     Accumulate<S>* positions) {
  attend_rows<S, Score>(call, step, DecodePlace::here(call.batch), queries, positions);
}

template <class S, class Score>
PYSEQ_KERNEL(kDecodeThreads)
decode_attend_backward_kernel(DeviceBackward<S> args, int64_t t) {
  attend_rows_back<S, Score>(args, t, DecodePlace::here(args.decode.call.batch));
}

template <class S>
PYSEQ_KERNEL(kPointwiseThreads)
output_backward_kernel(DeviceBackward<S> args, int64_t t, const Accumulate<S>* sums) {
  const int64_t H = args.decode.call.hidden;
  each_unit(args.decode.call.batch, H, [&](int64_t row, int64_t unit) {
    output_back(args, t, row, unit, sums == nullptr ? Accumulate<S>(0) : sums[row * H + unit]);
  });
}

template <class S>
PYSEQ_KERNEL(kPointwiseThreads)
context_backward_kernel(DeviceBackward<S> args, int64_t t, const Accumulate<S>* sums) {
  const int64_t M = args.decode.call.memory_size;
  each_unit(args.decode.call.batch, M, [&](int64_t row, int64_t unit) {
    context_back(args, t, row, unit, sums[row * M + unit]);
  });
}

template <class S>
PYSEQ_KERNEL(kPointwiseThreads)
state_backward_kernel(DeviceBackward<S> args, int64_t l, int64_t t, const Accumulate<S>* above,
                      const Accumulate<S>* after) {
  using A = Accumulate<S>;
  const int64_t H = args.decode.call.hidden;
  const StateTerms<S> terms = args.of_state(l, t);
  each_unit(args.decode.call.batch, H, [&](int64_t row, int64_t unit) {
    const int64_t offset = row * H + unit;
    state_back(args, terms, l, t, row, unit, above == nullptr ? A(0) : above[offset],
               after == nullptr ? A(0) : after[offset]);
  });
}

// ---- Loops -----------------------------------------------------------------------------

// Products and launches in turns, until one of them fails.
template <class S>
struct Turns {
  using A = Accumulate<S>;
  const Multiply<S>& multiply;
  cudaStream_t stream;
  int64_t rows;
  bool across;
  cudaError_t error = cudaSuccess;

  // The sum of those products that there are, in `to`; null if there is none.
  const A* sum(std::initializer_list<Product<S>> products, int64_t units, A* to) {
    bool any = false;
    for (const Product<S>& product : products) {
      if (product.weights == nullptr) continue;
      if (error == cudaSuccess) multiply({product, rows, units, across, any, to});
      any = true;
    }
    return any ? to : nullptr;
  }

  template <class... Args>
  void run(void (*kernel)(Args...), const Grid& grid, Args... args) {
    if (error == cudaSuccess) error = launch(kernel, grid, stream, args...);
  }
};

template <class S>
struct AlternateForward {
  using A = Accumulate<S>;
  S* below;      // (2, B, H): a layer's output times its dropout mask, in turns
  A* of_below;   // (B, G*H)
  A* of_state;   // (B, G*H)
  A* projected;  // (B, the largest of A, P, H)
  A* positions;

  AlternateForward(const cpu::Decode<S>& call, WorkPieces& pieces) {
    const int64_t B = call.batch, H = call.hidden, gates = cell_shape(call.cell).gates * H;
    int64_t widest = H;
    for (const int64_t size : {call.w_query == nullptr ? 0 : call.key_size, call.position_size}) {
      widest = size > widest ? size : widest;
    }
    below = pieces.take<S>(2 * B * H);
    of_below = pieces.take<A>(B * gates);
    of_state = pieces.take<A>(B * gates);
    projected = pieces.take<A>(B * widest);
    positions = pieces.take<A>(decode_positions(call, attention_blocks(call)));
  }

  void attend(Turns<S>& turns, const cpu::Decode<S>& call, const ForwardStep<S>& step,
              const S* state) const {
    const int64_t B = call.batch, H = call.hidden;
    const auto project = [&](const S* weights, int64_t size, bool tanh, S* to) {
      const A* const sums = turns.sum({{state, H, weights, H, H}}, size, projected);
      turns.run(store_kernel<S>, pointwise_grid(B * size), sums, B * size, tanh, to);
    };
    if (call.w_position != nullptr) {
      project(call.w_position, call.position_size, true,
              call.positions + step.slot * B * call.position_size);
    }
    if (call.w_query != nullptr) {
      project(call.w_query, call.key_size, false, call.query + step.slot * B * call.key_size);
    }
    with_score(call.additive, [&](auto score) {
      turns.run(decode_attend_kernel<S, decltype(score)>, attention_grid(call), call, step,
                step_queries(call, step, state), positions);
    });
  }

  // Returns the state of the top layer.
  const S* step_cells(Turns<S>& turns, const DeviceDecode<S>& args,
                      const ForwardStep<S>& step) const {
    const cpu::Decode<S>& call = args.call;
    const int64_t B = call.batch, H = call.hidden, L = call.layer_count,
                  gates = cell_shape(call.cell).gates * H;
    const S* input = step.fed;
    for (int64_t l = 0; l < L; ++l) {
      const cpu::DecoderLayer<S>& layer = args.layers[l];
      const int64_t width = l == 0 ? call.fed_size() : H;
      const A* const from_below =
          turns.sum({{input, width, layer.w_in, layer.w_in_stride, width}}, gates, of_below);
      const A* const from_state =
          turns.sum({{layer.states + step.before, H, layer.w_hh, H, H}}, gates, of_state);
      const bool masked = layer.mask != nullptr && l + 1 < L;
      S* const masked_to = masked ? below + (l & 1) * B * H : nullptr;
      with_cell(call.cell, [&](auto cell) {
        turns.run(decode_cell_kernel<S, decltype(cell)>, pointwise_grid(B * H), call, layer, l == 0,
                  step, masked_to, from_below, from_state);
      });
      input = masked ? masked_to : layer.states + step.after;
    }
    return input;
  }

  void combine(Turns<S>& turns, const cpu::Decode<S>& call, const ForwardStep<S>& step,
               const S* top) const {
    const int64_t H = call.hidden, M = call.memory_size, count = call.batch * H;
    const A* const sums =
        turns.sum({{top, H, call.combine + M, M + H, H}, {step.context, M, call.combine, M + H, M}},
                  H, projected);
    turns.run(store_kernel<S>, pointwise_grid(count), sums, count, true, step.output);
  }
};

template <class S>
struct AlternateBackward {
  using A = Accumulate<S>;
  A* above;  // (B, the larger of H and M)
  A* after;  // (B, H)

  AlternateBackward(const cpu::Decode<S>& call, WorkPieces& pieces) {
    const int64_t widest = call.memory_size > call.hidden ? call.memory_size : call.hidden;
    above = pieces.take<A>(call.batch * widest);
    after = pieces.take<A>(call.batch * call.hidden);
  }

  void states(Turns<S>& turns, const DeviceBackward<S>& args, int64_t t) const {
    const cpu::Decode<S>& decode = args.decode.call;
    const int64_t H = decode.hidden;
    for (int64_t l = decode.layer_count - 1; l >= 0; --l) {
      const StateTerms<S> terms = args.of_state(l, t);
      const A* const from_above = turns.sum({terms.above, terms.query, terms.position}, H, above);
      const A* const from_after = turns.sum({terms.after}, H, after);
      turns.run(state_backward_kernel<S>, pointwise_grid(decode.batch * H), args, l, t, from_above,
                from_after);
    }
  }

  void attention(Turns<S>& turns, const DeviceBackward<S>& args, int64_t t) const {
    const cpu::Decode<S>& decode = args.decode.call;
    const A* const sums =
        turns.sum({args.of_context(t), args.of_fed_context(t)}, decode.memory_size, above);
    turns.run(context_backward_kernel<S>, pointwise_grid(decode.batch * decode.memory_size), args,
              t, sums);
    with_score(decode.additive, [&](auto score) {
      turns.run(decode_attend_backward_kernel<S, decltype(score)>, attention_grid(decode), args, t);
    });
  }

  void step(Turns<S>& turns, const DeviceBackward<S>& args, int64_t t) const {
    const cpu::Decode<S>& decode = args.decode.call;
    const A* const sums = turns.sum({args.of_fed_output(t)}, decode.hidden, above);
    turns.run(output_backward_kernel<S>, pointwise_grid(decode.batch * decode.hidden), args, t,
              sums);
    if (decode.attends_first) states(turns, args, t);
    attention(turns, args, t);
    if (!decode.attends_first) states(turns, args, t);
  }

  void first(Turns<S>& turns, const DeviceBackward<S>& args) const {
    const cpu::Decode<S>& decode = args.decode.call;
    const int64_t F = fed_size(decode), count = decode.batch * F;
    const A* const sums = turns.sum({args.of_first_fed()}, F, above);
    turns.run(store_kernel<S>, pointwise_grid(count), sums, count, false, args.call.d_feed);
    states(turns, args, -1);
  }
};

}  // namespace

// ---- Launchers -------------------------------------------------------------------------

template <class S>
int64_t decode_alternate_forward_workspace(const cpu::Decode<S>& args) {
  WorkPieces count(nullptr);
  AlternateForward<S>(args, count);
  return count.used();
}

template <class S>
int64_t decode_alternate_backward_workspace(const cpu::Decode<S>& args) {
  WorkPieces count(nullptr);
  take_backward_work(args, attention_blocks(args), count);
  AlternateBackward<S>(args, count);
  return count.used();
}

template <class S>
cudaError_t decode_alternate_forward(const cpu::Decode<S>& args, void* workspace,
                                     const Multiply<S>& multiply, cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  WorkPieces pieces(workspace);
  const AlternateForward<S> loop(args, pieces);
  const DeviceDecode<S> all = with_layers(args);
  Turns<S> turns{multiply, stream, args.batch, /*across=*/false};
  for (int64_t t = 0; t < args.steps; ++t) {
    const ForwardStep<S> step = forward_step(all.call, t);
    if (args.attends_first) {
      loop.attend(turns, all.call, step, all.layers[args.layer_count - 1].states + step.before);
    }
    const S* const top = loop.step_cells(turns, all, step);
    if (!args.attends_first) loop.attend(turns, all.call, step, top);
    loop.combine(turns, all.call, step, top);
  }
  return turns.error;
}

template <class S>
cudaError_t decode_alternate_backward(const cpu::DecodeBackward<S>& args, void* workspace,
                                      const Multiply<S>& multiply, cudaStream_t stream) {
  const cpu::Decode<S>& call = args.forward;
  if (call.batch == 0) return cudaSuccess;
  WorkPieces pieces(workspace);
  DeviceBackward<S> all =
      backward_arguments(args, take_backward_work(call, attention_blocks(call), pieces));
  for (int64_t l = 0; l < call.layer_count; ++l) {
    all.weights.w_in[l] = call.layers[l].w_in;
    all.weights.w_hh[l] = call.layers[l].w_hh;
  }
  all.weights.of_context = call.combine;
  all.weights.of_top = call.combine + call.memory_size;
  all.weights.w_query = call.w_query;
  all.weights.w_position = call.w_position;
  const AlternateBackward<S> loop(call, pieces);
  Turns<S> turns{multiply, stream, call.batch, /*across=*/true};
  for (int64_t t = call.steps - 1; t >= 0; --t) loop.step(turns, all, t);
  loop.first(turns, all);
  return turns.error == cudaSuccess ? source_gradients(args, stream) : turns.error;
}

#define PYSEQ_INSTANTIATE(S)                                                              \
  template int64_t decode_alternate_forward_workspace<S>(const cpu::Decode<S>&);          \
  template int64_t decode_alternate_backward_workspace<S>(const cpu::Decode<S>&);         \
  template cudaError_t decode_alternate_forward<S>(const cpu::Decode<S>&, void*,          \
                                                   const Multiply<S>&, cudaStream_t);     \
  template cudaError_t decode_alternate_backward<S>(const cpu::DecodeBackward<S>&, void*, \
                                                    const Multiply<S>&, cudaStream_t);
PYSEQ_INSTANTIATE(float)
PYSEQ_INSTANTIATE(double)
PYSEQ_INSTANTIATE(Half)
PYSEQ_INSTANTIATE(Bfloat16)
#undef PYSEQ_INSTANTIATE

}  // namespace pyseq::cuda
