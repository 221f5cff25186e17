// SPDX-License-Identifier: Apache-2.0
// The memory of a search and what of its steps depends on the decoder; search_steps.h works in it.
#pragma once

#include "decode_step.h"

namespace pyseq::cpu::PYSEQ_TIER {

constexpr int32_t kStart = 1, kStop = 2;  // of pyseq.types; <pad> is 0

// Panels of the output layer that a thread takes together, with the maximum and the sum of
// their softmax. Fixed, so that the bits do not depend on the number of threads.
constexpr int64_t kChunk = 8;
// Tokens whose products with the input weights are made at a time.
constexpr int64_t kFresh = 16;
// The most memory for those products, in each team.
constexpr int64_t kInputBytes = 8 << 20;

// A continuation of a hypothesis by one token.
template <class T>
struct Candidate {
  T score;         // log P
  int32_t parent;  // the hypothesis, counted from the team's first
  int32_t token;
};

// The unfinished hypotheses of a team as one of its members knows them: those of a row lie
// side by side, the best one first.
template <class T>
struct Hypotheses {
  int64_t count;
  T* scores;        // log P
  int32_t* tokens;  // the last one
  int32_t* rows;    // of the batch
  int32_t* draws;   // with sampling: which of the row's
};

// The memory of a search, but for its trace. Taken twice, as in decode_step.h; what is not of
// type T comes from `others`.
template <class T>
struct GenerateMemory {
  DecoderWeights<T> weights;
  DecoderScratch<T> scratch;
  Weights<T> w_x, w_output;
  T* states[kMaxLayers];  // each (2, N, H), in turns before and after a step
  T* cells[kMaxLayers];   // likewise, or null
  T* gates[kMaxLayers];   // (N, G*H), the first layer's input part; null for the others
  T* folded;              // (rows, S, H): the combination of the memory, or null
  T *query, *context, *output;
  T* attn;                   // (N*heads, S)
  T* fed;                    // (N, F)
  T *positions, *centers;    // as in Decode, or null
  T* pasts;                  // with taps: (2, N*heads, S), like the states
  T* logits;                 // (N, logit_stride)
  T *peaks, *masses;         // (N, chunk_stride): of a chunk max x, and sum exp(x - max)
  T* inputs;                 // (teams, input_rows, G*H): input parts of the gates, by token
  T* fresh;                  // (threads, kFresh, E), embeddings that have none yet
  T* scores;                 // (threads, 2, N)
  T* best_ranks;             // (threads, rows, n_best)
  int32_t* numbers;          // (threads, 7, N): tokens, rows, draws (twice each) and parents
  int64_t* counts;           // (threads, N): steps before the next one, where windows need it
  int32_t* places;           // (threads, V): where the input part of a token is, or -1
  Candidate<T>* candidates;  // (threads, 2 * beam_size)
  T* allowed;                // with sampling: (threads, V), logits
  Candidate<T>* pool;        // with sampling: (threads, V)
  T* covered;                // with a coverage penalty: (threads, 2, N, S), sums of weights
  T* masked;                 // (N, H), outputs times their dropout masks; null without
  int64_t logit_stride, chunks, chunk_stride, input_rows;

