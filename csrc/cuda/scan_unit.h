// SPDX-License-Identifier: Apache-2.0
// What one thread does in a step for one unit of one row, forward and backward, once the products
// are made: the same in a persistent launch and in the launch of one step. Two calls that follow
// one another for the same unit are made by the same thread, or by launches in the same order.
#pragma once

#include "launch.h"
#include "scan.h"
#include "tile.h"

namespace pyseq::cuda {

// Sizes are multiplied in 64 bits: a buffer may hold more than 2^31 numbers.
using Index = int64_t;

// The n-th step processed: its time, and the slots of the states before and after it. As
// slot_before and slot_after on the CPU.
struct Step {
  Index n, t, before, after;
};

template <class Args>
PYSEQ_DEVICE Step forward_step(const Args& args, Index n) {
  const Index T = args.steps;
  const Index t = args.reverse ? T - 1 - n : n;
  if (!args.save) return {n, t, n & 1, (n + 1) & 1};
  return {n, t, args.reverse ? T - n : n, args.reverse ? T - n - 1 : n + 1};
}

template <class Args>
PYSEQ_DEVICE bool is_active(const Args& args, Index t, Index row) {
  return args.lengths == nullptr || t < args.lengths[row];
}

// Whether the row's state is cleared before the n-th step; there is no step T.
template <class Args>
PYSEQ_DEVICE bool is_cleared(const Args& args, Index n, Index row) {
  if (args.resets == nullptr || n >= args.steps) return false;
  const Index t = args.reverse ? args.steps - 1 - n : n;
  return args.resets[t * args.batch + row] && is_active(args, t, row);
}

// Zoneout: the share of the old value in the new one. In this form a share of 0 or 1 gives one of
// them exactly.
template <class A>
PYSEQ_DEVICE A zone_out(A old_share, A old_value, A new_value) {
  return old_share * old_value + (1 - old_share) * new_value;
}

template <class T>
PYSEQ_DEVICE const T* at(const Strided<T>& numbers, Index t, Index row) {
  return numbers.data + t * numbers.step + row * numbers.row;
}

// ---- Forward ---------------------------------------------------------------------------

// What a unit of a row starts a step from. None of it comes from another unit, so that it can be
// read before the others have arrived.
template <class S, class Cell>
struct UnitInputs {
  using A = Accumulate<S>;
  bool active;
  A x[Cell::kPre];  // the input's part of the sums; of one that stays apart its bias
  A own[at_least_one(Cell::kUnitWeights)];
  A h;
  A c[at_least_one(Cell::kStates)];
};

template <class Cell, class S>
PYSEQ_DEVICE UnitInputs<S, Cell> load_unit(const ScanForward<S>& args, const Step& step, Index row,
                                           Index unit) {
  constexpr int G = Cell::kGates, K = Cell::kStates;
  const Index B = args.batch, H = args.hidden;
  UnitInputs<S, Cell> in{};
  in.active = is_active(args, step.t, row);
  PYSEQ_UNROLL
  for (int k = 0; k < K; ++k) {
    in.c[k] = args.cells[((step.before * B + row) * K + k) * H + unit];
  }
  if (!in.active) return in;
  PYSEQ_UNROLL
  for (int g = 0; g < G; ++g) in.x[g] = widen(args.gates[((step.t * B + row) * G + g) * H + unit]);
  if (Cell::kPre > G && args.apart_bias != nullptr) {
    in.x[Cell::kPre - 1] = widen(args.apart_bias[unit]);
  }
  PYSEQ_UNROLL
  for (int i = 0; i < Cell::kUnitWeights; ++i) {
    in.own[i] = widen(args.unit_weights[row * args.unit_weights_stride + i * H + unit]);
  }
  // With a projection no cell that reads h comes here, only LSTM.
  if (args.w_hr == nullptr) in.h = widen(args.states[(step.before * B + row) * H + unit]);
  return in;
}

// Stores the state after the step; the output is zero where the row is not active. `unit` counts
// the numbers of the state.
template <class S>
PYSEQ_DEVICE void keep_state(const ScanForward<S>& args, const Step& step, Index row, Index unit,
                             bool active, Accumulate<S> h) {
  using A = Accumulate<S>;
  const Index B = args.batch, P = args.state_size, offset = row * P + unit;
  S after = narrow<S>(h);
  if (!active || args.zoneout_h.data != nullptr) {
    after = args.states[step.before * B * P + offset];
    if (active) {
      after = narrow<S>(zone_out(widen(at(args.zoneout_h, step.t, row)[unit]), widen(after), h));
    }
  }
  args.y[step.t * B * P + offset] = active ? after : narrow<S>(A(0));
  if (is_cleared(args, step.n + 1, row)) {
    after = args.reset_h.data != nullptr ? at(args.reset_h, 0, row)[unit] : narrow<S>(A(0));
  }
  args.states[step.after * B * P + offset] = after;
  if (args.h_mask != nullptr) {
    args.masked[((step.n + 1) & 1) * B * P + offset] =
        narrow<S>(widen(after) * widen(args.h_mask[offset]));
  }
}

// Stores what goes on beside h; `before` and `c`: before the step and as the cell gave it.
template <int K, class S>
PYSEQ_DEVICE void keep_cell(const ScanForward<S>& args, const Step& step, Index row, Index unit,
                            bool active, const Accumulate<S>* before, Accumulate<S>* c) {
  using A = Accumulate<S>;
  const Index B = args.batch, H = args.hidden;
  if (active && args.zoneout_c.data != nullptr) {
    c[0] = zone_out(widen(at(args.zoneout_c, step.t, row)[unit]), before[0], c[0]);
  }
  const bool cleared = is_cleared(args, step.n + 1, row);
  PYSEQ_UNROLL
  for (int k = 0; k < K; ++k) {
    if (args.c_steps != nullptr) {
      args.c_steps[((step.t * B + row) * K + k) * H + unit] = active ? c[k] : A(0);
    }
    A after = active ? c[k] : before[k];
    if (cleared) after = args.reset_c.data != nullptr ? at(args.reset_c, 0, row)[k * H + unit] : 0;
    args.cells[((step.after * B + row) * K + k) * H + unit] = after;
  }
}

// h of the cell: to the projection, or the state itself.
template <class S>
PYSEQ_DEVICE void keep_inner(const ScanForward<S>& args, const Step& step, Index row, Index unit,
                             bool active, Accumulate<S> h) {
  if (args.w_hr == nullptr) return keep_state(args, step, row, unit, active, h);
  const Index t = args.save ? step.t : 0;
  args.inner[(t * args.batch + row) * args.hidden + unit] = narrow<S>(active ? h : 0);
}

// What the last gate's weights multiply, of a cell that gates its state; `sum` is the first gate's.
template <class Cell, class S>
PYSEQ_DEVICE void gate_unit(const ScanForward<S>& args, const Step& step, Index row, Index unit,
                            Accumulate<S> sum) {
  using A = Accumulate<S>;
  const Index B = args.batch, H = args.hidden;
  A gated = 0;
  if (is_active(args, step.t, row)) {
    gated = Cell::template gated<Math<A>>(
        widen(args.gates[(step.t * B + row) * Cell::kGates * H + unit]) + sum,
        widen(args.h_mask == nullptr ? args.states[(step.before * B + row) * H + unit]
                                     : args.masked[((step.n & 1) * B + row) * H + unit]));
  }
  args.inner[((args.save ? step.t : 0) * B + row) * H + unit] = narrow<S>(gated);
}

// sums: of the recurrent product, by gate.
template <class Cell, class S>
PYSEQ_DEVICE void forward_unit(const ScanForward<S>& args, const Step& step, Index row, Index unit,
                               UnitInputs<S, Cell>& in, const Accumulate<S> (&sums)[Cell::kGates]) {
  using A = Accumulate<S>;
  constexpr int G = Cell::kGates, K = Cell::kStates;
  const Index B = args.batch, H = args.hidden;
  A c[at_least_one(K)];
  PYSEQ_UNROLL
  for (int k = 0; k < K; ++k) c[k] = in.c[k];
  A h = in.h;
  if (in.active) {
    A pre[Cell::kPre];
    PYSEQ_UNROLL
    for (int g = 0; g < Cell::kPre; ++g) pre[g] = in.x[g];
    PYSEQ_UNROLL
    for (int g = 0; g < G; ++g) pre[Cell::recurrent_slot(g)] += sums[g];
    Cell::template forward<Math<A>>(pre, in.own, h, c);
    if (args.save) {
      PYSEQ_UNROLL
      for (int g = 0; g < G; ++g) {
        args.gates[((step.t * B + row) * G + g) * H + unit] = narrow<S>(pre[g]);
      }
      if constexpr (Cell::kPre > G) {
        args.apart[(step.t * B + row) * H + unit] = narrow<S>(pre[G]);
      }
    }
  }
  if constexpr (K > 0) keep_cell<K>(args, step, row, unit, in.active, in.c, c);
  keep_inner(args, step, row, unit, in.active, h);
}

// ---- Backward --------------------------------------------------------------------------

// Of a backward loop, in which n = -1 only brings the gradient to the first state.
template <class S>
PYSEQ_DEVICE Step backward_step(const ScanBackward<S>& args, Index n) {
  const Index T = args.steps;
  if (n < 0) return {n, 0, 0, 0};
  return {n, args.reverse ? T - 1 - n : n, args.reverse ? T - n : n,
          args.reverse ? T - n - 1 : n + 1};
}

template <class A>
PYSEQ_DEVICE void add_to(A* to, Index offset, A value) {
  if (to != nullptr) to[offset] += value;
}

// The gradients of c from the step after, which a reset cuts off.
template <class Cell, class S>
PYSEQ_DEVICE void cut_cell(const ScanBackward<S>& args, const Step& step, Index row, Index unit) {
  if constexpr (Cell::kStates > 0) {
    if (!is_cleared(args, step.n + 1, row)) return;
    PYSEQ_UNROLL
    for (int k = 0; k < Cell::kStates; ++k) {
      const Index offset = (row * Cell::kStates + k) * args.hidden + unit;
      add_to(args.d_reset_c, offset, args.d_c[offset]);
      args.d_c[offset] = 0;
    }
  }
}

// What a unit of a row starts a step back from, besides the gradients that the step after left.
// None of it comes from another unit, so that it can be read before the others have arrived.
template <class S, class Cell>
struct UnitSaved {
  using A = Accumulate<S>;
  bool active;  // whether there is such a step, and the row takes part in it
  A gates[Cell::kPre];
  A own[at_least_one(Cell::kUnitWeights)];
  A h;
  A c[at_least_one(Cell::kStates)];
  A d_c[at_least_one(Cell::kStates)];  // of c after this very step
  A d_y;                               // without a projection
};

template <class Cell, class S>
PYSEQ_DEVICE UnitSaved<S, Cell> load_saved(const ScanBackward<S>& args, const Step& step, Index row,
                                           Index unit) {
  constexpr int G = Cell::kGates, K = Cell::kStates;
  const Index B = args.batch, H = args.hidden, at_t = step.t * B + row;
  UnitSaved<S, Cell> in{};
  in.active = step.n >= 0 && is_active(args, step.t, row);
  if (!in.active) return in;
  PYSEQ_UNROLL
  for (int g = 0; g < G; ++g) in.gates[g] = widen(args.gates[(at_t * G + g) * H + unit]);
  if constexpr (Cell::kPre > G) in.gates[G] = widen(args.apart[at_t * H + unit]);
  PYSEQ_UNROLL
  for (int i = 0; i < Cell::kUnitWeights; ++i) {
    in.own[i] = widen(args.unit_weights[row * args.unit_weights_stride + i * H + unit]);
  }
  PYSEQ_UNROLL
  for (int k = 0; k < K; ++k) {
    in.c[k] = args.cells[((step.before * B + row) * K + k) * H + unit];
    if (args.d_c_steps != nullptr) in.d_c[k] = args.d_c_steps[(at_t * K + k) * H + unit];
  }
  // With a projection no cell that reads h comes here.
  if (args.w_hr == nullptr) {
    in.h = widen(args.states[(step.before * B + row) * H + unit]);
    in.d_y = widen(args.d_y[at_t * H + unit]);
  }
  return in;
}

// Stores the gradients of one gate's sums.
template <class Cell, class S>
struct GateGradients {
  using A = Accumulate<S>;
  const ScanBackward<S>& args;
  Index row_at_t, unit;

