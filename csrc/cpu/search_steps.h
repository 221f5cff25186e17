// SPDX-License-Identifier: Apache-2.0
// The steps of a decoder that reads its own tokens: input of the last tokens, cells, attention,
// output layer. Who chooses the tokens is search_beam.h, or search_scheduled.h.
#pragma once

#include "search_memory.h"

namespace pyseq::cpu::PYSEQ_TIER {

// One thread's part in the steps of its team, which share the units and the vocabulary. Members
// make the same choices from the same numbers, each in memory of its own, so that they wait for
// one another only where one reads what the other computed.
template <class T>
class OwnTokens {
 public:
  OwnTokens(const Generate<T>& args, const GenerateParts<T>& parts, const GenerateMemory<T>& memory,
            const Decode<T>& decoder, const Place& at, T* inputs, int thread)
      : args_(args),
        parts_(parts),
        memory_(memory),
        decoder_(decoder),
        layers_given_(decoder.layers),
        at_(at),
        thread_(thread),
        begin_(at.rows.begin * args.beam_size),
        units_(at.part(vectors<T>(decoder.hidden))),
        chunks_(at.part(memory.chunks)),
        columns_{units_.begin * kLanes<T>, smaller(units_.end * kLanes<T>, decoder.hidden)},
        fed_columns_(at.part(decoder.fed_size())),
        past_columns_(at.part(decoder.head_count() * decoder.source)),
        inputs_(inputs),
        fresh_(memory.fresh + thread * kFresh * args.embedding_size),
        places_(memory.places + thread * args.vocab),
        counts_(memory.counts + thread * decoder.batch),
        fed_(memory.fed) {
    const int64_t N = decoder.batch;
    T* const scores = memory.scores + thread * 2 * N;
    int32_t* const numbers = memory.numbers + thread * 7 * N;
    now_ = {0, scores, numbers, numbers + N, numbers + 2 * N};
    next_ = {0, scores + N, numbers + 3 * N, numbers + 4 * N, numbers + 5 * N};
    parents_ = numbers + 6 * N;
    // Masks of dropout are those of a step, so that each thread has layers of its own.
    for (int64_t l = 0; l < decoder.layer_count; ++l) layers_[l] = decoder.layers[l];
    decoder_.layers = layers_;
  }

 protected:
  static void copy_columns(const Range& columns, const T* from, T* to) {
    if (columns.size() <= 0) return;
    __builtin_memcpy(to + columns.begin, from + columns.begin,
                     static_cast<size_t>(columns.size()) * sizeof(T));
  }
  // The part of a row of H numbers that belongs to this thread's units.
  void copy_units(const T* from, T* to) const { copy_columns(columns_, from, to); }

  // The weights of all heads of a row; the past ones lie in two slots that take turns like the
  // states.
  int64_t weights_size() const { return decoder_.head_count() * decoder_.source; }
  T* past(int64_t slot) const {
    return decoder_.taps == 0 ? nullptr : memory_.pasts + slot * decoder_.batch * weights_size();
  }

