// SPDX-License-Identifier: Apache-2.0
// One recurrent layer over a whole sequence, forward and backward. With few rows the input's
// product was made before (it lies in `gates`).
#pragma once

#include "gemm.h"
#include "kernels.h"
#include "norm.h"
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

// Zoneout: the share of the old value in the new one. In this form a share of 0 or 1 gives one of
// them exactly.
template <class V>
PYSEQ_FORCE_INLINE V zone_out(V old_share, V old_value, V new_value) {
  return old_share * old_value + (1 - old_share) * new_value;
}

// The sums of one vector of units, from what was normalised.
template <class Cell, class T>
PYSEQ_FORCE_INLINE void normed_sums(const ScanForward<T>& args, int64_t unit, int count,
                                    const T* x_row, const Moments<T>& of_x, const T* r_row,
                                    const Moments<T>& of_r, T* sums) {
#pragma GCC unroll 4
  for (int g = 0; g < Cell::kGates; ++g) {
    const int64_t offset = g * args.hidden + unit;
    Vec<T> x = load(args.norm.gain_ih + offset, count) * of_x.normed(load(x_row + offset, count));
    if (args.bias != nullptr) x += load(args.bias + offset, count);
    Vec<T> r = load(args.norm.gain_hh + offset, count) * of_r.normed(load(r_row + offset, count));
    if (Cell::recurrent_slot(g) == g) {
      x += r;
    } else {
      if (args.apart_bias != nullptr) r += load(args.apart_bias + unit, count);
      store(sums + Cell::recurrent_slot(g) * kLanes<T>, r);
    }
    store(sums + g * kLanes<T>, x);
  }
}

