// SPDX-License-Identifier: Apache-2.0
// Drawing a token from a distribution that is sharpened and cut.
#pragma once

#include "search_memory.h"

namespace pyseq::cpu::PYSEQ_TIER {

// Number `counter` of a sequence of random 64 bits: SplitMix64 (Steele et al. 2014).
inline uint64_t random_bits(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + (counter + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Uniform in [0, 1), for a draw of the batch and the step in which it draws: it depends on nothing
// else, so that rows may end when they like.
inline double uniform(uint64_t seed, int64_t draw, int64_t step) {
  const uint64_t own = random_bits(seed, static_cast<uint64_t>(draw));
  return static_cast<double>(random_bits(own, static_cast<uint64_t>(step)) >> 11) * 0x1p-53;
}

// The candidates as a heap, whose first has the largest score, of equal ones the smallest token.
template <class T>
bool comes_before(const Candidate<T>& a, const Candidate<T>& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

template <class T>
void sink(Candidate<T>* heap, int64_t count, int64_t at) {
  const Candidate<T> sunk = heap[at];
  for (int64_t child = 2 * at + 1; child < count; child = 2 * at + 1) {
    if (child + 1 < count && comes_before(heap[child + 1], heap[child])) ++child;
    if (!comes_before(heap[child], sunk)) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = sunk;
}

// Moves the likeliest of the heap behind its end, which so comes one nearer.
template <class T>
void take_first(Candidate<T>* heap, int64_t& count) {
  const Candidate<T> first = heap[0];
  heap[0] = heap[--count];
  sink(heap, count, 0);
  heap[count] = first;
}

// A token by its logit, minus infinity for those that must not be drawn: of the tokens in their
// order, or with a cut from the likeliest one on, the first up to which the probabilities add up to
// more than `draw` of their sum. -1 if there is none. `pool` has room for all tokens.
template <class T>
int32_t draw_token(const Sampling& how, const T* logits, int64_t vocab, double draw,
                   Candidate<T>* pool) {
  T peak = -__builtin_inf();
  int64_t count = 0;
  for (int64_t token = 0; token < vocab; ++token) {
    if (!(logits[token] > -__builtin_inf())) continue;
    peak = logits[token] > peak ? logits[token] : peak;
    pool[count++] = {logits[token], 0, static_cast<int32_t>(token)};
  }
  if (count == 0) return -1;
  const auto share = [&](int64_t i) {
    const double below = static_cast<double>(pool[i].score) - static_cast<double>(peak);
    return __builtin_exp(below / how.temperature);
  };
  const auto mass = [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += share(i);
    return sum;
  };
  if (how.top_k == 0 && how.top_p == 1) {
    const double threshold = draw * mass(0, count);
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      sum += share(i);
      if (sum > threshold) return pool[i].token;
    }
    return pool[count - 1].token;  // but for rounding
  }
  for (int64_t at = count / 2; at-- > 0;) sink(pool, count, at);
  // Those that may be drawn are taken from the heap, the likeliest at the end of the pool.
  int64_t left = count;
  double all = how.top_k == 0 ? mass(0, count) : 0, kept = 0;
  while (how.top_k > 0 && left > 0 && count - left < how.top_k) {
    take_first(pool, left);
    all += share(left);
  }
  int64_t last = count;  // of those up to top_p
  while (last > 0 && (last == count || kept < how.top_p * all)) {
    if (last == left) {
      if (how.top_k > 0) break;
      take_first(pool, left);
    }
    kept += share(--last);
  }
  const double threshold = draw * kept;
  double sum = 0;
  for (int64_t i = count; i-- > last;) {
    sum += share(i);
    if (sum > threshold) return pool[i].token;
  }
  return pool[last].token;  // but for rounding
}

}  // namespace pyseq::cpu::PYSEQ_TIER
