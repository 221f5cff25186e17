// SPDX-License-Identifier: Apache-2.0
// A decoder on its own tokens as one loop: input of the last tokens, cells, attention, output
// layer, choice. A team searches its rows to the end and waits for no other team.
#pragma once

#include "gemm.h"
#include "search_beam.h"
#include "search_scheduled.h"

namespace pyseq::cpu::PYSEQ_TIER {

template <class T>
GenerateStatus generate(const Generate<T>& args) {
  GenerateParts<T> parts{};
  with_cell(args.decoder.cell, [&](auto cell) {
    using Cell = decltype(cell);
    parts.gates = Cell::kGates;
    parts.has_cell = Cell::kStates > 0;
    parts.cells = step_cells<T, Cell>;
    parts.inputs = input_parts<T, Cell::kGates>;
  });
  with_score(args.decoder.additive,
             [&](auto score) { parts.attend = attend_step<T, decltype(score)>; });

  const int64_t L = args.decoder.layer_count, H = args.decoder.hidden;
  const int gates = static_cast<int>(parts.gates);
  StepCost cost = decoder_cost(args.decoder, gates, static_cast<int>(L) + 5);
  const int64_t more = gates * H * args.embedding_size + H * args.vocab;
  cost.weights += more;
  cost.weight_bytes += more * static_cast<int64_t>(sizeof(T));
  cost.steps = args.max_length;
  // The hypotheses of a row stay together.
  const Plan plan = plan_steps(cost, args.decoder.threads, args.rows);

  Pieces<T> count(nullptr);
  Pieces<char> count_others(nullptr);
  GenerateMemory<T>::take(args, gates, parts.has_cell, plan, count, count_others);
  Workspace workspace(count.bytes() + count_others.bytes());
  Pieces<T> pieces(workspace.data());
  Pieces<char> others(static_cast<char*>(workspace.data()) + count.bytes());
  const auto memory = GenerateMemory<T>::take(args, gates, parts.has_cell, plan, pieces, others);

  DecoderLayer<T> layers[kMaxLayers];
  for (int64_t l = 0; l < L; ++l) {
    layers[l] = args.decoder.layers[l];
    layers[l].gates = memory.gates[l];
    layers[l].states = memory.states[l];
    layers[l].cells = memory.cells[l];
  }
  Decode<T> decoder = args.decoder;
  decoder.layers = layers;
  decoder.query = memory.query;
  decoder.context = memory.context;
  decoder.positions = memory.positions;
  decoder.centers = memory.centers;
  if (memory.folded != nullptr) {
    const int64_t M = decoder.memory_size;
    gemm<T>({.m = args.rows * decoder.source,
             .n = H,
             .k = M,
             .threads = decoder.threads,
             .a = decoder.memory,
             .a_row = M,
             .a_column = 1,
             .b = decoder.combine,
             .b_row = 1,
             .b_column = M + H,
             .bias = nullptr,
             .c = memory.folded,
             .c_row = H,
             .accumulate = false,
             .a_sums = nullptr});
    decoder.memory = memory.folded;
    decoder.memory_size = H;
  }
  GenerateTeam<T> shared[kMaxTeams] = {};
  Teams teams(plan);

  parallel(plan.threads, [&](int thread, int present) {
    memory.pack(L, thread, present);
    if (present > 1) teams.all.wait(present);
    const Place at = place(plan, thread, present, args.rows, teams);
    const int64_t team = at.barrier - teams.team;
    T* const inputs = memory.inputs + team * memory.input_rows * gates * H;
    if (args.scheduled != nullptr) {
      ScheduledReader<T>(args, parts, memory, decoder, at, inputs, thread).run();
    } else {
      Searcher<T>(args, parts, memory, decoder, at, shared[team], inputs, thread).run();
    }
  });

  GenerateStatus status = GenerateStatus::kDone;
  for (int team = 0; team < plan.teams; ++team) {
    if (shared[team].status != GenerateStatus::kDone) status = shared[team].status;
    if (shared[team].trace == nullptr) continue;
    GenerateStep<T>* first = shared[team].trace;
    while (first->before != nullptr) first = first->before;
    first->before = *args.trace;
    *args.trace = shared[team].trace;
  }
  return status;
}

}  // namespace pyseq::cpu::PYSEQ_TIER
