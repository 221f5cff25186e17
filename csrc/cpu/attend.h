// SPDX-License-Identifier: Apache-2.0
// Attention of all queries at once. Work is dealt out as (row of the batch, block of
// queries); nothing of size (T, B, S, A) is ever stored.
#pragma once

#include "attention.h"
#include "kernels.h"
#include "steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

template <class T>
int attend_threads(const Attend<T>& args) {
  // A thread should have some 20 µs of work.
  const int64_t work = args.steps * args.batch * args.source *
                       (args.key_size * (args.additive ? 16 : 1) + args.memory_size);
  return static_cast<int>(smaller(args.threads, 1 + work / 500000));
}

// Calls body<queries in the block>(row, first query) for this thread's share of the blocks.
template <class T, class Body>
PYSEQ_FORCE_INLINE void for_query_blocks(const Attend<T>& args, int thread, int present,
                                         const Body& body) {
  const int64_t blocks = (args.steps + kQueries - 1) / kQueries;
  const Range mine = share(args.batch * blocks, thread, present);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t row = i / blocks, t = i % blocks * kQueries;
    if (t + kQueries <= args.steps) {
      body.template operator()<kQueries>(row, t);
    } else {
      for (int64_t last = t; last < args.steps; ++last) body.template operator()<1>(row, last);
    }
  }
}

template <class T>
PYSEQ_FORCE_INLINE int64_t valid_positions(const int64_t* lengths, int64_t row, int64_t source) {
  return lengths == nullptr ? source : lengths[row];
}

template <class T>
void attend_forward(const Attend<T>& args) {
  const int64_t B = args.batch, S = args.source, A = args.key_size, M = args.memory_size;
  with_score(args.additive, [&](auto score) {
    using Score = decltype(score);
    parallel(attend_threads(args), [&](int thread, int present) {
      for_query_blocks(args, thread, present, [&]<int Q>(int64_t row, int64_t t) {
        const int64_t valid = valid_positions<T>(args.lengths, row, S);
        T* attn = args.attn + (t * B + row) * S;
        scores<T, Score, Q>(args.query + (t * B + row) * A, B * A, args.keys + row * S * A, valid,
                            A, args.v, attn, B * S);
        for (int q = 0; q < Q; ++q) {
          softmax(attn + q * B * S, valid, attn + q * B * S);
          for (int64_t s = valid; s < S; ++s) attn[q * B * S + s] = 0;
        }
        weighted_sum<T, Q>(attn, B * S, args.memory + row * S * M, valid, M, {0, vectors<T>(M)},
                           args.context + (t * B + row) * M, B * M);
      });
    });
  });
}

template <class T>
void attend_backward(const AttendBackward<T>& backward) {
  const Attend<T>& args = backward.forward;
  const int64_t B = args.batch, S = args.source, A = args.key_size, M = args.memory_size;
  const int threads = attend_threads(args);
  parallel(threads, [&](int thread, int present) {
    for_query_blocks(args, thread, present, [&]<int Q>(int64_t row, int64_t t) {
      const int64_t valid = valid_positions<T>(args.lengths, row, S);
      const int64_t first = (t * B + row) * S;
      T* d_scores = backward.d_scores + first;
      scores<T, DotScore, Q>(backward.d_context + (t * B + row) * M, B * M,
                             args.memory + row * S * M, valid, M, nullptr, d_scores, B * S);
      for (int q = 0; q < Q; ++q) {
        T* d = d_scores + q * B * S;
        if (backward.d_attn != nullptr) {
          for (int64_t s = 0; s < valid; ++s) d[s] += backward.d_attn[first + q * B * S + s];
        }
        softmax_backward(args.attn + first + q * B * S, d, valid, d);
        for (int64_t s = valid; s < S; ++s) d[s] = 0;
      }
      if (!args.additive) {
        weighted_sum<T, Q>(d_scores, B * S, args.keys + row * S * A, valid, A, {0, vectors<T>(A)},
                           backward.d_query + (t * B + row) * A, B * A);
      }
    });
  });
  if (!args.additive) return;
  // The keys' gradients add up over the queries: one thread owns a row and a run of
  // components, and goes through the queries in order.
  constexpr int64_t kRun = 4;
  const int64_t runs = (vectors<T>(A) + kRun - 1) / kRun;
  parallel(threads, [&](int thread, int present) {
    const Range mine = share(B * runs, thread, present);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t row = i / runs, begin = i % runs * kRun;
      const Range columns{begin, smaller(begin + kRun, vectors<T>(A))};
      const int64_t from = columns.begin * kLanes<T>, to = smaller(columns.end * kLanes<T>, A);
      const int64_t valid = valid_positions<T>(args.lengths, row, S);
      for (int64_t a = from; a < to; ++a) backward.d_v[row * A + a] = 0;
      for (int64_t s = 0; s < S; ++s) {
        for (int64_t a = from; a < to; ++a) backward.d_keys[(row * S + s) * A + a] = 0;
      }
      for (int64_t t = 0; t < args.steps; ++t) {
        additive_backward(args.query + (t * B + row) * A, args.keys + row * S * A, args.v,
                          backward.d_scores + (t * B + row) * S, valid, A, columns,
                          backward.d_query + (t * B + row) * A, backward.d_keys + row * S * A,
                          backward.d_v + row * A);
      }
    }
  });
}

}  // namespace pyseq::cpu::PYSEQ_TIER
