// SPDX-License-Identifier: Apache-2.0
// Greedy and beam search as one loop: input of the last tokens, cells, attention, output
// layer, choice. A team searches its rows to the end and waits for no other team; its
// members share the units and the vocabulary, and each makes every choice for itself.
#pragma once

#include <stdlib.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "decode_step.h"
#include "gemm.h"

namespace pyseq::cpu::PYSEQ_TIER {

constexpr int32_t kStart = 1, kStop = 2;  // of pyseq.types; <pad> is 0

// Panels of the output layer that a thread takes together, with the maximum and the sum of
// their softmax. Fixed, so that the bits do not depend on the number of threads.
constexpr int64_t kChunk = 8;
// Tokens whose products with the input weights are made at a time.
constexpr int64_t kFresh = 16;
// The most memory for those products, in each team.
constexpr int64_t kInputBytes = 8 << 20;

// A bit for each lane above the threshold.
template <class T>
PYSEQ_FORCE_INLINE uint32_t lanes_above(Vec<T> value, T threshold) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(value, broadcast(threshold), _CMP_GT_OQ);
  } else {
    return _mm512_cmp_pd_mask(value, broadcast(threshold), _CMP_GT_OQ);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return _mm256_movemask_ps(_mm256_cmp_ps(value, broadcast(threshold), _CMP_GT_OQ));
  } else {
    return _mm256_movemask_pd(_mm256_cmp_pd(value, broadcast(threshold), _CMP_GT_OQ));
  }
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) bits |= (value[lane] > threshold ? 1u : 0u) << lane;
  return bits;
#endif
}

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
  T *query, *context, *attn, *output, *fed;
  T* logits;                 // (N, logit_stride)
  T *peaks, *masses;         // (N, chunk_stride): of a chunk max x, and sum exp(x - max)
  T* inputs;                 // (teams, input_rows, G*H): input parts of the gates, by token
  T* fresh;                  // (threads, kFresh, E), embeddings that have none yet
  T* scores;                 // (threads, 2, N)
  T* best_ranks;             // (threads, rows, n_best)
  int32_t* numbers;          // (threads, 5, N): tokens, rows (twice each) and parents
  int32_t* places;           // (threads, V): where the input part of a token is, or -1
  Candidate<T>* candidates;  // (threads, 2 * beam_size)
  T* masked;                 // (N, H), outputs times their dropout masks; null without
  int64_t logit_stride, chunks, chunk_stride, input_rows;

  static GenerateMemory take(const Generate<T>& args, int gates, bool has_cell, const Plan& plan,
                             Pieces<T>& pieces, Pieces<char>& others) {
    const Decode<T>& decoder = args.decoder;
    const int64_t N = decoder.batch, H = decoder.hidden, E = args.embedding_size, V = args.vocab;
    // Results are about as long as their sources, whatever the limit.
    const int64_t S = decoder.source, steps = S > 0 ? smaller(args.max_length, S) : args.max_length;
    const bool packs = repays_packing(steps, N, decoder_cost(decoder, gates, 0).weight_bytes);
    // Positions are combined once, hypotheses at every step. For as many of the one as of the
    // other it would not repay: of a few rows the product costs little more than half of it.
    const bool folded = decoder.combine != nullptr && N * steps >= 2 * args.rows * S;
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
    memory.attn = pieces.take(N * decoder.source);
    memory.output = pieces.take(N * H);
    memory.fed = pieces.take(N * H);

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
    memory.numbers = take<int32_t>(others, plan.threads * 5 * N);
    memory.places = take<int32_t>(others, plan.threads * V);
    memory.candidates = take<Candidate<T>>(others, plan.threads * 2 * args.beam_size);
    return memory;
  }

  void pack(int64_t layer_count, int thread, int present) const {
    weights.pack(layer_count, thread, present);
    pack_rows(w_x, thread, present);
    pack_rows(w_output, thread, present);
  }

 private:
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
  decltype(&step_attention<T, DotScore>) attention;
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

template <class T>
T length_penalty(const Generate<T>& args, int64_t length) {
  return static_cast<T>(__builtin_pow(static_cast<double>(5 + length) / 6.0, args.length_penalty));
}

// What the members of a team share beside the memory of a step; the first member writes it.
template <class T>
struct alignas(64) GenerateTeam {
  GenerateStep<T>* trace;
  GenerateStatus status;
};

