// SPDX-License-Identifier: Apache-2.0
// Layer normalisation of a scan's sums: what each step has besides, forward and backward.
#pragma once

#include "norm.h"
#include "scan_steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

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

}  // namespace pyseq::cpu::PYSEQ_TIER
