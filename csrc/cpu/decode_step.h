// SPDX-License-Identifier: Apache-2.0
// One forward step of an attention decoder: stacked cells, scores, softmax, context, Luong's
// combination. decode_forward.h and search.h put steps together.
#pragma once

#include "attend.h"

namespace pyseq::cpu::PYSEQ_TIER {

// The weights of a decoder as its forward steps read them. Taken twice: once to count the
// memory, once for good (see Pieces).
template <class T>
struct DecoderWeights {
  Weights<T> w_x;
  Weights<T> w_in[kMaxLayers];
  Weights<T> w_hh[kMaxLayers];
  Weights<T> combine_context;
  Weights<T> combine_hidden;
  Weights<T> w_query;
  Weights<T> w_position;

  // With `folded` the context's part of the combination is left out; see DecoderStep.
  static DecoderWeights take(const Decode<T>& args, int gates, bool packs, bool folded,
                             Pieces<T>& pieces) {
    const int64_t H = args.hidden, M = args.memory_size;
    const auto weights = [&](const T* source, const QuantizedWeights* quantized, int64_t stride,
                             int64_t units, int gate_count, int64_t k_count) {
      Weights<T> taken{source, stride, units, gate_count, k_count, nullptr, quantized};
      if (packs && source != nullptr) taken.packed = pieces.take(taken.packed_size());
      return taken;
    };
    DecoderWeights all{};
    all.w_x = weights(args.w_x, nullptr, args.w_x_stride, H, gates, args.input);
    for (int64_t l = 0; l < args.layer_count; ++l) {
      const DecoderLayer<T>& layer = args.layers[l];
      all.w_in[l] = weights(layer.w_in, layer.quantized_in, layer.w_in_stride, H, gates,
                            l == 0 ? args.fed_size() : H);
      all.w_hh[l] = weights(layer.w_hh, layer.quantized_hh, H, H, gates, H);
    }
    const T* const from_hidden = args.combine == nullptr ? nullptr : args.combine + M;
    if (!folded) {
      all.combine_context = weights(args.combine, args.quantized_context, M + H, H, 1, M);
    }
    all.combine_hidden = weights(from_hidden, args.quantized_hidden, M + H, H, 1, H);
    all.w_query = weights(args.w_query, args.quantized_query, H, args.key_size, 1, H);
    all.w_position = weights(args.w_position, nullptr, H, args.position_size, 1, H);
    return all;
  }

  void pack(int64_t layer_count, int thread, int present) const {
    pack_rows(w_x, thread, present);
    for (int64_t l = 0; l < layer_count; ++l) {
      pack_rows(w_in[l], thread, present);
      pack_rows(w_hh[l], thread, present);
    }
    pack_rows(combine_context, thread, present);
    pack_rows(combine_hidden, thread, present);
    pack_rows(w_query, thread, present);
    pack_rows(w_position, thread, present);
  }
};

template <class T>
int64_t decoder_row_workspace(const Decode<T>& args) {
  const int64_t size = row_workspace(args.taps, args.source, args.key_size / args.head_count());
  return (size + 15) / 16 * 16;
}

// Rows of the batch whose attention a thread makes together, phase by phase: a row's phases wait
// for one another's last instruction, and what other rows have to do fills the time.
constexpr int64_t kRowsTogether = 8;

// Where the phases of a step leave what the next ones read; taken like the weights.
template <class T>
struct DecoderScratch {
  T* below;   // (2, B, H): a layer's output times its dropout mask; layers take turns
  T* scores;  // (B, S)
  T* own;     // (threads, own_size): kRowsTogether rows of attention weights for each thread
  int64_t own_row, own_size;
  T* rows;  // (threads, row_size): what an AttentionRow works in
  int64_t row_size;