  // One hypothesis for each row, or for each of its draws: <start>.
  void begin() {
    const int64_t draws = args_.sampling == nullptr ? 1 : args_.n_best;
    const int64_t H = decoder_.hidden;
    for (int64_t token = 0; token < args_.vocab; ++token) places_[token] = -1;
    const int64_t F = decoder_.fed_size(), S = weights_size();
    for (int64_t number = at_.rows.begin * draws; number < at_.rows.end * draws; ++number) {
      const int64_t i = now_.count++, row = number / draws;
      now_.scores[i] = 0;
      now_.tokens[i] = kStart;
      now_.rows[i] = static_cast<int32_t>(row);
      now_.draws[i] = static_cast<int32_t>(number % draws);
      for (int64_t l = 0; l < decoder_.layer_count; ++l) {
        const int64_t from = (l * args_.rows + row) * H, to = (begin_ + i) * H;
        copy_units(args_.h_0 + from, memory_.states[l] + to);
        if (parts_.has_cell) copy_units(args_.c_0 + from, memory_.cells[l] + to);
      }
      copy_columns(fed_columns_, args_.feed + row * F, memory_.fed + (begin_ + i) * F);
      if (decoder_.taps == 0) continue;
      T* const own_past = past(0) + (begin_ + i) * S;
      if (args_.past != nullptr) {
        copy_columns(past_columns_, args_.past + row * S, own_past);
      } else {
        set_zero(own_past + past_columns_.begin, past_columns_.size());
      }
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
    decoder_.source_rows = now_.rows - begin_;
    if (decoder_.window > 0 && decoder_.w_position == nullptr) {
      const int64_t* const first = args_.decoder.first_step;
      for (int64_t i = 0; i < now_.count; ++i) {
        counts_[i] = number_ + (first == nullptr ? 0 : first[now_.rows[i]]);
      }
      decoder_.first_step = counts_ - begin_;
    }
    DecoderStep<T> step{0,
                        backwards_,
                        slot_ * slot_size,
                        (1 - slot_) * slot_size,
                        decoder_.feeding ? fed_ : nullptr,
                        memory_.output,
                        memory_.attn,
                        past(slot_),
                        past(1 - slot_),
                        memory_.folded != nullptr};
    const auto attend = [&](const T* state) {
      parts_.attend(decoder_, memory_.weights, memory_.scratch, step, at_, thread_, state);
    };
    if (decoder_.attends_first) {
      attend(layers_[decoder_.layer_count - 1].states + step.before);
      step.fed = memory_.context;
    }
    const T* const top = parts_.cells(decoder_, memory_.weights, memory_.scratch, step, at_);
    if (!decoder_.attends()) return top;
    if (!decoder_.attends_first) attend(top);
    combine_step(decoder_, memory_.weights, step, at_, top);
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

  // The next hypotheses are those of now; each is the one that it was.
  void advance() {
    const Hypotheses<T> before = now_;
    now_ = next_;
    next_ = before;
    slot_ = 1 - slot_;
    fed_ = decoder_.feeds_context ? memory_.context : memory_.output;
    ++number_;
  }

  // The same, but each takes over the state of its parent.
  void go_on() {
    const int64_t before = now_.count;
    advance();
    bool same = now_.count == before;
    for (int64_t i = 0; same && i < now_.count; ++i) same = parents_[i] == i;
    if (same) return;
    // Into the slots that the step has read.
    slot_ = 1 - slot_;
    const int64_t H = decoder_.hidden, N = decoder_.batch, F = decoder_.fed_size();
    const int64_t from_slot = (1 - slot_) * N, to_slot = slot_ * N;
    for (int64_t i = 0; i < now_.count; ++i) {
      const int64_t parent = begin_ + parents_[i], own = begin_ + i;
      for (int64_t l = 0; l < decoder_.layer_count; ++l) {
        copy_units(memory_.states[l] + (from_slot + parent) * H,
                   memory_.states[l] + (to_slot + own) * H);
        if (parts_.has_cell) {
          copy_units(memory_.cells[l] + (from_slot + parent) * H,
                     memory_.cells[l] + (to_slot + own) * H);
        }
      }
      if (decoder_.feeding) {
        copy_columns(fed_columns_, fed_ + parent * F, memory_.fed + own * F);
      }
      if (decoder_.taps > 0) {
        copy_columns(past_columns_, past(1 - slot_) + parent * weights_size(),
                     past(slot_) + own * weights_size());
      }
    }
    fed_ = memory_.fed;
    at_.wait();
  }

  const Generate<T>& args_;
  const GenerateParts<T>& parts_;
  const GenerateMemory<T>& memory_;
  Decode<T> decoder_;
  const DecoderLayer<T>* const layers_given_;
  DecoderLayer<T> layers_[kMaxLayers];
  Place at_;  // its rows: first those of the batch, then the unfinished hypotheses
  const int thread_;
  const int64_t begin_;  // the team's first hypothesis in the tensors of all
  const Range units_, chunks_, columns_, fed_columns_, past_columns_;
  T* const inputs_;
  T* const fresh_;
  int32_t* const places_;
  int64_t* const counts_;
  const T* fed_;
  Hypotheses<T> now_, next_;
  int32_t* parents_;  // which of the hypotheses before each of the next ones continues
  int64_t input_count_ = 0, slot_ = 0, number_ = 0;
  bool backwards_ = false;  // every other step: see `product`
};

}  // namespace pyseq::cpu::PYSEQ_TIER