// Adds to the sums of exp(x - peak) those of a vector of logits whose first `skipped` lanes do
// not count.
template <class T>
PYSEQ_FORCE_INLINE Vec<T> shares(const T* logits, int skipped, T peak) {
  Vec<T> x = load(logits);
  for (int lane = 0; lane < skipped; ++lane) x[lane] = -__builtin_inf();
  return Math<T>::exp_nonpositive(x - peak);
}

// One thread's part in the search of its team. Members make the same choices from the same
// numbers, each in memory of its own, so that they wait for one another only where one reads
// what the other computed.
template <class T>
class Searcher {
 public:
  Searcher(const Generate<T>& args, const GenerateParts<T>& parts, const GenerateMemory<T>& memory,
           const Decode<T>& decoder, const Place& at, GenerateTeam<T>& team, T* inputs, int thread)
      : args_(args),
        parts_(parts),
        memory_(memory),
        decoder_(decoder),
        layers_given_(decoder.layers),
        team_(team),
        at_(at),
        thread_(thread),
        begin_(at.rows.begin * args.beam_size),
        units_(at.part(vectors<T>(decoder.hidden))),
        chunks_(at.part(memory.chunks)),
        columns_{units_.begin * kLanes<T>, smaller(units_.end * kLanes<T>, decoder.hidden)},
        inputs_(inputs),
        fresh_(memory.fresh + thread * kFresh * args.embedding_size),
        best_ranks_(memory.best_ranks + thread * args.rows * args.n_best),
        places_(memory.places + thread * args.vocab),
        candidates_(memory.candidates + thread * 2 * args.beam_size),
        fed_(memory.fed),
        end_penalty_(length_penalty(args, args.max_length)) {
    const int64_t N = decoder.batch;
    T* const scores = memory.scores + thread * 2 * N;
    int32_t* const numbers = memory.numbers + thread * 5 * N;
    now_ = {0, scores, numbers, numbers + N};
    next_ = {0, scores + N, numbers + 2 * N, numbers + 3 * N};
    parents_ = numbers + 4 * N;
    // Masks of dropout are those of a step, so that each thread has layers of its own.
    for (int64_t l = 0; l < decoder.layer_count; ++l) layers_[l] = decoder.layers[l];
    decoder_.layers = layers_;
  }

  void run() {
    begin();
    if (args_.scheduled != nullptr) return feed(*args_.scheduled);
    for (int64_t emitted = 1; now_.count > 0; ++emitted) {
      at_.rows = {begin_, begin_ + now_.count};
      backwards_ = emitted % 2 == 0;
      read_tokens();
      const T* const top = step();
      // The step has waited for the first member, which had to get memory before.
      if (team_.status != GenerateStatus::kDone) return;
      trace_ = team_.trace;  // here, since the first member adds to it while others still choose
      predict(top);
      if (!choose(emitted)) {
        if (at_.member == 0) team_.status = GenerateStatus::kNotFinite;
        return;
      }
      if (at_.member == 0) keep(emitted);
      if (emitted == args_.max_length) return;
      go_on();
    }
  }

 private:
  // The part of a row of H numbers that belongs to this thread's units.
  void copy_units(const T* from, T* to) const {
    if (columns_.size() <= 0) return;
    __builtin_memcpy(to + columns_.begin, from + columns_.begin,
                     static_cast<size_t>(columns_.size()) * sizeof(T));
  }

  // One hypothesis for each row: <start>.
  void begin() {
    const int64_t H = decoder_.hidden;
    for (int64_t token = 0; token < args_.vocab; ++token) places_[token] = -1;
    for (int64_t row = at_.rows.begin; row < at_.rows.end; ++row) {
      const int64_t i = now_.count++;
      now_.scores[i] = 0;
      now_.tokens[i] = kStart;
      now_.rows[i] = static_cast<int32_t>(row);
      for (int64_t n = row * args_.n_best; n < (row + 1) * args_.n_best; ++n) {
        best_ranks_[n] = -__builtin_inf();
        if (at_.member == 0 && args_.results != nullptr) {
          args_.results[n] = {static_cast<T>(-__builtin_inf()), 0, nullptr, 0};
        }
      }
      for (int64_t l = 0; l < decoder_.layer_count; ++l) {
        const int64_t from = (l * args_.rows + row) * H, to = (begin_ + i) * H;
        copy_units(args_.h_0 + from, memory_.states[l] + to);
        if (parts_.has_cell) copy_units(args_.c_0 + from, memory_.cells[l] + to);
      }
      copy_units(args_.feed + row * H, memory_.fed + (begin_ + i) * H);
    }
    at_.wait();
  }

