// SPDX-License-Identifier: Apache-2.0
// A step of the decoder's backward loop: which products it takes, and what is made of their sums;
// the same in a persistent launch and in the launches of one step. cpu/decode_backward.h is the
// same loop on the CPU. What adds up over the steps is left to later launches and products.
#pragma once

#include "attend.h"
#include "decode_step.h"

namespace pyseq::cuda {

// The weights that sums of gradients are made with: where they are `transposed` a row for each
// number that gets a gradient, else as forward has them.
template <class S>
struct BackwardWeights {
  bool transposed;
  const S* w_in[kMostDecoderLayers];  // (F or H, G*H) or null
  const S* w_hh[kMostDecoderLayers];  // (H, G*H)
  const S* of_context;                // (M, H), of the combination
  const S* of_top;                    // (H, H)
  const S* w_query;                   // (H, A) or null
  const S* w_position;                // (H, P) or null
};

// What a block works in beside the tensors of the call.
template <class S>
struct BackwardWork {
  S* d_top;                  // (B, H): what a dot says of the state that asked
  S* d_centers;              // (B*N)
  Accumulate<S>* positions;  // see decode_positions
};

// The sums for a state before a step: those from above, which take the dropout mask, those from the
// step after, and what needs no product.
template <class S>
struct StateTerms {
  Product<S> above, query, position, after;
  const S* direct;  // (B, H) or null
  const S* mask;    // (B, H) or null
};

template <class S>
struct DeviceBackward {
  cpu::DecodeBackward<S> call;  // `forward` stands in `decode`
  DeviceDecode<S> decode;
  BackwardWeights<S> weights;
  BackwardWork<S> work;
  int64_t rows;  // G*H

  // `stride` is that of weights that are not transposed.
  PYSEQ_INLINE Product<S> product(const S* from, int64_t count, const S* of, int64_t stride) const {
    return {from, count, of, weights.transposed ? count : stride, count};
  }

  PYSEQ_INLINE const S* x_gates(int64_t l, int64_t t) const {
    return decode.layers[l].d_x_gates + t * decode.call.batch * rows;
  }

  // What the cells of step t say of what was fed to them, if there are such and they were.
  PYSEQ_INLINE Product<S> of_fed(int64_t t) const {
    if (!decode.call.feeding || t >= decode.call.steps) return {};
    return product(x_gates(0, t), rows, weights.w_in[0], decode.layers[0].w_in_stride);
  }
  PYSEQ_INLINE Product<S> of_fed_output(int64_t t) const {
    return decode.call.feeds_context ? Product<S>{} : of_fed(t + 1);
  }
  PYSEQ_INLINE Product<S> of_fed_context(int64_t t) const {
    if (!decode.call.feeds_context) return {};
    return of_fed(decode.call.attends_first ? t : t + 1);
  }
  // Of what was fed first. A context that comes first is fed at once.
  PYSEQ_INLINE Product<S> of_first_fed() const {
    return decode.call.attends_first ? Product<S>{} : of_fed(0);
  }

  PYSEQ_INLINE const S* d_sum(int64_t t) const {
    return call.d_sum + t * decode.call.batch * decode.call.hidden;
  }
  PYSEQ_INLINE Product<S> of_context(int64_t t) const {
    const int64_t H = decode.call.hidden, M = decode.call.memory_size;
    return product(d_sum(t), H, weights.of_context, M + H);
  }

  // What the attention of step t says of the state that asked.
  PYSEQ_INLINE void add_asked(int64_t t, StateTerms<S>& terms) const {
    const cpu::Decode<S>& own = decode.call;
    const int64_t A = own.key_size, P = own.position_size;
    terms.direct = own.additive ? call.d_query + t * own.batch * A : work.d_top;
    if (own.w_query != nullptr) {
      terms.query = product(terms.direct, A, weights.w_query, own.hidden);
      terms.direct = nullptr;
    }
    if (own.w_position != nullptr) {
      terms.position =
          product(call.d_positions + t * own.batch * P, P, weights.w_position, own.hidden);
    }
  }

