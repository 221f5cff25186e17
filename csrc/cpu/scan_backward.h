// SPDX-License-Identifier: Apache-2.0
// Backward of one recurrent layer over a whole sequence, with the products that follow its loop.
#pragma once

#include "gemm.h"
#include "scan_norm.h"

namespace pyseq::cpu::PYSEQ_TIER {

// Rows whose gate gradients are kept until the products of the weight gradients take them, at most:
// enough for those to run at their full speed, few enough to be still in the cache, and one run of
// k to those products.
constexpr int64_t kGradientRows = 448;

// The recurrent weights as the loop backward reads them, in blocks of equal shape: one; of each
// head and gate; or, of a cell that gates its state, of the last gate beside those before it.
template <class T>
struct ScanBlocks {
  Weights<T> shape;  // the first
  int64_t count;
  Weights<T> last;  // if it has another shape, in place of block 1

  Weights<T> block(int64_t index) const {
    if (last.source != nullptr && index == 1) return last;
    Weights<T> own = shape;
    own.source += index * own.k_count * own.stride;
    if (own.packed != nullptr) own.packed += index * own.packed_size();
    return own;
  }
};

// The loop over one run. Leaves in d_h and d_c the gradients of the state before it.
template <class T, class Cell, bool Normed>
void scan_backward_run(const ScanBackward<T>& args, const ScanGradientRun<T>& run,
                       const ScanBlocks<T>& w_hh, const Weights<T>& w_hr, const Place& at) {
  constexpr int G = Cell::kGates, K = Cell::kStates, U = Cell::kUnitWeights;
  const int64_t B = args.batch, H = args.hidden, P = args.state_size;
  const bool projects = args.w_hr != nullptr;
  const Steps steps{args.steps, B, args.reverse, args.lengths, args.resets};
  const int64_t heads = Cell::kHeads ? args.heads : 1, head_size = P / heads;
  const int64_t head_panels = vectors<T>(head_size);
  const Range units = at.part(vectors<T>(H)), outputs = at.part(heads * head_panels);
  // The step before the first only brings the gradient to the state.
  for (int64_t n = run.end - 1; n >= run.begin - 1; --n) {
    const bool inside = n >= run.begin;
    const int64_t t = inside ? steps.time(n) : 0, in_run = t - run.first_time;
    const int64_t before = inside ? slot_before(n, args.steps, args.reverse, true) : 0;

    // One vector of units of an active row whose h_t has the gradient d_h, and whose c has d_c_own
    // besides what the step after left: to the sums of the gates.
    const auto gates_back = [&](int64_t row, int64_t unit, int count, Vec<T> d_h, Vec<T> d_c_own) {
      const int64_t offset = row * H + unit;
      const T* c_prev = nullptr;
      T* d_c = nullptr;
      Vec<T> d_c_zoned = {};
      if constexpr (K > 0) {
        c_prev = args.cells + (before * B + row) * K * H + unit;
        d_c = args.d_c + row * K * H + unit;
        if (args.d_c_steps != nullptr) {
          const T* const d_c_step = args.d_c_steps + (t * B + row) * K * H + unit;
          for (int k = 0; k < K; ++k) add_to(d_c, k * H, load(d_c_step + k * H, count), count);
        }
        if (args.zoneout_c) {
          const Vec<T> share = load(args.zoneout_c.at(t, row) + unit, count);
          const Vec<T> all = load(d_c, count);
          d_c_zoned = share * all;
          store(d_c, (1 - share) * all, count);
        }
        if constexpr (Normed) add_to(d_c, 0, d_c_own, count);
      }
      // Normalised sums have their gradients made in two steps, of which this is the first.
      const int64_t d_gates = (in_run * B + row) * G * H + unit, own = row * G * H + unit;
      T* const d_x_gates = Normed ? run.norm.d_x_normed + own : run.d_x_gates + d_gates;
      T* const d_r_gates = Normed ? run.norm.d_r_normed + own : run.d_r_gates + d_gates;
      const T* own_weights = nullptr;
      T* d_own_weights = nullptr;
      if constexpr (U > 0) {
        own_weights = args.unit_weights + row * args.unit_weights_stride + unit;
        d_own_weights = args.d_unit_weights + row * U * H + unit;
      }
      T unused[kLanes<T>];
      const bool passes_no_h = projects || (Normed && K > 0);
      cell_backward<Cell>(
          UnitBackward<T>{H, count, args.gates + (t * B + row) * G * H + unit,
                          args.apart == nullptr ? nullptr : args.apart + t * B * H + offset,
                          projects ? c_prev : args.states + before * B * P + offset, c_prev,
                          passes_no_h ? unused : args.d_h + offset, d_c, d_x_gates, d_r_gates,
                          own_weights, d_own_weights},
          d_h);
      if constexpr (K > 0) {
        if (args.zoneout_c) add_to(d_c, 0, d_c_zoned, count);
      }
    };

    // One vector of units of a row whose h_t has the gradient d_h.
    const auto step_back = [&](int64_t row, int64_t unit, int count, Vec<T> d_h) {
      const int64_t offset = row * H + unit;
      if constexpr (K > 0) {
        if (steps.cleared(n + 1, row)) {
          T* const d_c = args.d_c + row * K * H + unit;
          if (args.d_reset_c != nullptr) {
            T* const d_reset = args.d_reset_c + row * K * H + unit;
            for (int k = 0; k < K; ++k) add_to(d_reset, k * H, load(d_c + k * H, count), count);
          }
          store_zero<K>(d_c, H, count);
        }
      }
      if (!inside) return;
      if (!steps.active(n, row)) {
        const int64_t d_gates = (in_run * B + row) * G * H + unit;
        for (int g = 0; g < G; ++g) {
          store(run.d_x_gates + d_gates + g * H, Vec<T>{}, count);
          store(run.d_r_gates + d_gates + g * H, Vec<T>{}, count);
        }
        return;
      }
      if constexpr (Normed && K > 0) {
        // The rest waits until the whole row of c has its gradient.
        const T* const stats = args.norm.moments + ((t * B + row) * 3 + 2) * 2;
        const Moments<T> of_c{stats[0], stats[1]};
        const Vec<T> gain = load(args.norm.gain_c + unit, count);
        const Vec<T> normed = of_c.normed(load(args.norm.c_sums + t * B * H + offset, count));
        const Vec<T> o = load(args.gates + ((t * B + row) * G + Cell::kOutput) * H + unit, count);
        Vec<T> d_o, d_c;
        Cell::template output_backward<Math<T>>(
            o, gain * normed + load(args.norm.bias_c + unit, count), d_h, d_o, d_c);
        store(run.norm.d_output + offset, d_o, count);
        store(run.norm.d_c_normed + offset, d_c * gain, count);
        add_to(run.norm.row_gain_c, offset, d_c * normed, count);
        add_to(run.norm.row_bias_c, offset, d_c, count);
        if (!projects) store(args.d_h + offset, Vec<T>{}, count);
      } else {
        gates_back(row, unit, count, d_h, Vec<T>{});
      }
    };

    const bool follows = Cell::kRecurrent && n + 1 < run.end && steps.any_active(n + 1, at.rows);
    const T* d_next =
        follows ? run.d_r_gates + (steps.time(n + 1) - run.first_time) * B * G * H : nullptr;
    T* const d_projected = inside && projects ? run.d_projected + in_run * B * P : nullptr;
    // One vector of the state after the step, and what the step after makes of its gradient.
    const auto state_back = [&](int64_t row, int64_t unit, int count, const T* sums) {
      const int64_t offset = row * P + unit;
      // What comes from the step after, which a reset cuts off.
      Vec<T> d_h = load(sums);
      if (args.h_mask != nullptr) {
        const Vec<T> mask = load(args.h_mask + offset, count);
        d_h *= mask;
        if (inside) {
          store(run.masked + in_run * B * P + offset,
                mask * load(args.states + before * B * P + offset, count), count);
        }
      }
      d_h += load(args.d_h + offset, count);
      if (steps.cleared(n + 1, row)) {
        add_to(args.d_reset_h, offset, d_h, count);
        d_h = Vec<T>{};
      }
      const bool active = inside && steps.active(n, row);
      if (active) d_h += load(args.d_y + t * B * P + offset, count);
      Vec<T> d_h_zoned = {};
      if (active && args.zoneout_h) {
        const Vec<T> share = load(args.zoneout_h.at(t, row) + unit, count);
        d_h_zoned = share * d_h;
        d_h = (1 - share) * d_h;
      }
      if (projects) {
        if (inside) {
          store(d_projected + offset, active ? d_h : Vec<T>{}, count);
        }
        store(args.d_h + offset, active ? d_h_zoned : d_h, count);
      } else {
        if (!active) store(args.d_h + offset, d_h, count);
        step_back(row, unit, count, d_h);
        if (active && args.zoneout_h) add_to(args.d_h, offset, d_h_zoned, count);
      }
    };
    if constexpr (Cell::kHeads) {
      for_each_head(outputs, head_panels, [&](int64_t head, const Range& own) {
        const int64_t first = head * head_size;
        Segment<T> segments[G];
        for (int g = 0; g < G; ++g) {
          segments[g] = column_segment(follows ? d_next + g * H + first : nullptr, G * H,
                                       w_hh.block(head * G + g));
        }
        product<T, 1, 1>(segments, follows ? G : 0, at.rows.begin, at.rows.end, own.begin, own.end,
                         n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                           state_back(row, first + panel * kLanes<T>,
                                      lanes_inside<T>(head_size, panel), sums);
                         });
      });
    } else {
      const Segment<T> recurrent = column_segment(d_next, G * H, w_hh.block(0));
      product<T, 1, 1>(&recurrent, follows ? 1 : 0, at.rows.begin, at.rows.end, outputs.begin,
                       outputs.end, n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                         state_back(row, panel * kLanes<T>, lanes_inside<T>(P, panel), sums);
                       });
    }
    if constexpr (Cell::kRecurrent) at.wait();
    if (projects) {
      const Segment<T> projection = plain_segment<T>(d_projected, w_hr);
      product<T, 1, 1>(&projection, inside ? 1 : 0, at.rows.begin, at.rows.end, units.begin,
                       units.end, n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                         step_back(row, panel * kLanes<T>, lanes_inside<T>(H, panel), load(sums));
                       });
      at.wait();
    }
    if constexpr (Cell::kGatesState) {
      T* const d_gates = run.d_r_gates + (inside ? in_run * B * G * H : 0);
      const Segment<T> last = column_segment<T>(d_gates + (G - 1) * H, G * H, w_hh.block(1));
      product<T, 1, 1>(&last, inside ? 1 : 0, at.rows.begin, at.rows.end, units.begin, units.end,
                       n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                         if (!inside || !steps.active(n, row)) return;
                         const int count = lanes_inside<T>(H, panel);
                         const int64_t unit = panel * kLanes<T>, offset = row * H + unit;
                         const bool masks = args.h_mask != nullptr;
                         Vec<T> d_seen = {}, d_gated = load(sums);
                         Cell::backward_gated(
                             load(args.gates + (t * B + row) * G * H + unit, count),
                             load(masks ? run.masked + (in_run * B + row) * P + unit
                                        : args.states + before * B * P + offset,
                                  count),
                             d_seen, d_gated);
                         if (masks) d_seen *= load(args.h_mask + offset, count);
                         add_to(args.d_h, offset, d_seen, count);
                         store(d_gates + row * G * H + unit, d_gated, count);
                       });
      at.wait();
    }
    if constexpr (Normed) {
      if (inside) normed_back<Cell>(args, run, steps, at, n, in_run, gates_back);
    }
  }
}