  // The input parts of the gates: computed once for each token, since hypotheses share tokens
  // and repeat them.
  void read_tokens() {
    const int64_t width = parts_.gates * decoder_.hidden, E = args_.embedding_size;
    if (input_count_ + now_.count > memory_.input_rows && memory_.input_rows < args_.vocab) {
      for (int64_t token = 0; token < args_.vocab; ++token) places_[token] = -1;
      input_count_ = 0;
    }
    int64_t fresh = 0;
    const auto compute = [&] {
      parts_.inputs(memory_.w_x, decoder_.layers[0].bias, fresh_, fresh, units_,
                    inputs_ + (input_count_ - fresh) * width);
      fresh = 0;
    };
    for (int64_t i = 0; i < now_.count; ++i) {
      const int32_t token = now_.tokens[i];
      if (places_[token] >= 0) continue;
      places_[token] = static_cast<int32_t>(input_count_++);
      __builtin_memcpy(fresh_ + fresh * E, args_.embedding + token * E,
                       static_cast<size_t>(E) * sizeof(T));
      if (++fresh == kFresh) compute();
    }
    compute();
    for (int64_t i = 0; i < now_.count; ++i) {
      const T* const from = inputs_ + places_[now_.tokens[i]] * width;
      T* const to = memory_.gates[0] + (begin_ + i) * width;
      for (int64_t gate = 0; gate < width; gate += decoder_.hidden) {
        copy_units(from + gate, to + gate);
      }
    }
  }

  // Returns what the output layer reads.
  const T* step() {
    const int64_t slot_size = decoder_.batch * decoder_.hidden;
    const DecoderStep<T> step{0,
                              backwards_,
                              slot_ * slot_size,
                              (1 - slot_) * slot_size,
                              decoder_.feeding ? fed_ : nullptr,
                              memory_.output,
                              memory_.attn,
                              now_.rows - begin_,
                              memory_.folded != nullptr};
    const T* const top = parts_.cells(decoder_, memory_.weights, memory_.scratch, step, at_);
    if (!decoder_.attends()) return top;
    parts_.attention(decoder_, memory_.weights, memory_.scratch, step, at_, thread_, top);
    return memory_.output;
  }

