// SPDX-License-Identifier: Apache-2.0
// Greedy and beam search: which of the continuations go on, and which were the best. Sampling:
// which tokens are drawn.
#pragma once

#include <stdlib.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "search_sample.h"
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
        end_penalty_(length_penalty(args, args.max_length)) {
    if (args.sampling != nullptr) {
      allowed_ = memory.allowed + thread * args.vocab;
      pool_ = memory.pool + thread * args.vocab;
    }
    if (args.coverage_penalty > 0) {
      const int64_t size = decoder.batch * decoder.source;
      covered_ = memory.covered + thread * 2 * size;
      covered_next_ = covered_ + size;
    }
  }

  void run() {
    this->begin();
    for (int64_t n = at_.rows.begin * args_.n_best; n < at_.rows.end * args_.n_best; ++n) {
      best_ranks_[n] = -__builtin_inf();
      if (at_.member == 0) args_.results[n] = {best_ranks_[n], 0, nullptr, 0};
    }
    if (args_.coverage_penalty > 0) set_zero(covered_, now_.count * decoder_.source);
    for (int64_t emitted = 1; now_.count > 0; ++emitted) {
      at_.rows = {begin_, begin_ + now_.count};
      backwards_ = emitted % 2 == 0;
      this->read_tokens();
      const T* const top = this->step();
      // The step has waited for the first member, which had to get memory before.
      if (team_.status != GenerateStatus::kDone) return;
      trace_ = team_.trace;  // here, since the first member adds to it while others still choose
      this->predict(top);
      if (args_.coverage_penalty > 0) cover();
      if (args_.sampling == nullptr ? !choose(emitted) : !draw(emitted)) {
        if (at_.member == 0) team_.status = GenerateStatus::kNotFinite;
        return;
      }
      if (at_.member == 0) keep(emitted);
      if (emitted == args_.max_length) return;
      if (args_.coverage_penalty > 0) hand_on_covered();
      this->go_on();
    }
  }

 private:
  using Base = OwnTokens<T>;
  using Base::args_, Base::at_, Base::backwards_, Base::begin_, Base::decoder_, Base::memory_,
      Base::next_, Base::now_, Base::parents_;

  const T* logits_of(int64_t i) const {
    return memory_.logits + (begin_ + i) * memory_.logit_stride;
  }

  // What makes log-probabilities of the logits x of hypothesis `i`: x - peak - log_mass. False if
  // they are not finite.
  bool normalize(int64_t i, T& peak, T& log_mass) const {
    const int64_t row = begin_ + i, chunks = memory_.chunks;
    const T* const peaks = memory_.peaks + row * chunks;
    const T* const masses = memory_.masses + row * chunks;
    peak = peaks[0];
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
    log_mass = static_cast<T>(__builtin_log(static_cast<double>(mass)));
    return true;
  }

  // The token that hypothesis `i` has to begin with as number `count`, or 0.
  int64_t forced_token(int64_t i, int64_t count) const {
    return count < args_.prefix_length ? args_.prefix[now_.rows[i] * args_.prefix_length + count]
                                       : 0;
  }

  // <pad> and <start> are never emitted, <stop> not too early.
  int64_t first_allowed(int64_t count) const {
    return count < args_.min_length ? kStop + 1 : kStop;
  }

  // Adds the continuations of hypothesis `i`, which has emitted `count` tokens, to the
  // candidates of its row. False if the logits are not finite.
  bool collect(int64_t i, int64_t count) {
    T peak, log_mass;
    if (!normalize(i, peak, log_mass)) return false;
    const int64_t chunks = memory_.chunks;
    const T* const peaks = memory_.peaks + (begin_ + i) * chunks;
    const T score = now_.scores[i];
    const int64_t capacity = 2 * args_.beam_size;
    const auto threshold = [&] {
      return candidate_count_ < capacity ? static_cast<T>(-__builtin_inf())
                                         : candidates_[capacity - 1].score;
    };
    const T* const logits = logits_of(i);
    if (const int64_t forced = forced_token(i, count); forced != 0) {
      const T forced_score = logits[forced] - peak - log_mass + score;
      if (forced_score > -__builtin_inf()) {
        insert({forced_score, static_cast<int32_t>(i), static_cast<int32_t>(forced)});
      }
      return true;
    }
    const int64_t panels = vectors<T>(args_.vocab);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (!(peaks[chunk] - peak - log_mass + score > threshold())) continue;
      const int64_t end = smaller((chunk + 1) * kChunk, panels);
      for (int64_t panel = chunk * kChunk; panel < end; ++panel) {
        const Vec<T> scores = load(logits + panel * kLanes<T>) - peak - log_mass + score;
        uint32_t bits = lanes_above<T>(scores, threshold());
        const int64_t skipped = first_allowed(count) - panel * kLanes<T>;
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

  // Whether the n - 1 tokens before `other` are those up to `one`, in n-grams.
  bool follows_the_same(Emitted one, Emitted other) const {
    for (int64_t same = 1; same < args_.block_ngrams; ++same, one = one.before()) {
      other = other.before();
      if (one.token() != other.token()) return false;
    }
    return true;
  }

  // Whether `token` would end an n-gram that is among the `count` tokens of hypothesis `i`.
  bool ends_repeated(int64_t i, int64_t count, int32_t token) const {
    const int64_t n = args_.block_ngrams;
    const Emitted last{trace_, i};
    Emitted end = last;
    for (int64_t left = count; left >= n; --left, end = end.before()) {
      if (end.token() == token && follows_the_same(last, end)) return true;
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
  void offer(int32_t row, T score, T penalty, int64_t length, int32_t slot, int32_t parent) {
    const int64_t count = args_.n_best;
    T* const ranks = best_ranks_ + row * count;
    T rank = score / penalty;
    if (!(rank > ranks[count - 1])) return;
    if (args_.coverage_penalty > 0) {  // which is never above zero
      rank += coverage(parent);
      if (!(rank > ranks[count - 1])) return;
    }
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
      // At the end the best of them are the results, unless coverage ranks them otherwise.
      const bool ranked = ends && args_.coverage_penalty == 0;
      const int64_t first = next_.count, limit = first + (ranked ? args_.n_best : args_.beam_size);
      for (int64_t c = 0; c < candidate_count_; ++c) {
        const Candidate<T>& candidate = candidates_[c];
        if (candidate.token != kStop) {
          if (next_.count == limit) continue;
          next_.scores[next_.count] = candidate.score;
          next_.tokens[next_.count] = candidate.token;
          next_.rows[next_.count] = row;
          parents_[next_.count++] = candidate.parent;
        } else if (c < args_.beam_size) {
          offer(row, candidate.score, penalty, emitted - 1, candidate.parent, candidate.parent);
        }
      }
      if (next_.count == first) continue;
      if (ends) {
        for (int64_t i = first; i < next_.count; ++i) {
          offer(row, next_.scores[i], penalty, emitted, static_cast<int32_t>(i), parents_[i]);
        }
      } else if (!(best_ranks_[(row + 1) * args_.n_best - 1] <
                   next_.scores[first] / end_penalty_)) {
        // log P only falls and the penalty only grows: none of them can become the best.
        next_.count = first;
      }
    }
    return true;
  }

  // Adds the attention of this step, the mean of the heads, to that of the steps before.
  void cover() {
    const int64_t N = decoder_.head_count(), S = decoder_.source;
    for (int64_t i = 0; i < now_.count; ++i) {
      const T* const attn = memory_.attn + (begin_ + i) * N * S;
      for (int64_t s = 0; s < S; ++s) {
        T sum = 0;
        for (int64_t head = 0; head < N; ++head) sum += attn[head * S + s];
        covered_[i * S + s] += sum / static_cast<T>(N);
      }
    }
  }

  void hand_on_covered() {
    const int64_t S = decoder_.source;
    for (int64_t i = 0; i < next_.count; ++i) {
      __builtin_memcpy(covered_next_ + i * S, covered_ + parents_[i] * S,
                       static_cast<size_t>(S) * sizeof(T));
    }
    T* const before = covered_;
    covered_ = covered_next_;
    covered_next_ = before;
  }

  // cp of Wu et al. 2016, eq. 14, of hypothesis `i`. A weight may have underflowed: the logarithm
  // stays finite, so that those which have missed a position can still be compared.
  T coverage(int64_t i) const {
    constexpr double kTiny = sizeof(T) == 4 ? __FLT_MIN__ : __DBL_MIN__;
    const int64_t S = decoder_.source;
    const int64_t valid = valid_positions<T>(decoder_.lengths, now_.rows[i], S);
    double sum = 0;
    for (int64_t s = 0; s < valid; ++s) {
      const double seen = static_cast<double>(covered_[i * S + s]);
      if (seen < 1) sum += __builtin_log(seen > kTiny ? seen : kTiny);
    }
    return static_cast<T>(args_.coverage_penalty * sum);
  }

  // The logits of hypothesis `i`, which has emitted `count` tokens, minus infinity for tokens that
  // must not follow.
  void allow(int64_t i, int64_t count) {
    const T* const logits = logits_of(i);
    const T forbidden = -__builtin_inf();
    if (const int64_t forced = forced_token(i, count); forced != 0) {
      for (int64_t token = 0; token < args_.vocab; ++token) allowed_[token] = forbidden;
      allowed_[forced] = logits[forced];
      return;
    }
    __builtin_memcpy(allowed_, logits, static_cast<size_t>(args_.vocab) * sizeof(T));
    for (int64_t token = 0; token < first_allowed(count); ++token) allowed_[token] = forbidden;
    if (args_.block_ngrams == 0) return;
    const Emitted last{trace_, i};
    Emitted end = last;
    for (int64_t left = count; left >= args_.block_ngrams; --left, end = end.before()) {
      if (follows_the_same(last, end)) allowed_[end.token()] = forbidden;
    }
  }

  // As choose, for draws: each goes on by the token that it draws, up to <stop>.
  bool draw(int64_t emitted) {
    const Sampling& how = *args_.sampling;
    next_.count = 0;
    for (int64_t i = 0; i < now_.count; ++i) {
      T peak, log_mass;
      if (!normalize(i, peak, log_mass)) return false;
      allow(i, emitted - 1);
      const int64_t number = now_.rows[i] * args_.n_best + now_.draws[i];
      const int32_t token =
          draw_token(how, allowed_, args_.vocab, uniform(how.seed, number, emitted - 1), pool_);
      if (token < 0) continue;  // its result stays what it was: none
      const T score = now_.scores[i] + (logits_of(i)[token] - peak - log_mass);
      GenerateResult<T>& result = args_.results[number];
      if (token == kStop) {
        if (at_.member == 0) result = {score, emitted - 1, team_.trace, static_cast<int32_t>(i)};
        continue;
      }
      const int64_t next = next_.count++;
      next_.scores[next] = score;
      next_.tokens[next] = token;
      next_.rows[next] = now_.rows[i];
      next_.draws[next] = now_.draws[i];
      parents_[next] = static_cast<int32_t>(i);
      if (emitted == args_.max_length && at_.member == 0) {
        result = {score, emitted, nullptr, static_cast<int32_t>(next)};  // and see `keep`
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
  T* allowed_ = nullptr;                            // with sampling: (V)
  Candidate<T>* pool_ = nullptr;                    // with sampling: (V)
  T *covered_ = nullptr, *covered_next_ = nullptr;  // with a coverage penalty: (N, S) each
  const T end_penalty_;
  const GenerateStep<T>* trace_ = nullptr;  // the steps up to now
  int64_t candidate_count_ = 0;
};

}  // namespace pyseq::cpu::PYSEQ_TIER
