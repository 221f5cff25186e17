// SPDX-License-Identifier: Apache-2.0
// Attention of ONE query over one row, forward and backward, with all that a row may have: a
// window, a Gaussian in it, past weights that enter the score. One thread takes the whole of it,
// and a row's queries in order, so that what adds up over them needs no other thread. Called for
// attend and decode.
#pragma once

#include "attention.h"
#include "steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

template <class T>
void set_zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

// What a query sees of its row.
template <class T>
struct View {
  Range seen;
  T center;
  T precision;  // 1 / (2 sigma^2), or 0 without a Gaussian
};

// How many positions a query sees of `source`; a window of 0 is none.
inline int64_t positions_seen(int64_t window, int64_t source) {
  return window == 0 || window >= source ? source : smaller(source, 2 * window + 1);
}

// Zero in a row of numbers, one for each position, where nothing is seen.
template <class T>
void clear_unseen(const Range& seen, int64_t source, T* row) {
  set_zero(row, seen.begin);
  set_zero(row + seen.end, source - seen.end);
}

// The positions of [0, valid) within `half_width` of the centre. NaN sees all, so that what it
// makes of them comes out.
template <class T>
Range window_around(T center, int64_t half_width, int64_t valid) {
  const double first = __builtin_ceil(static_cast<double>(center) - half_width);
  const double last = __builtin_floor(static_cast<double>(center) + half_width);
  if (first != first) return {0, valid};
  const int64_t begin = first <= 0 ? 0 : first < valid ? static_cast<int64_t>(first) : valid;
  const int64_t end = last < 0 ? 0 : last < valid ? static_cast<int64_t>(last) + 1 : valid;
  return {begin, larger(begin, end)};
}

template <class T>
View<T> window_view(T center, int64_t half_width, bool gaussian, int64_t valid) {
  // sigma = D / 2.
  const T precision = gaussian ? T(2) / (T(half_width) * T(half_width)) : T(0);
  return {window_around(center, half_width, valid), center, precision};
}

template <class T>
struct AttentionRow {
  int64_t source, key_size, memory_size;
  View<T> view;
  const T* query;   // (A)
  const T* keys;    // (S, A)
  const T* memory;  // (S, M)
  const T* v;       // (A), additive only
  T* attn;          // one for each position that is seen
  T* context;       // (M), forward only
  // Where past weights enter an additive score, else zero and null.
  int64_t taps;
  const T* w_history;  // (K, A)
  const T* past;       // (S)
  T* workspace;        // row_workspace numbers
};

// Numbers that a row works in: the past with its ends padded, the keys that it moved, and for
// backward their gradients and what a few taps of the convolution get.
inline int64_t row_workspace(int64_t taps, int64_t source, int64_t key_size) {
  return taps == 0 ? 0 : source + taps + (2 * source + kQueries) * key_size + taps;
}

namespace detail {

// The Gaussian at the lanes from position `first` on.
template <class T>
PYSEQ_FORCE_INLINE Vec<T> gaussian(const View<T>& view, int64_t first) {
  Vec<T> distance;
  for (int lane = 0; lane < kLanes<T>; ++lane) distance[lane] = T(first + lane) - view.center;
  return Math<T>::exp_nonpositive(-view.precision * distance * distance);
}

}  // namespace detail

// The keys of what is seen, each with what the convolution of the past makes of its neighbours.
template <class T>
const T* seen_keys(const AttentionRow<T>& row) {
  const int64_t begin = row.view.seen.begin, count = row.view.seen.size(), A = row.key_size,
                K = row.taps;
  const T* const keys = row.keys + begin * A;
  if (K == 0) return keys;
  T* const padded = row.workspace;
  T* const moved = padded + row.source + K;
  const int64_t first = begin - K / 2;
  for (int64_t i = 0; i < count + K - 1; ++i) {
    const int64_t s = first + i;
    padded[i] = s >= 0 && s < row.source ? row.past[s] : T(0);
  }
  const Range components{0, vectors<T>(A)};
  int64_t s = 0;
  for (; s + kQueries <= count; s += kQueries) {
    weighted_sum<T, kQueries>(padded + s, 1, row.w_history, K, A, components, moved + s * A, A);
  }
  for (; s < count; ++s) {
    weighted_sum<T, 1>(padded + s, 0, row.w_history, K, A, components, moved + s * A, 0);
  }
  for (int64_t i = 0; i < count * A; ++i) moved[i] += keys[i];
  return moved;
}

