// SPDX-License-Identifier: Apache-2.0
// A whole attention decoder as one loop over the target steps.
#pragma once

#include "decode_step.h"

namespace pyseq::cpu::PYSEQ_TIER {

template <class T, class Cell, class Score>
void decode_forward_cell(const Decode<T>& args) {
  constexpr int G = Cell::kGates;
  const int64_t B = args.batch, H = args.hidden, L = args.layer_count;
  const Plan plan = plan_decode(args, G, static_cast<int>(L) + 3 + (args.projects_query() ? 1 : 0));
  const bool packs = repays_packing(args.steps, B);

  Pieces<T> count(nullptr);
  DecoderWeights<T>::take(args, G, packs, /*folded=*/false, count);
  DecoderScratch<T>::take(args, plan.threads, count);
  Workspace workspace(count.bytes());
  Pieces<T> pieces(workspace.data());
  const auto weights = DecoderWeights<T>::take(args, G, packs, /*folded=*/false, pieces);
  const auto scratch = DecoderScratch<T>::take(args, plan.threads, pieces);
  Teams teams(plan);

  parallel(plan.threads, [&](int thread, int present) {
    weights.pack(L, thread, present);
    if (present > 1) teams.all.wait(present);

    const Place at = place(plan, thread, present, B, teams);
    for (int64_t t = 0; t < args.steps; ++t) {
      T* const output = args.output + t * B * H;
      const int64_t M = args.memory_size;
      const T* const context = args.context + (args.save ? t : 0) * B * M;
      const T* const fed = t == 0               ? args.feed
                           : args.feeds_context ? (args.save ? context - B * M : context)
                                                : output - B * H;
      DecoderStep<T> step{t,
                          t % 2 != 0,
                          slot_before(t, args.steps, false, args.save) * B * H,
                          slot_after(t, args.steps, false, args.save) * B * H,
                          args.feeding ? fed : nullptr,
                          output,
                          args.attn + t * args.attn_step,
                          nullptr,
                          /*folded=*/false};
      if (args.attends_first) {
        attend_step<T, Score>(args, weights, scratch, step, at, thread,
                              args.layers[L - 1].states + step.before);
        step.fed = context;
      }
      const T* const top = step_cells<T, Cell>(args, weights, scratch, step, at);
      if (args.attends_first) {
        combine_step(args, weights, step, at, top);
      } else {
        step_attention<T, Score>(args, weights, scratch, step, at, thread, top);
      }
    }
  });
}

template <class T>
void decode_forward(const Decode<T>& args) {
  with_cell(args.cell, [&](auto cell) {
    with_score(args.additive,
               [&](auto score) { decode_forward_cell<T, decltype(cell), decltype(score)>(args); });
  });
}

}  // namespace pyseq::cpu::PYSEQ_TIER