  static DecoderScratch take(const Decode<T>& args, int threads, Pieces<T>& pieces) {
    DecoderScratch scratch{};
    scratch.below = pieces.take(2 * args.batch * args.hidden);
    scratch.scores = pieces.take(args.batch * args.source);
    scratch.own_row = (args.source + 15) / 16 * 16;
    scratch.own_size = kRowsTogether * scratch.own_row + kGap<T>;
    scratch.own = pieces.take(scratch.own_size * threads);
    scratch.row_size = decoder_row_workspace(args) + kGap<T>;
    scratch.rows = pieces.take(scratch.row_size * threads);
    return scratch;
  }
};

// One forward step: where it reads and writes.
template <class T>
struct DecoderStep {
  int64_t t;              // counts steps in what is kept of every one
  bool backwards;         // in which order to take the panels; see `product`
  int64_t before, after;  // in elements: where the states lie in those of a layer
  const T* fed;           // (B, F), the output or context before; null without feeding
  T* output;              // (B, H), which may be the memory of `fed`
  T* attn;                // (B, S)
  const T* past;          // with taps: (B*N, S), what enters the scores
  T* past_after;          // and what will enter those of the next step
  // Whether the combination was applied to the memory already, whose weighted sum is then not
  // the context but what the combination makes of it.
  bool folded;
};

// In multiply-adds: about what a tanh costs, and what two members of a team can both do in the
// time in which they would share it and wait for each other.
constexpr int64_t kTanhWork = 16, kWaitWork = 40000;

template <class T>
StepCost decoder_cost(const Decode<T>& args, int gates, int barriers, bool folded = false) {
  constexpr int64_t kBytes = sizeof(T);
  const int64_t H = args.hidden;
  int64_t weights = gates * H * args.input;
  if (args.attends()) weights += H * (folded ? H : args.memory_size + H);
  for (int64_t l = 0; l < args.layer_count; ++l) {
    weights += gates * H * H * (args.layers[l].reads_below() ? 2 : 1);
  }
  if (args.projects_query()) weights += args.key_size * H;
  weights += args.position_size * H;
  const int64_t seen = positions_seen(args.window, args.source);
  const int64_t row_work =
      seen * (args.key_size * (args.additive ? kTanhWork : 1) + args.memory_size);
  return quantized_cost(args.layers[0].quantized_hh,
                        {args.batch, weights, row_work, weights * kBytes,
                         (args.layer_count * H + args.key_size + args.memory_size + H) * kBytes,
                         barriers, args.steps});
}

// Multiply-adds of the scores of so many rows.
template <class T>
int64_t score_work(const Decode<T>& args, int64_t rows) {
  return rows * args.source * args.key_size * (args.additive ? kTanhWork : 1);
}

template <class T>
Plan plan_decode(const Decode<T>& args, int gates, int barriers) {
  return plan_steps(decoder_cost(args, gates, barriers), args.threads);
}

// The stacked cells of one step, for the rows and units of this thread. Returns the state of
// the top layer, (B, H), which all members of the team have written.
template <class T, class Cell>
const T* step_cells(const Decode<T>& args, const DecoderWeights<T>& weights,
                    const DecoderScratch<T>& scratch, const DecoderStep<T>& step, const Place& at) {
  constexpr int G = Cell::kGates;
  const int64_t B = args.batch, H = args.hidden, L = args.layer_count, t = step.t;
  const int64_t kept = args.save ? 1 : 0;
  const Range units = at.part(vectors<T>(H));
  const T* below = step.fed;
  for (int64_t l = 0; l < L; ++l) {
    const DecoderLayer<T>& layer = args.layers[l];
    Segment<T> segments[3];
    int segment_count = 0;
    const bool reads_x = l == 0 && args.x != nullptr, has_product = l == 0 && !reads_x;
    if (reads_x)
      segments[segment_count++] = input_segment(args.x + t * B * args.input, weights.w_x);
    if (layer.reads_below()) {
      segments[segment_count++] = input_segment(below, weights.w_in[l]);
    }
    segments[segment_count++] =
        recurrent_segment<Cell>(layer.states + step.before, weights.w_hh[l]);
    T* const gates = layer.gates + (has_product ? t : t * kept) * B * G * H;
    const bool masked = layer.mask != nullptr && l + 1 < L;
    T* const masked_output = scratch.below + (l & 1) * B * H;
    product<T, G, Cell::kPre>(
        segments, segment_count, at.rows.begin, at.rows.end, units.begin, units.end, step.backwards,
        [&](int64_t row, int64_t panel, const T* sums) {
          const int lanes = lanes_inside<T>(H, panel);
          const int64_t unit = panel * kLanes<T>, offset = row * H + unit;
          T* const row_gates = gates + row * G * H + unit;
          const T* c_prev = nullptr;
          T* c_next = nullptr;
          if constexpr (Cell::kStates > 0) {
            c_prev = layer.cells + step.before + offset;
            c_next = layer.cells + step.after + offset;
          }
          const Vec<T> h = cell_forward<Cell>(
              UnitForward<T>{H, lanes, has_product ? row_gates : layer.bias + unit,
                             layer.apart_bias == nullptr ? nullptr : layer.apart_bias + unit,
                             args.save ? row_gates : nullptr,
                             layer.apart == nullptr ? nullptr : layer.apart + t * B * H + offset,
                             layer.states + step.before + offset, c_prev, c_next},
              sums);
          store(layer.states + step.after + offset, h, lanes);
          if (masked) {
            store(masked_output + offset, h * load(layer.mask + t * B * H + offset, lanes), lanes);
          }
        });
    at.wait();
    below = masked ? masked_output : layer.states + step.after;
  }
  return below;
}

// The rows of attention that a member takes, of those of its team: heads are rows of their own.
inline Range attention_rows(const Place& at, int64_t heads) {
  const Range mine = at.part(at.rows.size() * heads);
  return {at.rows.begin * heads + mine.begin, at.rows.begin * heads + mine.end};
}

// The row of keys, memory and lengths that a row attends to.
template <class T>
int64_t source_row(const Decode<T>& args, int64_t row) {
  return args.source_rows == nullptr ? row : args.source_rows[row];
}

// The positions that a row may attend to.
template <class T>
int64_t attended_positions(const Decode<T>& args, int64_t row) {
  return valid_positions<T>(args.lengths, source_row(args, row), args.source);
}

// The attention of one row of a step, whose queries lie in `queries`, (B, A).
template <class T>
AttentionRow<T> decoder_row(const Decode<T>& args, int64_t row, T center, const T* queries,
                            const T* past, T* attn, T* context, T* workspace) {
  const int64_t N = args.head_count(), S = args.source, A = args.key_size / N,
                M = args.memory_size / N;
  const int64_t from = source_row(args, row / N) * N + row % N;
  const int64_t valid = attended_positions(args, row / N);
  const View<T> view = args.window > 0
                           ? window_view(center, args.window, args.w_position != nullptr, valid)
                           : View<T>{{0, valid}, T(0), T(0)};
  return {S,
          A,
          M,
          view,
          queries + row * A,
          args.keys + from * S * A,
          args.memory + from * S * M,
          args.v == nullptr ? nullptr : args.v + row % N * A,
          attn + row * S + view.seen.begin,
          context == nullptr ? nullptr : context + row * M,
          args.taps,
          args.w_history == nullptr ? nullptr : args.w_history + row % N * args.taps * A,
          past == nullptr ? nullptr : past + row * S,
          workspace};
}

// The centre of a window at step t that no W predicts.
template <class T>
T given_center(const Decode<T>& args, int64_t t, int64_t row) {
  return T(t + (args.first_step == nullptr ? 0 : args.first_step[row / args.head_count()]));
}

// p = R sigmoid(v . tanh(W h)), where R is the length of the row; of that the tanh is there.
template <class T>
T predicted_center(const Decode<T>& args, int64_t slot, int64_t row) {
  const int64_t P = args.position_size, own = row / args.head_count();
  T share;
  scores<T, DotScore, 1>(args.positions + (slot * args.batch + own) * P, 0, args.position_v, 1, P,
                         nullptr, &share, 0);
  const T length = T(attended_positions(args, own));
  return length * Math<T>::sigmoid(broadcast(share))[0];
}

// Attention row by row, for all that a row may have: each member takes whole rows.
template <class T, class Score>
void step_rows(const Decode<T>& args, const DecoderScratch<T>& scratch, const DecoderStep<T>& step,
               const Place& at, int thread, const T* queries) {
  const int64_t B = args.batch, S = args.source, N = args.head_count(), t = step.t;
  const int64_t slot = args.save ? t : 0;
  const Range mine = attention_rows(at, N);
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    T center = given_center(args, t, row);
    if (args.w_position != nullptr) {
      center = predicted_center(args, slot, row);
      if (row % N == 0) args.centers[slot * B + row / N] = center;
    }
    const AttentionRow<T> seen =
        decoder_row(args, row, center, queries, step.past, step.attn,
                    args.context + t * args.context_step, scratch.rows + thread * scratch.row_size);
    attend_row<T, Score>(seen);
    T* const attn = step.attn + row * S;
    // Of weights that the next step writes over nobody reads what was not seen.
    const bool last_alone = args.attn_step == 0 && args.steps > 1;
    if (!last_alone || args.taps > 0) clear_unseen(seen.view.seen, S, attn);
    if (args.taps == 0) continue;
    for (int64_t s = row * S; s < (row + 1) * S; ++s) {
      step.past_after[s] = args.cumulative ? step.past[s] + attn[s - row * S] : attn[s - row * S];
    }
  }
  at.wait();
}