// The products of one run: the gradients of x, and its share of those of weights and biases.
template <class T, class Cell>
void scan_gradient_products(const ScanBackward<T>& args, const ScanGradientRun<T>& run) {
  constexpr int G = Cell::kGates;
  const int64_t gate_rows = G * args.hidden;
  const int64_t B = args.batch, H = args.hidden, I = args.input, P = args.state_size;
  const int64_t t = run.first_time, rows = (run.end - run.begin) * B;
  const bool adds = run.end < args.steps;
  // c (+)= a^T b, for a (rows, columns) and b (rows, c_columns).
  const auto part = [&](const T* a, int64_t a_stride, int64_t columns, const T* b, int64_t b_stride,
                        int64_t c_columns, T* c, T* a_sums) {
    return Gemm<T>{columns, c_columns, rows, args.threads, a,    1,     a_stride, b, b_stride,
                   1,       nullptr,   c,    c_columns,    adds, a_sums};
  };
  if (args.d_x != nullptr) {
    gemm<T>({rows, I, gate_rows, args.threads, run.d_x_gates, gate_rows, 1, args.w_ih, I, 1,
             nullptr, args.d_x + t * B * I, I, false});
  }
  // Slot t lies before step t, or after it in reverse: what each step started from.
  const T* const h_before =
      args.h_mask != nullptr ? run.masked : args.states + (t + (args.reverse ? 1 : 0)) * B * P;
  // Biases come after a normalisation, so theirs are other sums.
  Gemm<T> of_input = part(run.d_x_gates, gate_rows, gate_rows, args.x + t * B * I, I, I,
                          args.d_w_ih, args.norm ? nullptr : args.d_b_ih);
  const Gemm<T> of_state = part(run.d_r_gates, gate_rows, gate_rows, h_before, P, P, args.d_w_hh,
                                args.norm ? nullptr : args.d_b_hh);
  constexpr bool kAtOnce = Cell::kRecurrent && !Cell::kGatesState && !Cell::kHeads;
  const bool same = kAtOnce && run.d_r_gates == run.d_x_gates;
  if (same) of_input.beside = &of_state;
  gemm(of_input);
  if constexpr (kAtOnce) {
    if (!same) gemm(of_state);
    if (same && run.begin == 0) {
      __builtin_memcpy(args.d_b_hh, args.d_b_ih, static_cast<size_t>(gate_rows) * sizeof(T));
    }
  } else if constexpr (Cell::kGatesState) {
    const int64_t before = gate_rows - H;
    gemm(part(run.d_r_gates, gate_rows, before, h_before, P, P, args.d_w_hh, args.d_b_hh));
    gemm(part(run.d_r_gates + before, gate_rows, H, args.inner + t * B * H, H, P,
              args.d_w_hh + before * P, args.d_b_hh + before));
  } else if constexpr (Cell::kHeads) {
    const int64_t D = H / args.heads;
    for (int64_t head = 0; head < args.heads; ++head) {
      for (int g = 0; g < G; ++g) {
        const int64_t column = g * H + head * D;
        gemm(part(run.d_r_gates + column, gate_rows, D, h_before + head * D, P, D,
                  args.d_w_hh + (head * G + g) * D * D, args.d_b_hh + column));
      }
    }
  }
  if (args.w_hr != nullptr) {
    gemm(part(run.d_projected, P, P, args.inner + t * B * H, H, H, args.d_w_hr, nullptr));
  }
}

