// SPDX-License-Identifier: Apache-2.0
// A whole attention decoder as one loop over the target steps.
#pragma once

#include "decode_step.h"
#include "gemm.h"

namespace pyseq::cpu::PYSEQ_TIER {

// What a loop writes again at every step, in memory of each team's own; see RowsApart: the states,
// and context and query unless those of every step are kept.
template <class T>
struct DecoderApart {
  RowsApart<T> states, contexts, queries;
  int64_t layer_count, arrays;  // of states: h and, if the cell has it, c of each layer
  T* memory;

  static DecoderApart take(const Decode<T>& args, const Plan& plan, bool has_cell,
                           Pieces<T>& pieces) {
    const int64_t B = args.batch;
    DecoderApart all{{plan, 2, B, args.hidden},
                     {plan, 1, B, args.context_step == 0 ? args.memory_size : 0},
                     {plan, 1, B, args.projects_query() && !args.save ? args.key_size : 0},
                     args.layer_count,
                     has_cell ? 2 : 1,
                     nullptr};
    all.memory = pieces.take(all.arrays * args.layer_count * all.states.size() +
                             all.contexts.size() + all.queries.size());
    return all;
  }

  Slots<T> of(const Place& at, int64_t layer, int64_t array) const {
    return states.of(at, memory + (layer * arrays + array) * states.size());
  }

  // Lets `own`, a copy of `args`, and its layers work there.
  void enter(const Place& at, const Decode<T>& args, Decode<T>& own,
             DecoderLayer<T>* layers) const {
    for (int64_t l = 0; l < layer_count; ++l) {
      layers[l] = args.layers[l];
      layers[l].states = of(at, l, 0).data;
      if (at.member == 0) states.copy(at, args.layers[l].states, layers[l].states);
      if (arrays == 1) continue;
      layers[l].cells = of(at, l, 1).data;
      if (at.member == 0) states.copy(at, args.layers[l].cells, layers[l].cells);
    }
    own.layers = layers;
    T* const others = memory + layer_count * arrays * states.size();
    if (args.context_step == 0) own.context = contexts.of(at, others).data;
    if (args.projects_query() && !args.save)
      own.query = queries.of(at, others + contexts.size()).data;
  }

  // Hands back what goes on after the last step.
  void leave(const Place& at, const Decode<T>& args, const Decode<T>& own) const {
    if (at.member != 0) return;
    const int64_t slot = slot_before(args.steps, args.steps, false, false);
    const int64_t last = slot * args.batch * args.hidden;
    for (int64_t l = 0; l < layer_count; ++l) {
      states.copy(at, of(at, l, 0)[slot], args.layers[l].states + last);
      if (arrays == 2) states.copy(at, of(at, l, 1)[slot], args.layers[l].cells + last);
    }
    if (args.context_step == 0) contexts.copy(at, own.context, args.context);
  }
};

// Whether the combination is applied to the memory ahead, so that steps only add up what it makes
// of it: one product in place of a smaller one at every step, which pays where the steps are no
// fewer than the positions. Nobody may want the contexts themselves.
template <class T>
bool folds_memory(const Decode<T>& args) {
  return args.combine != nullptr && !args.save && !args.attends_first && !args.feeds_context &&
         !args.by_rows() && args.source_rows == nullptr && args.source <= args.steps;
}

// What takes the place of memory and context then.
template <class T>
struct FoldedMemory {
  T* memory;   // (B, S, H)
  T* context;  // (B, H)

  static FoldedMemory take(const Decode<T>& args, bool folded, Pieces<T>& pieces) {
    const int64_t rows = folded ? args.batch : 0;
    return {pieces.take(rows * args.source * args.hidden), pieces.take(rows * args.hidden)};
  }

