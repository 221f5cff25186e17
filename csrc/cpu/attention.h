// SPDX-License-Identifier: Apache-2.0
// Pieces of attention for one row of the batch: scores of a few queries against a run of
// keys, softmax and its derivative, weighted sums. attend.h and decode_step.h put them together.
#pragma once

#include "../scores.h"
#include "activations.h"
#include "threads.h"

namespace pyseq::cpu::PYSEQ_TIER {

// How many queries share one pass over the keys or the memory.
constexpr int kQueries = 4;

namespace detail {

// Scores of K keys, of which `inside` are there; those past them are the last one again. Not
// inlined: the compiler may fuse the multiply-adds of a tanh in one copy as it does not in another,
// and which block a key is in depends on the number of threads.
template <class T, class Score, int Q, int K>
[[gnu::noinline, gnu::noclone]] void score_block(const T* query, int64_t query_stride,
                                                 const T* keys, int inside, int64_t size,
                                                 const T* v, T* out, int64_t out_stride) {
  using V = Vec<T>;
  const T* key_rows[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) key_rows[k] = keys + smaller(k, inside - 1) * size;
  V sum[Q][K] = {};
  const auto add = [&](int64_t i, int count) __attribute__((always_inline)) {
    V scale = {};
    if constexpr (Score::kAdditive) scale = load(v + i, count);
    V value[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) value[q] = load(query + q * query_stride + i, count);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      const V key = load(key_rows[k] + i, count);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        sum[q][k] = Score::template add<Math<T>>(sum[q][k], value[q], key, scale);
      }
    }
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>) add(i, kLanes<T>);
  if (i < size) add(i, static_cast<int>(size - i));
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) store(out + q * out_stride, sum_each<T, K>(sum[q]), inside);
}

template <class T, int Q, int W>
PYSEQ_FORCE_INLINE void weighted_block(const T* weights, int64_t weight_stride, const T* rows,
                                       int64_t row_count, int64_t size, int count, T* out,
                                       int64_t out_stride) {
  using V = Vec<T>;
  V sum[Q][W] = {};
  for (int64_t s = 0; s < row_count; ++s) {
    V value[W];
    for (int w = 0; w < W; ++w) {
      value[w] = load(rows + s * size + w * kLanes<T>, w == W - 1 ? count : kLanes<T>);
    }
    for (int q = 0; q < Q; ++q) {
      const V weight = broadcast(weights[q * weight_stride + s]);
      for (int w = 0; w < W; ++w) sum[q][w] += weight * value[w];
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int w = 0; w < W; ++w) {
      store(out + q * out_stride + w * kLanes<T>, sum[q][w], w == W - 1 ? count : kLanes<T>);
    }
  }
}

}  // namespace detail

// out[q][s] = score(query q, key s) for `key_count` keys that lie one after the other.
template <class T, class Score, int Q>
void scores(const T* query, int64_t query_stride, const T* keys, int64_t key_count, int64_t size,
            const T* v, T* out, int64_t out_stride) {
  // As many keys at a time as there are registers for, and lanes for their scores; a tanh needs
  // most of the registers.
  constexpr int kFew = smaller(kLanes<T>, 4);
  constexpr int K = Q > 1 || Score::kAdditive ? kFew : smaller(kLanes<T>, kAccumulators);
  int64_t s = 0;
  const auto block = [&]<int Keys>() {
    const int inside = static_cast<int>(smaller(Keys, key_count - s));
    detail::score_block<T, Score, Q, Keys>(query, query_stride, keys + s * size, inside, size, v,
                                           out + s, out_stride);
    s += Keys;
  };
  while (key_count - s > K / 2) block.template operator()<K>();
  while (s < key_count) block.template operator()<kFew>();
}