// The weights alone.
template <class T, class Score>
void row_weights(const AttentionRow<T>& row) {
  const View<T>& view = row.view;
  const int64_t begin = view.seen.begin, count = view.seen.size();
  T* const attn = row.attn;
  scores<T, Score, 1>(row.query, 0, seen_keys(row), count, row.key_size, row.v, attn, 0);
  softmax(attn, count, attn);
  if (view.precision != 0) {
    for (int64_t s = 0; s < count; s += kLanes<T>) {
      const int inside = lanes_inside<T>(count, s / kLanes<T>);
      store(attn + s, load(attn + s, inside) * detail::gaussian(view, begin + s), inside);
    }
  }
}

template <class T, class Score>
void attend_row(const AttentionRow<T>& row) {
  row_weights<T, Score>(row);
  const Range& seen = row.view.seen;
  weighted_sum<T, 1>(row.attn, 0, row.memory + seen.begin * row.memory_size, seen.size(),
                     row.memory_size, {0, vectors<T>(row.memory_size)}, row.context, 0);
}

// Gradients for one query. Those named `add_` are added to, or null where they are not wanted.
template <class T>
struct AttentionRowBackward {
  AttentionRow<T> forward;
  const T* d_context;  // (M)
  const T* d_attn;     // (S) or null
  T* d_scores;         // one for each position that is seen
  T* d_query;          // (A)
  T* add_d_keys;       // (S, A), never null for an additive score
  T* add_d_memory;     // (S, M) or null
  T* add_d_v;          // (A), additive only
  T* d_center;         // one number, or null
  // With past weights only: in of those after the step, out of those before it.
  T* d_past;           // (S)
  bool cumulative;     // whether they are the sum of all steps, not the last one's
  T* add_d_w_history;  // (K, A)
};

namespace detail {

// out[s] += weights[s] * row, for `count` rows of `size` numbers, of which the vectors [begin,
// end).
template <class T>
void add_outer(const T* weights, const T* row, int64_t count, int64_t size, Range vectors_,
               T* out) {
  for (int64_t v = vectors_.begin; v < vectors_.end; ++v) {
    const int64_t i = v * kLanes<T>;
    const int inside = lanes_inside<T>(size, v);
    const Vec<T> value = load(row + i, inside);
    for (int64_t s = 0; s < count; ++s) {
      T* const sum = out + s * size + i;
      store(sum, load(sum, inside) + weights[s] * value, inside);
    }
  }
}

}  // namespace detail

// What the gradients of the moved keys are to the past and to the convolution.
template <class T>
void history_backward(const AttentionRowBackward<T>& backward, const T* d_moved) {
  const AttentionRow<T>& row = backward.forward;
  const int64_t count = row.view.seen.size(), S = row.source, A = row.key_size, K = row.taps;
  const int64_t first = row.view.seen.begin - K / 2;
  const T* const padded = row.workspace;
  T* const d_taps = row.workspace + S + K + 2 * S * A;
  T* const d_neighbours = d_taps + kQueries * A;
  for (int64_t s = 0; s < count; ++s) {
    scores<T, DotScore, 1>(d_moved + s * A, 0, row.w_history, K, A, nullptr, d_neighbours, 0);
    for (int64_t j = 0; j < K; ++j) {
      const int64_t neighbour = first + s + j;
      if (neighbour >= 0 && neighbour < S) backward.d_past[neighbour] += d_neighbours[j];
    }
  }
  const Range components{0, vectors<T>(A)};
  for (int64_t j = 0; j < K;) {
    int64_t tap_count = 1;
    if (j + kQueries <= K) {
      tap_count = kQueries;
      weighted_sum<T, kQueries>(padded + j, 1, d_moved, count, A, components, d_taps, A);
    } else {
      weighted_sum<T, 1>(padded + j, 0, d_moved, count, A, components, d_taps, 0);
    }
    T* const sum = backward.add_d_w_history + j * A;
    for (int64_t i = 0; i < tap_count * A; ++i) sum[i] += d_taps[i];
    j += tap_count;
  }
}

