// SPDX-License-Identifier: Apache-2.0
// One step of one row of a scan with layer normalisation, made by the threads of a block: the sums
// of the input and of the recurrent part, each over all gates, and c are normalised. The order of
// a row's sum depends on nothing but the number of threads.
#pragma once

#include "scan_unit.h"

namespace pyseq::cuda {

// Added to the variance: the usual number, torch's and that of the papers' own code.
constexpr double kNormEpsilon = 1e-5;

// What a row is normalised with: (value - mean) * scale.
template <class A>
struct Moments {
  A mean, scale;

  PYSEQ_DEVICE A normed(A value) const { return (value - mean) * scale; }
};

// The mean of term(i) over a row, the same in each thread.
template <class A, class Term>
PYSEQ_DEVICE A row_mean(Index size, A* scratch, const Term& term) {
  A sum = 0;
  for (Index i = thread_index(); i < size; i += thread_count()) sum += term(i);
  const A mean = block_sum(sum, scratch) / static_cast<A>(size);
  sync_threads();  // before the scratch is used again
  return mean;
}

// In two passes: the mean of squares less the square of the mean would cancel.
template <class A, class Number>
PYSEQ_DEVICE Moments<A> moments(const Number* row, Index size, A* scratch) {
  const A mean = row_mean(size, scratch, [&](Index i) { return widen(row[i]); });
  const A variance = row_mean(size, scratch, [&](Index i) {
    const A deviation = widen(row[i]) - mean;
    return deviation * deviation;
  });
  return {mean, Math<A>::inverse_root(variance + static_cast<A>(kNormEpsilon))};
}

// What the gradient of a normalised row, times its gain, has to lose: both means over the row.
//   d_value = scale * (d_normed - mean(d_normed) - normed * mean(d_normed * normed))
template <class A>
struct NormGradient {
  Moments<A> moments;
  A mean, mean_normed;

