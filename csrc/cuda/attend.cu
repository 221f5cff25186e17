// SPDX-License-Identifier: Apache-2.0
// Attention of all queries at once: a block for each query, and for the gradients of the keys one
// for each row and run of components, which goes through the queries in order. No atomics: the same
// bits every time.
#include "attend.h"
#include "attention.h"
#include "launch.h"

namespace pyseq::cuda {

namespace {

constexpr int kThreads = 128;
// Weights of a query that a block holds in shared memory; more lie in the workspace.
constexpr int64_t kSharedWeights = 4096;
// More blocks than this take turns.
constexpr int64_t kMostBlocks = 1 << 20;

template <class S>
int64_t query_count(const cpu::Attend<S>& args) {
  return args.steps * args.batch;
}

// With a workspace there are only so many blocks, each with a row of it.
constexpr int64_t kWorkspaceBlocks = 1024;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class S>
Grid query_grid(const cpu::Attend<S>& args) {
  const bool shared = args.source <= kSharedWeights;
  const int64_t numbers = kThreads / kWarp + (shared ? args.source : 0);
  return {static_cast<int>(smaller(query_count(args), shared ? kMostBlocks : kWorkspaceBlocks)), 1,
          kThreads, numbers * static_cast<int64_t>(sizeof(Accumulate<S>))};
}

template <class S>
PYSEQ_DEVICE AttentionRow<S> row_of_query(const cpu::Attend<S>& args, int64_t query,
                                          Accumulate<S>* workspace) {
  using A = Accumulate<S>;
  const int64_t N = args.heads, row = query % args.batch, t = query / args.batch;
  const int64_t valid = valid_positions(args.lengths, row / N, args.source);
  const bool gaussian = args.centers != nullptr;
  const int64_t before = args.step == nullptr ? 0 : args.step[row / N];
  const A center = gaussian ? widen(args.centers[query / N]) : A(t + before);
  A* const scratch = static_cast<A*>(shared_memory());
  return {
      args.source,
      args.key_size,
      args.memory_size,
      args.window > 0 ? window_view(center, args.window, gaussian, valid) : whole_view<A>(valid),
      args.query + query * args.key_size,
      args.keys + row * args.source * args.key_size,
      args.memory + row * args.source * args.memory_size,
      args.v == nullptr ? nullptr : args.v + row % N * args.key_size,
      0,
      nullptr,
      nullptr,
      workspace == nullptr ? scratch + thread_count() / kWarp
                           : workspace + block_index_x() * args.source,
      scratch};
}

// ---- Kernels ---------------------------------------------------------------------------

template <class S, class Score>
PYSEQ_KERNEL(kThreads)
attend_forward_kernel(cpu::Attend<S> args, Accumulate<S>* workspace) {
  const int64_t count = args.steps * args.batch;
  for (int64_t query = block_index_x(); query < count; query += grid_size_x()) {
    attend_row<S, Score>(row_of_query(args, query, workspace), args.attn + query * args.source,
                         args.context + query * args.memory_size);
  }
}

template <class S, class Score>
PYSEQ_KERNEL(kThreads)
attend_backward_kernel(cpu::AttendBackward<S> args, Accumulate<S>* workspace) {
  const cpu::Attend<S>& forward = args.forward;
  const int64_t count = forward.steps * forward.batch, S_ = forward.source;
  for (int64_t query = block_index_x(); query < count; query += grid_size_x()) {
    const AttentionRowBackward<S> back{forward.attn + query * S_,
                                       args.d_context + query * forward.memory_size,
                                       args.d_attn == nullptr ? nullptr : args.d_attn + query * S_,
                                       args.d_scores + query * S_,
                                       args.d_query + query * forward.key_size,
                                       args.d_centers == nullptr ? nullptr : args.d_centers + query,
                                       nullptr,
                                       false};
    attend_row_backward<S, Score>(row_of_query(forward, query, workspace), back);
  }
}

// A block takes 32 components of a row, a lane each; its warps share out the positions. Block y
// counts runs of components.
template <class S, class Score>
PYSEQ_KERNEL(kThreads)
key_gradients_kernel(KeyGradients<S> args) {
  using A = Accumulate<S>;
  const cpu::Attend<S>& forward = args.forward;
  const int64_t B = forward.batch, S_ = forward.source, size = forward.key_size;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp,
            warps = thread_count() / kWarp;
  const int64_t row = block_index_x(), a = int64_t{block_index_y()} * kWarp + lane,
                head = row % forward.heads;
  const bool inside = a < size;
  AttentionRow<S> of_row{};
  of_row.source = S_;
  of_row.key_size = size;
  of_row.keys = forward.keys + row * S_ * size;
  of_row.v = Score::kAdditive ? forward.v + head * size : nullptr;
  of_row.taps = args.taps;
  of_row.w_history = args.taps > 0 ? args.w_history + head * args.taps * size : nullptr;
  A d_v = 0;
  for (int64_t s = warp; s < S_; s += warps) {
    A d_key = 0;
    for (int64_t t = 0; t < forward.steps; ++t) {
      const int64_t query = t * B + row;
      const A d_score = widen(args.d_scores[query * S_ + s]);
      // What no query sees must not be looked at: zero times what it holds may be NaN.
      if (d_score == 0 || !inside) continue;
      const A q = widen(forward.query[query * size + a]);
      if constexpr (Score::kAdditive) {
        if (args.taps > 0) of_row.past = args.past + query * S_;
        d_key += AdditiveScore::backward<Math<A>>(q, key_component(of_row, s, a),
                                                  widen(of_row.v[a]), d_score, d_v);
      } else {
        d_key = Math<A>::multiply_add(d_score, q, d_key);
      }
    }
    if (inside && args.d_keys != nullptr) {
      args.d_keys[(row * S_ + s) * size + a] = narrow<S>(d_key);
    }
  }
  if constexpr (Score::kAdditive) {
    A* const sums = static_cast<A*>(shared_memory());
    sums[warp * kWarp + lane] = d_v;
    sync_threads();
    if (warp == 0 && inside && args.d_v != nullptr) {
      A sum = 0;
      for (int w = 0; w < warps; ++w) sum += sums[w * kWarp + lane];
      args.d_v[row * size + a] = narrow<S>(sum);
    }
  }
}

template <class S>
PYSEQ_KERNEL(kThreads)
memory_gradients_kernel(KeyGradients<S> args) {
  using A = Accumulate<S>;
  const cpu::Attend<S>& forward = args.forward;
  const int64_t B = forward.batch, S_ = forward.source, size = forward.memory_size;
  const int lane = thread_index() % kWarp, warps = thread_count() / kWarp;
  const int64_t row = block_index_x(), m = int64_t{block_index_y()} * kWarp + lane;
  if (m >= size) return;
  for (int64_t s = thread_index() / kWarp; s < S_; s += warps) {
    A d_memory = 0;
    for (int64_t t = 0; t < forward.steps; ++t) {
      const int64_t query = t * B + row;
      const A weight = widen(forward.attn[query * S_ + s]);
      if (weight == 0) continue;
      d_memory = Math<A>::multiply_add(weight, widen(args.d_context[query * size + m]), d_memory);
    }
    args.d_memory[(row * S_ + s) * size + m] = narrow<S>(d_memory);
  }
}

// Block y counts runs of components, block x taps of rows.
template <class S>
PYSEQ_KERNEL(kThreads)
history_gradients_kernel(KeyGradients<S> args) {
  using A = Accumulate<S>;
  const cpu::Attend<S>& forward = args.forward;
  const int64_t B = forward.batch, S_ = forward.source, size = forward.key_size, K = args.taps;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp,
            warps = thread_count() / kWarp;
  const int64_t row = block_index_x() / K, j = block_index_x() % K, head = row % forward.heads,
                a = int64_t{block_index_y()} * kWarp + lane;
  const bool inside = a < size;
  AttentionRow<S> of_row{};
  of_row.source = S_;
  of_row.key_size = size;
  of_row.keys = forward.keys + row * S_ * size;
  of_row.v = forward.v + head * size;
  of_row.taps = K;
  of_row.w_history = args.w_history + head * K * size;
  A sum = 0;
  for (int64_t s = warp; s < S_; s += warps) {
    const int64_t neighbour = s + j - K / 2;
    if (neighbour < 0 || neighbour >= S_) continue;
    for (int64_t t = 0; t < forward.steps; ++t) {
      const int64_t query = t * B + row;
      const A d_score = widen(args.d_scores[query * S_ + s]);
      if (d_score == 0 || !inside) continue;
      of_row.past = args.past + query * S_;
      sum = Math<A>::multiply_add(
          additive_gradient(of_row, s, a, widen(forward.query[query * size + a]), d_score),
          of_row.past[neighbour], sum);
    }
  }
  A* const sums = static_cast<A*>(shared_memory());
  sums[warp * kWarp + lane] = sum;
  sync_threads();
  if (warp == 0 && inside) {
    sum = 0;
    for (int w = 0; w < warps; ++w) sum += sums[w * kWarp + lane];
    args.d_w_history[(row * K + j) * size + a] = narrow<S>(sum);
  }
}

}  // namespace

// ---- Launchers -------------------------------------------------------------------------

template <class S>
int64_t attend_workspace(const cpu::Attend<S>& args) {
  if (args.source <= kSharedWeights) return 0;
  return smaller(query_count(args), kWorkspaceBlocks) * args.source *
         static_cast<int64_t>(sizeof(Accumulate<S>));
}

template <class S>
cudaError_t attend_forward(const cpu::Attend<S>& args, void* workspace, cudaStream_t stream) {
  if (query_count(args) == 0) return cudaSuccess;
  const auto kernel = args.additive ? &attend_forward_kernel<S, AdditiveScore>
                                    : &attend_forward_kernel<S, DotScore>;
  return launch(kernel, query_grid(args), stream, args, static_cast<Accumulate<S>*>(workspace));
}

template <class S>
cudaError_t key_gradients(const KeyGradients<S>& args, cudaStream_t stream) {
  const cpu::Attend<S>& forward = args.forward;
  const int64_t rows = forward.batch;
  const auto runs = [](int64_t size) { return static_cast<int>((size + kWarp - 1) / kWarp); };
  Grid grid{static_cast<int>(rows), runs(forward.key_size), kThreads,
            kThreads * static_cast<int64_t>(sizeof(Accumulate<S>))};
  if (rows == 0) return cudaSuccess;
  if (grid.y > 0 && (args.d_keys != nullptr || args.d_v != nullptr)) {
    const auto kernel = forward.additive ? &key_gradients_kernel<S, AdditiveScore>
                                         : &key_gradients_kernel<S, DotScore>;
    if (const cudaError_t error = launch(kernel, grid, stream, args); error != cudaSuccess) {
      return error;
    }
  }
  if (grid.y > 0 && args.taps > 0) {
    Grid taps = grid;
    taps.x = static_cast<int>(rows * args.taps);
    if (const cudaError_t error = launch(&history_gradients_kernel<S>, taps, stream, args);
        error != cudaSuccess) {
      return error;
    }
  }
  grid.y = runs(forward.memory_size);
  if (grid.y == 0 || args.d_memory == nullptr) return cudaSuccess;
  return launch(&memory_gradients_kernel<S>, grid, stream, args);
}

template <class S>
cudaError_t attend_backward(const cpu::AttendBackward<S>& args, void* workspace,
                            cudaStream_t stream) {
  const cpu::Attend<S>& forward = args.forward;
  if (query_count(forward) > 0) {
    const auto kernel = forward.additive ? &attend_backward_kernel<S, AdditiveScore>
                                         : &attend_backward_kernel<S, DotScore>;
    if (const cudaError_t error = launch(kernel, query_grid(forward), stream, args,
                                         static_cast<Accumulate<S>*>(workspace));
        error != cudaSuccess) {
      return error;
    }
  }
  // Of a dot without a window one product outside makes these.
  if (!forward.additive && forward.window == 0) return cudaSuccess;
  return key_gradients<S>({forward, args.d_scores, args.d_context, 0, nullptr, nullptr, args.d_keys,
                           args.d_v, forward.window > 0 ? args.d_memory : nullptr, nullptr},
                          stream);
}

#define PYSEQ_INSTANTIATE(S)                                                                   \
  template int64_t attend_workspace<S>(const cpu::Attend<S>&);                                 \
  template cudaError_t attend_forward<S>(const cpu::Attend<S>&, void*, cudaStream_t);          \
  template cudaError_t attend_backward<S>(const cpu::AttendBackward<S>&, void*, cudaStream_t); \
  template cudaError_t key_gradients<S>(const KeyGradients<S>&, cudaStream_t);
PYSEQ_INSTANTIATE(float)
PYSEQ_INSTANTIATE(double)
PYSEQ_INSTANTIATE(Half)
PYSEQ_INSTANTIATE(Bfloat16)
#undef PYSEQ_INSTANTIATE

}  // namespace pyseq::cuda
