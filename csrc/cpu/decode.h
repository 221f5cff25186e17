// SPDX-License-Identifier: Apache-2.0
// A whole attention decoder, forward and backward, as one loop over the target steps:
// stacked cells, scores, softmax, context, Luong's combination, input feeding.
#pragma once

#include "attend.h"

namespace pyseq::cpu::PYSEQ_TIER {

// The weights of a decoder as its forward steps read them. Taken twice: once to count the
// memory, once for good (see Pieces).
template <class T>
struct DecoderWeights {
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

// Where the phases of a step leave what the next ones read; taken like the weights.
template <class T>
struct DecoderScratch {
  T* below;   // (2, B, H): a layer's output times its dropout mask; layers take turns
  T* scores;  // (B, S)
  T* own;     // (threads, own_size): a row of attention weights for each thread
  int64_t own_size;
  T* rows;  // (threads, row_size): what an AttentionRow works in
  int64_t row_size;

  static DecoderScratch take(const Decode<T>& args, int threads, Pieces<T>& pieces) {
    DecoderScratch scratch{};
    scratch.below = pieces.take(2 * args.batch * args.hidden);
    scratch.scores = pieces.take(args.batch * args.source);
    scratch.own_size = (args.source + 15) / 16 * 16;
    scratch.own = pieces.take(scratch.own_size * threads);
    scratch.row_size = decoder_row_workspace(args);
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
  // (B): the row of keys, memory and lengths that each row attends to; null: its own.
  const int32_t* source_rows;
  // Whether the combination was applied to the memory already, whose weighted sum is then not
  // the context but what the combination makes of it.
  bool folded;
};

// In multiply-adds: about what a tanh costs, and what two members of a team can both do in the
// time in which they would share it and wait for each other.
constexpr int64_t kTanhWork = 16, kWaitWork = 40000;

template <class T>
StepCost decoder_cost(const Decode<T>& args, int gates, int barriers) {
  const int64_t H = args.hidden;
  int64_t weights = args.attends() ? H * (args.memory_size + H) : 0;
  for (int64_t l = 0; l < args.layer_count; ++l) {
    weights += gates * H * H * (args.layers[l].reads_below() ? 2 : 1);
  }
  if (args.projects_query()) weights += args.key_size * H;
  weights += args.position_size * H;
  const int64_t seen = args.window > 0 ? smaller(args.source, 2 * args.window + 1) : args.source;
  const int64_t row_work =
      seen * (args.key_size * (args.additive ? kTanhWork : 1) + args.memory_size);
  return quantized_cost(
      args.layers[0].quantized_hh,
      {args.batch, weights, row_work, weights * static_cast<int64_t>(sizeof(T)), barriers});
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
    Segment<T> segments[2];
    int segment_count = 0;
    if (layer.reads_below()) {
      segments[segment_count++] = input_segment(below, weights.w_in[l]);
    }
    segments[segment_count++] =
        recurrent_segment<Cell>(layer.states + step.before, weights.w_hh[l]);
    T* const gates = layer.gates + (l == 0 ? t : t * kept) * B * G * H;
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
              UnitForward<T>{H, lanes, l == 0 ? row_gates : layer.bias + unit,
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

// The attention of one row of a step, whose queries lie in `queries`, (B, A).
template <class T>
AttentionRow<T> decoder_row(const Decode<T>& args, int64_t row, T center, const T* queries,
                            const T* past, T* attn, T* context, T* workspace) {
  const int64_t N = args.head_count(), S = args.source, A = args.key_size / N,
                M = args.memory_size / N;
  const int64_t valid = valid_positions<T>(args.lengths, row / N, S);
  const View<T> view = args.window > 0
                           ? window_view(center, args.window, args.w_position != nullptr, valid)
                           : View<T>{{0, valid}, T(0), T(0)};
  return {S,
          A,
          M,
          view,
          queries + row * A,
          args.keys + row * S * A,
          args.memory + row * S * M,
          args.v == nullptr ? nullptr : args.v + row % N * A,
          attn + row * S,
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

// p = S sigmoid(v . tanh(W h)), of which the tanh is there.
template <class T>
T predicted_center(const Decode<T>& args, int64_t slot, int64_t row) {
  const int64_t P = args.position_size, own = row / args.head_count();
  T share;
  scores<T, DotScore, 1>(args.positions + (slot * args.batch + own) * P, 0, args.position_v, 1, P,
                         nullptr, &share, 0);
  const T length = T(valid_positions<T>(args.lengths, own, args.source));
  return length * Math<T>::sigmoid(broadcast(share))[0];
}

// Attention row by row, for all that a row may have: each member takes whole rows.
template <class T, class Score>
void step_rows(const Decode<T>& args, const DecoderScratch<T>& scratch, const DecoderStep<T>& step,
               const Place& at, int thread, const T* queries) {
  const int64_t B = args.batch, S = args.source, N = args.head_count(), t = step.t;
  const int64_t slot = args.save ? t : 0;
  const T* past = nullptr;
  T* past_after = nullptr;
  if (args.taps > 0) {
    past = args.past + slot_before(t, args.steps, false, args.save) * B * N * S;
    past_after = args.past + slot_after(t, args.steps, false, args.save) * B * N * S;
  }
  const Range mine = attention_rows(at, N);
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    T center = given_center(args, t, row);
    if (args.w_position != nullptr) {
      center = predicted_center(args, slot, row);
      if (row % N == 0) args.centers[slot * B + row / N] = center;
    }
    attend_row<T, Score>(decoder_row(args, row, center, queries, past, step.attn,
                                     args.context + slot * B * args.memory_size,
                                     scratch.rows + thread * scratch.row_size));
    if (args.taps == 0) continue;
    const T* const attn = step.attn + row * S;
    for (int64_t s = row * S; s < (row + 1) * S; ++s) {
      past_after[s] = args.cumulative ? past[s] + attn[s - row * S] : attn[s - row * S];
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

  const auto source_row = [&](int64_t row) {
    return step.source_rows == nullptr ? row : step.source_rows[row];
  };
  // Scores are shared out by position, the context by component; between the two every
  // member takes the whole softmax, which costs less than to wait once more. So do all scores
  // of a few rows, if no member needs what another makes of its own part of the context.
  const auto score_row = [&](int64_t row, Range part, T* row_scores) {
    scores<T, Score, 1>(query + row * A, 0, args.keys + (source_row(row) * S + part.begin) * A,
                        part.size(), A, args.v, row_scores + part.begin, 0);
  };
  T* const context = args.context + slot * B * M;
  const auto attend_row = [&](int64_t row, const T* row_scores) {
    const int64_t from = source_row(row);
    const int64_t valid = valid_positions<T>(args.lengths, from, S);
    softmax(row_scores, valid, own_attn);
    for (int64_t s = valid; s < S; ++s) own_attn[s] = 0;
    weighted_sum<T, 1>(own_attn, 0, args.memory + from * S * M, valid, M, memory_part,
                       context + row * M, 0);
    const Range part = at.part(S);
    T* const attn = step.attn + row * S;
    for (int64_t s = part.begin; s < part.end; ++s) attn[s] = own_attn[s];
  };
  const auto valid_of = [&](int64_t row) {
    return valid_positions<T>(args.lengths, source_row(row), S);
  };
  const int64_t score_work = at.rows.size() * S * A * (Score::kAdditive ? kTanhWork : 1);
  if (at.members == 1 || (step.folded && score_work <= kWaitWork)) {
    for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
      score_row(row, {0, valid_of(row)}, own_attn);
      attend_row(row, own_attn);
    }
  } else {
    for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
      score_row(row, at.part(valid_of(row)), scratch.scores + row * S);
    }
    at.wait();
    for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
      attend_row(row, scratch.scores + row * S);
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
  const T* const context = args.context + (args.save ? step.t : 0) * args.batch * args.memory_size;
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

// The attention of one step by the top state, and Luong's combination.
template <class T, class Score>
void step_attention(const Decode<T>& args, const DecoderWeights<T>& weights,
                    const DecoderScratch<T>& scratch, const DecoderStep<T>& step, const Place& at,
                    int thread, const T* top) {
  attend_step<T, Score>(args, weights, scratch, step, at, thread, top);
  combine_step(args, weights, step, at, top);
}

template <class T, class Cell, class Score>
void decode_forward_cell(const Decode<T>& args) {
  constexpr int G = Cell::kGates;
  const int64_t B = args.batch, H = args.hidden, L = args.layer_count;
  const Plan plan = plan_decode(args, G, static_cast<int>(L) + 3 + (args.projects_query() ? 1 : 0));
  const bool packs = repays_packing(args.steps, B);

  Pieces<T> count(nullptr);
  DecoderWeights<T>::take(args, G, packs, /*folded=*/false, count);
  DecoderScratch<T>::take(args, plan.threads, count);
  Workspace workspace(count.bytes());
  Pieces<T> pieces(workspace.data());
  const auto weights = DecoderWeights<T>::take(args, G, packs, /*folded=*/false, pieces);
  const auto scratch = DecoderScratch<T>::take(args, plan.threads, pieces);
  Teams teams(plan);

  parallel(plan.threads, [&](int thread, int present) {
    weights.pack(L, thread, present);
    if (present > 1) teams.all.wait(present);

    const Place at = place(plan, thread, present, B, teams);
    for (int64_t t = 0; t < args.steps; ++t) {
      T* const output = args.output + t * B * H;
      const int64_t M = args.memory_size;
      const T* const context = args.context + (args.save ? t : 0) * B * M;
      const T* const fed = t == 0               ? args.feed
                           : args.feeds_context ? (args.save ? context - B * M : context)
                                                : output - B * H;
      DecoderStep<T> step{t,
                          t % 2 != 0,
                          slot_before(t, args.steps, false, args.save) * B * H,
                          slot_after(t, args.steps, false, args.save) * B * H,
                          args.feeding ? fed : nullptr,
                          output,
                          args.attn + t * args.attn_step,
                          nullptr,
                          /*folded=*/false};
      if (args.attends_first) {
        attend_step<T, Score>(args, weights, scratch, step, at, thread,
                              args.layers[L - 1].states + step.before);
        step.fed = context;
      }
      const T* const top = step_cells<T, Cell>(args, weights, scratch, step, at);
      if (args.attends_first) {
        combine_step(args, weights, step, at, top);
      } else {
        step_attention<T, Score>(args, weights, scratch, step, at, thread, top);
      }
    }
  });
}

template <class T>
struct DecodeBackwardMemory {
  Weights<T> w_in[kMaxLayers];
  Weights<T> w_hh[kMaxLayers];
  Weights<T> combine_context;
  Weights<T> combine_hidden;
  Weights<T> w_query;
  Weights<T> w_position;
  T* d_top;   // (B, H): what reaches the top state from attention
  T* d_attn;  // (B, S)
  T* own;     // (threads, own_size): a row of score gradients for each thread
  int64_t own_size;
  T* rows;  // (threads, row_size): what an AttentionRow works in
  int64_t row_size;
  T* d_centers;  // (B*N)

  static DecodeBackwardMemory take(const Decode<T>& args, int gates, int threads,
                                   Pieces<T>& pieces) {
    const int64_t B = args.batch, H = args.hidden, S = args.source, M = args.memory_size;
    const auto weights = [&](const T* source, int64_t stride, int64_t units, int64_t k_count) {
      Weights<T> taken{source, stride, units, 1, k_count, nullptr};
      if (source != nullptr) taken.packed = pieces.take(taken.packed_size());
      return taken;
    };
    DecodeBackwardMemory memory{};
    for (int64_t l = 0; l < args.layer_count; ++l) {
      const DecoderLayer<T>& layer = args.layers[l];
      memory.w_in[l] =
          weights(layer.w_in, layer.w_in_stride, l == 0 ? args.fed_size() : H, gates * H);
      memory.w_hh[l] = weights(layer.w_hh, H, H, gates * H);
    }
    memory.combine_context = weights(args.combine, M + H, M, H);
    memory.combine_hidden = weights(args.combine + M, M + H, H, H);
    memory.w_query = weights(args.w_query, H, H, args.key_size);
    memory.w_position = weights(args.w_position, H, H, args.position_size);
    memory.d_top = pieces.take(B * H);
    memory.d_attn = pieces.take(B * S);
    memory.own_size = (S + 15) / 16 * 16;
    memory.own = pieces.take(memory.own_size * threads);
    memory.row_size = decoder_row_workspace(args);
    memory.rows = pieces.take(memory.row_size * threads);
    memory.d_centers = pieces.take(args.window > 0 ? B * args.head_count() : 0);
    return memory;
  }

  void pack(int64_t layer_count, int thread, int present) const {
    for (int64_t l = 0; l < layer_count; ++l) {
      if (w_in[l].source != nullptr) pack_columns(w_in[l], thread, present);
      pack_columns(w_hh[l], thread, present);
    }
    pack_columns(combine_context, thread, present);
    pack_columns(combine_hidden, thread, present);
    if (w_query.source != nullptr) pack_columns(w_query, thread, present);
    if (w_position.source != nullptr) pack_columns(w_position, thread, present);
  }
};

template <class T, class Cell, class Score>
void decode_backward_cell(const DecodeBackward<T>& backward) {
  constexpr int G = Cell::kGates;
  const Decode<T>& args = backward.forward;
  const int64_t B = args.batch, H = args.hidden, S = args.source, A = args.key_size,
                M = args.memory_size, L = args.layer_count, T_ = args.steps, P = args.position_size,
                N = args.head_count(), F = args.fed_size();
  const int64_t unit_panels = vectors<T>(H);
  const Plan plan = plan_decode(args, G, static_cast<int>(L) + 4);
  // The states that the queries are made of, and these: step t's are B rows from row t * B on.
  const T* const asking = args.layers[L - 1].states + (args.attends_first ? 0 : B * H);
  const T* const queries = args.w_query == nullptr ? asking : args.query;

  Pieces<T> count(nullptr);
  DecodeBackwardMemory<T>::take(args, G, plan.threads, count);
  Workspace workspace(count.bytes());
  Pieces<T> pieces(workspace.data());
  const auto memory = DecodeBackwardMemory<T>::take(args, G, plan.threads, pieces);
  Teams teams(plan);

  parallel(plan.threads, [&](int thread, int present) {
    memory.pack(L, thread, present);
    if (present > 1) teams.all.wait(present);

    const Place at = place(plan, thread, present, B, teams);
    const Range units = at.part(unit_panels), key_part = at.part(vectors<T>(A)),
                memory_part = at.part(vectors<T>(M)), fed_part = at.part(vectors<T>(F));
    T* const own_scores = memory.own + thread * memory.own_size;

    // What the cells of step t say of what was fed to them, if there are such and they were.
    const auto fed_segments = [&](int64_t t, Segment<T>* segments) {
      if (!args.feeding || t >= T_) return 0;
      *segments = plain_segment<T>(args.layers[0].d_x_gates + t * B * G * H, memory.w_in[0]);
      return 1;
    };

    const auto sum_gradient = [&](int64_t t) {
      Segment<T> segment;
      const int segment_count = args.feeds_context ? 0 : fed_segments(t + 1, &segment);
      product<T, 1, 1>(&segment, segment_count, at.rows.begin, at.rows.end, units.begin, units.end,
                       t % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                         const int64_t offset = (t * B + row) * H + panel * kLanes<T>;
                         const int lanes = lanes_inside<T>(H, panel);
                         const Vec<T> out = load(args.output + offset, lanes);
                         const Vec<T> d_out = load(sums) + load(backward.d_output + offset, lanes);
                         store(backward.d_sum + offset, d_out * (1 - out * out), lanes);
                       });
      at.wait();
    };

    const auto context_gradient = [&](int64_t t) {
      Segment<T> segments[2];
      int segment_count = 1;
      segments[0] = plain_segment<T>(backward.d_sum + t * B * H, memory.combine_context);
      if (args.feeds_context) {
        segment_count += fed_segments(args.attends_first ? t : t + 1, segments + 1);
      }
      const T* const d_fed = t + 1 == T_ ? backward.d_fed : nullptr;
      product<T, 1, 1>(segments, segment_count, at.rows.begin, at.rows.end, memory_part.begin,
                       memory_part.end, t % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                         const int64_t offset = row * M + panel * kLanes<T>;
                         const int lanes = lanes_inside<T>(M, panel);
                         Vec<T> sum = load(sums);
                         if (d_fed != nullptr) sum += load(d_fed + offset, lanes);
                         store(backward.d_context + t * B * M + offset, sum, lanes);
                       });
      at.wait();
    };

    // Row by row; see attention_row.h. Windows predicted from a row's state end with its gradient.
    const auto row_gradient = [&](int64_t t) {
      const Range mine = attention_rows(at, N);
      const int64_t key_size = A / N, memory_size = M / N;
      for (int64_t row = mine.begin; row < mine.end; ++row) {
        const int64_t query = t * B * N + row;
        const T center =
            args.w_position == nullptr ? given_center(args, t, row) : args.centers[t * B + row / N];
        T* const d_query = Score::kAdditive ? backward.d_query + t * B * A : memory.d_top;
        attend_row_backward<T, Score>(
            {decoder_row<T>(args, row, center, queries + t * B * A,
                            args.taps == 0 ? nullptr : args.past + t * B * N * S,
                            args.attn + t * B * N * S, nullptr,
                            memory.rows + thread * memory.row_size),
             backward.d_context + query * memory_size,
             backward.d_attn == nullptr ? nullptr : backward.d_attn + query * S,
             backward.d_scores + query * S, d_query + row * key_size,
             backward.d_keys == nullptr ? nullptr : backward.d_keys + row * S * key_size,
             backward.d_memory == nullptr ? nullptr : backward.d_memory + row * S * memory_size,
             Score::kAdditive ? backward.d_v + row * key_size : nullptr,
             args.w_position == nullptr ? nullptr : memory.d_centers + row,
             args.taps == 0 ? nullptr : backward.d_past + row * S, args.cumulative,
             args.taps == 0 ? nullptr : backward.d_w_history + row * args.taps * key_size});
      }
      at.wait();
      if (args.w_position == nullptr) return;
      const Range own = attention_rows(at, 1);
      for (int64_t row = own.begin; row < own.end; ++row) {
        T d_center = 0;
        for (int64_t head = row * N; head < (row + 1) * N; ++head) {
          d_center += memory.d_centers[head];
        }
        const T length = T(valid_positions<T>(args.lengths, row, S));
        const T center = args.centers[t * B + row];
        const T d_share = length > 0 ? d_center * center * (1 - center / length) : T(0);
        backward.d_shares[t * B + row] = d_share;
        const int64_t first = (t * B + row) * P;
        for (int64_t i = 0; i < P; ++i) {
          const T position = args.positions[first + i];
          backward.d_positions[first + i] =
              d_share * args.position_v[i] * (1 - position * position);
        }
      }
      at.wait();
    };

    const auto attention_gradient = [&](int64_t t) {
      if (args.by_rows()) return row_gradient(t);
      T* const d_context = backward.d_context + t * B * M;
      const auto score_row = [&](int64_t row) {
        const Range part = at.part(valid_positions<T>(args.lengths, row, S));
        T* const d_attn = memory.d_attn + row * S + part.begin;
        scores<T, DotScore, 1>(d_context + row * M, 0, args.memory + (row * S + part.begin) * M,
                               part.size(), M, nullptr, d_attn, 0);
        if (backward.d_attn != nullptr) {
          const T* more = backward.d_attn + (t * B + row) * S + part.begin;
          for (int64_t s = 0; s < part.size(); ++s) d_attn[s] += more[s];
        }
      };
      const auto attend_row = [&](int64_t row) {
        const int64_t valid = valid_positions<T>(args.lengths, row, S);
        const T* attn = args.attn + (t * B + row) * S;
        softmax_backward(attn, memory.d_attn + row * S, valid, own_scores);
        for (int64_t s = valid; s < S; ++s) own_scores[s] = 0;
        const Range part = at.part(S);
        T* const d_scores = backward.d_scores + (t * B + row) * S;
        for (int64_t s = part.begin; s < part.end; ++s) d_scores[s] = own_scores[s];
        if constexpr (Score::kAdditive) {
          additive_backward(queries + (t * B + row) * A, args.keys + row * S * A, args.v,
                            own_scores, valid, A, key_part, backward.d_query + (t * B + row) * A,
                            backward.d_keys + row * S * A, backward.d_v + row * A);
        } else {
          weighted_sum<T, 1>(own_scores, 0, args.keys + row * S * A, valid, A, key_part,
                             memory.d_top + row * A, 0);
        }
      };
      if (at.members == 1) {
        for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
          score_row(row);
          attend_row(row);
        }
      } else {
        for (int64_t row = at.rows.begin; row < at.rows.end; ++row) score_row(row);
        at.wait();
        for (int64_t row = at.rows.begin; row < at.rows.end; ++row) attend_row(row);
        at.wait();
      }
    };

    // What the attention of step t says of the state that asked: segments that add to sum 0, and
    // what needs no product.
    const auto query_segments = [&](int64_t t, Segment<T>* segments, const T*& direct) {
      int segment_count = 0;
      direct = memory.d_top;
      if constexpr (Score::kAdditive) {
        direct = backward.d_query + t * B * A;
        if (args.w_query != nullptr) {
          segments[segment_count++] = plain_segment<T>(direct, memory.w_query, 0);
          direct = nullptr;
        }
      }
      if (args.w_position != nullptr) {
        segments[segment_count++] =
            plain_segment<T>(backward.d_positions + t * B * P, memory.w_position, 0);
      }
      return segment_count;
    };

    const auto cell_gradients = [&](int64_t t) {
      for (int64_t l = L - 1; l >= 0; --l) {
        const DecoderLayer<T>& layer = args.layers[l];
        const bool is_top = l + 1 == L;
        // Sum 0 comes from above and takes the dropout mask, sum 1 from the step after.
        Segment<T> segments[4];
        int segment_count = 0;
        const T* direct = nullptr;
        if (is_top) {
          segments[segment_count++] =
              plain_segment<T>(backward.d_sum + t * B * H, memory.combine_hidden, 0);
          // This state asked in this step, or asks in the next one.
          const int64_t asked = args.attends_first ? t + 1 : t;
          if (asked < T_) segment_count += query_segments(asked, segments + 1, direct);
        } else {
          segments[segment_count++] =
              plain_segment<T>(args.layers[l + 1].d_x_gates + t * B * G * H, memory.w_in[l + 1], 0);
        }
        if (t + 1 < T_) {
          segments[segment_count++] =
              plain_segment<T>(layer.d_r_gates + (t + 1) * B * G * H, memory.w_hh[l], 1);
        }
        const T* mask = is_top ? nullptr : layer.mask;
        product<T, 1, 2>(
            segments, segment_count, at.rows.begin, at.rows.end, units.begin, units.end, t % 2 != 0,
            [&](int64_t row, int64_t panel, const T* sums) {
              const int lanes = lanes_inside<T>(H, panel);
              const int64_t unit = panel * kLanes<T>, offset = row * H + unit;
              Vec<T> d_h = load(sums);
              if (direct != nullptr) d_h += load(direct + offset, lanes);
              if (mask != nullptr) d_h *= load(mask + t * B * H + offset, lanes);
              d_h += load(sums + kLanes<T>) + load(layer.d_h + offset, lanes);
              const T* c_prev = nullptr;
              T* d_c = nullptr;
              if constexpr (Cell::kStates > 0) {
                c_prev = layer.cells + t * B * H + offset;
                d_c = layer.d_c + offset;
              }
              const int64_t gates = (t * B + row) * G * H + unit;
              cell_backward<Cell>(
                  UnitBackward<T>{
                      H, lanes, layer.gates + gates,
                      layer.apart == nullptr ? nullptr : layer.apart + t * B * H + offset,
                      layer.states + t * B * H + offset, c_prev, layer.d_h + offset, d_c,
                      layer.d_x_gates + gates, layer.d_r_gates + gates},
                  d_h);
            });
        at.wait();
      }
    };

    for (int64_t t = T_ - 1; t >= 0; --t) {
      sum_gradient(t);
      if (args.attends_first) {
        cell_gradients(t);
        context_gradient(t);
        attention_gradient(t);
      } else {
        context_gradient(t);
        attention_gradient(t);
        cell_gradients(t);
      }
    }

    // Of what was there before the first step. A context that comes first is fed at once.
    Segment<T> segments[4];
    const int fed_count = args.attends_first ? 0 : fed_segments(0, segments);
    product<T, 1, 1>(segments, fed_count, at.rows.begin, at.rows.end, fed_part.begin, fed_part.end,
                     true, [&](int64_t row, int64_t panel, const T* sums) {
                       store(backward.d_feed + row * F + panel * kLanes<T>, load(sums),
                             lanes_inside<T>(F, panel));
                     });
    for (int64_t l = 0; l < L; ++l) {
      const DecoderLayer<T>& layer = args.layers[l];
      int segment_count = 1;
      const T* direct = nullptr;
      segments[0] = plain_segment<T>(layer.d_r_gates, memory.w_hh[l]);
      if (args.attends_first && l + 1 == L) {
        segment_count += query_segments(0, segments + 1, direct);
      }
      product<T, 1, 1>(segments, segment_count, at.rows.begin, at.rows.end, units.begin, units.end,
                       false, [&](int64_t row, int64_t panel, const T* sums) {
                         const int64_t offset = row * H + panel * kLanes<T>;
                         const int lanes = lanes_inside<T>(H, panel);
                         Vec<T> sum = load(sums) + load(layer.d_h + offset, lanes);
                         if (direct != nullptr) sum += load(direct + offset, lanes);
                         store(layer.d_h + offset, sum, lanes);
                       });
    }
  });
}

template <class T>
void decode_forward(const Decode<T>& args) {
  with_cell(args.cell, [&](auto cell) {
    with_score(args.additive,
               [&](auto score) { decode_forward_cell<T, decltype(cell), decltype(score)>(args); });
  });
}

template <class T>
void decode_backward(const DecodeBackward<T>& args) {
  with_cell(args.forward.cell, [&](auto cell) {
    with_score(args.forward.additive,
               [&](auto score) { decode_backward_cell<T, decltype(cell), decltype(score)>(args); });
  });
}

}  // namespace pyseq::cpu::PYSEQ_TIER