  PYSEQ_DEVICE A of(A value, A d_normed) const {
    return moments.scale * (d_normed - mean - moments.normed(value) * mean_normed);
  }
};

// d_normed(i): what the gradient of the normalised row is there.
template <class A, class Number, class Gradient>
PYSEQ_DEVICE NormGradient<A> norm_gradient(const Number* row, const Moments<A>& of, Index size,
                                           A* scratch, const Gradient& d_normed) {
  const A mean = row_mean(size, scratch, d_normed);
  const A mean_normed =
      row_mean(size, scratch, [&](Index i) { return d_normed(i) * of.normed(widen(row[i])); });
  return {of, mean, mean_normed};
}

template <class Body>
PYSEQ_DEVICE void each_of_row(Index size, const Body& body) {
  for (Index i = thread_index(); i < size; i += thread_count()) body(i);
}

// ---- Forward ---------------------------------------------------------------------------

// `scratch`: a number for each warp, in shared memory.
template <class Cell, class S>
PYSEQ_DEVICE void normed_row(const ScanForward<S>& args, const Step& step, Index row,
                             Accumulate<S>* scratch) {
  using A = Accumulate<S>;
  constexpr int G = Cell::kGates, K = Cell::kStates;
  const Index B = args.batch, H = args.hidden;
  const ScanNorm<S>& norm = args.norm;
  const bool active = is_active(args, step.t, row);
  const Index kept = args.save ? step.t : 0;
  const S* const x_row = norm.x_sums + (step.t * B + row) * G * H;
  const A* const r_row = norm.r_sums + (kept * B + row) * G * H;
  S* const gates = args.gates + (kept * B + row) * G * H;
  const auto keep_moments = [&](int which, const Moments<A>& of) {
    if (!args.save || thread_index() != 0) return;
    A* const to = norm.moments + ((step.t * B + row) * 3 + which) * 2;
    to[0] = of.mean;
    to[1] = of.scale;
  };
  Moments<A> of_x{}, of_r{};
  if (active) {
    of_x = moments(x_row, G * H, scratch);
    of_r = moments(r_row, G * H, scratch);
    keep_moments(0, of_x);
    keep_moments(1, of_r);
  }
  each_of_row(H, [&](Index unit) {
    A before[at_least_one(K)], c[at_least_one(K)];
    PYSEQ_UNROLL
    for (int k = 0; k < K; ++k) {
      before[k] = c[k] = args.cells[((step.before * B + row) * K + k) * H + unit];
    }
    A h = args.w_hr != nullptr ? A(0) : widen(args.states[(step.before * B + row) * H + unit]);
    if (active) {
      A pre[Cell::kPre];
      if constexpr (Cell::kPre > G) pre[G] = 0;
      PYSEQ_UNROLL
      for (int g = 0; g < G; ++g) {
        const Index i = g * H + unit;
        pre[g] = widen(norm.gain_ih[i]) * of_x.normed(widen(x_row[i]));
        if (norm.bias != nullptr) pre[g] += widen(norm.bias[i]);
      }
      PYSEQ_UNROLL
      for (int g = 0; g < G; ++g) {
        const Index i = g * H + unit;
        A r = widen(norm.gain_hh[i]) * of_r.normed(r_row[i]);
        if (Cell::recurrent_slot(g) != g && args.apart_bias != nullptr) {
          r += widen(args.apart_bias[unit]);
        }
        pre[Cell::recurrent_slot(g)] += r;
      }
      const A* const no_weights = nullptr;
      Cell::template forward<Math<A>>(pre, no_weights, h, c);
      // The output gate is read again below.
      if (args.save || K > 0) {
        PYSEQ_UNROLL
        for (int g = 0; g < G; ++g) gates[g * H + unit] = narrow<S>(pre[g]);
      }
      if constexpr (Cell::kPre > G) {
        if (args.save) args.apart[(step.t * B + row) * H + unit] = narrow<S>(pre[G]);
      }
      if constexpr (K > 0) norm.c_sums[(kept * B + row) * H + unit] = c[0];
    }
    if constexpr (K > 0) {
      keep_cell<K>(args, step, row, unit, active, before, c);
    } else {
      keep_inner(args, step, row, unit, active, h);
    }
  });
  if constexpr (K > 0) {
    const A* const c_row = norm.c_sums + (kept * B + row) * H;
    Moments<A> of_c{};
    if (active) {
      sync_threads();  // the whole row of c is there
      of_c = moments(c_row, H, scratch);
      keep_moments(2, of_c);
    }
    each_of_row(H, [&](Index unit) {
      A h = 0;
      if (active) {
        const A c = widen(norm.gain_c[unit]) * of_c.normed(c_row[unit]) + widen(norm.bias_c[unit]);
        h = Cell::template output<Math<A>>(widen(gates[Cell::kOutput * H + unit]), c);
      }
      keep_inner(args, step, row, unit, active, h);
    });
  }
}

// ---- Backward --------------------------------------------------------------------------

// d_state(unit, active, d_y): its StateGradient, asked for once. It is stored in the state's
// buffer, unless a projection has done that.
template <class Cell, class S, class DState>
PYSEQ_DEVICE void normed_row_back(const ScanBackward<S>& args, const Step& step, Index row,
                                  Accumulate<S>* scratch, const DState& d_state) {
  using A = Accumulate<S>;
  constexpr int G = Cell::kGates, K = Cell::kStates;
  const Index B = args.batch, H = args.hidden, at_t = step.t * B + row;
  const ScanNorm<S>& norm = args.norm;
  const bool projects = args.w_hr != nullptr;
  const bool active = step.n >= 0 && is_active(args, step.t, row);
  // Gradients of the normalised sums of each part, of the output gate's, and of c.
  A* const d_x_normed = args.scratch + row * (2 * G + 2) * H;
  A* const d_r_normed = d_x_normed + G * H;
  A* const d_output = d_r_normed + G * H;
  A* const d_c_normed = d_output + H;
  const auto moments_of = [&](int which) {
    const A* const kept = norm.moments + (at_t * 3 + which) * 2;
    return Moments<A>{kept[0], kept[1]};
  };
  // To the gates, of which the first half of the way is the cell's.
  const auto gates_back = [&](Index unit, const UnitSaved<S, Cell>& in, A d_h, A d_c_own) {
    return cell_back<Cell>(args, step, row, unit, in, d_h, d_c_own, [&](int gate, A d_x, A d_r) {
      d_x_normed[gate * H + unit] = d_x;
      d_r_normed[gate * H + unit] = d_r;
    });
  };
  each_of_row(H, [&](Index unit) {
    const UnitSaved<S, Cell> in = load_saved<Cell>(args, step, row, unit);
    const StateGradient<A> d = d_state(unit, active, in.d_y);
    cut_cell<Cell>(args, step, row, unit);
    const Index offset = row * H + unit;
    if (!active) {
      if (!projects) args.d_h[offset] = d.d_h;
      if (step.n >= 0) no_gates<Cell>(args, step, row, unit);
      return;
    }
    A passed = d.zoned;  // to the state before, past the weights
    if constexpr (K > 0) {
      const A gain = widen(norm.gain_c[unit]);
      const A normed = moments_of(2).normed(norm.c_sums[at_t * H + unit]);
      A d_c;
      Cell::template output_backward<Math<A>>(in.gates[Cell::kOutput],
                                              gain * normed + widen(norm.bias_c[unit]), d.d_h,
                                              d_output[unit], d_c);
      d_c_normed[unit] = d_c * gain;
      args.row_gain_c[offset] += d_c * normed;
      args.row_bias_c[offset] += d_c;
    } else {
      passed += gates_back(unit, in, d.d_h, A(0));
    }
    if (!projects) args.d_h[offset] = passed;
  });
  if (!active) return;
  sync_threads();
  if constexpr (K > 0) {
    const A* const c_row = norm.c_sums + at_t * H;
    const NormGradient<A> gradient =
        norm_gradient(c_row, moments_of(2), H, scratch, [&](Index i) { return d_c_normed[i]; });
    each_of_row(H, [&](Index unit) {
      gates_back(unit, load_saved<Cell>(args, step, row, unit), A(0),
                 gradient.of(c_row[unit], d_c_normed[unit]));
      d_x_normed[Cell::kOutput * H + unit] = d_output[unit];
      d_r_normed[Cell::kOutput * H + unit] = d_output[unit];
    });
    sync_threads();
  }
  const auto part_back = [&](const auto* sums, int which, const S* gain, const A* d_normed,
                             A* row_gain, S* d_sums) {
    const auto d_scaled = [&](Index i) { return d_normed[i] * widen(gain[i]); };
    const Moments<A> of = moments_of(which);
    const NormGradient<A> gradient = norm_gradient(sums, of, G * H, scratch, d_scaled);
    each_of_row(G * H, [&](Index i) {
      const A value = widen(sums[i]);
      d_sums[at_t * G * H + i] = narrow<S>(gradient.of(value, d_scaled(i)));
      row_gain[row * G * H + i] += d_normed[i] * of.normed(value);
    });
  };
  part_back(norm.x_sums + at_t * G * H, 0, norm.gain_ih, d_x_normed, args.row_gain_ih,
            args.d_x_gates);
  part_back(norm.r_sums + at_t * G * H, 1, norm.gain_hh, d_r_normed, args.row_gain_hh,
            args.d_r_gates);
  each_of_row(G * H, [&](Index i) { args.row_bias[row * G * H + i] += d_x_normed[i]; });
  if constexpr (Cell::kPre > G) {
    each_of_row(
        H, [&](Index unit) { args.row_apart[row * H + unit] += d_r_normed[(G - 1) * H + unit]; });
  }
}

}  // namespace pyseq::cuda
