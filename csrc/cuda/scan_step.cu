// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one step of a scan whose products are made outside: for layers whose weights
// do not fit into the multiprocessors. A thread has one unit of one row. Nothing here depends on
// what the host knows only later, so that a CUDA graph can hold the whole loop.
#include "scan_norm.h"

namespace pyseq::cuda {
namespace {

constexpr int kStepThreads = kPointwiseThreads;

}  // namespace

template <class S, class Cell>
PYSEQ_KERNEL(kStepThreads)
scan_gate_forward_kernel(const ScanForward<S> args, const int64_t n, const Accumulate<S>* sums) {
  const Step step = forward_step(args, n);
  each_unit(args.batch, args.hidden, [&](Index row, Index unit) {
    gate_unit<Cell>(args, step, row, unit, sums[row * Cell::kGates * args.hidden + unit]);
  });
}

template <class S, class Cell>
PYSEQ_KERNEL(kStepThreads)
scan_step_forward_kernel(const ScanForward<S> args, const int64_t n, const Accumulate<S>* sums) {
  const Step step = forward_step(args, n);
  each_unit(args.batch, args.hidden, [&](Index row, Index unit) {
    UnitInputs<S, Cell> in = load_unit<Cell>(args, step, row, unit);
    Accumulate<S> own[Cell::kGates] = {};
    if constexpr (Cell::kRecurrent) {
      PYSEQ_UNROLL
      for (int g = 0; g < Cell::kGates; ++g) {
        own[g] = sums[(row * Cell::kGates + g) * args.hidden + unit];
      }
    }
    forward_unit<Cell>(args, step, row, unit, in, own);
  });
}

template <class S>
PYSEQ_KERNEL(kStepThreads)
scan_project_forward_kernel(const ScanForward<S> args, const int64_t n, const Accumulate<S>* sums) {
  const Step step = forward_step(args, n);
  each_unit(args.batch, args.state_size, [&](Index row, Index unit) {
    keep_state(args, step, row, unit, is_active(args, step.t, row),
               sums[row * args.state_size + unit]);
  });
}

template <class S, class Cell>
PYSEQ_KERNEL(kStepThreads)
scan_state_backward_kernel(const ScanBackward<S> args, const int64_t n, const Accumulate<S>* sums) {
  const Step step = backward_step(args, n);
  each_unit(args.batch, args.state_size, [&](Index row, Index unit) {
    const Accumulate<S> sum = sums == nullptr ? 0 : sums[row * args.state_size + unit];
    if (args.w_hr != nullptr) return project_back(args, step, row, unit, sum);
    backward_unit<Cell>(args, step, row, unit, load_saved<Cell>(args, step, row, unit), sum);
  });
}

template <class S, class Cell>
PYSEQ_KERNEL(kStepThreads)
scan_project_backward_kernel(const ScanBackward<S> args, const int64_t n,
                             const Accumulate<S>* sums) {
  const Step step = backward_step(args, n);
  each_unit(args.batch, args.hidden, [&](Index row, Index unit) {
    const Accumulate<S> sum = sums == nullptr ? 0 : sums[row * args.hidden + unit];
    projected_back<Cell>(args, step, row, unit, sum);
  });
}

template <class S, class Cell>
PYSEQ_KERNEL(kStepThreads)
scan_gate_backward_kernel(const ScanBackward<S> args, const int64_t n, const Accumulate<S>* sums) {
  const Step step = backward_step(args, n);
  each_unit(args.batch, args.hidden, [&](Index row, Index unit) {
    gate_back<Cell>(args, step, row, unit, sums[row * args.hidden + unit]);
  });
}

// The same for layers that normalise: a block has a row, whose units it sums up.

template <class S, class Cell>
PYSEQ_KERNEL(kStepThreads)
scan_norm_forward_kernel(const ScanForward<S> args, const int64_t n) {
  normed_row<Cell>(args, forward_step(args, n), block_index_x(),
                   static_cast<Accumulate<S>*>(shared_memory()));
}

template <class S, class Cell>
PYSEQ_KERNEL(kStepThreads)
scan_norm_backward_kernel(const ScanBackward<S> args, const int64_t n, const Accumulate<S>* sums) {
  using A = Accumulate<S>;
  const Step step = backward_step(args, n);
  const Index row = block_index_x();
  const auto d_state = [&](Index unit, bool active, A d_y) {
    const A sum = sums == nullptr ? A(0) : sums[row * args.state_size + unit];
    return state_back(args, step, row, unit, sum, active, d_y);
  };
  normed_row_back<Cell>(args, step, row, static_cast<A*>(shared_memory()), d_state);
}

template <class S, class Cell>
PYSEQ_KERNEL(kStepThreads)
scan_norm_project_backward_kernel(const ScanBackward<S> args, const int64_t n,
                                  const Accumulate<S>* sums) {
  using A = Accumulate<S>;
  const Step step = backward_step(args, n);
  const Index row = block_index_x();
  const auto d_inner = [&](Index unit, bool, A) {
    return StateGradient<A>{sums == nullptr ? A(0) : sums[row * args.hidden + unit], 0};
  };
  normed_row_back<Cell>(args, step, row, static_cast<A*>(shared_memory()), d_inner);
}

namespace {

template <class S>
Grid rows_of(Index batch) {
  return {static_cast<int>(batch), 1, kStepThreads, kStepThreads / kWarp * int64_t{sizeof(S)}};
}

// Calls body with the type of a cell that a projection may follow.
template <class Body>
cudaError_t with_projected_cell(CellKind cell, const Body& body) {
  return cell == CellKind::kLstm ? body(Lstm{}) : body(LstmPeephole{});
}

}  // namespace

template <class S>
cudaError_t scan_gate_forward(const ScanForward<S>& args, int64_t n, const Accumulate<S>* sums,
                              cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  return launch(scan_gate_forward_kernel<S, GruResetBefore>,
                pointwise_grid(args.batch * args.hidden), stream, args, n, sums);
}

template <class S>
cudaError_t scan_step_forward(const ScanForward<S>& args, int64_t n, const Accumulate<S>* sums,
                              cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  if (args.norm.gain_ih != nullptr) {
    return with_cell(args.cell, [&](auto cell) {
      return launch(scan_norm_forward_kernel<S, decltype(cell)>, rows_of<Accumulate<S>>(args.batch),
                    stream, args, n);
    });
  }
  return with_any_cell(args.cell, [&](auto cell) {
    return launch(scan_step_forward_kernel<S, decltype(cell)>,
                  pointwise_grid(args.batch * args.hidden), stream, args, n, sums);
  });
}

template <class S>
cudaError_t scan_project_forward(const ScanForward<S>& args, int64_t n, const Accumulate<S>* sums,
                                 cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  return launch(scan_project_forward_kernel<S>, pointwise_grid(args.batch * args.state_size),
                stream, args, n, sums);
}

template <class S>
cudaError_t scan_state_backward(const ScanBackward<S>& args, int64_t n, const Accumulate<S>* sums,
                                cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  // With a projection only what lies behind it is normalised.
  if (args.norm.gain_ih != nullptr && args.w_hr == nullptr) {
    return with_cell(args.cell, [&](auto cell) {
      return launch(scan_norm_backward_kernel<S, decltype(cell)>,
                    rows_of<Accumulate<S>>(args.batch), stream, args, n, sums);
    });
  }
  return with_any_cell(args.cell, [&](auto cell) {
    return launch(scan_state_backward_kernel<S, decltype(cell)>,
                  pointwise_grid(args.batch * args.state_size), stream, args, n, sums);
  });
}

template <class S>
cudaError_t scan_project_backward(const ScanBackward<S>& args, int64_t n, const Accumulate<S>* sums,
                                  cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  if (args.norm.gain_ih != nullptr) {
    return launch(scan_norm_project_backward_kernel<S, Lstm>, rows_of<Accumulate<S>>(args.batch),
                  stream, args, n, sums);
  }
  return with_projected_cell(args.cell, [&](auto cell) {
    return launch(scan_project_backward_kernel<S, decltype(cell)>,
                  pointwise_grid(args.batch * args.hidden), stream, args, n, sums);
  });
}

template <class S>
cudaError_t scan_gate_backward(const ScanBackward<S>& args, int64_t n, const Accumulate<S>* sums,
                               cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  return launch(scan_gate_backward_kernel<S, GruResetBefore>,
                pointwise_grid(args.batch * args.hidden), stream, args, n, sums);
}

#define PYSEQ_INSTANTIATE_FORWARD(S, name) \
  template cudaError_t name<S>(const ScanForward<S>&, int64_t, const Accumulate<S>*, cudaStream_t);
#define PYSEQ_INSTANTIATE_BACKWARD(S, name) \
  template cudaError_t name<S>(const ScanBackward<S>&, int64_t, const Accumulate<S>*, cudaStream_t);
#define PYSEQ_INSTANTIATE(S)                           \
  PYSEQ_INSTANTIATE_FORWARD(S, scan_gate_forward)      \
  PYSEQ_INSTANTIATE_FORWARD(S, scan_step_forward)      \
  PYSEQ_INSTANTIATE_FORWARD(S, scan_project_forward)   \
  PYSEQ_INSTANTIATE_BACKWARD(S, scan_state_backward)   \
  PYSEQ_INSTANTIATE_BACKWARD(S, scan_project_backward) \
  PYSEQ_INSTANTIATE_BACKWARD(S, scan_gate_backward)
PYSEQ_INSTANTIATE(float)
PYSEQ_INSTANTIATE(double)
PYSEQ_INSTANTIATE(Half)
PYSEQ_INSTANTIATE(Bfloat16)
#undef PYSEQ_INSTANTIATE
#undef PYSEQ_INSTANTIATE_BACKWARD
#undef PYSEQ_INSTANTIATE_FORWARD

}  // namespace pyseq::cuda
