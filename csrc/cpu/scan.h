// SPDX-License-Identifier: Apache-2.0
// One recurrent layer over a whole sequence, forward and backward. With few rows the input's
// product was made before (it lies in `gates`).
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

// Which rows take part in a step, and which start it afresh.
struct Steps {
  int64_t steps, batch;
  bool reverse;
  const int64_t* lengths;
  const bool* resets;

  int64_t time(int64_t n) const { return reverse ? steps - 1 - n : n; }
  bool active(int64_t n, int64_t row) const { return lengths == nullptr || time(n) < lengths[row]; }
  bool any_active(int64_t n, const Range& rows) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (active(n, row)) return true;
    }
    return false;
  }
  // Whether the row's state is cleared before the n-th step; there is no step `steps`.
  bool cleared(int64_t n, int64_t row) const {
    return resets != nullptr && n < steps && resets[time(n) * batch + row] && active(n, row);
  }
};

// The cost of a unit's arithmetic, in multiply-adds.
constexpr int64_t kUnitCost = 16;

// The plan of a loop in which no thread waits for another: all share the units.
inline Plan plan_free(int64_t multiply_adds, int threads) {
  return {static_cast<int>(smaller(threads, 1 + multiply_adds / 1000000)), 1};
}

template <class T, class Cell>
void scan_forward_cell(const ScanForward<T>& args) {
  constexpr int G = Cell::kGates, K = Cell::kStates;
  const int64_t B = args.batch, H = args.hidden, P = args.state_size;
  const int64_t recurrent = Cell::kRecurrent ? P : 0;
  const bool projects = args.w_hr != nullptr || args.quantized_hr != nullptr;
  const int64_t unit_panels = vectors<T>(H), state_panels = vectors<T>(P);
  const Steps steps{args.steps, B, args.reverse, args.lengths, args.resets};

  const bool reads_input = args.w_ih != nullptr;
  const int64_t I = reads_input ? args.input : 0;
  const int64_t weights = G * H * (I + recurrent) + (projects ? P * H : 0);
  const StepCost cost{B, weights, 0, weights * static_cast<int64_t>(sizeof(T)), projects ? 2 : 1};
  const Plan plan = Cell::kRecurrent
                        ? plan_steps(quantized_cost(args.quantized_hh, cost), args.threads)
                        : plan_free(args.steps * B * (weights + H * kUnitCost), args.threads);
  Weights<T> w_ih{args.w_ih, I, H, G, I, nullptr};
  Weights<T> w_hh{args.w_hh, P, H, G, recurrent, nullptr, args.quantized_hh};
  Weights<T> w_hr{args.w_hr, H, P, 1, H, nullptr, args.quantized_hr};
  const bool packs = args.quantized_hh == nullptr && repays_packing(args.steps, B);
  const int64_t w_ih_size = packs && reads_input ? w_ih.packed_size() : 0;
  const int64_t w_hh_size = packs ? w_hh.packed_size() : 0;
  const int64_t w_hr_size = packs && projects ? w_hr.packed_size() : 0;
  Workspace workspace(static_cast<size_t>(w_ih_size + w_hh_size + w_hr_size) * sizeof(T));
  if (packs) {
    w_hh.packed = static_cast<T*>(workspace.data());
    if (reads_input) w_ih.packed = w_hh.packed + w_hh_size;
    if (projects) w_hr.packed = w_hh.packed + w_hh_size + w_ih_size;
  }
  Teams teams(plan);

  parallel(plan.threads, [&](int thread, int present) {
    pack_rows(w_ih, thread, present);
    pack_rows(w_hh, thread, present);
    pack_rows(w_hr, thread, present);
    if (present > 1) teams.all.wait(present);

    const Place at = place(plan, thread, present, B, teams);
    const Range units = at.part(unit_panels), outputs = at.part(state_panels);
    for (int64_t n = 0; n < args.steps; ++n) {
      const int64_t t = steps.time(n);
      const int64_t before = slot_before(n, args.steps, args.reverse, args.save);
      const int64_t after = slot_after(n, args.steps, args.reverse, args.save);
      const T* h_before = args.states + before * B * P;
      T* h_after = args.states + after * B * P;
      T* inner = projects ? args.inner + (args.save ? t * B * H : 0) : nullptr;
      const bool works = steps.any_active(n, at.rows);

      // Stores the state after the step; the output is zero where the row is not active.
      const auto keep_state = [&](int64_t row, int64_t panel, Vec<T> h, bool active) {
        const int64_t offset = row * P + panel * kLanes<T>;
        const int count = lanes_inside<T>(P, panel);
        store(args.y + t * B * P + offset, active ? h : Vec<T>{}, count);
        if (!active) h = load(h_before + offset, count);
        store(h_after + offset, steps.cleared(n + 1, row) ? Vec<T>{} : h, count);
      };

      Segment<T> segments[2];
      int segment_count = 0;
      if (reads_input) segments[segment_count++] = input_segment<T>(args.x + t * B * I, w_ih);
      if constexpr (Cell::kRecurrent) {
        segments[segment_count++] = recurrent_segment<Cell>(h_before, w_hh);
      }
      product<T, G, Cell::kPre>(
          segments, works ? segment_count : 0, at.rows.begin, at.rows.end, units.begin, units.end,
          n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
            const int count = lanes_inside<T>(H, panel);
            const int64_t unit = panel * kLanes<T>, offset = row * H + unit;
            const bool active = steps.active(n, row);
            const T* c_prev = nullptr;
            T* c_next = nullptr;
            if constexpr (K > 0) {
              c_prev = args.cells + (before * B + row) * K * H + unit;
              c_next = args.cells + (after * B + row) * K * H + unit;
            }
            Vec<T> h = {};
            if (active) {
              T* gates =
                  args.gates == nullptr ? nullptr : args.gates + (t * B + row) * G * H + unit;
              const T* x =
                  reads_input ? (args.bias == nullptr ? nullptr : args.bias + unit) : gates;
              T* apart = args.apart == nullptr ? nullptr : args.apart + t * B * H + offset;
              const T* apart_bias = args.apart_bias == nullptr ? nullptr : args.apart_bias + unit;
              // With a projection no cell that reads h_prev comes here, only LSTM.
              const T* h_prev = projects ? c_prev : h_before + offset;
              const T* own = args.unit_weights == nullptr ? nullptr : args.unit_weights + unit;
              h = cell_forward<Cell>(
                  UnitForward<T>{H, count, x, apart_bias, args.save ? gates : nullptr, apart,
                                 h_prev, c_prev, c_next, own},
                  sums);
            }
            if constexpr (K > 0) {
              Vec<T> c[K];
              if (!active) {
                load_each<K>(c_prev, H, count, c);
                store_each<K>(c_next, H, count, c);
              }
              if (args.c_steps != nullptr) {
                T* const c_step = args.c_steps + (t * B + row) * K * H + unit;
                if (active) {
                  load_each<K>(c_next, H, count, c);
                  store_each<K>(c_step, H, count, c);
                } else {
                  store_zero<K>(c_step, H, count);
                }
              }
              if (steps.cleared(n + 1, row)) store_zero<K>(c_next, H, count);
            }
            if (projects) {
              store(inner + offset, h, count);
            } else {
              keep_state(row, panel, h, active);
            }
          });
      if constexpr (Cell::kRecurrent) at.wait();
      if (projects) {
        const Segment<T> projection = plain_segment(inner, w_hr);
        product<T, 1, 1>(&projection, works ? 1 : 0, at.rows.begin, at.rows.end, outputs.begin,
                         outputs.end, n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                           keep_state(row, panel, load(sums), steps.active(n, row));
                         });
        at.wait();
      }
    }
  });
}

