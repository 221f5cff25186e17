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
  const int64_t seen = positions_seen(args.window, args.source);
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

// What one query sees of its row among windows.
template <class T>
View<T> windowed_view(const Attend<T>& args, int64_t row, int64_t t) {
  const int64_t N = args.heads;
  const bool gaussian = args.centers != nullptr;
  const int64_t step = args.step == nullptr ? t : args.step[row / N] + t;
  const T center = gaussian ? args.centers[(t * args.batch + row) / N] : T(step);
  return window_view(center, args.window, gaussian,
                     valid_positions<T>(args.lengths, row / N, args.source));
}

// What every query sees of its row without windows.
template <class T>
View<T> whole_view(const Attend<T>& args, int64_t row) {
  return {{0, valid_positions<T>(args.lengths, row / args.heads, args.source)}, T(0), T(0)};
}

// The query itself; `attn` is where its weights lie, one for each position that it sees.
template <class T>
AttentionRow<T> windowed_row(const Attend<T>& args, int64_t row, int64_t t, const View<T>& view,
                             T* attn) {
  const int64_t S = args.source, A = args.key_size, M = args.memory_size,
                query = t * args.batch + row;
  return {S,
          A,
          M,
          view,
          args.query + query * A,
          args.keys + row * S * A,
          args.memory + row * S * M,
          args.v == nullptr ? nullptr : args.v + row % args.heads * A,
          attn,
          args.context == nullptr ? nullptr : args.context + query * M,
          /*taps=*/0,
          nullptr,
          nullptr,
          nullptr};
}

template <class T>
void windows_forward(const Attend<T>& args) {
  const int64_t B = args.batch, S = args.source;
  const int threads = attend_threads(args);
  // Of weights that nobody asked for each thread has one row.
  Workspace own(args.attn == nullptr ? static_cast<size_t>(threads * S) * sizeof(T) : 0);
  with_score(args.additive, [&](auto score) {
    parallel(threads, [&](int thread, int present) {
      const Range mine = share(B * args.steps, thread, present);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t row = i / args.steps, t = i % args.steps;
        const View<T> view = windowed_view(args, row, t);
        T* const attn = args.attn == nullptr ? static_cast<T*>(own.data()) + thread * S
                                             : args.attn + (t * B + row) * S;
        attend_row<T, decltype(score)>(
            windowed_row(args, row, t, view, attn + (args.attn == nullptr ? 0 : view.seen.begin)));
        if (args.attn != nullptr) clear_unseen(view.seen, S, attn);
      }
    });
  });
}

// Vectors of components that one thread takes of a row, whose queries it goes through in order.
constexpr int64_t kComponentRun = 4;

inline int64_t component_runs(int64_t vector_count) {
  return (vector_count + kComponentRun - 1) / kComponentRun;
}
inline Range component_run(int64_t run, int64_t vector_count) {
  return {run * kComponentRun, smaller((run + 1) * kComponentRun, vector_count)};
}

