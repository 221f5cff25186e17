// SPDX-License-Identifier: Apache-2.0
// Attention of queries that are steps in order, where the weights of the steps before enter the
// score of the next. A thread takes a row through all its steps; rows wait for no other.
#pragma once

#include "attend.h"

namespace pyseq::cpu::PYSEQ_TIER {

template <class T>
int history_threads(const Attend<T>& args) {
  return static_cast<int>(larger(1, smaller(attend_threads(args), args.batch)));
}

// What a thread works in, rounded so that two share no cache line.
template <class T>
int64_t history_workspace(const Attend<T>& args, int64_t more) {
  return (row_workspace(args.taps, args.source, args.key_size) + more + 15) / 16 * 16;
}

// One step of a row, whose weights lie at `attn` and those before it at `past`, both (S).
template <class T>
AttentionRow<T> history_row(const Attend<T>& args, int64_t row, int64_t t, T* attn, const T* past,
                            T* workspace) {
  const View<T> view = args.window > 0 ? windowed_view(args, row, t) : whole_view(args, row);
  AttentionRow<T> step = windowed_row(args, row, t, view, attn + view.seen.begin);
  step.taps = args.taps;
  step.w_history = args.w_history + row % args.heads * args.taps * args.key_size;
  step.past = past;
  step.workspace = workspace;
  return step;
}

template <class T>
void add_to_past(const T* attn, bool cumulative, int64_t source, const T* before, T* after) {
  for (int64_t s = 0; s < source; ++s) after[s] = cumulative ? before[s] + attn[s] : attn[s];
}

template <class T>
void steps_forward(const Attend<T>& args) {
  const int64_t B = args.batch, S = args.source;
  const bool keeps = args.attn != nullptr;
  const int threads = history_threads(args);
  const int64_t own_size = history_workspace(args, keeps ? 0 : S);
  Workspace own(static_cast<size_t>(threads * own_size) * sizeof(T));
  parallel(threads, [&](int thread, int present) {
    T* const workspace = static_cast<T*>(own.data()) + thread * own_size;
    const Range mine = share(B, thread, present);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      T* const past = args.past + row * S;
      for (int64_t t = 0; t < args.steps; ++t) {
        T* const attn = keeps ? args.attn + (t * B + row) * S : workspace + own_size - S;
        const AttentionRow<T> step = history_row(args, row, t, attn, past, workspace);
        attend_row<T, AdditiveScore>(step);
        clear_unseen(step.view.seen, S, attn);
        add_to_past(attn, args.cumulative, S, past, past);
      }
    }
  });
}

template <class T>
void steps_backward(const AttendBackward<T>& backward) {
  const Attend<T>& args = backward.forward;
  const int64_t B = args.batch, S = args.source, A = args.key_size, M = args.memory_size,
                K = args.taps, steps = args.steps;
  const int threads = history_threads(args);
  // The sums of the weights before each step but the first are made once more; the weights of the
  // last step alone are there.
  const int64_t sums_size = args.cumulative ? larger(0, steps - 1) * S : 0;
  const int64_t own_size = history_workspace(args, S + sums_size);
  Workspace own(static_cast<size_t>(threads * own_size) * sizeof(T));
  parallel(threads, [&](int thread, int present) {
    T* const workspace = static_cast<T*>(own.data()) + thread * own_size;
    T* const sums = workspace + own_size - sums_size;
    T* const d_scores = sums - S;
    const Range mine = share(B, thread, present);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      T* const d_keys = backward.d_keys + row * S * A;
      T* const d_memory = backward.d_memory == nullptr ? nullptr : backward.d_memory + row * S * M;
      T* const d_v = backward.d_v + row * A;
      T* const d_w_history = backward.d_w_history + row * K * A;
      set_zero(d_keys, S * A);
      if (d_memory != nullptr) set_zero(d_memory, S * M);
      set_zero(d_v, A);
      set_zero(d_w_history, K * A);
      const auto attn_of = [&](int64_t t) { return args.attn + (t * B + row) * S; };
      const auto past_of = [&](int64_t t) -> const T* {
        if (t == 0) return args.past + row * S;
        return args.cumulative ? sums + (t - 1) * S : attn_of(t - 1);
      };
      if (args.cumulative) {
        for (int64_t t = 0; t + 1 < steps; ++t) {
          add_to_past(attn_of(t), true, S, past_of(t), sums + t * S);
        }
      }
      for (int64_t t = steps - 1; t >= 0; --t) {
        const int64_t query = t * B + row;
        const AttentionRow<T> step = history_row(args, row, t, attn_of(t), past_of(t), workspace);
        attend_row_backward<T, AdditiveScore>(
            {step, backward.d_context + query * M,
             backward.d_attn == nullptr ? nullptr : backward.d_attn + query * S, d_scores,
             backward.d_query + query * A, d_keys, d_memory, d_v,
             backward.d_centers == nullptr ? nullptr : backward.d_centers + query,
             backward.d_past + row * S, args.cumulative, d_w_history});
      }
    }
  });
}

template <class T>
void attend_forward(const Attend<T>& args) {
  args.taps > 0 ? steps_forward(args) : queries_forward(args);
}

template <class T>
void attend_backward(const AttendBackward<T>& backward) {
  backward.forward.taps > 0 ? steps_backward(backward) : queries_backward(backward);
}

}  // namespace pyseq::cpu::PYSEQ_TIER