// Rows whose gate gradients are kept until the products of the weight gradients take them:
// enough for those to run at their full speed, few enough to be still in the cache.
constexpr int64_t kGradientRows = 384;

// What a backward loop keeps of one run of steps, which it goes through from the last.
template <class T>
struct ScanGradientRun {
  int64_t begin, end;  // in the order of processing
  int64_t first_time;  // the earliest of its time steps
  T* d_x_gates;        // (steps of a run, B, G*H)
  T* d_r_gates;        // the same memory unless a sum stays apart
  T* d_projected;      // with w_hr: (steps of a run, B, P), of h before it is shared out
};

// The loop over one run. Leaves in d_h and d_c the gradients of the state before it.
template <class T, class Cell>
void scan_backward_run(const ScanBackward<T>& args, const ScanGradientRun<T>& run,
                       const Weights<T>& w_hh, const Weights<T>& w_hr, const Place& at) {
  constexpr int G = Cell::kGates, K = Cell::kStates, U = Cell::kUnitWeights;
  const int64_t B = args.batch, H = args.hidden, P = args.state_size;
  const bool projects = args.w_hr != nullptr;
  const Steps steps{args.steps, B, args.reverse, args.lengths, args.resets};
  const Range units = at.part(vectors<T>(H)), outputs = at.part(vectors<T>(P));
  // The step before the first only brings the gradient to the state.
  for (int64_t n = run.end - 1; n >= run.begin - 1; --n) {
    const bool inside = n >= run.begin;
    const int64_t t = inside ? steps.time(n) : 0, in_run = t - run.first_time;
    const int64_t before = inside ? slot_before(n, args.steps, args.reverse, true) : 0;

    // One vector of units of a row whose h_t has the gradient d_h.
    const auto step_back = [&](int64_t row, int64_t panel, Vec<T> d_h) {
      const int count = lanes_inside<T>(H, panel);
      const int64_t unit = panel * kLanes<T>, offset = row * H + unit;
      T* d_c = nullptr;
      if constexpr (K > 0) {
        d_c = args.d_c + row * K * H + unit;
        if (steps.cleared(n + 1, row)) store_zero<K>(d_c, H, count);
      }
      if (!inside) return;
      const int64_t gates = (t * B + row) * G * H + unit;
      const int64_t d_gates = (in_run * B + row) * G * H + unit;
      if (!steps.active(n, row)) {
        for (int g = 0; g < G; ++g) {
          store(run.d_x_gates + d_gates + g * H, Vec<T>{}, count);
          store(run.d_r_gates + d_gates + g * H, Vec<T>{}, count);
        }
        return;
      }
      const T* c_prev = nullptr;
      if constexpr (K > 0) {
        c_prev = args.cells + (before * B + row) * K * H + unit;
        if (args.d_c_steps != nullptr) {
          const T* const d_c_step = args.d_c_steps + (t * B + row) * K * H + unit;
          for (int k = 0; k < K; ++k) {
            T* const d = d_c + k * H;
            store(d, load(d, count) + load(d_c_step + k * H, count), count);
          }
        }
      }
      const T* own = nullptr;
      T* d_own = nullptr;
      if constexpr (U > 0) {
        own = args.unit_weights + unit;
        d_own = args.d_unit_weights + row * U * H + unit;
      }
      T unused[kLanes<T>];
      cell_backward<Cell>(
          UnitBackward<T>{H, count, args.gates + gates,
                          args.apart == nullptr ? nullptr : args.apart + t * B * H + offset,
                          projects ? c_prev : args.states + before * B * P + offset, c_prev,
                          projects ? unused : args.d_h + offset, d_c, run.d_x_gates + d_gates,
                          run.d_r_gates + d_gates, own, d_own},
          d_h);
    };

    const bool follows = Cell::kRecurrent && n + 1 < run.end && steps.any_active(n + 1, at.rows);
    const T* d_next =
        follows ? run.d_r_gates + (steps.time(n + 1) - run.first_time) * B * G * H : nullptr;
    const Segment<T> recurrent = plain_segment(d_next, w_hh);
    T* const d_projected = inside && projects ? run.d_projected + in_run * B * P : nullptr;
    product<T, 1, 1>(&recurrent, follows ? 1 : 0, at.rows.begin, at.rows.end, outputs.begin,
                     outputs.end, n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                       const int64_t offset = row * P + panel * kLanes<T>;
                       const int count = lanes_inside<T>(P, panel);
                       // What comes from the step after, which a reset cuts off.
                       Vec<T> d_h = load(sums) + load(args.d_h + offset, count);
                       if (steps.cleared(n + 1, row)) d_h = Vec<T>{};
                       const bool active = inside && steps.active(n, row);
                       if (active) d_h += load(args.d_y + t * B * P + offset, count);
                       if (projects) {
                         if (inside) {
                           store(d_projected + offset, active ? d_h : Vec<T>{}, count);
                         }
                         store(args.d_h + offset, active ? Vec<T>{} : d_h, count);
                       } else {
                         if (!active) store(args.d_h + offset, d_h, count);
                         step_back(row, panel, d_h);
                       }
                     });
    if constexpr (Cell::kRecurrent) at.wait();
    if (projects) {
      const Segment<T> projection = plain_segment<T>(d_projected, w_hr);
      product<T, 1, 1>(&projection, inside ? 1 : 0, at.rows.begin, at.rows.end, units.begin,
                       units.end, n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                         step_back(row, panel, load(sums));
                       });
      at.wait();
    }
  }
}