  // Lets `own`, a copy of `args`, attend to what is made here.
  void enter(const Decode<T>& args, Decode<T>& own) const {
    const int64_t H = args.hidden, M = args.memory_size;
    gemm<T>({.m = args.batch * args.source,
             .n = H,
             .k = M,
             .threads = args.threads,
             .a = args.memory,
             .a_row = M,
             .a_column = 1,
             .b = args.combine,
             .b_row = 1,
             .b_column = M + H,
             .bias = nullptr,
             .c = memory,
             .c_row = H,
             .accumulate = false,
             .a_sums = nullptr});
    own.memory = memory;
    own.context = context;
  }
};

template <class T, class Cell, class Score>
void decode_forward_cell(const Decode<T>& given) {
  constexpr int G = Cell::kGates;
  const int64_t B = given.batch, H = given.hidden, L = given.layer_count;
  const bool folded = folds_memory(given);
  Decode<T> args = given;
  if (folded) args.memory_size = H;
  const int barriers = static_cast<int>(L) + (folded ? 1 : 3) + (given.projects_query() ? 1 : 0);
  const StepCost cost = decoder_cost(given, G, barriers, folded);
  const Plan plan = plan_steps(cost, given.threads);
  const bool packs = repays_packing(given.steps, B, H, cost.weight_bytes);

  Pieces<T> count(nullptr);
  DecoderWeights<T>::take(given, G, packs, folded, count);
  DecoderScratch<T>::take(args, plan.threads, count);
  DecoderApart<T>::take(args, plan, Cell::kStates > 0, count);
  FoldedMemory<T>::take(given, folded, count);
  Workspace workspace(count.bytes());
  Pieces<T> pieces(workspace.data());
  const auto weights = DecoderWeights<T>::take(given, G, packs, folded, pieces);
  const auto scratch = DecoderScratch<T>::take(args, plan.threads, pieces);
  const auto apart = DecoderApart<T>::take(args, plan, Cell::kStates > 0, pieces);
  const auto memory = FoldedMemory<T>::take(given, folded, pieces);
  if (folded) memory.enter(given, args);
  const bool keeps_apart = plan.teams > 1 && args.steps > 0;
  Teams teams(plan);

  parallel(plan.threads, [&](int thread, int present) {
    const Place at = place(plan, thread, present, B, teams);
    Decode<T> own = args;
    DecoderLayer<T> layers[kMaxLayers];
    if (keeps_apart) apart.enter(at, args, own, layers);
    const int64_t slot_size = (keeps_apart ? at.rows.size() : B) * H;
    weights.pack(L, thread, present);
    if (present > 1) teams.all.wait(present);

    for (int64_t t = 0; t < args.steps; ++t) {
      T* const output = args.output + t * B * H;
      const T* const context = own.context + t * args.context_step;
      const T* const fed = t == 0               ? args.feed
                           : args.feeds_context ? context - args.context_step
                                                : output - B * H;
      const auto past = [&](int64_t slot) {
        return args.taps == 0 ? nullptr : args.past + slot * B * args.head_count() * args.source;
      };
      DecoderStep<T> step{t,
                          t % 2 != 0,
                          slot_before(t, args.steps, false, /*all=*/false) * slot_size,
                          slot_after(t, args.steps, false, /*all=*/false) * slot_size,
                          args.feeding ? fed : nullptr,
                          output,
                          args.attn + t * args.attn_step,
                          past(slot_before(t, args.steps, false, args.save)),
                          past(slot_after(t, args.steps, false, args.save)),
                          folded};
      if (args.attends_first) {
        attend_step<T, Score>(own, weights, scratch, step, at, thread,
                              own.layers[L - 1].states + step.before);
        step.fed = context;
      }
      const T* const top = step_cells<T, Cell>(own, weights, scratch, step, at);
      if (!args.attends_first) {
        attend_step<T, Score>(own, weights, scratch, step, at, thread, top);
      }
      combine_step(own, weights, step, at, top);
    }
    if (keeps_apart) apart.leave(at, args, own);
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
