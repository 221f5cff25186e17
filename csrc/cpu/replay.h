// SPDX-License-Identifier: Apache-2.0
// The states of a run once more, from the gates that forward kept: no product, and so cheaper than
// to write the states out forward and keep them for backward.
#pragma once

#include "scan_steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

template <class T, class Cell>
void replay_cell(const Replay<T>& args) {
  constexpr int G = Cell::kGates, K = Cell::kStates;
  const int64_t B = args.batch, H = args.hidden, panels = vectors<T>(H);
  const Steps steps{args.steps, B, args.reverse, args.lengths, nullptr};
  const Plan plan = plan_free(args.steps * B * H * kUnitCost, args.threads);
  parallel(plan.threads, [&](int thread, int present) {
    const Range mine = share(B * panels, thread, present);
    for (int64_t n = 0; n < args.steps; ++n) {
      const int64_t t = steps.time(n);
      const int64_t before = slot_before(n, args.steps, args.reverse, /*all=*/true) * B * H;
      const int64_t after = slot_after(n, args.steps, args.reverse, /*all=*/true) * B * H;
      int64_t row = mine.begin / panels, panel = mine.begin % panels;
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int count = lanes_inside<T>(H, panel);
        const int64_t unit = panel * kLanes<T>, offset = row * H + unit;
        Vec<T> h = load(args.states + before + offset, count), c[at_least_one(K)];
        if constexpr (K > 0) c[0] = load(args.cells + before + offset, count);
        if (steps.active(n, row)) {
          Vec<T> saved[Cell::kPre] = {};
          load_each<G>(args.gates + (t * B + row) * G * H + unit, H, count, saved);
          Cell::template replay<Math<T>>(saved, h, c);
        }
        store(args.states + after + offset, h, count);
        if constexpr (K > 0) store(args.cells + after + offset, c[0], count);
        if (++panel == panels) {
          panel = 0;
          ++row;
        }
      }
    }
  });
}

template <class T>
void replay(const Replay<T>& args) {
  if (args.cell == CellKind::kLstmPeephole) return replay_cell<T, LstmPeephole>(args);
  with_cell(args.cell, [&](auto cell) { replay_cell<T, decltype(cell)>(args); });
}

}  // namespace pyseq::cpu::PYSEQ_TIER