// out[q] = sum_s weights[q][s] * rows[s], for the vectors [begin, end) of a row.
template <class T, int Q>
void weighted_sum(const T* weights, int64_t weight_stride, const T* rows, int64_t row_count,
                  int64_t size, Range vectors_, T* out, int64_t out_stride) {
  constexpr int W = 4;
  int64_t i = vectors_.begin;
  const int64_t whole = smaller(vectors_.end, size / kLanes<T>);
  for (; i + W <= whole; i += W) {
    detail::weighted_block<T, Q, W>(weights, weight_stride, rows + i * kLanes<T>, row_count, size,
                                    kLanes<T>, out + i * kLanes<T>, out_stride);
  }
  for (; i < vectors_.end; ++i) {
    detail::weighted_block<T, Q, 1>(weights, weight_stride, rows + i * kLanes<T>, row_count, size,
                                    lanes_inside<T>(size, i), out + i * kLanes<T>, out_stride);
  }
}

// attn = softmax of `count` scores, which may be the same memory. NaN in, NaN out.
template <class T>
[[gnu::noinline, gnu::noclone]] void softmax(const T* scores, int64_t count, T* attn) {
  using V = Vec<T>;
  constexpr int N = kLanes<T>;
  // The first vectors stay here: what was stored in part is not there again for a while.
  constexpr int64_t kHere = 8;
  if (count == 0) return;
  V here[kHere];
  const int64_t all = vectors<T>(count);
  V above = broadcast(scores[0]);
  for (int64_t i = 0; i < all; ++i) {
    const int inside = lanes_inside<T>(count, i);
    const V some = load(scores + i * N, inside);
    if (i < kHere) here[i] = some;
    above = (some > above) & lanes_below<T>(inside) ? some : above;
  }
  const T largest = max_lanes<T>(above);
  V sum = {};
  for (int64_t i = 0; i < all; ++i) {
    const int inside = lanes_inside<T>(count, i);
    const V some = i < kHere ? here[i] : load(scores + i * N, inside);
    const V e = Math<T>::exp_nonpositive(some - largest);
    if (i < kHere) {
      here[i] = e;
    } else {
      store(attn + i * N, e, inside);
    }
    sum += lanes_below<T>(inside) ? e : V{};
  }
  const T scale = 1 / sum_lanes<T>(sum);
  for (int64_t i = 0; i < all; ++i) {
    const int inside = lanes_inside<T>(count, i);
    const V e = i < kHere ? here[i] : load(attn + i * N, inside);
    store(attn + i * N, e * scale, inside);
  }
}

// d_scores = attn * (d_attn - sum(attn * d_attn)), over d_attn or elsewhere.
template <class T>
[[gnu::noinline, gnu::noclone]] void softmax_backward(const T* attn, const T* d_attn, int64_t count,
                                                      T* d_scores) {
  T sum = 0;
  for (int64_t s = 0; s < count; ++s) sum += attn[s] * d_attn[s];
  for (int64_t s = 0; s < count; ++s) d_scores[s] = attn[s] * (d_attn[s] - sum);
}

// The additive score's gradients for one query and the vectors [begin, end) of its
// components: d_query is written, d_keys and d_v are added to.
template <class T>
[[gnu::noinline, gnu::noclone]] void additive_backward(const T* query, const T* keys, const T* v,
                                                       const T* d_scores, int64_t key_count,
                                                       int64_t size, Range vectors_, T* d_query,
                                                       T* d_keys, T* d_v) {
  using V = Vec<T>;
  for (int64_t i = vectors_.begin; i < vectors_.end; ++i) {
    const int64_t offset = i * kLanes<T>;
    const int count = lanes_inside<T>(size, i);
    const V q = load(query + offset, count);
    const V scale = load(v + offset, count);
    V d_q = {};
    V d_scale = load(d_v + offset, count);
    for (int64_t s = 0; s < key_count; ++s) {
      T* d_key = d_keys + s * size + offset;
      const V d_sum = AdditiveScore::backward<Math<T>>(q, load(keys + s * size + offset, count),
                                                       scale, broadcast(d_scores[s]), d_scale);
      d_q += d_sum;
      store(d_key, load(d_key, count) + d_sum, count);
    }
    store(d_query + offset, d_q, count);
    store(d_v + offset, d_scale, count);
  }
}

// Calls body with the score's type.
template <class Body>
void with_score(bool additive, const Body& body) {
  if (additive) {
    body(AdditiveScore{});
  } else {
    body(DotScore{});
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
