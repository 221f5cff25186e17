// SPDX-License-Identifier: Apache-2.0
// Backward of a whole attention decoder, as one loop over the target steps from the last.
#pragma once

#include "decode_step.h"

namespace pyseq::cpu::PYSEQ_TIER {

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
        T* const d_scores =
            backward.d_scores == nullptr ? own_scores : backward.d_scores + query * S;
        const AttentionRow<T> forward = decoder_row<T>(
            args, row, center, queries + t * B * A,
            args.taps == 0 ? nullptr : args.past + t * B * N * S, args.attn + t * B * N * S,
            nullptr, memory.rows + thread * memory.row_size);
        attend_row_backward<T, Score>(
            {forward, backward.d_context + query * memory_size,
             backward.d_attn == nullptr ? nullptr : backward.d_attn + query * S,
             d_scores + forward.view.seen.begin, d_query + row * key_size,
             backward.d_keys == nullptr ? nullptr : backward.d_keys + row * S * key_size,
             backward.d_memory == nullptr ? nullptr : backward.d_memory + row * S * memory_size,
             Score::kAdditive ? backward.d_v + row * key_size : nullptr,
             args.w_position == nullptr ? nullptr : memory.d_centers + row,
             args.taps == 0 ? nullptr : backward.d_past + row * S, args.cumulative,
             args.taps == 0 ? nullptr : backward.d_w_history + row * args.taps * key_size});
        if (backward.d_scores != nullptr) clear_unseen(forward.view.seen, S, d_scores);
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
        if (backward.d_scores != nullptr) {
          for (int64_t s = valid; s < S; ++s) own_scores[s] = 0;
          const Range part = at.part(S);
          T* const d_scores = backward.d_scores + (t * B + row) * S;
          for (int64_t s = part.begin; s < part.end; ++s) d_scores[s] = own_scores[s];
        }
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
void decode_backward(const DecodeBackward<T>& args) {
  with_cell(args.forward.cell, [&](auto cell) {
    with_score(args.forward.additive,
               [&](auto score) { decode_backward_cell<T, decltype(cell), decltype(score)>(args); });
  });
}

}  // namespace pyseq::cpu::PYSEQ_TIER
