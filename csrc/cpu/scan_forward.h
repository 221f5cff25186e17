// SPDX-License-Identifier: Apache-2.0
// One recurrent layer over a whole sequence. With few rows the input's product was made before (it
// lies in `gates`).
#pragma once

#include "scan_norm.h"
#include "turns.h"

namespace pyseq::cpu::PYSEQ_TIER {

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
  constexpr int64_t kBytes = sizeof(T);
  const StepCost cost{B,        weights,   0, weights * kBytes, (projects ? P + H : P) * kBytes,
                      barriers, args.steps};
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
  const bool packs =
      args.quantized_hh == nullptr && repays_packing(args.steps, B, P, weights * kBytes);
  const int64_t w_ih_size = packs && reads_input ? w_ih.packed_size() : 0;
  const int64_t w_hh_size = packs ? blocks * w_block.packed_size() : 0;
  const int64_t w_hr_size = packs && projects ? w_hr.packed_size() : 0;
  const RowsApart<T> h_apart(plan, 2, B, P), c_apart(plan, 2, B, K * H);
  const bool apart = plan.teams > 1 && !args.slots;
  const int64_t packed_size = w_ih_size + w_hh_size + w_hr_size;
  const int64_t states_size = apart ? h_apart.size() + c_apart.size() : 0;
  Workspace workspace(static_cast<size_t>(packed_size + states_size) * sizeof(T));
  T* const apart_states = static_cast<T*>(workspace.data()) + packed_size;
  if (packs) {
    w_block.packed = static_cast<T*>(workspace.data());
    if (reads_input) w_ih.packed = w_block.packed + w_hh_size;
    if (projects) w_hr.packed = w_block.packed + w_hh_size + w_ih_size;
  }
  Teams teams(plan);
  const bool begins = begins_backwards(args.steps);

  parallel(plan.threads, [&](int thread, int present) {
    const Place at = place(plan, thread, present, B, teams);
    Slots<T> states{args.states, B * P}, cells{args.cells, B * K * H};
    if (apart) {
      states = h_apart.of(at, apart_states);
      if (K > 0) cells = c_apart.of(at, apart_states + h_apart.size());
      if (at.member == 0) {
        h_apart.copy(at, args.states, states[0]);
        if (K > 0) c_apart.copy(at, args.cells, cells[0]);
      }
    }
    pack_rows(w_ih, thread, present);
    for (int64_t block = 0; block < blocks; ++block) pack_rows(w_hh(block), thread, present);
    pack_rows(w_hr, thread, present);
    if (present > 1) teams.all.wait(present);

    const Range units = at.part(heads * head_panels), outputs = at.part(state_panels);
    for (int64_t n = 0; n < args.steps; ++n) {
      const int64_t t = steps.time(n);
      const bool backwards = (n % 2 != 0) != begins;
      const int64_t before = slot_before(n, args.steps, args.reverse, args.slots);
      const int64_t after = slot_after(n, args.steps, args.reverse, args.slots);
      const T* h_before = states[before];
      T* h_after = states[after];
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
        const T* c_prev = cells[before] + row * K * H + unit;
        T* c_next = cells[after] + row * K * H + unit;
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
                         units.end, backwards, [&](int64_t row, int64_t panel, const T* sums) {
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
              c_prev = cells[before] + offset;
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
              if (active) store(cells[after] + offset, load(c_own, count), count);
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
          const Segment<T> first = plain_segment(h_read, w_hh(0));
          product<T, 1, 1>(&first, works ? 1 : 0, at.rows.begin, at.rows.end, units.begin,
                           units.end, backwards, [&](int64_t row, int64_t panel, const T* sums) {
                             const int count = lanes_inside<T>(H, panel);
                             const int64_t unit = panel * kLanes<T>, offset = row * H + unit;
                             Vec<T> gated = {};
                             if (steps.active(n, row)) {
                               T* const sum = args.gates + (t * B + row) * G * H + unit;
                               const Vec<T> pre = load(sum, count) + load(sums);
                               store(sum, pre, count);
                               gated =
                                   Cell::template gated<Math<T>>(pre, load(h_read + offset, count));
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
            c_prev = cells[before] + row * K * H + unit;
            c_next = cells[after] + row * K * H + unit;
          }
          Vec<T> h = {};
          if (active) {
            T* gates = args.gates == nullptr ? nullptr : args.gates + (t * B + row) * G * H + unit;
            const T* x = reads_input ? (args.bias == nullptr ? nullptr : args.bias + unit) : gates;
            T* apart = args.apart == nullptr ? nullptr : args.apart + t * B * H + offset;
            const T* apart_bias = args.apart_bias == nullptr ? nullptr : args.apart_bias + unit;
            // With a projection no cell that reads h_prev comes here, only LSTM.
            const T* h_prev = projects ? c_prev : h_before + offset;
            const T* own = args.unit_weights == nullptr
                               ? nullptr
                               : args.unit_weights + row * args.unit_weights_stride + unit;
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
          segments[segment_count++] = plain_segment(h_read, w_hh(1), 1);
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
                &segment, works ? 1 : 0, at.rows.begin, at.rows.end, own.begin, own.end, backwards,
                [&](int64_t row, int64_t panel, const T* sums) {
                  step(row, first + panel * kLanes<T>, lanes_inside<T>(recurrent, panel), sums);
                });
          });
        } else {
          product<T, kGatesAtOnce, Cell::kPre>(
              segments, works ? segment_count : 0, at.rows.begin, at.rows.end, units.begin,
              units.end, backwards, [&](int64_t row, int64_t panel, const T* sums) {
                step(row, panel * kLanes<T>, lanes_inside<T>(H, panel), sums);
              });
        }
      }
      if constexpr (Cell::kRecurrent) at.wait();
      if (projects) {
        const Segment<T> projection = plain_segment(inner, w_hr);
        product<T, 1, 1>(&projection, works ? 1 : 0, at.rows.begin, at.rows.end, outputs.begin,
                         outputs.end, backwards, [&](int64_t row, int64_t panel, const T* sums) {
                           keep_state(row, panel * kLanes<T>, lanes_inside<T>(P, panel), load(sums),
                                      steps.active(n, row));
                         });
        at.wait();
      }
    }
    if (apart && at.member == 0) {
      const int64_t last = slot_before(args.steps, args.steps, args.reverse, false);
      h_apart.copy(at, states[last], args.states + last * B * P);
      if (K > 0) c_apart.copy(at, cells[last], args.cells + last * B * K * H);
    }
  });
}

template <class T>
void scan_forward(const ScanForward<T>& args) {
  if (args.norm) {
    with_cell(args.cell, [&](auto cell) { scan_forward_cell<T, decltype(cell), true>(args); });
  } else {
    with_any_cell(args.cell, [&](auto cell) { scan_forward_cell<T, decltype(cell), false>(args); });
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