  // The logits, and for each chunk of them the maximum and the sum of exp(x - maximum).
  void predict(const T* output) {
    const int64_t V = args_.vocab;
    const Segment<T> segment = plain_segment(output, memory_.w_output);
    for (int64_t n = 0; n < chunks_.size(); ++n) {
      const int64_t chunk = backwards_ ? chunks_.end - 1 - n : chunks_.begin + n;
      const Range panels{chunk * kChunk, smaller((chunk + 1) * kChunk, vectors<T>(V))};
      product<T, 1, 1>(&segment, 1, at_.rows.begin, at_.rows.end, panels.begin, panels.end,
                       backwards_, [&](int64_t row, int64_t panel, const T* sums) {
                         const int64_t token = panel * kLanes<T>;
                         const int lanes = lanes_inside<T>(V, panel);
                         Vec<T> logits = load(sums);
                         if (args_.output_bias != nullptr)
                           logits += load(args_.output_bias + token, lanes);
                         for (int lane = lanes; lane < kLanes<T>; ++lane)
                           logits[lane] = -__builtin_inf();
                         store(memory_.logits + row * memory_.logit_stride + token, logits);
                       });
      for (int64_t row = at_.rows.begin; row < at_.rows.end; ++row) {
        const T* const logits = memory_.logits + row * memory_.logit_stride;
        Vec<T> largest = broadcast(static_cast<T>(-__builtin_inf()));
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
          const Vec<T> x = load(logits + panel * kLanes<T>);
          largest = x > largest ? x : largest;
        }
        const T peak = max_lanes<T>(largest);
        // Where all are forbidden: anything finite.
        const T zero = peak == -__builtin_inf() ? 0 : peak;
        Vec<T> mass = {};
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
          mass += Math<T>::exp_nonpositive(load(logits + panel * kLanes<T>) - zero);
        }
        memory_.peaks[row * memory_.chunks + chunk] = peak;
        memory_.masses[row * memory_.chunks + chunk] = sum_lanes<T>(mass);
      }
    }
    at_.wait();
  }

  // Adds the continuations of hypothesis `i`, which has emitted `count` tokens, to the
  // candidates of its row. False if the logits are not finite.
  bool collect(int64_t i, int64_t count) {
    const int64_t row = begin_ + i, chunks = memory_.chunks;
    const T* const peaks = memory_.peaks + row * chunks;
    const T* const masses = memory_.masses + row * chunks;
    T peak = peaks[0];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      peak = peaks[chunk] > peak ? peaks[chunk] : peak;
    }
    Vec<T> total = {};
    for (int64_t chunk = 0; chunk < chunks; chunk += kLanes<T>) {
      const int inside = lanes_inside<T>(chunks, chunk / kLanes<T>);
      Vec<T> below = load(peaks + chunk, inside) - peak;
      below = below > 0 ? Vec<T>{} : below;  // beyond the last chunk
      total += load(masses + chunk, inside) * Math<T>::exp_nonpositive(below);
    }
    const T mass = sum_lanes<T>(total);
    // The largest term of the sum is 1, unless the maximum is infinite or there is a NaN.
    if (!(mass >= 1)) return false;
    const T log_mass = static_cast<T>(__builtin_log(static_cast<double>(mass)));

    const T score = now_.scores[i];
    const int64_t capacity = 2 * args_.beam_size;
    const auto threshold = [&] {
      return candidate_count_ < capacity ? static_cast<T>(-__builtin_inf())
                                         : candidates_[capacity - 1].score;
    };
    const T* const logits = memory_.logits + row * memory_.logit_stride;
    if (count < args_.prefix_length) {
      const int64_t forced = args_.prefix[now_.rows[i] * args_.prefix_length + count];
      if (forced != 0) {
        const T forced_score = logits[forced] - peak - log_mass + score;
        if (forced_score > -__builtin_inf()) {
          insert({forced_score, static_cast<int32_t>(i), static_cast<int32_t>(forced)});
        }
        return true;
      }
    }
    // <pad> and <start> are never emitted, <stop> not too early.
    const int64_t first_allowed = count < args_.min_length ? kStop + 1 : kStop;
    const int64_t panels = vectors<T>(args_.vocab);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (!(peaks[chunk] - peak - log_mass + score > threshold())) continue;
      const int64_t end = smaller((chunk + 1) * kChunk, panels);
      for (int64_t panel = chunk * kChunk; panel < end; ++panel) {
        const Vec<T> scores = load(logits + panel * kLanes<T>) - peak - log_mass + score;
        uint32_t bits = lanes_above<T>(scores, threshold());
        const int64_t skipped = first_allowed - panel * kLanes<T>;
        if (skipped > 0) bits &= skipped < kLanes<T> ? ~((1u << skipped) - 1) : 0;
        for (; bits != 0; bits &= bits - 1) {
          const int lane = __builtin_ctz(bits);
          const auto token = static_cast<int32_t>(panel * kLanes<T> + lane);
          if (args_.block_ngrams > 0 && ends_repeated(i, count, token)) continue;
          insert({scores[lane], static_cast<int32_t>(i), token});
        }
      }
    }
    return true;
  }

  // A token that a hypothesis has emitted, as the trace knows it.
  struct Emitted {
    const GenerateStep<T>* step;
    int64_t slot;
    int32_t token() const { return step->tokens[slot]; }
    Emitted before() const { return {step->before, step->parents[slot]}; }
  };

  // Whether `token` would end an n-gram that is among the `count` tokens of hypothesis `i`.
  bool ends_repeated(int64_t i, int64_t count, int32_t token) const {
    const int64_t n = args_.block_ngrams;
    const Emitted last{trace_, i};
    Emitted end = last;
    for (int64_t left = count; left >= n; --left, end = end.before()) {
      if (end.token() != token) continue;
      Emitted one = last, other = end;
      int64_t same = 1;
      for (; same < n; ++same, one = one.before()) {
        other = other.before();
        if (one.token() != other.token()) break;
      }
      if (same == n) return true;
    }
    return false;
  }

  // Candidates stay sorted; of equal ones the earlier stays before the later.
  void insert(const Candidate<T>& candidate) {
    const int64_t capacity = 2 * args_.beam_size;
    int64_t at = candidate_count_;
    if (at == capacity) {
      if (!(candidate.score > candidates_[--at].score)) return;
    } else {
      ++candidate_count_;
    }
    for (; at > 0 && candidates_[at - 1].score < candidate.score; --at) {
      candidates_[at] = candidates_[at - 1];
    }
    candidates_[at] = candidate;
  }

  // Puts a hypothesis among the row's best ones if it belongs there; of equal ones the earlier
  // stays before the later.
  void offer(int32_t row, T score, T penalty, int64_t length, int32_t slot) {
    const T rank = score / penalty;
    const int64_t count = args_.n_best;
    T* const ranks = best_ranks_ + row * count;
    if (!(rank > ranks[count - 1])) return;
    GenerateResult<T>* const results = at_.member == 0 ? args_.results + row * count : nullptr;
    int64_t at = count - 1;
    for (; at > 0 && rank > ranks[at - 1]; --at) {
      ranks[at] = ranks[at - 1];
      if (results != nullptr) results[at] = results[at - 1];
    }
    ranks[at] = rank;
    if (results != nullptr) results[at] = {score, length, team_.trace, slot};
  }

  // The best finished hypotheses of each row and those that go on. False if logits are not
  // finite.
  bool choose(int64_t emitted) {
    const T penalty = length_penalty(args_, emitted);
    const bool ends = emitted == args_.max_length;
    next_.count = 0;
    for (int64_t begin = 0, end = 0; begin < now_.count; begin = end) {
      const int32_t row = now_.rows[begin];
      candidate_count_ = 0;
      for (; end < now_.count && now_.rows[end] == row; ++end) {
        if (!collect(end, emitted - 1)) return false;
      }
      const int64_t first = next_.count, limit = first + (ends ? args_.n_best : args_.beam_size);
      for (int64_t c = 0; c < candidate_count_; ++c) {
        const Candidate<T>& candidate = candidates_[c];
        if (candidate.token != kStop) {
          if (next_.count == limit) continue;
          next_.scores[next_.count] = candidate.score;
          next_.tokens[next_.count] = candidate.token;
          next_.rows[next_.count] = row;
          parents_[next_.count++] = candidate.parent;
        } else if (c < args_.beam_size) {
          offer(row, candidate.score, penalty, emitted - 1, candidate.parent);
        }
      }
      if (next_.count == first) continue;
      if (ends) {
        for (int64_t i = first; i < next_.count; ++i) {
          offer(row, next_.scores[i], penalty, emitted, static_cast<int32_t>(i));
        }
      } else if (!(best_ranks_[(row + 1) * args_.n_best - 1] <
                   next_.scores[first] / end_penalty_)) {
        // log P only falls and the penalty only grows: none of them can become the best.
        next_.count = first;
      }
    }
    return true;
  }

  // Adds this step to the trace.
  void keep(int64_t emitted) {
    const int64_t numbers = 2 * next_.count, S = args_.need_weights ? decoder_.source : 0;
    const size_t attn_bytes = static_cast<size_t>(now_.count * S) * sizeof(T);
    const size_t bytes =
        sizeof(GenerateStep<T>) + attn_bytes + static_cast<size_t>(numbers) * sizeof(int32_t);
    auto* const kept = static_cast<GenerateStep<T>*>(malloc(bytes));
    if (kept == nullptr) {
      team_.status = GenerateStatus::kOutOfMemory;
      return;
    }
    T* const attn = reinterpret_cast<T*>(kept + 1);
    int32_t* const tokens = reinterpret_cast<int32_t*>(attn + now_.count * S);
    *kept = {team_.trace, tokens, tokens + next_.count, S > 0 ? attn : nullptr};
    team_.trace = kept;
    __builtin_memcpy(attn, memory_.attn + begin_ * decoder_.source, attn_bytes);
    for (int64_t i = 0; i < next_.count; ++i) {
      kept->tokens[i] = next_.tokens[i];
      kept->parents[i] = parents_[i];
    }
    if (emitted != args_.max_length) return;
    // Those that were cut off end in this step, which was not there when they were offered.
    for (int64_t i = 0; i < next_.count; ++i) {
      GenerateResult<T>* const results = args_.results + next_.rows[i] * args_.n_best;
      for (int64_t n = 0; n < args_.n_best; ++n) {
        if (results[n].length == emitted) results[n].last = kept;
      }
    }
  }

  // Every hypothesis takes over the state of its parent.
  void go_on() {
    const Hypotheses<T> before = now_;
    now_ = next_;
    next_ = before;
    bool same = now_.count == before.count;
    for (int64_t i = 0; same && i < now_.count; ++i) same = parents_[i] == i;
    if (same) {
      slot_ = 1 - slot_;
      fed_ = memory_.output;
      return;
    }
    const int64_t H = decoder_.hidden, N = decoder_.batch;
    const int64_t from_slot = (1 - slot_) * N, to_slot = slot_ * N;
    for (int64_t i = 0; i < now_.count; ++i) {
      const int64_t from = (begin_ + parents_[i]) * H, to = (begin_ + i) * H;
      for (int64_t l = 0; l < decoder_.layer_count; ++l) {
        copy_units(memory_.states[l] + from_slot * H + from, memory_.states[l] + to_slot * H + to);
        if (parts_.has_cell) {
          copy_units(memory_.cells[l] + from_slot * H + from, memory_.cells[l] + to_slot * H + to);
        }
      }
      if (decoder_.feeding) copy_units(memory_.output + from, memory_.fed + to);
    }
    fed_ = memory_.fed;
    at_.wait();
  }

  // Scheduled sampling: every row goes on to the end, and reads the truth or its own token.
  void feed(const ScheduledInputs<T>& scheduled) {
    const int64_t rows = args_.rows, count = now_.count;
    const Range own = at_.rows;
    const auto chooses = [&](int64_t t) {
      const bool* const coins = scheduled.coins + t * rows;
      for (int64_t row = own.begin; row < own.end; ++row) {
        if (!coins[row]) return true;
      }
      return false;
    };
    int64_t last = scheduled.steps - 1;
    while (last > 0 && !chooses(last)) --last;
    for (int64_t i = 0; i < count; ++i) {
      now_.tokens[i] = static_cast<int32_t>(scheduled.tokens[own.begin + i]);
      next_.rows[i] = now_.rows[i];
    }
    next_.count = count;
    const DecoderLayer<T>* const all = layers_given_;
    for (int64_t t = 0; t < last; ++t) {
      backwards_ = t % 2 != 0;
      for (int64_t l = 0; l < decoder_.layer_count; ++l) {
        if (all[l].mask != nullptr) layers_[l].mask = all[l].mask + t * rows * decoder_.hidden;
      }
      if (scheduled.embedding_masks == nullptr) {
        read_tokens();
      } else {
        read_masked(scheduled.embedding_masks + t * rows * args_.embedding_size);
      }
      const T* top = step();
      if (chooses(t + 1)) {
        if (scheduled.output_masks != nullptr) {
          top = masked(top, scheduled.output_masks + t * rows * decoder_.hidden);
        }
        predict(top);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t place = (t + 1) * rows + own.begin + i;
        next_.tokens[i] = static_cast<int32_t>(scheduled.tokens[place]);
        if (scheduled.coins[place]) continue;
        next_.tokens[i] =
            scheduled.draws == nullptr ? likeliest(i).token : drawn(i, scheduled.draws[place]);
        if (at_.member == 0) scheduled.fed[place] = next_.tokens[i];
      }
      const Hypotheses<T> before = now_;
      now_ = next_;
      next_ = before;
      slot_ = 1 - slot_;
      fed_ = memory_.output;
    }
  }

  // As read_tokens, where the embeddings of a row are dropped as its mask (E) says.
  void read_masked(const T* masks) {
    const int64_t width = parts_.gates * decoder_.hidden, E = args_.embedding_size;
    for (int64_t first = 0; first < now_.count; first += kFresh) {
      const int64_t count = smaller(kFresh, now_.count - first);
      for (int64_t i = 0; i < count; ++i) {
        const T* const embedding = args_.embedding + now_.tokens[first + i] * E;
        const T* const mask = masks + (begin_ + first + i) * E;
        for (int64_t e = 0; e < E; ++e) fresh_[i * E + e] = embedding[e] * mask[e];
      }
      parts_.inputs(memory_.w_x, decoder_.layers[0].bias, fresh_, count, units_,
                    memory_.gates[0] + (begin_ + first) * width);
    }
  }

  const T* masked(const T* output, const T* masks) {
    for (int64_t row = at_.rows.begin; row < at_.rows.end; ++row) {
      for (int64_t unit = columns_.begin; unit < columns_.end; ++unit) {
        const int64_t place = row * decoder_.hidden + unit;
        memory_.masked[place] = output[place] * masks[place];
      }
    }
    at_.wait();
    return memory_.masked;
  }

  // Of the tokens that may be emitted the one with the largest logit, which stands in place of
  // the score; of equal ones the first.
  Candidate<T> likeliest(int64_t i) const {
    const int64_t row = begin_ + i;
    const T* const logits = memory_.logits + row * memory_.logit_stride;
    const T* const peaks = memory_.peaks + row * memory_.chunks;
    Candidate<T> best{static_cast<T>(-__builtin_inf()), 0, kStop};
    for (int64_t chunk = 0; chunk < memory_.chunks; ++chunk) {
      if (!(peaks[chunk] > best.score)) continue;
      const int64_t begin = chunk * kChunk * kLanes<T>;
      const int64_t end = smaller(begin + kChunk * kLanes<T>, args_.vocab);
      for (int64_t token = larger(begin, kStop); token < end; ++token) {
        if (logits[token] > best.score) best = {logits[token], 0, static_cast<int32_t>(token)};
      }
    }
    return best;
  }

  // Of the tokens that may be emitted, in their order, the first up to which the probabilities
  // add up to more than `draw` of their sum. A token whatever the logits.
  int32_t drawn(int64_t i, T draw) const {
    const T* const logits = memory_.logits + (begin_ + i) * memory_.logit_stride;
    const T peak = likeliest(i).score;
    const int64_t panels = vectors<T>(args_.vocab);
    const auto shares_of = [&](int64_t panel) {
      return shares(logits + panel * kLanes<T>, panel == 0 ? kStop : 0, peak);
    };
    T total = 0;
    for (int64_t panel = 0; panel < panels; ++panel) total += sum_lanes<T>(shares_of(panel));
    const T threshold = draw * total;
    int32_t last = kStop;  // of those with a share
    T sum = 0;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Vec<T> parts = shares_of(panel);
      const T after = sum + sum_lanes<T>(parts);
      const bool inside = after > threshold;
      for (int lane = 0; lane < kLanes<T> && (inside || panel + 1 == panels); ++lane) {
        if (!(parts[lane] > 0)) continue;
        last = static_cast<int32_t>(panel * kLanes<T> + lane);
        sum += parts[lane];
        if (sum > threshold) return last;
      }
      if (inside) return last;  // but for rounding one of its lanes
      sum = after;
    }
    return last;
  }

  const Generate<T>& args_;
  const GenerateParts<T>& parts_;
  const GenerateMemory<T>& memory_;
  Decode<T> decoder_;
  const DecoderLayer<T>* const layers_given_;
  DecoderLayer<T> layers_[kMaxLayers];
  GenerateTeam<T>& team_;
  Place at_;  // its rows: first those of the batch, then the unfinished hypotheses
  const int thread_;
  const int64_t begin_;  // the team's first hypothesis in the tensors of all
  const Range units_, chunks_, columns_;
  T* const inputs_;
  T* const fresh_;
  T* const best_ranks_;
  int32_t* const places_;
  Candidate<T>* const candidates_;
  const T* fed_;
  const T end_penalty_;
  Hypotheses<T> now_, next_;
  int32_t* parents_;  // which of the hypotheses before each of the next ones continues
  const GenerateStep<T>* trace_ = nullptr;  // the steps up to now
  int64_t candidate_count_ = 0, input_count_ = 0, slot_ = 0;
  bool backwards_ = false;  // every other step: see `product`
};

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
             [&](auto score) { parts.attention = step_attention<T, decltype(score)>; });

  const int64_t L = args.decoder.layer_count, H = args.decoder.hidden;
  const int gates = static_cast<int>(parts.gates);
  StepCost cost = decoder_cost(args.decoder, gates, static_cast<int>(L) + 5);
  const int64_t more = gates * H * args.embedding_size + H * args.vocab;
  cost.weights += more;
  cost.weight_bytes += more * static_cast<int64_t>(sizeof(T));
  Plan plan = plan_steps(cost, args.decoder.threads);
  // The hypotheses of a row stay together.
  if (plan.teams > args.rows) plan.teams = 1;

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
    Searcher<T>(args, parts, memory, decoder, at, shared[team],
                memory.inputs + team * memory.input_rows * gates * H, thread)
        .run();
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