  static GenerateMemory take(const Generate<T>& args, int gates, bool has_cell, const Plan& plan,
                             Pieces<T>& pieces, Pieces<char>& others) {
    const Decode<T>& decoder = args.decoder;
    const int64_t N = decoder.batch, H = decoder.hidden, E = args.embedding_size, V = args.vocab;
    // Results are about as long as their sources, whatever the limit.
    const int64_t S = decoder.source, steps = S > 0 ? smaller(args.max_length, S) : args.max_length;
    const bool packs = repays_packing(steps, N, H, decoder_cost(decoder, gates, 0).weight_bytes);
    // Positions are combined once, hypotheses at every step. For as many of the one as of the
    // other it would not repay: of a few rows the product costs little more than half of it.
    const bool folded =
        decoder.combine != nullptr && folds(decoder) && N * steps >= 2 * args.rows * S;
    const auto packed = [&](Weights<T> weights) {
      if (packs && weights.quantized == nullptr) {
        weights.packed = pieces.take(weights.packed_size());
      }
      return weights;
    };
    GenerateMemory memory{};
    memory.weights = DecoderWeights<T>::take(decoder, gates, packs, folded, pieces);
    if (folded) memory.folded = pieces.take(args.rows * S * H);
    memory.scratch = DecoderScratch<T>::take(decoder, plan.threads, pieces);
    memory.w_x = packed({args.w_x, args.w_x_stride, H, gates, E, nullptr, args.quantized_x});
    memory.w_output = packed({args.w_output, H, V, 1, H, nullptr});
    for (int64_t l = 0; l < decoder.layer_count; ++l) {
      memory.states[l] = pieces.take(2 * N * H);
      if (has_cell) memory.cells[l] = pieces.take(2 * N * H);
    }
    memory.gates[0] = pieces.take(N * gates * H);
    memory.query = pieces.take(N * decoder.key_size);
    memory.context = pieces.take(N * larger(decoder.memory_size, H));
    memory.attn = pieces.take(N * decoder.head_count() * S);
    memory.output = pieces.take(N * H);
    memory.fed = pieces.take(N * decoder.fed_size());
    if (decoder.w_position != nullptr) {
      memory.positions = pieces.take(N * decoder.position_size);
      memory.centers = pieces.take(N);
    }
    if (decoder.taps > 0) memory.pasts = pieces.take(2 * N * decoder.head_count() * S);

    memory.logit_stride = vectors<T>(V) * kLanes<T>;
    memory.chunks = (vectors<T>(V) + kChunk - 1) / kChunk;
    memory.chunk_stride = vectors<T>(memory.chunks) * kLanes<T>;
    memory.logits = pieces.take(N * memory.logit_stride);
    memory.peaks = pieces.take(N * memory.chunk_stride);
    memory.masses = pieces.take(N * memory.chunk_stride);

    // At least those of one step.
    const int64_t row_bytes = gates * H * static_cast<int64_t>(sizeof(T));
    memory.input_rows = smaller(V, larger(N, kInputBytes / row_bytes));
    memory.inputs = pieces.take(plan.teams * memory.input_rows * gates * H);
    memory.fresh = pieces.take(plan.threads * kFresh * E);
    memory.scores = pieces.take(plan.threads * 2 * N);
    memory.best_ranks = pieces.take(plan.threads * args.rows * args.n_best);
    if (args.scheduled != nullptr && args.scheduled->output_masks != nullptr) {
      memory.masked = pieces.take(N * H);
    }
    if (args.sampling != nullptr) {
      memory.allowed = pieces.take(plan.threads * V);
      memory.pool = take<Candidate<T>>(others, plan.threads * V);
    }
    if (args.coverage_penalty > 0) memory.covered = pieces.take(plan.threads * 2 * N * S);
    memory.numbers = take<int32_t>(others, plan.threads * 7 * N);
    memory.places = take<int32_t>(others, plan.threads * V);
    memory.counts = take<int64_t>(others, plan.threads * N);
    memory.candidates = take<Candidate<T>>(others, plan.threads * 2 * args.beam_size);
    return memory;
  }

  void pack(int64_t layer_count, int thread, int present) const {
    weights.pack(layer_count, thread, present);
    pack_rows(w_x, thread, present);
    pack_rows(w_output, thread, present);
  }

 private:
  // Whether the combination of a weighted sum of positions is the sum of their combinations, and
  // nobody reads the context itself.
  static bool folds(const Decode<T>& decoder) {
    return decoder.head_count() == 1 && !decoder.feeds_context;
  }

  template <class Other>
  static Other* take(Pieces<char>& pieces, int64_t count) {
    return reinterpret_cast<Other*>(pieces.take(count * static_cast<int64_t>(sizeof(Other))));
  }
};

// What of a step depends on the cell and the score.
template <class T>
struct GenerateParts {
  int64_t gates;
  bool has_cell;
  decltype(&attend_step<T, DotScore>) attend;
  const T* (*cells)(const Decode<T>&, const DecoderWeights<T>&, const DecoderScratch<T>&,
                    const DecoderStep<T>&, const Place&);
  void (*inputs)(const Weights<T>& w_x, const T* bias, const T* embeddings, int64_t rows,
                 Range units, T* inputs);
};

// Input parts of the gates, with their biases, for `rows` embeddings.
template <class T, int G>
void input_parts(const Weights<T>& w_x, const T* bias, const T* embeddings, int64_t rows,
                 Range units, T* inputs) {
  const int64_t H = w_x.units;
  const Segment<T> segment = input_segment(embeddings, w_x);
  product<T, G, G>(&segment, 1, 0, rows, units.begin, units.end, false,
                   [&](int64_t row, int64_t panel, const T* sums) {
                     const int lanes = lanes_inside<T>(H, panel);
                     for (int g = 0; g < G; ++g) {
                       const int64_t unit = g * H + panel * kLanes<T>;
                       store(inputs + row * G * H + unit,
                             load(sums + g * kLanes<T>) + load(bias + unit, lanes), lanes);
                     }
                   });
}

}  // namespace pyseq::cpu::PYSEQ_TIER