  PYSEQ_DEVICE void operator()(int gate, A d_x, A d_r) const {
    const Index offset = (row_at_t * Cell::kGates + gate) * args.hidden + unit;
    args.d_x_gates[offset] = narrow<S>(d_x);
    if constexpr (Cell::kPre > Cell::kGates) args.d_r_gates[offset] = narrow<S>(d_r);
  }
};

// One unit whose h has the gradient d_h, before any projection, and whose c has d_c_own besides
// what the step after left: keep(gate, d_x, d_r) gets the gradients of the sums. Returns the part
// of the gradient of the state before that passes no weights.
template <class Cell, class S, class Keep>
PYSEQ_DEVICE Accumulate<S> cell_back(const ScanBackward<S>& args, const Step& step, Index row,
                                     Index unit, const UnitSaved<S, Cell>& in, Accumulate<S> d_h,
                                     Accumulate<S> d_c_own, const Keep& keep) {
  using A = Accumulate<S>;
  constexpr int K = Cell::kStates, U = Cell::kUnitWeights;
  const Index H = args.hidden;
  A d_pre[Cell::kPre], d_c[at_least_one(K)] = {}, d_own[at_least_one(U)];
  PYSEQ_UNROLL
  for (int k = 0; k < K; ++k) d_c[k] = args.d_c[(row * K + k) * H + unit] + in.d_c[k];
  A d_c_zoned = 0;
  if (K > 0 && args.zoneout_c.data != nullptr) {
    const A share = widen(at(args.zoneout_c, step.t, row)[unit]);
    d_c_zoned = share * d_c[0];
    d_c[0] *= 1 - share;
  }
  d_c[0] += d_c_own;
  Cell::template backward<Math<A>>(in.gates, in.own, in.h, in.c, d_h, d_c, d_pre, d_own);
  PYSEQ_UNROLL
  for (int k = 0; k < K; ++k) {
    args.d_c[(row * K + k) * H + unit] = d_c[k] + (k == 0 ? d_c_zoned : 0);
  }
  PYSEQ_UNROLL
  for (int i = 0; i < U; ++i) args.d_unit_weights[(row * U + i) * H + unit] += d_own[i];
  PYSEQ_UNROLL
  for (int g = 0; g < Cell::kGates; ++g) keep(g, d_pre[g], d_pre[Cell::recurrent_slot(g)]);
  return d_h;
}
template <class Cell, class S>
PYSEQ_DEVICE Accumulate<S> cell_back(const ScanBackward<S>& args, const Step& step, Index row,
                                     Index unit, const UnitSaved<S, Cell>& in, Accumulate<S> d_h) {
  const GateGradients<Cell, S> keep{args, step.t * args.batch + row, unit};
  return cell_back<Cell>(args, step, row, unit, in, d_h, Accumulate<S>(0), keep);
}

// The gradients of the gates of a row that a step leaves alone.
template <class Cell, class S>
PYSEQ_DEVICE void no_gates(const ScanBackward<S>& args, const Step& step, Index row, Index unit) {
  constexpr int G = Cell::kGates;
  PYSEQ_UNROLL
  for (int g = 0; g < G; ++g) {
    const Index offset = ((step.t * args.batch + row) * G + g) * args.hidden + unit;
    args.d_x_gates[offset] = narrow<S>(Accumulate<S>(0));
    args.d_r_gates[offset] = narrow<S>(Accumulate<S>(0));
  }
}

// What a number of the state after a step has of gradient.
template <class A>
struct StateGradient {
  A d_h;    // of the new h; or, of a row that takes no part, of the state
  A zoned;  // of the state before, past the step
};

// `sum`: of the product of the gates' gradients in the step after; d_y: of the output, where the
// row is active.
template <class S>
PYSEQ_DEVICE StateGradient<Accumulate<S>> state_back(const ScanBackward<S>& args, const Step& step,
                                                     Index row, Index unit, Accumulate<S> sum,
                                                     bool active, Accumulate<S> d_y) {
  using A = Accumulate<S>;
  const Index offset = row * args.state_size + unit;
  A d_h = args.h_mask == nullptr ? sum : sum * widen(args.h_mask[offset]);
  d_h += args.d_h[offset];
  if (is_cleared(args, step.n + 1, row)) {
    add_to(args.d_reset_h, offset, d_h);
    d_h = 0;
  }
  if (!active) return {d_h, 0};
  d_h += d_y;
  if (args.zoneout_h.data == nullptr) return {d_h, 0};
  const A share = widen(at(args.zoneout_h, step.t, row)[unit]);
  return {(1 - share) * d_h, share * d_h};
}

// A number of a state that is a projection: its gradient goes to the projection's product.
template <class S>
PYSEQ_DEVICE void project_back(const ScanBackward<S>& args, const Step& step, Index row, Index unit,
                               Accumulate<S> sum) {
  using A = Accumulate<S>;
  const Index P = args.state_size, at_t = (step.t * args.batch + row) * P + unit;
  const bool inside = step.n >= 0, active = inside && is_active(args, step.t, row);
  const A d_y = active ? widen(args.d_y[at_t]) : A(0);
  const StateGradient<A> d = state_back(args, step, row, unit, sum, active, d_y);
  if (inside) args.d_projected[at_t] = narrow<S>(active ? d.d_h : 0);
  args.d_h[row * P + unit] = active ? d.zoned : d.d_h;
}

// A unit whose h is the state itself.
template <class Cell, class S>
PYSEQ_DEVICE void backward_unit(const ScanBackward<S>& args, const Step& step, Index row,
                                Index unit, const UnitSaved<S, Cell>& in, Accumulate<S> sum) {
  const StateGradient<Accumulate<S>> d = state_back(args, step, row, unit, sum, in.active, in.d_y);
  cut_cell<Cell>(args, step, row, unit);
  Accumulate<S>& d_h = args.d_h[row * args.state_size + unit];
  if (in.active) {
    d_h = cell_back<Cell>(args, step, row, unit, in, d.d_h) + d.zoned;
  } else {
    d_h = d.d_h;
    if (step.n >= 0) no_gates<Cell>(args, step, row, unit);
  }
}

// A unit behind a projection; `sum`: of the product of d_projected. In step -1 too, for resets.
template <class Cell, class S>
PYSEQ_DEVICE void projected_back(const ScanBackward<S>& args, const Step& step, Index row,
                                 Index unit, Accumulate<S> sum) {
  cut_cell<Cell>(args, step, row, unit);
  const UnitSaved<S, Cell> in = load_saved<Cell>(args, step, row, unit);
  if (in.active) {
    cell_back<Cell>(args, step, row, unit, in, sum);
  } else if (step.n >= 0) {
    no_gates<Cell>(args, step, row, unit);
  }
}

// The first gate of a cell that gates its state; `sum`: of the product of the last gate's
// gradients.
template <class Cell, class S>
PYSEQ_DEVICE void gate_back(const ScanBackward<S>& args, const Step& step, Index row, Index unit,
                            Accumulate<S> sum) {
  if (!is_active(args, step.t, row)) return;
  const Index B = args.batch, H = args.hidden;
  const Index gate = (step.t * B + row) * Cell::kGates * H + unit;
  const Index offset = row * H + unit;
  const S h = args.states[step.before * B * H + offset];
  const Accumulate<S> mask = args.h_mask == nullptr ? 1 : widen(args.h_mask[offset]);
  Accumulate<S> d_seen = 0;
  Cell::backward_gated(widen(args.gates[gate]), widen(narrow<S>(mask * widen(h))), d_seen, sum);
  args.d_h[offset] += mask * d_seen;
  args.d_x_gates[gate] = narrow<S>(sum);
}

}  // namespace pyseq::cuda