// The attention of one step by the state (B, H), which leaves the context.
template <class T, class Score>
void attend_step(const Decode<T>& args, const DecoderWeights<T>& weights,
                 const DecoderScratch<T>& scratch, const DecoderStep<T>& step, const Place& at,
                 int thread, const T* state) {
  const int64_t B = args.batch, S = args.source, A = args.key_size, M = args.memory_size;
  const int64_t slot = args.save ? step.t : 0;
  const Range memory_part = at.part(vectors<T>(M));
  T* const own_attn = scratch.own + thread * scratch.own_size;

  const T* query = state;
  if (args.w_position != nullptr) {
    const int64_t P = args.position_size;
    const Range part = at.part(vectors<T>(P));
    T* const positions = args.positions + slot * B * P;
    const Segment<T> segment = plain_segment(state, weights.w_position);
    product<T, 1, 1>(&segment, 1, at.rows.begin, at.rows.end, part.begin, part.end, step.backwards,
                     [&](int64_t row, int64_t panel, const T* sums) {
                       store(positions + row * P + panel * kLanes<T>, Math<T>::tanh(load(sums)),
                             lanes_inside<T>(P, panel));
                     });
    if (!args.projects_query()) at.wait();
  }
  if (args.projects_query()) {
    const Range key_part = at.part(vectors<T>(A));
    T* const projected = args.query + slot * B * A;
    const Segment<T> segment = plain_segment(state, weights.w_query);
    product<T, 1, 1>(&segment, 1, at.rows.begin, at.rows.end, key_part.begin, key_part.end,
                     step.backwards, [&](int64_t row, int64_t panel, const T* sums) {
                       store(projected + row * A + panel * kLanes<T>, load(sums),
                             lanes_inside<T>(A, panel));
                     });
    at.wait();
    query = projected;
  }
  if (args.by_rows()) return step_rows<T, Score>(args, scratch, step, at, thread, query);

  // Scores are shared out by position, the context by component; between the two every
  // member takes the whole softmax, which costs less than to wait once more. So do all scores
  // of a few rows, if no member needs what another makes of its own part of the context.
  const auto score_row = [&](int64_t row, Range part, T* row_scores) {
    scores<T, Score, 1>(query + row * A, 0,
                        args.keys + (source_row(args, row) * S + part.begin) * A, part.size(), A,
                        args.v, row_scores + part.begin, 0);
  };
  T* const context = args.context + step.t * args.context_step;
  const auto soften_row = [&](int64_t row, const T* row_scores, T* row_attn) {
    const int64_t valid = attended_positions(args, row);
    softmax(row_scores, valid, row_attn);
    set_zero(row_attn + valid, S - valid);
  };
  const auto mix_row = [&](int64_t row, const T* row_attn) {
    weighted_sum<T, 1>(row_attn, 0, args.memory + source_row(args, row) * S * M,
                       attended_positions(args, row), M, memory_part, context + row * M, 0);
    const Range part = at.part(S);
    T* const attn = step.attn + row * S;
    for (int64_t s = part.begin; s < part.end; ++s) attn[s] = row_attn[s];
  };
  if (at.members == 1 || (step.folded && score_work(args, at.rows.size()) <= kWaitWork)) {
    for (int64_t begin = at.rows.begin; begin < at.rows.end; begin += kRowsTogether) {
      const int64_t end = smaller(begin + kRowsTogether, at.rows.end);
      const auto own_row = [&](int64_t row) { return own_attn + (row - begin) * scratch.own_row; };
      for (int64_t row = begin; row < end; ++row) {
        score_row(row, {0, attended_positions(args, row)}, own_row(row));
      }
      for (int64_t row = begin; row < end; ++row) soften_row(row, own_row(row), own_row(row));
      for (int64_t row = begin; row < end; ++row) mix_row(row, own_row(row));
    }
  } else {
    for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
      score_row(row, at.part(attended_positions(args, row)), scratch.scores + row * S);
    }
    at.wait();
    for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
      soften_row(row, scratch.scores + row * S, own_attn);
      mix_row(row, own_attn);
    }
    if (!step.folded) at.wait();
  }
}

// Luong's combination of the context and the top state.
template <class T>
void combine_step(const Decode<T>& args, const DecoderWeights<T>& weights,
                  const DecoderStep<T>& step, const Place& at, const T* top) {
  const int64_t H = args.hidden;
  const Range units = at.part(vectors<T>(H));
  const T* const context = args.context + step.t * args.context_step;
  const Segment<T> combined[2] = {plain_segment(top, weights.combine_hidden),
                                  plain_segment(context, weights.combine_context)};
  product<T, 1, 1>(combined, step.folded ? 1 : 2, at.rows.begin, at.rows.end, units.begin,
                   units.end, step.backwards, [&](int64_t row, int64_t panel, const T* sums) {
                     const int64_t offset = row * H + panel * kLanes<T>;
                     const int lanes = lanes_inside<T>(H, panel);
                     Vec<T> sum = load(sums);
                     if (step.folded) sum += load(context + offset, lanes);
                     store(step.output + offset, Math<T>::tanh(sum), lanes);
                   });
  at.wait();
}

}  // namespace pyseq::cpu::PYSEQ_TIER