  // Of the state of layer l after step t, or of the first one for t = -1.
  PYSEQ_INLINE StateTerms<S> of_state(int64_t l, int64_t t) const {
    const cpu::Decode<S>& own = decode.call;
    const cpu::DecoderLayer<S>& layer = decode.layers[l];
    const int64_t B = own.batch, H = own.hidden, M = own.memory_size;
    const bool is_top = l + 1 == own.layer_count;
    StateTerms<S> terms{};
    if (t >= 0) {
      if (is_top) {
        terms.above = product(d_sum(t), H, weights.of_top, M + H);
      } else {
        terms.above =
            product(x_gates(l + 1, t), rows, weights.w_in[l + 1], decode.layers[l + 1].w_in_stride);
        if (layer.mask != nullptr) terms.mask = layer.mask + t * B * H;
      }
    }
    // The top state asked in this step, or asks in the next one.
    const int64_t asks = own.attends_first ? t + 1 : t;
    if (is_top && asks >= 0 && asks < own.steps) add_asked(asks, terms);
    if (t + 1 < own.steps) {
      terms.after = product(layer.d_r_gates + (t + 1) * B * rows, rows, weights.w_hh[l], H);
    }
    return terms;
  }
};

// ---- What is made of the sums ----------------------------------------------------------

// Of the output of step t.
template <class S>
PYSEQ_DEVICE void output_back(const DeviceBackward<S>& args, int64_t t, int64_t row, int64_t unit,
                              Accumulate<S> sum) {
  using A = Accumulate<S>;
  const cpu::Decode<S>& decode = args.decode.call;
  const int64_t offset = (t * decode.batch + row) * decode.hidden + unit;
  const A out = widen(decode.output[offset]);
  const A d_out = sum + widen(args.call.d_output[offset]);
  args.call.d_sum[offset] = narrow<S>(d_out * (1 - out * out));
}

// Of the context of step t.
template <class S>
PYSEQ_DEVICE void context_back(const DeviceBackward<S>& args, int64_t t, int64_t row, int64_t unit,
                               Accumulate<S> sum) {
  const cpu::Decode<S>& decode = args.decode.call;
  const int64_t M = decode.memory_size;
  if (args.call.d_fed != nullptr && t + 1 == decode.steps) {
    sum += widen(args.call.d_fed[row * M + unit]);
  }
  args.call.d_context[(t * decode.batch + row) * M + unit] = narrow<S>(sum);
}

// Windows predicted from a row's state end with its gradient. Every thread of the block.
template <class S>
PYSEQ_DEVICE void position_back(const DeviceBackward<S>& args, int64_t t, int64_t row) {
  using A = Accumulate<S>;
  const cpu::Decode<S>& decode = args.decode.call;
  const int64_t B = decode.batch, N = decode.heads, P = decode.position_size;
  A d_center = 0;
  for (int64_t head = row * N; head < (row + 1) * N; ++head) {
    d_center += widen(args.work.d_centers[head]);
  }
  const A length = A(valid_positions(decode.lengths, row, decode.source));
  const A center = decode.centers[t * B + row];
  const A d_share = length > 0 ? d_center * center * (1 - center / length) : A(0);
  if (thread_index() == 0) args.call.d_shares[t * B + row] = narrow<S>(d_share);
  const int64_t first = (t * B + row) * P;
  for (int64_t i = thread_index(); i < P; i += thread_count()) {
    const A position = widen(decode.positions[first + i]);
    args.call.d_positions[first + i] =
        narrow<S>(d_share * widen(decode.position_v[i]) * (1 - position * position));
  }
}

// The attention of step t for the rows at `at`.
template <class S, class Score>
PYSEQ_DEVICE void attend_rows_back(const DeviceBackward<S>& args, int64_t t,
                                   const DecodePlace& at) {
  using A = Accumulate<S>;
  const cpu::Decode<S>& decode = args.decode.call;
  const cpu::DecodeBackward<S>& call = args.call;
  const int64_t B = decode.batch, N = decode.heads, S_ = decode.source, A_ = decode.key_size,
                M = decode.memory_size;
  const S* const asking = args.decode.layers[decode.layer_count - 1].states +
                          (decode.attends_first ? 0 : B * decode.hidden);
  const S* const queries = (decode.w_query == nullptr ? asking : decode.query) + t * B * A_;
  const A* const past = decode.taps == 0 ? nullptr : decode.past + t * B * N * S_;
  S* const d_query = Score::kAdditive ? call.d_query + t * B * A_ : args.work.d_top;
  for_attention_rows(decode, at, [&](int64_t row, int64_t head, int64_t end) {
    const A center =
        decode.w_position == nullptr ? given_center(decode, t, row) : decode.centers[t * B + row];
    for (; head < end; ++head) {
      const int64_t own = row * N + head, query = t * B * N + own;
      attend_row_backward<S, Score>(
          decoder_row(decode, own, center, queries, past, args.work.positions),
          {decode.attn + query * S_, call.d_context + query * (M / N),
           call.d_attn == nullptr ? nullptr : call.d_attn + query * S_, call.d_scores + query * S_,
           d_query + own * (A_ / N),
           decode.w_position == nullptr ? nullptr : args.work.d_centers + own,
           decode.taps == 0 ? nullptr : call.d_past + own * S_, decode.cumulative});
    }
    if (decode.w_position != nullptr) position_back(args, t, row);
  });
}

// The gradient of a state of which the sums are there.
template <class S>
PYSEQ_DEVICE Accumulate<S> state_gradient(const DeviceBackward<S>& args, const StateTerms<S>& terms,
                                          int64_t l, int64_t offset, Accumulate<S> above,
                                          Accumulate<S> after) {
  if (terms.direct != nullptr) above += widen(load_shared_by_blocks(terms.direct + offset));
  if (terms.mask != nullptr) above *= widen(terms.mask[offset]);
  return above + after + args.decode.layers[l].d_h[offset];
}

// Of the state of layer l after step t, through the cell.
template <class S, class Cell>
PYSEQ_DEVICE void cell_back(const DeviceBackward<S>& args, int64_t l, int64_t t, int64_t row,
                            int64_t unit, Accumulate<S> d_h) {
  using A = Accumulate<S>;
  constexpr int G = Cell::kGates;
  const cpu::DecoderLayer<S>& layer = args.decode.layers[l];
  const int64_t B = args.decode.call.batch, H = args.decode.call.hidden, offset = row * H + unit;
  const int64_t gates = (t * B + row) * G * H + unit;
  A saved[Cell::kPre], d_pre[Cell::kPre];
  PYSEQ_UNROLL
  for (int g = 0; g < G; ++g) saved[g] = widen(layer.gates[gates + g * H]);
  if constexpr (Cell::kPre > G) saved[G] = widen(layer.apart[t * B * H + offset]);
  A c_prev[1] = {}, d_c[1] = {};
  if constexpr (Cell::kStates > 0) {
    c_prev[0] = layer.cells[t * B * H + offset];
    d_c[0] = layer.d_c[offset];
  }
  Cell::template backward<Math<A>>(saved, static_cast<const A*>(nullptr),
                                   widen(layer.states[t * B * H + offset]), c_prev, d_h, d_c, d_pre,
                                   static_cast<A*>(nullptr));
  if constexpr (Cell::kStates > 0) layer.d_c[offset] = d_c[0];
  layer.d_h[offset] = d_h;
  PYSEQ_UNROLL
  for (int g = 0; g < G; ++g) {
    layer.d_x_gates[gates + g * H] = narrow<S>(d_pre[g]);
    if constexpr (Cell::kPre > G) {
      layer.d_r_gates[gates + g * H] = narrow<S>(d_pre[Cell::recurrent_slot(g)]);
    }
  }
}

// The sums of of_state(l, t), for t = -1 too.
template <class S>
PYSEQ_DEVICE void state_back(const DeviceBackward<S>& args, const StateTerms<S>& terms, int64_t l,
                             int64_t t, int64_t row, int64_t unit, Accumulate<S> above,
                             Accumulate<S> after) {
  const int64_t offset = row * args.decode.call.hidden + unit;
  const Accumulate<S> d_h = state_gradient(args, terms, l, offset, above, after);
  if (t < 0) {
    args.decode.layers[l].d_h[offset] = d_h;
    return;
  }
  with_cell(args.decode.call.cell,
            [&](auto cell) { cell_back<S, decltype(cell)>(args, l, t, row, unit, d_h); });
}

// ---- On the host -----------------------------------------------------------------------

// Everything but the weights.
template <class S>
DeviceBackward<S> backward_arguments(const cpu::DecodeBackward<S>& args,
                                     const BackwardWork<S>& work) {
  DeviceBackward<S> all{args,
                        with_layers(args.forward),
                        {},
                        work,
                        cell_shape(args.forward.cell).gates * args.forward.hidden};
  all.call.forward.layers = nullptr;  // that was the host's memory
  return all;
}

template <class S>
BackwardWork<S> take_backward_work(const cpu::Decode<S>& call, int64_t blocks, WorkPieces& pieces) {
  BackwardWork<S> work{};
  work.d_top = pieces.take<S>(call.batch * call.hidden);
  work.d_centers = pieces.take<S>(call.batch * call.head_count());
  work.positions = pieces.take<Accumulate<S>>(decode_positions(call, blocks));
  return work;
}

// The gradients that add up over the steps, of what the loop left of each.
template <class S>
cudaError_t source_gradients(const cpu::DecodeBackward<S>& args, cudaStream_t stream) {
  const cpu::Decode<S>& call = args.forward;
  const int64_t N = call.head_count();
  const S* const asking = call.layers[call.layer_count - 1].states +
                          (call.attends_first ? 0 : call.batch * call.hidden);
  KeyGradients<S> gradients{};
  gradients.forward.additive = call.additive;
  gradients.forward.steps = call.steps;
  gradients.forward.batch = call.batch * N;
  gradients.forward.heads = N;
  gradients.forward.source = call.source;
  gradients.forward.key_size = call.key_size / N;
  gradients.forward.memory_size = call.memory_size / N;
  gradients.forward.query = call.w_query == nullptr ? asking : call.query;
  gradients.forward.keys = call.keys;
  gradients.forward.memory = call.memory;
  gradients.forward.v = call.v;
  gradients.forward.attn = call.attn;
  gradients.d_scores = args.d_scores;
  gradients.d_context = args.d_context;
  gradients.taps = call.taps;
  gradients.w_history = call.w_history;
  gradients.past = call.past;
  gradients.d_keys = args.d_keys;
  gradients.d_v = args.d_v;
  gradients.d_memory = args.d_memory;
  gradients.d_w_history = args.d_w_history;
  return key_gradients(gradients, stream);
}

}  // namespace pyseq::cuda
