// SPDX-License-Identifier: Apache-2.0
// The output layer and its cross entropy in one: the logits of a few rows at a time are made,
// turned into their own gradient and multiplied on, so that those of all rows never exist.
#pragma once

#include "activations.h"
#include "gemm.h"
#include "kernels.h"

namespace pyseq::cpu::PYSEQ_TIER {

namespace detail {

// What is known of each row of a chunk. The gradient of its logits is
// factor * exp(logit - largest) - shift, less the target's own part.
template <class T>
struct LossRows {
  alignas(64) T largest[kMaxLossRows];  // of its logits
  alignas(64) T sum[kMaxLossRows];      // of exp(logit - largest)
  alignas(64) T total[kMaxLossRows];    // of logit - largest
  alignas(64) T factor[kMaxLossRows];
  alignas(64) T shift[kMaxLossRows];
  double loss[kMaxLossRows];
};

// The logits of a chunk lie transposed, as (V, rows): a vector holds one symbol of neighbouring
// rows, so that maximum and sum need no sum over lanes, and two of the three products read
// everything where it lies.
//
// For W vectors of rows from `row` on: the largest logit; then exp(logit - largest), which
// overwrites the logits if `keep`, and the two sums. They are taken in runs, since thousands
// of terms one after the other would cost digits.
template <class T, int W>
PYSEQ_FORCE_INLINE void exponentiate(const LinearCrossEntropy<T>& args, T* logits, int64_t stride,
                                     int count, bool keep, int64_t row, LossRows<T>& rows) {
  using V = Vec<T>;
  constexpr int64_t kRun = 64;
  const auto inside = [&](int w) { return w == W - 1 ? count : kLanes<T>; };
  const auto logit = [&](int64_t v, int w) {
    const V value = load(logits + v * stride + w * kLanes<T>, inside(w));
    return args.bias == nullptr ? value : value + args.bias[v];
  };
  V largest[W], sum[W] = {}, total[W] = {};
  for (int w = 0; w < W; ++w) largest[w] = logit(0, w);
  for (int64_t v = 1; v < args.vocab; ++v) {
    for (int w = 0; w < W; ++w) {
      const V value = logit(v, w);
      largest[w] = value > largest[w] ? value : largest[w];
    }
  }
  for (int64_t begin = 0; begin < args.vocab; begin += kRun) {
    const int64_t end = smaller(begin + kRun, args.vocab);
    V run_sum[W] = {}, run_total[W] = {};
    for (int64_t v = begin; v < end; ++v) {
      for (int w = 0; w < W; ++w) {
        const V below = logit(v, w) - largest[w];
        const V power = Math<T>::exp_nonpositive(below);
        run_total[w] += below;
        run_sum[w] += power;
        if (keep) store(logits + v * stride + w * kLanes<T>, power, inside(w));
      }
    }
    for (int w = 0; w < W; ++w) {
      sum[w] += run_sum[w];
      total[w] += run_total[w];
    }
  }
  for (int w = 0; w < W; ++w) {
    store(rows.largest + row + w * kLanes<T>, largest[w]);
    store(rows.sum + row + w * kLanes<T>, sum[w]);
    store(rows.total + row + w * kLanes<T>, total[w]);
  }
}

}  // namespace detail

template <class T>
void linear_cross_entropy(const LinearCrossEntropy<T>& args) {
  using V = Vec<T>;
  constexpr int N = kLanes<T>;
  const int64_t vocab = args.vocab, H = args.hidden_size;
  const bool differentiates =
      args.d_hidden != nullptr || args.d_weight != nullptr || args.d_bias != nullptr;
  const double smoothing = args.label_smoothing, count = static_cast<double>(args.rows);
  // A row's gradient is softmax - (1 - smoothing) [target] - smoothing / V, over the count.
  const T hit = static_cast<T>((1 - smoothing) / count);
  const T everywhere = static_cast<T>(smoothing / static_cast<double>(vocab) / count);
  detail::LossRows<T> rows;
  Barrier barrier;
  double loss = 0;

  for (int64_t begin = 0; begin < args.rows; begin += args.chunk) {
    const int64_t chunk = smaller(args.chunk, args.rows - begin), row_vectors = vectors<T>(chunk);
    const T* const hidden = args.hidden + begin * H;
    const int64_t* const target = args.target + begin;
    T* const logits = args.logits;
    gemm<T>({vocab, chunk, H, args.threads, args.weight, H, 1, hidden, 1, H, nullptr, logits, chunk,
             false});

    const int wanted = static_cast<int>(smaller(args.threads, 1 + vocab * chunk / 20000));
    parallel(wanted, [&](int thread, int present) {
      // First a thread has rows, and all symbols of them.
      const Range own = share(row_vectors, thread, present);
      const int64_t first = own.begin * N, last = smaller(own.end * N, chunk);
      T right[kMaxLossRows];
      for (int64_t row = first; row < last; ++row) {
        right[row] = logits[target[row] * chunk + row];
        if (args.bias != nullptr) right[row] += args.bias[target[row]];
      }
      int64_t i = own.begin;
      for (; i + 4 <= own.end; i += 4) {
        detail::exponentiate<T, 4>(args, logits + i * N, chunk, lanes_inside<T>(chunk, i + 3),
                                   differentiates, i * N, rows);
      }
      for (; i < own.end; ++i) {
        detail::exponentiate<T, 1>(args, logits + i * N, chunk, lanes_inside<T>(chunk, i),
                                   differentiates, i * N, rows);
      }
      for (int64_t row = first; row < own.end * N; ++row) {
        const bool exists = row < last;
        rows.factor[row] = exists ? static_cast<T>(1 / (rows.sum[row] * count)) : 0;
        rows.shift[row] = exists ? everywhere : 0;
        if (!exists) continue;
        rows.loss[row] = __builtin_log(static_cast<double>(rows.sum[row])) -
                         (1 - smoothing) * (static_cast<double>(right[row]) - rows.largest[row]);
        // Without smoothing a symbol may be forbidden by minus infinity.
        if (smoothing > 0) {
          rows.loss[row] -= smoothing / static_cast<double>(vocab) * rows.total[row];
        }
      }
      if (!differentiates) return;
      if (present > 1) barrier.wait(present);

      // Then it has symbols, and all rows of them.
      const Range symbols = share(vocab, thread, present);
      for (int64_t v = symbols.begin; v < symbols.end; ++v) {
        V sum = {};
        for (int64_t n = 0; n < row_vectors; ++n) {
          const int inside = lanes_inside<T>(chunk, n);
          T* const at = logits + v * chunk + n * N;
          const V gradient =
              load(at, inside) * load(rows.factor + n * N) - load(rows.shift + n * N);
          store(at, gradient, inside);
          sum += gradient;
        }
        if (args.d_bias != nullptr) {
          args.d_bias[v] = sum_lanes<T>(sum) + (begin > 0 ? args.d_bias[v] : T(0));
        }
      }
      for (int64_t row = 0; row < chunk; ++row) {
        const int64_t v = target[row];
        if (v < symbols.begin || v >= symbols.end) continue;
        logits[v * chunk + row] -= hit;
        if (args.d_bias != nullptr) args.d_bias[v] -= hit;
      }
    });
    for (int64_t row = 0; row < chunk; ++row) loss += rows.loss[row];
    if (args.d_hidden != nullptr) {
      gemm<T>({chunk, H, vocab, args.threads, logits, 1, chunk, args.weight, H, 1, nullptr,
               args.d_hidden + begin * H, H, false});
    }
    if (args.d_weight != nullptr) {
      gemm<T>({vocab, H, chunk, args.threads, logits, chunk, 1, hidden, H, 1, nullptr,
               args.d_weight, H, begin > 0});
    }
  }
  *args.loss = static_cast<T>(loss / count);
}

}  // namespace pyseq::cpu::PYSEQ_TIER