// First each query has the gradients of its scores made; then what they are to keys and memory is
// added up, query by query, where a window is. No two threads add to the same number, and in which
// order depends on none.
template <class T, class Score>
void windows_backward(const AttendBackward<T>& backward) {
  const Attend<T>& args = backward.forward;
  const int64_t B = args.batch, S = args.source, A = args.key_size, M = args.memory_size,
                steps = args.steps;
  // The most that a query sees.
  int64_t seen = positions_seen(args.window, S);
  if (args.centers != nullptr) {
    seen = 0;
    for (int64_t i = 0; i < B * steps; ++i) {
      seen = larger(seen, windowed_view(args, i % B, i / B).seen.size());
    }
  }
  // Weights that forward did not keep are made once more.
  const bool again = args.attn == nullptr;
  Workspace numbers(static_cast<size_t>(B * steps * seen * (again ? 2 : 1)) * sizeof(T));
  T* const all_d_scores = static_cast<T*>(numbers.data());
  T* const all_attn = all_d_scores + B * steps * seen;
  const auto arguments = [&](int64_t row, int64_t t) -> AttentionRowBackward<T> {
    const int64_t query = t * B + row;
    const View<T> view = windowed_view(args, row, t);
    T* const attn = again ? all_attn + query * seen : args.attn + query * S + view.seen.begin;
    return {windowed_row(args, row, t, view, attn),
            backward.d_context + query * M,
            backward.d_attn == nullptr ? nullptr : backward.d_attn + query * S,
            all_d_scores + query * seen,
            backward.d_query + query * A,
            backward.d_keys + row * S * A,
            backward.d_memory + row * S * M,
            Score::kAdditive ? backward.d_v + row * A : nullptr,
            backward.d_centers == nullptr ? nullptr : backward.d_centers + query,
            nullptr,
            /*cumulative=*/false,
            nullptr};
  };
  const int threads = attend_threads(args);
  parallel(threads, [&](int thread, int present) {
    const Range mine = share(B * steps, thread, present);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const AttentionRowBackward<T> query = arguments(i / steps, i % steps);
      const AttentionRow<T>& row = query.forward;
      if (again) row_weights<T, Score>(row);
      row_scores_backward(query);
      if constexpr (!Score::kAdditive) {
        weighted_sum<T, 1>(query.d_scores, 0, row.keys + row.view.seen.begin * A,
                           row.view.seen.size(), A, {0, vectors<T>(A)}, query.d_query, 0);
      }
    }
  });
  const int64_t key_runs = component_runs(vectors<T>(A)),
                runs = key_runs + component_runs(vectors<T>(M));
  parallel(threads, [&](int thread, int present) {
    const Range mine = share(B * runs, thread, present);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t row = i / runs, run = i % runs;
      const bool of_keys = run < key_runs;
      const int64_t size = of_keys ? A : M;
      const Range components = component_run(of_keys ? run : run - key_runs, vectors<T>(size));
      const int64_t from = components.begin * kLanes<T>,
                    count = smaller(components.end * kLanes<T>, size) - from;
      T* const sums = (of_keys ? backward.d_keys : backward.d_memory) + row * S * size;
      for (int64_t s = 0; s < S; ++s) set_zero(sums + s * size + from, count);
      if (of_keys && Score::kAdditive) set_zero(backward.d_v + row * A + from, count);
      for (int64_t t = 0; t < steps; ++t) {
        const AttentionRowBackward<T> query = arguments(row, t);
        const Range& seen_here = query.forward.view.seen;
        if (!of_keys) {
          row_memory_backward(query, components);
        } else if constexpr (Score::kAdditive) {
          additive_backward(query.forward.query, query.forward.keys + seen_here.begin * A,
                            query.forward.v, query.d_scores, seen_here.size(), A, components,
                            query.d_query, sums + seen_here.begin * A, query.add_d_v);
        } else {
          detail::add_outer(query.d_scores, query.forward.query, seen_here.size(), A, components,
                            sums + seen_here.begin * A);
        }
      }
    }
  });
}

template <class T>
void queries_forward(const Attend<T>& args) {
  if (args.window > 0) return windows_forward(args);
  const int64_t B = args.batch, S = args.source, A = args.key_size, M = args.memory_size;
  const int threads = attend_threads(args);
  // Of weights that nobody asked for each thread has a block.
  const bool keeps = args.attn != nullptr;
  const int64_t attn_stride = keeps ? B * S : S;
  Workspace own(keeps ? 0 : static_cast<size_t>(threads * kQueries * S) * sizeof(T));
  with_score(args.additive, [&](auto score) {
    using Score = decltype(score);
    parallel(threads, [&](int thread, int present) {
      for_query_blocks(args, thread, present, [&]<int Q>(int64_t row, int64_t t) {
        const int64_t valid = valid_positions<T>(args.lengths, row / args.heads, S);
        T* const attn = keeps ? args.attn + (t * B + row) * S
                              : static_cast<T*>(own.data()) + thread * kQueries * S;
        const T* v = Score::kAdditive ? args.v + row % args.heads * A : nullptr;
        scores<T, Score, Q>(args.query + (t * B + row) * A, B * A, args.keys + row * S * A, valid,
                            A, v, attn, attn_stride);
        for (int q = 0; q < Q; ++q) {
          T* const weights = attn + q * attn_stride;
          softmax(weights, valid, weights);
          if (keeps) set_zero(weights + valid, S - valid);
        }
        weighted_sum<T, Q>(attn, attn_stride, args.memory + row * S * M, valid, M,
                           {0, vectors<T>(M)}, args.context + (t * B + row) * M, B * M);
      });
    });
  });
}

template <class T>
void queries_backward(const AttendBackward<T>& backward) {
  const Attend<T>& args = backward.forward;
  if (args.window > 0) {
    return with_score(args.additive,
                      [&](auto score) { windows_backward<T, decltype(score)>(backward); });
  }
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
  const int64_t runs = component_runs(vectors<T>(A));
  parallel(threads, [&](int thread, int present) {
    const Range mine = share(B * runs, thread, present);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t row = i / runs;
      const Range columns = component_run(i % runs, vectors<T>(A));
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
