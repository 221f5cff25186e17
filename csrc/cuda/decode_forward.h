// SPDX-License-Identifier: Apache-2.0
// A step of the decoder's forward loop but for its products: the same in a persistent launch and in
// the launches of one step. cpu/decode_forward.h is the same loop on the CPU.
#pragma once

#include "decode_step.h"

namespace pyseq::cuda {

// What a step reads and writes.
template <class S>
struct ForwardStep {
  int64_t t, slot;
  int64_t before, after;  // in elements: where the states lie in those of a layer
  const S* fed;
  S* context;
  S* output;
  S* attn;
};

template <class S>
PYSEQ_INLINE ForwardStep<S> forward_step(const cpu::Decode<S>& call, int64_t t) {
  const int64_t state = call.batch * call.hidden, slot = call.save ? t : 0;
  S* const output = call.output + t * state;
  S* const context = call.context + slot * call.batch * call.memory_size;
  S* const context_before = call.save ? context - call.batch * call.memory_size : context;
  const S* const fed = call.attends_first   ? context
                       : t == 0             ? call.feed
                       : call.feeds_context ? context_before
                                            : output - state;
  return {t,
          slot,
          (call.save ? t : t & 1) * state,
          (call.save ? t + 1 : (t + 1) & 1) * state,
          fed,
          context,
          output,
          call.attn + t * call.attn_step};
}

// Where the queries of a step are, of which `state` is one for each row unless they are projected.
template <class S>
PYSEQ_INLINE const S* step_queries(const cpu::Decode<S>& call, const ForwardStep<S>& step,
                                   const S* state) {
  if (call.w_query == nullptr) return state;
  return call.query + step.slot * call.batch * call.key_size;
}

template <class S, class Cell>
PYSEQ_DEVICE void cell_step(const cpu::Decode<S>& call, const cpu::DecoderLayer<S>& layer,
                            bool first, const ForwardStep<S>& step, S* masked_to, int64_t row,
                            int64_t unit, const Accumulate<S> (&sums)[Cell::kPre]) {
  using A = Accumulate<S>;
  constexpr int G = Cell::kGates;
  const int64_t H = call.hidden, B = call.batch, offset = row * H + unit, t = step.t;
  S* const gates = layer.gates + ((first || call.save ? t : 0) * B + row) * G * H + unit;
  A pre[Cell::kPre];
  PYSEQ_UNROLL
  for (int g = 0; g < Cell::kPre; ++g) {
    pre[g] = sums[g];
    if (g < G) pre[g] += widen(first ? gates[g * H] : layer.bias[g * H + unit]);
  }
  if constexpr (Cell::kPre > G) {
    if (layer.apart_bias != nullptr) pre[G] += widen(layer.apart_bias[unit]);
  }
  A h = widen(layer.states[step.before + offset]);
  A c[1] = {};
  if constexpr (Cell::kStates > 0) c[0] = layer.cells[step.before + offset];
  Cell::template forward<Math<A>>(pre, static_cast<const A*>(nullptr), h, c);
  if constexpr (Cell::kStates > 0) layer.cells[step.after + offset] = c[0];
  if (call.save) {
    PYSEQ_UNROLL
    for (int g = 0; g < G; ++g) gates[g * H] = narrow<S>(pre[g]);
    if constexpr (Cell::kPre > G) {
      if (layer.apart != nullptr) layer.apart[t * B * H + offset] = narrow<S>(pre[G]);
    }
  }
  layer.states[step.after + offset] = narrow<S>(h);
  if (masked_to != nullptr) {
    masked_to[offset] = narrow<S>(h * widen(layer.mask[t * B * H + offset]));
  }
}

// p = S sigmoid(v . tanh(W h)), of which the tanh is there; the same in every thread.
template <class S>
PYSEQ_DEVICE Accumulate<S> predicted_center(const cpu::Decode<S>& call, int64_t slot, int64_t row) {
  using A = Accumulate<S>;
  const S* const tanh = call.positions + (slot * call.batch + row) * call.position_size;
  A share = 0;
  for (int64_t p = thread_index(); p < call.position_size; p += thread_count()) {
    share = Math<A>::multiply_add(widen(load_shared_by_blocks(tanh + p)), widen(call.position_v[p]),
                                  share);
  }
  share = block_sum(share, static_cast<A*>(shared_memory()));
  sync_threads();
  return A(valid_positions(call.lengths, row, call.source)) * Math<A>::sigmoid(share);
}

// The attention of one step for the rows at `at`, which leaves their contexts; see
// decode_positions.
template <class S, class Score>
PYSEQ_DEVICE void attend_rows(const cpu::Decode<S>& call, const ForwardStep<S>& step,
                              const DecodePlace& at, const S* queries, Accumulate<S>* positions) {
  using A = Accumulate<S>;
  const int64_t B = call.batch, N = call.heads, S_ = call.source, M = call.memory_size;
  const A* past = nullptr;
  A* past_after = nullptr;
  if (call.taps > 0) {
    past = call.past + (call.save ? step.t : step.t & 1) * B * N * S_;
    past_after = call.past + (call.save ? step.t + 1 : (step.t + 1) & 1) * B * N * S_;
  }
  for_attention_rows(call, at, [&](int64_t row, int64_t head, int64_t end) {
    A center = given_center(call, step.t, row);
    if (call.w_position != nullptr) {
      center = predicted_center(call, step.slot, row);
      if (thread_index() == 0) call.centers[step.slot * B + row] = center;
    }
    for (; head < end; ++head) {
      const int64_t own = row * N + head;
      S* const attn = step.attn + own * S_;
      attend_row<S, Score>(decoder_row(call, own, center, queries, past, positions), attn,
                           step.context + own * (M / N));
      if (call.taps == 0) continue;
      for (int64_t s = thread_index(); s < S_; s += thread_count()) {
        const A sum = call.cumulative ? past[own * S_ + s] : A(0);
        past_after[own * S_ + s] = sum + widen(attn[s]);
      }
      sync_threads();
    }
  });
}

}  // namespace pyseq::cuda