// The products of one run: the gradients of x, and its share of those of weights and biases.
template <class T>
void scan_gradient_products(const ScanBackward<T>& args, const ScanGradientRun<T>& run,
                            int64_t gate_rows) {
  const int64_t B = args.batch, H = args.hidden, I = args.input, P = args.state_size;
  const int64_t t = run.first_time, rows = (run.end - run.begin) * B;
  const bool adds = run.end < args.steps;
  // c (+)= a^T b, for a (rows, columns) and b (rows, c_columns).
  const auto accumulate = [&](const T* a, int64_t columns, const T* b, int64_t c_columns, T* c,
                              T* a_sums) {
    gemm<T>({columns, c_columns, rows, args.threads, a, 1, columns, b, c_columns, 1, nullptr, c,
             c_columns, adds, a_sums});
  };
  if (args.d_x != nullptr) {
    gemm<T>({rows, I, gate_rows, args.threads, run.d_x_gates, gate_rows, 1, args.w_ih, I, 1,
             nullptr, args.d_x + t * B * I, I, false});
  }
  // Slot t lies before step t, or after it in reverse: what each step started from.
  const T* const h_before = args.states + (t + (args.reverse ? 1 : 0)) * B * P;
  accumulate(run.d_x_gates, gate_rows, args.x + t * B * I, I, args.d_w_ih, args.d_b_ih);
  if (args.w_hh != nullptr) {
    accumulate(run.d_r_gates, gate_rows, h_before, P, args.d_w_hh, args.d_b_hh);
  }
  if (args.w_hr != nullptr) {
    accumulate(run.d_projected, P, args.inner + t * B * H, H, args.d_w_hr, nullptr);
  }
}

