// SPDX-License-Identifier: Apache-2.0
// Attention of ONE query over one row, forward and backward, with all that a row may have: a
// window, a Gaussian in it. One thread takes the whole of it, and the rows of a row's queries in
// order, so that what adds up over them needs no other thread. Called by attend.h and decode.h.
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
  T* attn;          // (S)
  T* context;       // (M), forward only
};

namespace detail {

// The Gaussian at the lanes from position `first` on.
template <class T>
PYSEQ_FORCE_INLINE Vec<T> gaussian(const View<T>& view, int64_t first) {
  Vec<T> distance;
  for (int lane = 0; lane < kLanes<T>; ++lane) distance[lane] = T(first + lane) - view.center;
  return Math<T>::exp_nonpositive(-view.precision * distance * distance);
}

}  // namespace detail

template <class T, class Score>
void attend_row(const AttentionRow<T>& row) {
  const View<T>& view = row.view;
  const int64_t begin = view.seen.begin, count = view.seen.size();
  T* const attn = row.attn + begin;
  scores<T, Score, 1>(row.query, 0, row.keys + begin * row.key_size, count, row.key_size, row.v,
                      attn, 0);
  softmax(attn, count, attn);
  if (view.precision != 0) {
    for (int64_t s = 0; s < count; s += kLanes<T>) {
      const int inside = lanes_inside<T>(count, s / kLanes<T>);
      store(attn + s, load(attn + s, inside) * detail::gaussian(view, begin + s), inside);
    }
  }
  for (int64_t s = 0; s < begin; ++s) row.attn[s] = 0;
  for (int64_t s = view.seen.end; s < row.source; ++s) row.attn[s] = 0;
  weighted_sum<T, 1>(attn, 0, row.memory + begin * row.memory_size, count, row.memory_size,
                     {0, vectors<T>(row.memory_size)}, row.context, 0);
}

// Gradients for one query. Those named `add_` are added to, or null where they are not wanted.
template <class T>
struct AttentionRowBackward {
  AttentionRow<T> forward;
  const T* d_context;  // (M)
  const T* d_attn;     // (S) or null
  T* d_scores;         // (S)
  T* d_query;          // (A)
  T* add_d_keys;       // (S, A), never null for an additive score
  T* add_d_memory;     // (S, M)
  T* add_d_v;          // (A), additive only
  T* d_center;         // one number, or null
};

namespace detail {

// out[s] += weights[s] * row, for `count` rows of `size` numbers.
template <class T>
void add_outer(const T* weights, const T* row, int64_t count, int64_t size, T* out) {
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const int inside = lanes_inside<T>(size, i / kLanes<T>);
    const Vec<T> value = load(row + i, inside);
    for (int64_t s = 0; s < count; ++s) {
      T* const sum = out + s * size + i;
      store(sum, load(sum, inside) + weights[s] * value, inside);
    }
  }
}

}  // namespace detail

template <class T, class Score>
void attend_row_backward(const AttentionRowBackward<T>& backward) {
  const AttentionRow<T>& row = backward.forward;
  const View<T>& view = row.view;
  const int64_t begin = view.seen.begin, count = view.seen.size(), A = row.key_size,
                M = row.memory_size;
  const T* const attn = row.attn + begin;
  T* const d_scores = backward.d_scores + begin;
  scores<T, DotScore, 1>(backward.d_context, 0, row.memory + begin * M, count, M, nullptr, d_scores,
                         0);
  if (backward.d_attn != nullptr) {
    for (int64_t s = 0; s < count; ++s) d_scores[s] += backward.d_attn[begin + s];
  }
  if (backward.add_d_memory != nullptr) {
    detail::add_outer(attn, backward.d_context, count, M, backward.add_d_memory + begin * M);
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
  for (int64_t s = 0; s < begin; ++s) backward.d_scores[s] = 0;
  for (int64_t s = view.seen.end; s < row.source; ++s) backward.d_scores[s] = 0;

  const Range components{0, vectors<T>(A)};
  if constexpr (Score::kAdditive) {
    additive_backward(row.query, row.keys + begin * A, row.v, d_scores, count, A, components,
                      backward.d_query, backward.add_d_keys + begin * A, backward.add_d_v);
  } else {
    weighted_sum<T, 1>(d_scores, 0, row.keys + begin * A, count, A, components, backward.d_query,
                       0);
    if (backward.add_d_keys != nullptr) {
      detail::add_outer(d_scores, row.query, count, A, backward.add_d_keys + begin * A);
    }
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
