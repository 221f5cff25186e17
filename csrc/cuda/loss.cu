// SPDX-License-Identifier: Apache-2.0
// The cross entropy of rows of logits, and their gradient in their place: a block for each row,
// which reads it three times, from the cache where it fits.
#include "launch.h"
#include "loss.h"

namespace pyseq::cuda {

namespace {

constexpr int kThreads = 256;
// More blocks than this take turns.
constexpr int64_t kMostBlocks = 1 << 20;
// Largest logit, sum of the powers, sum of the differences.
constexpr int kReductions = 3;

template <class S>
PYSEQ_KERNEL(kThreads)
loss_rows_kernel(LossRows<S> args) {
  const int64_t V = args.vocab, first = thread_index(), stride = thread_count();
  const int warps = thread_count() / kWarp;
  S* const scratch = static_cast<S*>(shared_memory());
  const double smoothing = args.label_smoothing;
  const S spread = static_cast<S>(smoothing / static_cast<double>(V));
  const S hit = static_cast<S>(1 - smoothing);
  for (int64_t row = block_index_x(); row < args.rows; row += grid_size_x()) {
    const int64_t target = args.target[row];
    S* const logits = args.logits + row * V;
    if (target == args.ignore_index) {
      if (first == 0) args.losses[row] = 0;
      for (int64_t v = first; args.differentiates && v < V; v += stride) logits[v] = 0;
      continue;
    }
    S largest = Math<S>::minus_infinity();
    for (int64_t v = first; v < V; v += stride) {
      largest = logits[v] > largest ? logits[v] : largest;
    }
    largest = block_max(largest, scratch);
    // Before others write the gradient, which they do only after they met here.
    const S own = target >= 0 && target < V ? logits[target] - largest : S(NAN);
    S sum = 0, total = 0;
    for (int64_t v = first; v < V; v += stride) {
      const S below = logits[v] - largest;
      sum += Math<S>::exp_nonpositive(below);
      total += below;
    }
    sum = block_sum(sum, scratch + warps);
    total = block_sum(total, scratch + 2 * warps);
    const S log_sum = ::log(sum);
    if (first == 0) {
      // A logit may be minus infinity: without smoothing that is nobody's loss.
      args.losses[row] = hit * (log_sum - own) +
                         (spread > 0 ? spread * (static_cast<S>(V) * log_sum - total) : S(0));
    }
    if (args.differentiates) {
      const S over = 1 / static_cast<S>(*args.count);
      const S scale = own == own ? over / sum : own;
      for (int64_t v = first; v < V; v += stride) {
        const S power = Math<S>::exp_nonpositive(logits[v] - largest);
        logits[v] = power * scale - (v == target ? hit + spread : spread) * over;
      }
    }
    // Before the next row's numbers come into the shared memory.
    sync_threads();
  }
}

}  // namespace

template <class S>
cudaError_t loss_rows(const LossRows<S>& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  const int64_t blocks = args.rows < kMostBlocks ? args.rows : kMostBlocks;
  const Grid grid{static_cast<int>(blocks), 1, kThreads,
                  kReductions * (kThreads / kWarp) * static_cast<int64_t>(sizeof(S))};
  return launch(&loss_rows_kernel<S>, grid, stream, args);
}

template cudaError_t loss_rows<float>(const LossRows<float>&, cudaStream_t);
template cudaError_t loss_rows<double>(const LossRows<double>&, cudaStream_t);

}  // namespace pyseq::cuda