template <class T, class Cell>
void scan_backward_cell(const ScanBackward<T>& args) {
  constexpr int G = Cell::kGates;
  constexpr bool kApart = Cell::kPre > G;
  const int64_t B = args.batch, H = args.hidden, P = args.state_size;
  const bool projects = args.w_hr != nullptr;
  const int64_t length = smaller(args.steps, larger(1, kGradientRows / larger(1, B)));

  const int64_t weights = (Cell::kRecurrent ? G * H * P : 0) + (projects ? P * H : 0);
  const StepCost cost{B, weights, 0, weights * static_cast<int64_t>(sizeof(T)), projects ? 2 : 1};
  const Plan plan = Cell::kRecurrent ? plan_steps(cost, args.threads)
                                     : plan_free(length * B * H * kUnitCost, args.threads);
  Weights<T> w_hh{args.w_hh, P, P, 1, Cell::kRecurrent ? G * H : 0, nullptr};
  Weights<T> w_hr{args.w_hr, H, H, 1, P, nullptr};
  ScanGradientRun<T> run{};
  const auto take = [&](Pieces<T> pieces) {
    w_hh.packed = pieces.take(w_hh.packed_size());
    if (projects) w_hr.packed = pieces.take(w_hr.packed_size());
    run.d_x_gates = pieces.take(length * B * G * H);
    run.d_r_gates = kApart ? pieces.take(length * B * G * H) : run.d_x_gates;
    if (projects) run.d_projected = pieces.take(length * B * P);
    return pieces.bytes();
  };
  Workspace workspace(take(Pieces<T>(nullptr)));
  take(Pieces<T>(workspace.data()));
  Teams teams(plan);

  for (run.end = args.steps; run.end > 0; run.end = run.begin) {
    run.begin = larger(0, run.end - length);
    run.first_time = args.reverse ? args.steps - run.end : run.begin;
    parallel(plan.threads, [&](int thread, int present) {
      if (run.end == args.steps) {
        pack_columns(w_hh, thread, present);
        if (projects) pack_columns(w_hr, thread, present);
        if (present > 1) teams.all.wait(present);
      }
      scan_backward_run<T, Cell>(args, run, w_hh, w_hr, place(plan, thread, present, B, teams));
    });
    scan_gradient_products(args, run, G * H);
  }
}

template <class T>
void scan_forward(const ScanForward<T>& args) {
  with_any_cell(args.cell, [&](auto cell) { scan_forward_cell<T, decltype(cell)>(args); });
}

template <class T>
void scan_backward(const ScanBackward<T>& args) {
  with_any_cell(args.cell, [&](auto cell) { scan_backward_cell<T, decltype(cell)>(args); });
}

}  // namespace pyseq::cpu::PYSEQ_TIER