template <class T, class Cell, bool Normed>
void scan_backward_cell(const ScanBackward<T>& args) {
  constexpr int G = Cell::kGates;
  constexpr bool kApart = Cell::kPre > G;
  const int64_t B = args.batch, H = args.hidden, P = args.state_size;
  const bool projects = args.w_hr != nullptr;
  // In runs of equal length, give or take a step: a short one would take as long to add to the
  // gradients of large weights.
  const int64_t full_runs = (args.steps * B + kGradientRows - 1) / kGradientRows;
  const int runs = static_cast<int>(smaller(args.steps, larger(1, full_runs)));
  const int64_t length = share(args.steps, 0, runs > 0 ? runs : 1).size();

  const int64_t heads = Cell::kHeads ? args.heads : 1, head_size = P / heads;
  const int64_t weights = (Cell::kRecurrent ? G * H * head_size : 0) + (projects ? P * H : 0);
  const int barriers = (projects || Cell::kGatesState ? 2 : 1) + (Normed ? 1 + Cell::kStates : 0);
  constexpr int64_t kBytes = sizeof(T);
  const StepCost cost{
      B, weights, 0, weights * kBytes, ((projects ? P : 0) + G * H) * kBytes, barriers, args.steps};
  const Plan plan = Cell::kRecurrent ? plan_steps(cost, args.threads)
                                     : plan_free(length * B * H * kUnitCost, args.threads);
  ScanBlocks<T> w_hh{{args.w_hh, P, P, 1, Cell::kRecurrent ? G * H : 0, nullptr}, 1, {}};
  if constexpr (Cell::kHeads) {
    w_hh = {{args.w_hh, head_size, head_size, 1, head_size, nullptr}, heads * G, {}};
  } else if constexpr (Cell::kGatesState) {
    const int64_t before = (G - 1) * H;
    w_hh.shape.k_count = before;
    w_hh.last = {args.w_hh + before * P, P, P, 1, H, nullptr};
  }
  Weights<T> w_hr{args.w_hr, H, H, 1, P, nullptr};
  const RowsApart<T> h_apart(plan, 1, B, P), c_apart(plan, 1, B, Cell::kStates * H);
  T *d_h = nullptr, *d_c = nullptr;
  ScanGradientRun<T> run{};
  const auto take = [&](Pieces<T> pieces) {
    d_h = pieces.take(h_apart.size());
    d_c = pieces.take(c_apart.size());
    w_hh.shape.packed = pieces.take(w_hh.count * w_hh.shape.packed_size());
    if (w_hh.last.source != nullptr) w_hh.last.packed = pieces.take(w_hh.last.packed_size());
    if (projects) w_hr.packed = pieces.take(w_hr.packed_size());
    run.d_x_gates = pieces.take(length * B * G * H);
    run.d_r_gates = kApart || Normed ? pieces.take(length * B * G * H) : run.d_x_gates;
    if (projects) run.d_projected = pieces.take(length * B * P);
    if (args.h_mask != nullptr) run.masked = pieces.take(length * B * P);
    if constexpr (Normed) {
      NormScratch<T>& norm = run.norm;
      norm.d_x_normed = pieces.take(B * G * H);
      norm.d_r_normed = kApart ? pieces.take(B * G * H) : norm.d_x_normed;
      norm.row_gain_ih = pieces.take(B * G * H);
      norm.row_gain_hh = pieces.take(B * G * H);
      norm.row_bias = pieces.take(B * G * H);
      if (kApart) norm.row_apart = pieces.take(B * H);
      if constexpr (Cell::kStates > 0) {
        norm.d_output = pieces.take(B * H);
        norm.d_c_normed = pieces.take(B * H);
        norm.row_gain_c = pieces.take(B * H);
        norm.row_bias_c = pieces.take(B * H);
      }
    }
    return pieces.bytes();
  };
  Workspace workspace(take(Pieces<T>(nullptr)));
  take(Pieces<T>(workspace.data()));
  if constexpr (Normed) clear_row_sums<Cell>(args, run.norm);
  Teams teams(plan);

  for (int i = runs - 1; i >= 0; --i) {
    const Range own_steps = share(args.steps, i, runs);
    run.begin = own_steps.begin;
    run.end = own_steps.end;
    run.first_time = args.reverse ? args.steps - run.end : run.begin;
    parallel(plan.threads, [&](int thread, int present) {
      if (run.end == args.steps) {
        for (int64_t i = 0; i < w_hh.count; ++i) pack_columns(w_hh.block(i), thread, present);
        if (w_hh.last.source != nullptr) pack_columns(w_hh.last, thread, present);
        if (projects) pack_columns(w_hr, thread, present);
        if (present > 1) teams.all.wait(present);
      }
      const Place at = place(plan, thread, present, B, teams);
      if (plan.teams == 1) {
        return scan_backward_run<T, Cell, Normed>(args, run, w_hh, w_hr, at);
      }
      ScanBackward<T> own = args;
      own.d_h = h_apart.of(at, d_h)[0];
      if (Cell::kStates > 0) own.d_c = c_apart.of(at, d_c)[0];
      if (at.member == 0) {
        h_apart.copy(at, args.d_h, own.d_h);
        if (Cell::kStates > 0) c_apart.copy(at, args.d_c, own.d_c);
      }
      at.wait();
      scan_backward_run<T, Cell, Normed>(own, run, w_hh, w_hr, at);
      if (at.member == 0) {
        h_apart.copy(at, own.d_h, args.d_h);
        if (Cell::kStates > 0) c_apart.copy(at, own.d_c, args.d_c);
      }
    });
    scan_gradient_products<T, Cell>(args, run);
  }
  if constexpr (Normed) sum_norm_gradients<Cell>(args, run.norm);
}

template <class T>
void scan_backward(const ScanBackward<T>& args) {
  if (args.norm) {
    with_cell(args.cell, [&](auto cell) { scan_backward_cell<T, decltype(cell), true>(args); });
  } else {
    with_any_cell(args.cell,
                  [&](auto cell) { scan_backward_cell<T, decltype(cell), false>(args); });
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
