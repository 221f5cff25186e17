// SPDX-License-Identifier: Apache-2.0
// Attention of ONE query over one row by one block, forward and backward, with all that a row may
// have: a window, a Gaussian in it, past weights that enter the score. The same as
// cpu/attention_row.h, except that the keys which the past has moved are never stored. Called by
// attend.cu and decode.cu.
#pragma once

#include "../scores.h"
#include "device.h"

namespace pyseq::cuda {

// The positions of a row that a query sees, and where its Gaussian stands.
template <class A>
struct View {
  int64_t begin, end;
  A center;
  A precision;  // 1 / (2 sigma^2), or 0 without a Gaussian

  PYSEQ_DEVICE int64_t count() const { return end - begin; }
  PYSEQ_DEVICE A gaussian(int64_t s) const {
    const A distance = A(s) - center;
    return Math<A>::exp_nonpositive(-precision * distance * distance);
  }
};

// How many positions of a row are there. Nobody looked at what `lengths` holds: that would wait for
// the device.
PYSEQ_DEVICE int64_t valid_positions(const int64_t* lengths, int64_t row, int64_t source) {
  if (lengths == nullptr) return source;
  const int64_t length = lengths[row];
  return length < 0 ? 0 : length < source ? length : source;
}

template <class A>
PYSEQ_DEVICE View<A> whole_view(int64_t valid) {
  return {0, valid, A(0), A(0)};
}

// The positions of [0, valid) within `half_width` of the centre. NaN sees all, so that what it
// makes of them comes out.
template <class A>
PYSEQ_DEVICE View<A> window_view(A center, int64_t half_width, bool gaussian, int64_t valid) {
  // sigma = D / 2.
  const A precision = gaussian ? A(2) / (A(half_width) * A(half_width)) : A(0);
  const double first = ::ceil(static_cast<double>(center) - static_cast<double>(half_width));
  const double last = ::floor(static_cast<double>(center) + static_cast<double>(half_width));
  if (first != first) return {0, valid, center, precision};
  const double bound = static_cast<double>(valid);
  const int64_t begin = first <= 0 ? 0 : first < bound ? static_cast<int64_t>(first) : valid;
  const int64_t end = last < 0 ? 0 : last < bound ? static_cast<int64_t>(last) + 1 : valid;
  return {begin, end < begin ? begin : end, center, precision};
}

template <class S>
struct AttentionRow {
  using A = Accumulate<S>;
  int64_t source, key_size, memory_size;
  View<A> view;
  const S* query;   // (A), maybe written in this launch
  const S* keys;    // (S, A)
  const S* memory;  // (S, M)
  const S* v;       // (A), additive only
  // Where past weights enter an additive score, else zero and null.
  int64_t taps;
  const S* w_history;  // (K, A)
  const A* past;       // (S), maybe written in this launch
  A* weights;          // (S), to work in, of this block
  A* scratch;          // a number for each warp
};

// Component a of the key at position s, with what the convolution of the past adds to it.
template <class S>
PYSEQ_DEVICE Accumulate<S> key_component(const AttentionRow<S>& row, int64_t s, int64_t a) {
  using A = Accumulate<S>;
  A key = widen(row.keys[s * row.key_size + a]);
  for (int64_t j = 0; j < row.taps; ++j) {
    const int64_t neighbour = s + j - row.taps / 2;
    if (neighbour < 0 || neighbour >= row.source) continue;
    key = Math<A>::multiply_add(load_shared_by_blocks(row.past + neighbour),
                                widen(row.w_history[j * row.key_size + a]), key);
  }
  return key;
}

// weights[s - begin] of what is seen: the attention weights. Ends after a sync_threads.
template <class S, class Score>
PYSEQ_DEVICE void attention_weights(const AttentionRow<S>& row) {
  using A = Accumulate<S>;
  using M = Math<A>;
  const int64_t count = row.view.count();
  const int thread = thread_index(), threads = thread_count(), lane = thread % kWarp;
  for (int64_t i = thread / kWarp; i < count; i += threads / kWarp) {
    A sum = 0;
    for (int64_t a = lane; a < row.key_size; a += kWarp) {
      const A v = Score::kAdditive ? widen(row.v[a]) : A(0);
      sum = Score::template add<M>(sum, widen(load_shared_by_blocks(row.query + a)),
                                   key_component(row, row.view.begin + i, a), v);
    }
    sum = warp_sum(sum);
    if (lane == 0) row.weights[i] = sum;
  }
  sync_threads();
  A largest = M::minus_infinity();
  for (int64_t i = thread; i < count; i += threads) {
    largest = row.weights[i] > largest ? row.weights[i] : largest;
  }
  largest = block_max(largest, row.scratch);
  sync_threads();
  A sum = 0;
  for (int64_t i = thread; i < count; i += threads) {
    const A e = M::exp_nonpositive(row.weights[i] - largest);
    row.weights[i] = e;
    sum += e;
  }
  const A scale = 1 / block_sum(sum, row.scratch);
  for (int64_t i = thread; i < count; i += threads) {
    A weight = row.weights[i] * scale;
    if (row.view.precision != 0) weight *= row.view.gaussian(row.view.begin + i);
    row.weights[i] = weight;
  }
  sync_threads();
}

// out[i] = sum_s weights[s] rows[s][i], for rows of `size` numbers.
template <class S>
PYSEQ_DEVICE void weighted_sum(const AttentionRow<S>& row, const S* rows, int64_t size, S* out) {
  using A = Accumulate<S>;
  const int64_t count = row.view.count();
  const S* const first = rows + row.view.begin * size;
  for (int64_t i = thread_index(); i < size; i += thread_count()) {
    A sum = 0;
    for (int64_t s = 0; s < count; ++s) {
      sum = Math<A>::multiply_add(row.weights[s], widen(first[s * size + i]), sum);
    }
    out[i] = narrow<S>(sum);
  }
}

// attn (S) and context (M), both written whole.
template <class S, class Score>
PYSEQ_DEVICE void attend_row(const AttentionRow<S>& row, S* attn, S* context) {
  attention_weights<S, Score>(row);
  for (int64_t s = thread_index(); s < row.source; s += thread_count()) {
    const bool seen = s >= row.view.begin && s < row.view.end;
    attn[s] = narrow<S>(seen ? row.weights[s - row.view.begin] : Accumulate<S>(0));
  }
  weighted_sum(row, row.memory, row.memory_size, context);
  sync_threads();
}

template <class S>
struct AttentionRowBackward {
  const S* attn;       // (S), of forward
  const S* d_context;  // (M), maybe written in this launch
  const S* d_attn;     // (S) or null
  S* d_scores;         // (S), written whole
  S* d_query;          // (A), written whole
  S* d_center;         // one number, or null
  // With past weights only: in of those after the step, out of those before it.
  Accumulate<S>* d_past;  // (S)
  bool cumulative;        // whether they are the sum of all steps, not the last one's
};

// What the energies of position s say of component a of the moved key, and of the query.
template <class S>
PYSEQ_DEVICE Accumulate<S> additive_gradient(const AttentionRow<S>& row, int64_t s, int64_t a,
                                             Accumulate<S> query, Accumulate<S> d_score) {
  Accumulate<S> d_v = 0;
  return AdditiveScore::backward<Math<Accumulate<S>>>(query, key_component(row, s, a),
                                                      widen(row.v[a]), d_score, d_v);
}

// Of the past: what each position gets of the keys that it moved.
template <class S>
PYSEQ_DEVICE void past_backward(const AttentionRow<S>& row, const AttentionRowBackward<S>& back) {
  using A = Accumulate<S>;
  const int lane = thread_index() % kWarp, warps = thread_count() / kWarp;
  const View<A>& view = row.view;
  for (int64_t s = thread_index() / kWarp; s < row.source; s += warps) {
    A sum = 0;
    for (int64_t j = 0; j < row.taps; ++j) {
      const int64_t moved = s - j + row.taps / 2;
      if (moved < view.begin || moved >= view.end) continue;
      const A d_score = row.weights[moved - view.begin];
      for (int64_t a = lane; a < row.key_size; a += kWarp) {
        const A query = widen(load_shared_by_blocks(row.query + a));
        sum = Math<A>::multiply_add(additive_gradient(row, moved, a, query, d_score),
                                    widen(row.w_history[j * row.key_size + a]), sum);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) back.d_past[s] = back.cumulative ? back.d_past[s] + sum : sum;
  }
}

template <class S, class Score>
PYSEQ_DEVICE void attend_row_backward(const AttentionRow<S>& row,
                                      const AttentionRowBackward<S>& back) {
  using A = Accumulate<S>;
  const View<A>& view = row.view;
  const int64_t begin = view.begin, count = view.count(), M = row.memory_size;
  const int thread = thread_index(), threads = thread_count(), lane = thread % kWarp;
  A* const d_scores = row.weights;
  for (int64_t i = thread / kWarp; i < count; i += threads / kWarp) {
    A sum = 0;
    for (int64_t m = lane; m < M; m += kWarp) {
      sum = Math<A>::multiply_add(widen(load_shared_by_blocks(back.d_context + m)),
                                  widen(row.memory[(begin + i) * M + m]), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      if (back.d_attn != nullptr) sum += widen(back.d_attn[begin + i]);
      if (row.taps > 0) sum += back.d_past[begin + i];
      d_scores[i] = sum;
    }
  }
  sync_threads();
  // A weight is a = alpha g, with alpha the softmax and g the Gaussian, which inside a window is
  // at least exp(-2): d_score = alpha (g d_a - sum(a d_a)) = a (d_a - sum(a d_a) / g).
  A sum = 0, moment = 0;
  for (int64_t i = thread; i < count; i += threads) {
    const A part = widen(back.attn[begin + i]) * d_scores[i];
    sum += part;
    moment += part * (A(begin + i) - view.center);
  }
  sum = block_sum(sum, row.scratch);
  sync_threads();
  if (back.d_center != nullptr) {
    moment = block_sum(moment, row.scratch);
    if (thread == 0) *back.d_center = narrow<S>(2 * view.precision * moment);
  }
  for (int64_t s = thread; s < row.source; s += threads) {
    A d_score = 0;
    if (s >= begin && s < view.end) {
      const A total = view.precision == 0 ? sum : sum / view.gaussian(s);
      d_score = widen(back.attn[s]) * (d_scores[s - begin] - total);
      d_scores[s - begin] = d_score;
    }
    back.d_scores[s] = narrow<S>(d_score);
  }
  sync_threads();
  if constexpr (Score::kAdditive) {
    for (int64_t a = thread; a < row.key_size; a += threads) {
      const A query = widen(load_shared_by_blocks(row.query + a));
      A d_query = 0;
      for (int64_t i = 0; i < count; ++i) {
        d_query += additive_gradient(row, begin + i, a, query, d_scores[i]);
      }
      back.d_query[a] = narrow<S>(d_query);
    }
    if (row.taps > 0) past_backward(row, back);
  } else {
    weighted_sum(row, row.keys, row.key_size, back.d_query);
  }
  sync_threads();
}

}  // namespace pyseq::cuda