template <class T, class Cell, bool Normed>
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
  // The rows of a normalisation are waited for.
  const int barriers = (projects || Cell::kGatesState ? 2 : 1) + (Normed ? 1 + K : 0);
  const StepCost cost{B, weights, 0, weights * static_cast<int64_t>(sizeof(T)), barriers};
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
      const T* h_read = args.h_mask == nullptr ? h_before : args.masked + (n & 1) * B * P;
      T* inner = args.inner == nullptr ? nullptr : args.inner + (args.save ? t * B * H : 0);
      const bool works = steps.any_active(n, at.rows);

      // Stores the state after the step; the output is zero where the row is not active.
      const auto keep_state = [&](int64_t row, int64_t unit, int count, Vec<T> h, bool active) {
        const int64_t offset = row * P + unit;
        if (active && args.zoneout_h) {
          h = zone_out(load(args.zoneout_h.at(t, row) + unit, count),
                       load(h_before + offset, count), h);
        }
        store(args.y + t * B * P + offset, active ? h : Vec<T>{}, count);
        if (!active) h = load(h_before + offset, count);
        if (steps.cleared(n + 1, row)) {
          h = args.reset_h ? load(args.reset_h.at(0, row) + unit, count) : Vec<T>{};
        }
        store(h_after + offset, h, count);
        if (args.h_mask != nullptr) {
          store(args.masked + ((n + 1) & 1) * B * P + offset, h * load(args.h_mask + offset, count),
                count);
        }
      };
      // c after the step, of which the cell has stored its own.
      const auto keep_cell = [&](int64_t row, int64_t unit, int count, bool active) {
        const T* c_prev = args.cells + (before * B + row) * K * H + unit;
        T* c_next = args.cells + (after * B + row) * K * H + unit;
        Vec<T> c[at_least_one(K)];
        load_each<K>(active ? c_next : c_prev, H, count, c);
        if (active && args.zoneout_c) {
          c[0] = zone_out(load(args.zoneout_c.at(t, row) + unit, count), load(c_prev, count), c[0]);
        }
        if (!active || args.zoneout_c) store_each<K>(c_next, H, count, c);
        if (args.c_steps != nullptr) {
          T* const c_step = args.c_steps + (t * B + row) * K * H + unit;
          active ? store_each<K>(c_step, H, count, c) : store_zero<K>(c_step, H, count);
        }
        if (steps.cleared(n + 1, row)) {
          if (args.reset_c) {
            load_each<K>(args.reset_c.at(0, row) + unit, H, count, c);
            store_each<K>(c_next, H, count, c);
          } else {
            store_zero<K>(c_next, H, count);
          }
        }
      };
      const auto keep_inner = [&](int64_t row, int64_t unit, int count, Vec<T> h, bool active) {
        if (projects) {
          store(inner + row * H + unit, h, count);
        } else {
          keep_state(row, unit, count, h, active);
        }
      };

      if constexpr (Normed) {
        const ScanNorm<T>& norm = args.norm;
        const int64_t kept = args.save ? t : 0;
        T* const r_sums = norm.r_sums + kept * B * G * H;
        const Segment<T> recurrent = input_segment(h_read, w_hh(0));
        product<T, G, G>(&recurrent, works ? 1 : 0, at.rows.begin, at.rows.end, units.begin,
                         units.end, n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                           T* const to = r_sums + row * G * H + panel * kLanes<T>;
                           const int count = lanes_inside<T>(H, panel);
                           for (int g = 0; g < G; ++g) {
                             store(to + g * H, load(sums + g * kLanes<T>), count);
                           }
                         });
        at.wait();
        const auto keep_moments = [&](int64_t row, int which, const Moments<T>& of) {
          if (!args.save || at.member != 0) return;
          T* const to = norm.moments + ((t * B + row) * 3 + which) * 2;
          to[0] = of.mean;
          to[1] = of.scale;
        };
        for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
          const bool active = steps.active(n, row);
          const T* const x_row = norm.x_sums + (t * B + row) * G * H;
          const T* const r_row = r_sums + row * G * H;
          Moments<T> of_x{}, of_r{};
          if (active) {
            of_x = moments(x_row, G * H);
            of_r = moments(r_row, G * H);
            keep_moments(row, 0, of_x);
            keep_moments(row, 1, of_r);
          }
          for (int64_t panel = units.begin; panel < units.end; ++panel) {
            const int count = lanes_inside<T>(H, panel);
            const int64_t unit = panel * kLanes<T>, offset = row * H + unit;
            const T* c_prev = nullptr;
            T* c_own = nullptr;
            if constexpr (K > 0) {
              c_prev = args.cells + before * B * H + offset;
              c_own = norm.c_sums + kept * B * H + offset;
            }
            Vec<T> h = {};
            if (active) {
              T sums[Cell::kPre * kLanes<T>];
              normed_sums<Cell>(args, unit, count, x_row, of_x, r_row, of_r, sums);
              // The output gate is read again below.
              const bool keeps_gates = args.save || K > 0;
              h = cell_forward<Cell>(
                  UnitForward<T>{
                      H, count, nullptr, nullptr,
                      keeps_gates ? args.gates + (kept * B + row) * G * H + unit : nullptr,
                      args.apart == nullptr ? nullptr : args.apart + t * B * H + offset,
                      projects ? c_prev : h_before + offset, c_prev, c_own},
                  sums);
            }
            if constexpr (K > 0) {
              if (active) store(args.cells + after * B * H + offset, load(c_own, count), count);
              keep_cell(row, unit, count, active);
            } else {
              keep_inner(row, unit, count, h, active);
            }
          }
        }
        if constexpr (K > 0) {
          at.wait();
          for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
            const bool active = steps.active(n, row);
            const T* const c_row = norm.c_sums + (kept * B + row) * H;
            const T* const o_row = args.gates + ((kept * B + row) * G + Cell::kOutput) * H;
            Moments<T> of_c{};
            if (active) {
              of_c = moments(c_row, H);
              keep_moments(row, 2, of_c);
            }
            for (int64_t panel = units.begin; panel < units.end; ++panel) {
              const int count = lanes_inside<T>(H, panel);
              const int64_t unit = panel * kLanes<T>;
              Vec<T> h = {};
              if (active) {
                const Vec<T> c =
                    load(norm.gain_c + unit, count) * of_c.normed(load(c_row + unit, count)) +
                    load(norm.bias_c + unit, count);
                h = Cell::template output<Math<T>>(load(o_row + unit, count), c);
              }
              keep_inner(row, unit, count, h, active);
            }
          }
        }
      } else {
        if constexpr (Cell::kGatesState) {
          const Segment<T> first = plain_segment(h_before, w_hh(0));
          product<T, 1, 1>(&first, works ? 1 : 0, at.rows.begin, at.rows.end, units.begin,
                           units.end, n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                             const int count = lanes_inside<T>(H, panel);
                             const int64_t unit = panel * kLanes<T>, offset = row * H + unit;
                             Vec<T> gated = {};
                             if (steps.active(n, row)) {
                               T* const sum = args.gates + (t * B + row) * G * H + unit;
                               const Vec<T> pre = load(sum, count) + load(sums);
                               store(sum, pre, count);
                               gated = Cell::template gated<Math<T>>(
                                   pre, load(h_before + offset, count));
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
          if constexpr (K > 0) keep_cell(row, unit, count, active);
          keep_inner(row, unit, count, h, active);
        };

        Segment<T> segments[2];
        int segment_count = 0;
        if (reads_input) segments[segment_count++] = input_segment<T>(args.x + t * B * I, w_ih);
        if constexpr (Cell::kGatesState) {
          segments[segment_count++] = plain_segment(h_before, w_hh(1), 1);
          segments[segment_count++] = plain_segment<T>(inner, w_hh(2), 2);
        } else if constexpr (Cell::kRecurrent && !Cell::kHeads) {
          segments[segment_count++] = recurrent_segment<Cell>(h_read, w_hh(0));
        }
        if constexpr (Cell::kHeads) {
          for_each_head(units, head_panels, [&](int64_t head, const Range& own) {
            const int64_t first = head * recurrent;
            Segment<T> segment = recurrent_segment<Cell>(h_read + first, w_hh(head));
            segment.a_stride = P;
            product<T, G, Cell::kPre>(
                &segment, works ? 1 : 0, at.rows.begin, at.rows.end, own.begin, own.end, n % 2 != 0,
                [&](int64_t row, int64_t panel, const T* sums) {
                  step(row, first + panel * kLanes<T>, lanes_inside<T>(recurrent, panel), sums);
                });
          });
        } else {
          product<T, kGatesAtOnce, Cell::kPre>(
              segments, works ? segment_count : 0, at.rows.begin, at.rows.end, units.begin,
              units.end, n % 2 != 0, [&](int64_t row, int64_t panel, const T* sums) {
                step(row, panel * kLanes<T>, lanes_inside<T>(H, panel), sums);
              });
        }
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

// What a backward loop with layer normalisation works in, for one step, and adds up over the steps
// for each row.
template <class T>
struct NormScratch {
  T* d_x_normed;   // (B, G*H): gradients of the input part of the sums, normalised and scaled
  T* d_r_normed;   // (B, G*H): of the recurrent part; the same memory unless a sum stays apart
  T* d_output;     // (B, H), LSTM: of the output gate's sum
  T* d_c_normed;   // (B, H), LSTM: of the normalised c
  T* row_gain_ih;  // (B, G*H): what each row adds to the gradient of gain_ih
  T* row_gain_hh;  // (B, G*H)
  T* row_bias;     // (B, G*H)
  T* row_apart;    // (B, H): of the bias of a sum that stays apart
  T* row_gain_c;   // (B, H), LSTM
  T* row_bias_c;   // (B, H), LSTM
};

// What a backward loop keeps of one run of steps, which it goes through from the last.
template <class T>
struct ScanGradientRun {
  int64_t begin, end;  // in the order of processing
  int64_t first_time;  // the earliest of its time steps
  T* d_x_gates;        // (steps of a run, B, G*H)
  T* d_r_gates;        // the same memory unless a sum stays apart
  T* d_projected;      // with w_hr: (steps of a run, B, P), of h before it is shared out
  T* masked;           // with h_mask: (steps of a run, B, P), what w_hh saw
  NormScratch<T> norm;
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

// Adds to `count` of the numbers at to + offset; to nothing where there are none.
template <class T>
PYSEQ_FORCE_INLINE void add_to(T* to, int64_t offset, Vec<T> value, int count) {
  if (to != nullptr) store(to + offset, load(to + offset, count) + value, count);
}

// The second half of a step back with layer normalisation, whose first half went to each unit
// alone: the gradients that need whole rows.
template <class Cell, class T, class GatesBack>
void normed_back(const ScanBackward<T>& args, const ScanGradientRun<T>& run, const Steps& steps,
                 const Place& at, int64_t n, int64_t in_run, const GatesBack& gates_back) {
  constexpr int G = Cell::kGates;
  const int64_t B = args.batch, H = args.hidden, t = steps.time(n);
  const Range units = at.part(vectors<T>(H));
  const ScanNorm<T>& norm = args.norm;
  const NormScratch<T>& scratch = run.norm;
  const auto moments_of = [&](int64_t row, int which) {
    const T* const kept = norm.moments + ((t * B + row) * 3 + which) * 2;
    return Moments<T>{kept[0], kept[1]};
  };
  const auto each_active = [&](const auto& body) {
    for (int64_t row = at.rows.begin; row < at.rows.end; ++row) {
      if (steps.active(n, row)) body(row);
    }
  };
  if constexpr (Cell::kStates > 0) {
    each_active([&](int64_t row) {
      const T* const c_row = norm.c_sums + (t * B + row) * H;
      const T* const d_row = scratch.d_c_normed + row * H;
      const NormGradient<T> gradient =
          norm_gradient(c_row, moments_of(row, 2), H,
                        [&](int64_t i, int count) { return load(d_row + i, count); });
      for (int64_t panel = units.begin; panel < units.end; ++panel) {
        const int count = lanes_inside<T>(H, panel);
        const int64_t unit = panel * kLanes<T>;
        const Vec<T> d_c = gradient.of(load(c_row + unit, count), load(d_row + unit, count));
        gates_back(row, unit, count, Vec<T>{}, d_c);
        store(scratch.d_x_normed + (row * G + Cell::kOutput) * H + unit,
              load(scratch.d_output + row * H + unit, count), count);
      }
    });
    at.wait();
  }
  each_active([&](int64_t row) {
    const T* const sums[2] = {norm.x_sums + (t * B + row) * G * H,
                              norm.r_sums + (t * B + row) * G * H};
    const T* const gains[2] = {norm.gain_ih, norm.gain_hh};
    const T* const d_normed[2] = {scratch.d_x_normed + row * G * H,
                                  scratch.d_r_normed + row * G * H};
    T* const row_gains[2] = {scratch.row_gain_ih + row * G * H, scratch.row_gain_hh + row * G * H};
    T* const d_sums[2] = {run.d_x_gates + (in_run * B + row) * G * H,
                          run.d_r_gates + (in_run * B + row) * G * H};
    for (int part = 0; part < 2; ++part) {
      const Moments<T> of = moments_of(row, part);
      const auto d_scaled = [&](int64_t i, int count) {
        return load(d_normed[part] + i, count) * load(gains[part] + i, count);
      };
      const NormGradient<T> gradient = norm_gradient(sums[part], of, G * H, d_scaled);
      for (int64_t panel = units.begin; panel < units.end; ++panel) {
        const int count = lanes_inside<T>(H, panel);
        for (int g = 0; g < G; ++g) {
          const int64_t i = g * H + panel * kLanes<T>;
          const Vec<T> value = load(sums[part] + i, count), d = load(d_normed[part] + i, count);
          store(d_sums[part] + i, gradient.of(value, d_scaled(i, count)), count);
          add_to(row_gains[part], i, d * of.normed(value), count);
          if (part == 0) add_to(scratch.row_bias + row * G * H, i, d, count);
        }
      }
    }
    if constexpr (Cell::kPre > G) {
      for (int64_t panel = units.begin; panel < units.end; ++panel) {
        const int64_t unit = panel * kLanes<T>;
        const int count = lanes_inside<T>(H, panel);
        add_to(scratch.row_apart + row * H, unit, load(d_normed[1] + (G - 1) * H + unit, count),
               count);
      }
    }
  });
  at.wait();
}

template <class Cell, class T>
void clear_row_sums(const ScanBackward<T>& args, const NormScratch<T>& scratch) {
  const size_t units = static_cast<size_t>(args.batch * args.hidden) * sizeof(T);
  T* const of_gates[] = {scratch.row_gain_ih, scratch.row_gain_hh, scratch.row_bias};
  for (T* rows : of_gates) __builtin_memset(rows, 0, Cell::kGates * units);
  T* const of_units[] = {scratch.row_apart, scratch.row_gain_c, scratch.row_bias_c};
  for (T* rows : of_units) {
    if (rows != nullptr) __builtin_memset(rows, 0, units);
  }
}

// The sums over the rows of what they added to the gradients of gains and biases.
template <class Cell, class T>
void sum_norm_gradients(const ScanBackward<T>& args, const NormScratch<T>& scratch) {
  const int64_t B = args.batch, H = args.hidden, rows = Cell::kGates * H;
  sum_rows(scratch.row_gain_ih, B, rows, args.d_gain_ih);
  sum_rows(scratch.row_gain_hh, B, rows, args.d_gain_hh);
  sum_rows(scratch.row_bias, B, rows, args.d_b_ih);
  sum_rows(scratch.row_bias, B, rows, args.d_b_hh);
  if constexpr (Cell::kPre > Cell::kGates) {
    sum_rows(scratch.row_apart, B, H, args.d_b_hh + rows - H);
  }
  if constexpr (Cell::kStates > 0) {
    sum_rows(scratch.row_gain_c, B, H, args.d_gain_c);
    sum_rows(scratch.row_bias_c, B, H, args.d_bias_c);
  }
}

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
        own_weights = args.unit_weights + unit;
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
                         Vec<T> d_h = load(args.d_h + offset, count), d_gated = load(sums);
                         Cell::backward_gated(
                             load(args.gates + (t * B + row) * G * H + unit, count),
                             load(args.states + before * B * P + offset, count), d_h, d_gated);
                         store(args.d_h + offset, d_h, count);
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
  const T* const h_before =
      args.h_mask != nullptr ? run.masked : args.states + (t + (args.reverse ? 1 : 0)) * B * P;
  // Biases come after a normalisation, so theirs are other sums.
  accumulate(run.d_x_gates, gate_rows, args.x + t * B * I, I, args.d_w_ih,
             args.norm ? nullptr : args.d_b_ih);
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
    accumulate(run.d_r_gates, gate_rows, h_before, P, args.d_w_hh,
               args.norm ? nullptr : args.d_b_hh);
  }
  if (args.w_hr != nullptr) {
    accumulate(run.d_projected, P, args.inner + t * B * H, H, args.d_w_hr, nullptr);
  }
}

template <class T, class Cell, bool Normed>
void scan_backward_cell(const ScanBackward<T>& args) {
  constexpr int G = Cell::kGates;
  constexpr bool kApart = Cell::kPre > G;
  const int64_t B = args.batch, H = args.hidden, P = args.state_size;
  const bool projects = args.w_hr != nullptr;
  const int64_t length = smaller(args.steps, larger(1, kGradientRows / larger(1, B)));

  const int64_t heads = Cell::kHeads ? args.heads : 1, head_size = P / heads;
  const int64_t weights = (Cell::kRecurrent ? G * H * head_size : 0) + (projects ? P * H : 0);
  const int barriers = (projects || Cell::kGatesState ? 2 : 1) + (Normed ? 1 + Cell::kStates : 0);
  const StepCost cost{B, weights, 0, weights * static_cast<int64_t>(sizeof(T)), barriers};
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
      scan_backward_run<T, Cell, Normed>(args, run, w_hh, w_hr,
                                         place(plan, thread, present, B, teams));
    });
    scan_gradient_products<T, Cell>(args, run);
  }
  if constexpr (Normed) sum_norm_gradients<Cell>(args, run.norm);
}

template <class T>
void scan_forward(const ScanForward<T>& args) {
  if (args.norm) {
    with_cell(args.cell, [&](auto cell) { scan_forward_cell<T, decltype(cell), true>(args); });
  } else {
    with_any_cell(args.cell, [&](auto cell) { scan_forward_cell<T, decltype(cell), false>(args); });
  }
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
