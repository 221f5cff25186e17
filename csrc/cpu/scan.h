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

// Calls body(head, its panels in `panels`, counted from its first) for each head that has some.
template <class Body>
PYSEQ_FORCE_INLINE void for_each_head(const Range& panels, int64_t head_panels, const Body& body) {
  for (int64_t begin = panels.begin; begin < panels.end;) {
    const int64_t head = begin / head_panels, first = head * head_panels;
    const int64_t end = smaller(panels.end, first + head_panels);
    body(head, Range{begin - first, end - first});
    begin = end;
  }
}

template <class T, class Cell>
void scan_forward_cell(const ScanForward<T>& args) {
  constexpr int G = Cell::kGates, K = Cell::kStates;
  const int64_t B = args.batch, H = args.hidden, P = args.state_size;
  const int64_t heads = Cell::kHeads ? args.heads : 1;
  const int64_t recurrent = Cell::kRecurrent ? P / heads : 0;
  const bool projects = args.w_hr != nullptr || args.quantized_hr != nullptr;
  const int64_t state_panels = vectors<T>(P);
  const Steps steps{args.steps, B, args.reverse, args.lengths, args.resets};

  const bool reads_input = args.w_ih != nullptr;
  const int64_t I = reads_input ? args.input : 0;
  const int64_t weights = G * H * (I + recurrent) + (projects ? P * H : 0);
  const StepCost cost{B, weights, 0, weights * static_cast<int64_t>(sizeof(T)),
                      projects || Cell::kGatesState ? 2 : 1};
  const Plan plan = Cell::kRecurrent
                        ? plan_steps(quantized_cost(args.quantized_hh, cost), args.threads)
                        : plan_free(args.steps * B * (weights + H * kUnitCost), args.threads);
  Weights<T> w_ih{args.w_ih, I, H, G, I, nullptr};
  // Of each head; of a cell that gates its state, of each gate.
  constexpr int kGatesAtOnce = Cell::kGatesState ? 1 : G;
  const int64_t blocks = Cell::kGatesState ? G : heads;
  Weights<T> w_block{args.w_hh, recurrent, H / heads,        kGatesAtOnce,
                     recurrent, nullptr,   args.quantized_hh};
  const auto w_hh = [&](int64_t block) {
    Weights<T> own = w_block;
    own.source += block * (H / heads) * kGatesAtOnce * recurrent;
    if (own.packed != nullptr) own.packed += block * own.packed_size();
    return own;
  };
  const int64_t head_panels = vectors<T>(H / heads);
  Weights<T> w_hr{args.w_hr, H, P, 1, H, nullptr, args.quantized_hr};
  const bool packs = args.quantized_hh == nullptr && repays_packing(args.steps, B);
  const int64_t w_ih_size = packs && reads_input ? w_ih.packed_size() : 0;
  const int64_t w_hh_size = packs ? blocks * w_block.packed_size() : 0;
  const int64_t w_hr_size = packs && projects ? w_hr.packed_size() : 0;
  Workspace workspace(static_cast<size_t>(w_ih_size + w_hh_size + w_hr_size) * sizeof(T));
  if (packs) {
    w_block.packed = static_cast<T*>(workspace.data());
    if (reads_input) w_ih.packed = w_block.packed + w_hh_size;
    if (projects) w_hr.packed = w_block.packed + w_hh_size + w_ih_size;
  }
  Teams teams(plan);

  parallel(plan.threads, [&](int thread, int present) {
    pack_rows(w_ih, thread, present);
    for (int64_t block = 0; block < blocks; ++block) pack_rows(w_hh(block), thread, present);
    pack_rows(w_hr, thread, present);
    if (present > 1) teams.all.wait(present);

    const Place at = place(plan, thread, present, B, teams);
    const Range units = at.part(heads * head_panels), outputs = at.part(state_panels);
    for (int64_t n = 0; n < args.steps; ++n) {
      const int64_t t = steps.time(n);
      const int64_t before = slot_before(n, args.steps, args.reverse, args.save);
      const int64_t after = slot_after(n, args.steps, args.reverse, args.save);
      const T* h_before = args.states + before * B * P;
      T* h_after = args.states + after * B * P;
      T* inner = args.inner == nullptr ? nullptr : args.inner + (args.save ? t * B * H : 0);
      const bool works = steps.any_active(n, at.rows);

      // Stores the state after the step; the output is zero where the row is not active.
      const auto keep_state = [&](int64_t row, int64_t unit, int count, Vec<T> h, bool active) {
        const int64_t offset = row * P + unit;
        store(args.y + t * B * P + offset, active ? h : Vec<T>{}, count);
        if (!active) h = load(h_before + offset, count);
        store(h_after + offset, steps.cleared(n + 1, row) ? Vec<T>{} : h, count);
      };

      if constexpr (Cell::kGatesState) {
        const Segment<T> first = plain_segment(h_before, w_hh(0));
        product<T, 1, 1>(&first, works ? 1 : 0, at.rows.begin, at.rows.end, units.begin, units.end,
                         n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                           const int count = lanes_inside<T>(H, panel);
                           const int64_t unit = panel * kLanes<T>, offset = row * H + unit;
                           Vec<T> gated = {};
                           if (steps.active(n, row)) {
                             T* const sum = args.gates + (t * B + row) * G * H + unit;
                             const Vec<T> pre = load(sum, count) + load(sums);
                             store(sum, pre, count);
                             gated =
                                 Cell::template gated<Math<T>>(pre, load(h_before + offset, count));
                           }
                           store(inner + offset, gated, count);
                         });
        at.wait();
      }

      // One vector of units of a row, with their sums.
      const auto step = [&](int64_t row, int64_t unit, int count, const T* sums) {
        const int64_t offset = row * H + unit;
        const bool active = steps.active(n, row);
        const T* c_prev = nullptr;
        T* c_next = nullptr;
        if constexpr (K > 0) {
          c_prev = args.cells + (before * B + row) * K * H + unit;
          c_next = args.cells + (after * B + row) * K * H + unit;
        }
        Vec<T> h = {};
        if (active) {
          T* gates = args.gates == nullptr ? nullptr : args.gates + (t * B + row) * G * H + unit;
          const T* x = reads_input ? (args.bias == nullptr ? nullptr : args.bias + unit) : gates;
          T* apart = args.apart == nullptr ? nullptr : args.apart + t * B * H + offset;
          const T* apart_bias = args.apart_bias == nullptr ? nullptr : args.apart_bias + unit;
          // With a projection no cell that reads h_prev comes here, only LSTM.
          const T* h_prev = projects ? c_prev : h_before + offset;
          const T* own = args.unit_weights == nullptr ? nullptr : args.unit_weights + unit;
          h = cell_forward<Cell>(
              UnitForward<T>{H, count, x, apart_bias, args.save ? gates : nullptr, apart, h_prev,
                             c_prev, c_next, own},
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
          keep_state(row, unit, count, h, active);
        }
      };

      Segment<T> segments[2];
      int segment_count = 0;
      if (reads_input) segments[segment_count++] = input_segment<T>(args.x + t * B * I, w_ih);
      if constexpr (Cell::kGatesState) {
        segments[segment_count++] = plain_segment(h_before, w_hh(1), 1);
        segments[segment_count++] = plain_segment<T>(inner, w_hh(2), 2);
      } else if constexpr (Cell::kRecurrent && !Cell::kHeads) {
        segments[segment_count++] = recurrent_segment<Cell>(h_before, w_hh(0));
      }
      if constexpr (Cell::kHeads) {
        for_each_head(units, head_panels, [&](int64_t head, const Range& own) {
          const int64_t first = head * recurrent;
          Segment<T> segment = recurrent_segment<Cell>(h_before + first, w_hh(head));
          segment.a_stride = P;
          product<T, G, Cell::kPre>(
              &segment, works ? 1 : 0, at.rows.begin, at.rows.end, own.begin, own.end, n % 2 != 0,
              [&](int64_t row, int64_t panel, const T* sums) {
                step(row, first + panel * kLanes<T>, lanes_inside<T>(recurrent, panel), sums);
              });
        });
      } else {
        product<T, kGatesAtOnce, Cell::kPre>(
            segments, works ? segment_count : 0, at.rows.begin, at.rows.end, units.begin, units.end,
            n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
              step(row, panel * kLanes<T>, lanes_inside<T>(H, panel), sums);
            });
      }
      if constexpr (Cell::kRecurrent) at.wait();
      if (projects) {
        const Segment<T> projection = plain_segment(inner, w_hr);
        product<T, 1, 1>(&projection, works ? 1 : 0, at.rows.begin, at.rows.end, outputs.begin,
                         outputs.end, n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                           keep_state(row, panel * kLanes<T>, lanes_inside<T>(P, panel), load(sums),
                                      steps.active(n, row));
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
template <class T, class Cell>
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

    // One vector of units of a row whose h_t has the gradient d_h.
    const auto step_back = [&](int64_t row, int64_t unit, int count, Vec<T> d_h) {
      const int64_t offset = row * H + unit;
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
    T* const d_projected = inside && projects ? run.d_projected + in_run * B * P : nullptr;
    // One vector of the state after the step, and what the step after makes of its gradient.
    const auto state_back = [&](int64_t row, int64_t unit, int count, const T* sums) {
      const int64_t offset = row * P + unit;
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
        step_back(row, unit, count, d_h);
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
                         Vec<T> d_h = load(args.d_h + offset, count), d_gated = load(sums);
                         Cell::backward_gated(
                             load(args.gates + (t * B + row) * G * H + unit, count),
                             load(args.states + before * B * P + offset, count), d_h, d_gated);
                         store(args.d_h + offset, d_h, count);
                         store(d_gates + row * G * H + unit, d_gated, count);
                       });
      at.wait();
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
  const auto accumulate_part = [&](const T* a, int64_t a_stride, int64_t columns, const T* b,
                                   int64_t b_stride, int64_t c_columns, T* c, T* a_sums) {
    gemm<T>({columns, c_columns, rows, args.threads, a, 1, a_stride, b, b_stride, 1, nullptr, c,
             c_columns, adds, a_sums});
  };
  const auto accumulate = [&](const T* a, int64_t columns, const T* b, int64_t c_columns, T* c,
                              T* a_sums) {
    accumulate_part(a, columns, columns, b, c_columns, c_columns, c, a_sums);
  };
  if (args.d_x != nullptr) {
    gemm<T>({rows, I, gate_rows, args.threads, run.d_x_gates, gate_rows, 1, args.w_ih, I, 1,
             nullptr, args.d_x + t * B * I, I, false});
  }
  // Slot t lies before step t, or after it in reverse: what each step started from.
  const T* const h_before = args.states + (t + (args.reverse ? 1 : 0)) * B * P;
  accumulate(run.d_x_gates, gate_rows, args.x + t * B * I, I, args.d_w_ih, args.d_b_ih);
  if constexpr (Cell::kGatesState) {
    const int64_t before = gate_rows - H;
    accumulate_part(run.d_r_gates, gate_rows, before, h_before, P, P, args.d_w_hh, args.d_b_hh);
    accumulate_part(run.d_r_gates + before, gate_rows, H, args.inner + t * B * H, H, P,
                    args.d_w_hh + before * P, args.d_b_hh + before);
  } else if constexpr (Cell::kHeads) {
    const int64_t D = H / args.heads;
    for (int64_t head = 0; head < args.heads; ++head) {
      for (int g = 0; g < G; ++g) {
        const int64_t column = g * H + head * D;
        accumulate_part(run.d_r_gates + column, gate_rows, D, h_before + head * D, P, D,
                        args.d_w_hh + (head * G + g) * D * D, args.d_b_hh + column);
      }
    }
  } else if constexpr (Cell::kRecurrent) {
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

  const int64_t heads = Cell::kHeads ? args.heads : 1, head_size = P / heads;
  const int64_t weights = (Cell::kRecurrent ? G * H * head_size : 0) + (projects ? P * H : 0);
  const StepCost cost{B, weights, 0, weights * static_cast<int64_t>(sizeof(T)),
                      projects || Cell::kGatesState ? 2 : 1};
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
  ScanGradientRun<T> run{};
  const auto take = [&](Pieces<T> pieces) {
    w_hh.shape.packed = pieces.take(w_hh.count * w_hh.shape.packed_size());
    if (w_hh.last.source != nullptr) w_hh.last.packed = pieces.take(w_hh.last.packed_size());
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
        for (int64_t i = 0; i < w_hh.count; ++i) pack_columns(w_hh.block(i), thread, present);
        if (w_hh.last.source != nullptr) pack_columns(w_hh.last, thread, present);
        if (projects) pack_columns(w_hr, thread, present);
        if (present > 1) teams.all.wait(present);
      }
      scan_backward_run<T, Cell>(args, run, w_hh, w_hr, place(plan, thread, present, B, teams));
    });
    scan_gradient_products<T, Cell>(args, run);
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
