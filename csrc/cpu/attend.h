// SPDX-License-Identifier: Apache-2.0
// Attention of all queries at once. Work is dealt out as (row of the batch, block of
// queries), or with windows as (row, query); nothing of size (T, B, S, A) is ever stored.
#pragma once

#include "attention_row.h"
#include "kernels.h"

namespace pyseq::cpu::PYSEQ_TIER {

template <class T>
int attend_threads(const Attend<T>& args) {
  // A thread should have some 20 µs of work.
  const int64_t seen = args.window > 0 ? smaller(args.source, 2 * args.window + 1) : args.source;
  const int64_t work = args.steps * args.batch * seen *
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

// The query of one row and step among windows.
template <class T>
AttentionRow<T> windowed_row(const Attend<T>& args, int64_t row, int64_t t) {
  const int64_t B = args.batch, N = args.heads, S = args.source, A = args.key_size,
                M = args.memory_size, query = t * B + row;
  const bool gaussian = args.centers != nullptr;
  const int64_t step = args.step == nullptr ? t : args.step[row / N] + t;
  const T center = gaussian ? args.centers[query / N] : T(step);
  return {S,
          A,
          M,
          window_view(center, args.window, gaussian, valid_positions<T>(args.lengths, row / N, S)),
          args.query + query * A,
          args.keys + row * S * A,
          args.memory + row * S * M,
          args.v == nullptr ? nullptr : args.v + row % N * A,
          args.attn + query * S,
          args.context == nullptr ? nullptr : args.context + query * M,
          /*taps=*/0,
          nullptr,
          nullptr,
          nullptr};
}

template <class T>
void windows_forward(const Attend<T>& args) {
  with_score(args.additive, [&](auto score) {
    parallel(attend_threads(args), [&](int thread, int present) {
      const Range mine = share(args.batch * args.steps, thread, present);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        attend_row<T, decltype(score)>(windowed_row(args, i / args.steps, i % args.steps));
      }
    });
  });
}

// Keys and memory get their gradients here, and only where a window is: one thread owns a row.
template <class T>
void windows_backward(const AttendBackward<T>& backward) {
  const Attend<T>& args = backward.forward;
  const int64_t B = args.batch, S = args.source, A = args.key_size, M = args.memory_size;
  with_score(args.additive, [&](auto score) {
    parallel(attend_threads(args), [&](int thread, int present) {
      const Range mine = share(B, thread, present);
      for (int64_t row = mine.begin; row < mine.end; ++row) {
        T* const d_keys = backward.d_keys + row * S * A;
        T* const d_memory = backward.d_memory + row * S * M;
        T* const d_v = backward.d_v == nullptr ? nullptr : backward.d_v + row * A;
        set_zero(d_keys, S * A);
        set_zero(d_memory, S * M);
        if (d_v != nullptr) set_zero(d_v, A);
        for (int64_t t = 0; t < args.steps; ++t) {
          const int64_t query = t * B + row;
          attend_row_backward<T, decltype(score)>(
              {windowed_row(args, row, t), backward.d_context + query * M,
               backward.d_attn == nullptr ? nullptr : backward.d_attn + query * S,
               backward.d_scores + query * S, backward.d_query + query * A, d_keys, d_memory, d_v,
               backward.d_centers == nullptr ? nullptr : backward.d_centers + query, nullptr,
               /*cumulative=*/false, nullptr});
        }
      }
    });
  });
}

template <class T>
void attend_forward(const Attend<T>& args) {
  if (args.window > 0) return windows_forward(args);
  const int64_t B = args.batch, S = args.source, A = args.key_size, M = args.memory_size;
  with_score(args.additive, [&](auto score) {
    using Score = decltype(score);
    parallel(attend_threads(args), [&](int thread, int present) {
      for_query_blocks(args, thread, present, [&]<int Q>(int64_t row, int64_t t) {
        const int64_t valid = valid_positions<T>(args.lengths, row / args.heads, S);
        T* attn = args.attn + (t * B + row) * S;
        const T* v = Score::kAdditive ? args.v + row % args.heads * A : nullptr;
        scores<T, Score, Q>(args.query + (t * B + row) * A, B * A, args.keys + row * S * A, valid,
                            A, v, attn, B * S);
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
  if (args.window > 0) return windows_backward(backward);
  const int64_t B = args.batch, S = args.source, A = args.key_size, M = args.memory_size;
  const int threads = attend_threads(args);
  parallel(threads, [&](int thread, int present) {
    for_query_blocks(args, thread, present, [&]<int Q>(int64_t row, int64_t t) {
      const int64_t valid = valid_positions<T>(args.lengths, row / args.heads, S);
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
      const int64_t valid = valid_positions<T>(args.lengths, row / args.heads, S);
      for (int64_t a = from; a < to; ++a) backward.d_v[row * A + a] = 0;
      for (int64_t s = 0; s < S; ++s) {
        for (int64_t a = from; a < to; ++a) backward.d_keys[(row * S + s) * A + a] = 0;
      }
      for (int64_t t = 0; t < args.steps; ++t) {
        additive_backward(args.query + (t * B + row) * A, args.keys + row * S * A,
                          args.v + row % args.heads * A, backward.d_scores + (t * B + row) * S,
                          valid, A, columns, backward.d_query + (t * B + row) * A,
                          backward.d_keys + row * S * A, backward.d_v + row * A);
      }
    }
  });
}

}  // namespace pyseq::cpu::PYSEQ_TIER
