// SPDX-License-Identifier: Apache-2.0
// Greedy and beam search: which of the continuations go on, and which were the best.
#pragma once

#include <stdlib.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "search_steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

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

// What the members of a team share beside the memory of a step; the first member writes it.
template <class T>
struct alignas(64) GenerateTeam {
  GenerateStep<T>* trace;
  GenerateStatus status;
};

template <class T>
T length_penalty(const Generate<T>& args, int64_t length) {
  return static_cast<T>(__builtin_pow(static_cast<double>(5 + length) / 6.0, args.length_penalty));
}

// One thread's part in the search of its team.
template <class T>
class Searcher : OwnTokens<T> {
 public:
  Searcher(const Generate<T>& args, const GenerateParts<T>& parts, const GenerateMemory<T>& memory,
           const Decode<T>& decoder, const Place& at, GenerateTeam<T>& team, T* inputs, int thread)
      : OwnTokens<T>(args, parts, memory, decoder, at, inputs, thread),
        team_(team),
        best_ranks_(memory.best_ranks + thread * args.rows * args.n_best),
        candidates_(memory.candidates + thread * 2 * args.beam_size),
        end_penalty_(length_penalty(args, args.max_length)) {}

  void run() {
    this->begin();
    for (int64_t n = at_.rows.begin * args_.n_best; n < at_.rows.end * args_.n_best; ++n) {
      best_ranks_[n] = -__builtin_inf();
      if (at_.member == 0) args_.results[n] = {best_ranks_[n], 0, nullptr, 0};
    }
    for (int64_t emitted = 1; now_.count > 0; ++emitted) {
      at_.rows = {begin_, begin_ + now_.count};
      backwards_ = emitted % 2 == 0;
      this->read_tokens();
      const T* const top = this->step();
      // The step has waited for the first member, which had to get memory before.
      if (team_.status != GenerateStatus::kDone) return;
      trace_ = team_.trace;  // here, since the first member adds to it while others still choose
      this->predict(top);
      if (!choose(emitted)) {
        if (at_.member == 0) team_.status = GenerateStatus::kNotFinite;
        return;
      }
      if (at_.member == 0) keep(emitted);
      if (emitted == args_.max_length) return;
      this->go_on();
    }
  }

 private:
  using Base = OwnTokens<T>;
  using Base::args_, Base::at_, Base::backwards_, Base::begin_, Base::decoder_, Base::memory_,
      Base::next_, Base::now_, Base::parents_;

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
    const int64_t numbers = 2 * next_.count, S = args_.need_weights ? this->weights_size() : 0;
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
    __builtin_memcpy(attn, memory_.attn + begin_ * this->weights_size(), attn_bytes);
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

  GenerateTeam<T>& team_;
  T* const best_ranks_;
  Candidate<T>* const candidates_;
  const T end_penalty_;
  const GenerateStep<T>* trace_ = nullptr;  // the steps up to now
  int64_t candidate_count_ = 0;
};

}  // namespace pyseq::cpu::PYSEQ_TIER