// The first half: the gradients of scores, centre and past.
template <class T>
void row_scores_backward(const AttentionRowBackward<T>& backward) {
  const AttentionRow<T>& row = backward.forward;
  const View<T>& view = row.view;
  const int64_t begin = view.seen.begin, count = view.seen.size(), M = row.memory_size;
  const T* const attn = row.attn;
  T* const d_scores = backward.d_scores;
  scores<T, DotScore, 1>(backward.d_context, 0, row.memory + begin * M, count, M, nullptr, d_scores,
                         0);
  if (backward.d_attn != nullptr) {
    for (int64_t s = 0; s < count; ++s) d_scores[s] += backward.d_attn[begin + s];
  }
  if (row.taps > 0) {
    for (int64_t s = 0; s < count; ++s) d_scores[s] += backward.d_past[begin + s];
    if (!backward.cumulative) set_zero(backward.d_past, row.source);
  }
  // A weight is a = alpha g, with alpha the softmax and g the Gaussian, which inside a window is
  // at least exp(-2): d_score = alpha (g d_a - sum(a d_a)) = a (d_a - sum(a d_a) / g).
  T sum = 0, moment = 0;
  for (int64_t s = 0; s < count; ++s) {
    const T part = attn[s] * d_scores[s];
    sum += part;
    moment += part * (T(begin + s) - view.center);
  }
  if (backward.d_center != nullptr) *backward.d_center = 2 * view.precision * moment;
  for (int64_t s = 0; s < count; s += kLanes<T>) {
    const int inside = lanes_inside<T>(count, s / kLanes<T>);
    const Vec<T> total =
        view.precision == 0 ? broadcast(sum) : sum / detail::gaussian(view, begin + s);
    store(d_scores + s, load(attn + s, inside) * (load(d_scores + s, inside) - total), inside);
  }
}

// What these are to the memory, for the vectors [begin, end) of its components.
template <class T>
void row_memory_backward(const AttentionRowBackward<T>& backward, Range components) {
  const AttentionRow<T>& row = backward.forward;
  const int64_t M = row.memory_size;
  detail::add_outer(row.attn, backward.d_context, row.view.seen.size(), M, components,
                    backward.add_d_memory + row.view.seen.begin * M);
}

template <class T, class Score>
void attend_row_backward(const AttentionRowBackward<T>& backward) {
  const AttentionRow<T>& row = backward.forward;
  const int64_t begin = row.view.seen.begin, count = row.view.seen.size(), A = row.key_size;
  const T* const d_scores = backward.d_scores;
  row_scores_backward(backward);
  if (backward.add_d_memory != nullptr) {
    row_memory_backward(backward, {0, vectors<T>(row.memory_size)});
  }
  const Range components{0, vectors<T>(A)};
  if constexpr (Score::kAdditive) {
    T* const add_d_keys = backward.add_d_keys + begin * A;
    const T* const keys = seen_keys(row);
    if (row.taps == 0) {
      additive_backward(row.query, keys, row.v, d_scores, count, A, components, backward.d_query,
                        add_d_keys, backward.add_d_v);
      return;
    }
    T* const d_moved = row.workspace + row.source + row.taps + row.source * A;
    set_zero(d_moved, count * A);
    additive_backward(row.query, keys, row.v, d_scores, count, A, components, backward.d_query,
                      d_moved, backward.add_d_v);
    for (int64_t i = 0; i < count * A; ++i) add_d_keys[i] += d_moved[i];
    history_backward(backward, d_moved);
  } else {
    weighted_sum<T, 1>(d_scores, 0, row.keys + begin * A, count, A, components, backward.d_query,
                       0);
    if (backward.add_d_keys != nullptr) {
      detail::add_outer(d_scores, row.query, count, A, components, backward.add_d_keys + begin * A);
    }
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
