// SPDX-License-Identifier: Apache-2.0
// Scheduled sampling: every row goes on to the end, and reads the truth or its own token.
#pragma once

#include "search_steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

// Adds to the sums of exp(x - peak) those of a vector of logits whose first `skipped` lanes do
// not count.
template <class T>
PYSEQ_FORCE_INLINE Vec<T> shares(const T* logits, int skipped, T peak) {
  Vec<T> x = load(logits);
  for (int lane = 0; lane < skipped; ++lane) x[lane] = -__builtin_inf();
  return Math<T>::exp_nonpositive(x - peak);
}

// One thread's part in what its team reads.
template <class T>
class ScheduledReader : OwnTokens<T> {
 public:
  using OwnTokens<T>::OwnTokens;

  void run() {
    this->begin();
    const ScheduledInputs<T>& scheduled = *args_.scheduled;
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
        this->read_tokens();
      } else {
        read_masked(scheduled.embedding_masks + t * rows * args_.embedding_size);
      }
      const T* top = this->step();
      if (chooses(t + 1)) {
        if (scheduled.output_masks != nullptr) {
          top = masked(top, scheduled.output_masks + t * rows * decoder_.hidden);
        }
        this->predict(top);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t place = (t + 1) * rows + own.begin + i;
        next_.tokens[i] = static_cast<int32_t>(scheduled.tokens[place]);
        if (scheduled.coins[place]) continue;
        next_.tokens[i] =
            scheduled.draws == nullptr ? likeliest(i).token : drawn(i, scheduled.draws[place]);
        if (at_.member == 0) scheduled.fed[place] = next_.tokens[i];
      }
      this->advance();
    }
  }

 private:
  using Base = OwnTokens<T>;
  using Base::args_, Base::at_, Base::backwards_, Base::begin_, Base::columns_, Base::decoder_,
      Base::fresh_, Base::layers_, Base::layers_given_, Base::memory_, Base::next_, Base::now_,
      Base::parts_, Base::units_;

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
};

}  // namespace pyseq::cpu::PYSEQ_TIER
