// SPDX-License-Identifier: Apache-2.0
// What the scan and the decoder share: threads as a lambda, where the states of a step lie,
// and the two epilogues that turn the sums of a tile into a cell step, forward and backward.
#pragma once

#include "../cell_kinds.h"
#include "activations.h"
#include "threads.h"
#include "tile.h"

namespace pyseq::cpu::PYSEQ_TIER {

template <class Body>
void parallel(int threads, const Body& body) {
  run_parallel(
      threads,
      [](void* context, int thread, int present) {
        (*static_cast<const Body*>(context))(thread, present);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// The slot that holds the state before, and after, the n-th step processed, of those of all steps
// or of two. In reverse the steps are processed from the last to the first, and slot t + 1 comes
// before step t.
PYSEQ_FORCE_INLINE int64_t slot_before(int64_t n, int64_t steps, bool reverse, bool all) {
  return all ? (reverse ? steps - n : n) : n & 1;
}
PYSEQ_FORCE_INLINE int64_t slot_after(int64_t n, int64_t steps, bool reverse, bool all) {
  return all ? (reverse ? steps - n - 1 : n + 1) : (n + 1) & 1;
}

// Slots of (rows, row size), a distance apart.
template <class T>
struct Slots {
  T* data;
  int64_t distance;

  T* operator[](int64_t slot) const { return data + slot * distance; }
};

// Between what two threads write again and again. The hardware fetches what it expects to be
// written next, in strides of a row too, out of the cache of the core that works there. Where cores
// share no cache, that took a third of the time of small layers.
template <class T>
constexpr int64_t kGap = 4096 / sizeof(T);

// Memory for the rows of each team, in `slots` that take turns, a gap away from that of other
// teams: for what is written again at every step.
template <class T>
class RowsApart {
 public:
  // Without teams there is nothing to keep apart, and no memory is needed.
  RowsApart(const Plan& plan, int64_t slots, int64_t rows, int64_t row_size)
      : slots_(slots),
        row_size_(row_size),
        size_(plan.teams > 1 ? slots * rows * row_size + plan.teams * kGap<T> : 0) {}

  int64_t size() const { return size_; }

  // The slots of a team in `memory`, in which row 0 is the first of all teams.
  Slots<T> of(const Place& at, T* memory) const {
    return {memory + at.team * kGap<T> + (slots_ - 1) * at.rows.begin * row_size_,
            at.rows.size() * row_size_};
  }

  // Copies a team's rows.
  void copy(const Place& at, const T* from, T* to) const {
    const int64_t begin = at.rows.begin * row_size_, count = at.rows.size() * row_size_;
    __builtin_memcpy(to + begin, from + begin, static_cast<size_t>(count) * sizeof(T));
  }

 private:
  int64_t slots_, row_size_, size_;
};

// Hands out pieces of one block of memory, each aligned to 64 bytes. Made without memory it
// counts, so that the same code that takes the pieces first says how much it will take.
template <class T>
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<T*>(memory)) {}
  T* take(int64_t count) {
    T* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    constexpr int64_t kAlign = 64 / sizeof(T);
    used_ += (count + kAlign - 1) / kAlign * kAlign;
    return piece;
  }
  size_t bytes() const { return static_cast<size_t>(used_) * sizeof(T); }

 private:
  T* memory_;
  int64_t used_ = 0;
};

// The cost of steps whose weights are quantized: so much less of them is read, and of 8 bits
// multiplied.
inline StepCost quantized_cost(const QuantizedWeights* quantized, StepCost cost) {
  if (quantized == nullptr) return cost;
  const int shorter = quantized->kind == QuantizedKind::kInt8 ? 4 : 2;
  cost.weight_bytes /= shorter;
  if (shorter == 4) cost.weights /= shorter;
  return cost;
}

// The product of states, gate by gate.
template <class Cell, class T>
PYSEQ_FORCE_INLINE Segment<T> recurrent_segment(const T* a, const Weights<T>& weights) {
  Segment<T> segment{a, weights.k_count, weights, {}};
  for (int g = 0; g < Cell::kGates; ++g) segment.slot[g] = Cell::recurrent_slot(g);
  return segment;
}

// The product of what comes from below.
template <class T>
PYSEQ_FORCE_INLINE Segment<T> input_segment(const T* a, const Weights<T>& weights) {
  return {a, weights.k_count, weights, {0, 1, 2, 3}};
}

// A product with one gate that adds to sum `slot`.
template <class T>
PYSEQ_FORCE_INLINE Segment<T> plain_segment(const T* a, const Weights<T>& weights, int slot = 0) {
  return {a, weights.k_count, weights, {slot, 0, 0, 0}};
}

// The same with some columns of rows that are `stride` apart.
template <class T>
PYSEQ_FORCE_INLINE Segment<T> column_segment(const T* a, int64_t stride,
                                             const Weights<T>& weights) {
  return {a, stride, weights, {0, 0, 0, 0}};
}

// One vector of units of one row, at one step: where its values lie. Pointers are to the
// first of `count` units; gate g is at gates + g * hidden, and so are the states beside h and the
// units' own weights.
template <class T>
struct UnitForward {
  int64_t hidden;
  int count;
  const T* x;           // (G*H) or null: what is added to the sums, the input part or biases
  const T* apart_bias;  // (H) or null
  T* gates;             // (G*H) or null: where what backward needs is kept
  T* apart;             // (H) or null
  const T* h_prev;
  const T* c_prev;
  T* c;
  const T* unit_weights = nullptr;  // (U*H) or null
};

// From where a row's numbers lie, `hidden` apart, and back.
template <int Count, class T>
PYSEQ_FORCE_INLINE void load_each(const T* from, int64_t hidden, int count, Vec<T>* values) {
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) values[i] = load(from + i * hidden, count);
}
template <int Count, class T>
PYSEQ_FORCE_INLINE void store_each(T* to, int64_t hidden, int count, const Vec<T>* values) {
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) store(to + i * hidden, values[i], count);
}
template <int Count, class T>
PYSEQ_FORCE_INLINE void store_zero(T* to, int64_t hidden, int count) {
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) store(to + i * hidden, Vec<T>{}, count);
}

// The new h; c and what backward needs are stored.
template <class Cell, class T>
PYSEQ_FORCE_INLINE Vec<T> cell_forward(const UnitForward<T>& unit, const T* sums) {
  using V = Vec<T>;
  V pre[Cell::kPre];
#pragma GCC unroll 4
  for (int g = 0; g < Cell::kPre; ++g) {
    pre[g] = load(sums + g * kLanes<T>);
    if (g < Cell::kGates && unit.x != nullptr) {
      pre[g] += load(unit.x + g * unit.hidden, unit.count);
    }
  }
  if constexpr (Cell::kPre > Cell::kGates) {
    if (unit.apart_bias != nullptr) {
      pre[Cell::kGates] += load(unit.apart_bias, unit.count);
    }
  }
  V h = load(unit.h_prev, unit.count);
  V c[at_least_one(Cell::kStates)], own[at_least_one(Cell::kUnitWeights)];
  load_each<Cell::kStates>(unit.c_prev, unit.hidden, unit.count, c);
  load_each<Cell::kUnitWeights>(unit.unit_weights, unit.hidden, unit.count, own);
  Cell::template forward<Math<T>>(pre, own, h, c);
  store_each<Cell::kStates>(unit.c, unit.hidden, unit.count, c);
  if (unit.gates != nullptr) {
#pragma GCC unroll 4
    for (int g = 0; g < Cell::kGates; ++g) {
      store(unit.gates + g * unit.hidden, pre[g], unit.count);
    }
    if constexpr (Cell::kPre > Cell::kGates) store(unit.apart, pre[Cell::kGates], unit.count);
  }
  return h;
}

template <class T>
struct UnitBackward {
  int64_t hidden;
  int count;
  const T* gates;
  const T* apart;
  const T* h_prev;
  const T* c_prev;
  T* d_h;  // out: the part of the gradient of h_{t-1} that passes no weights
  T* d_c;  // in of c_t, out of c_{t-1}
  T* d_x_gates;
  T* d_r_gates;
  const T* unit_weights = nullptr;
  T* d_unit_weights = nullptr;  // added to
};

// Stores the gradients of the pre-activations and what goes on to the step before.
template <class Cell, class T>
PYSEQ_FORCE_INLINE void cell_backward(const UnitBackward<T>& unit, Vec<T> d_h) {
  using V = Vec<T>;
  V saved[Cell::kPre];
  V d_pre[Cell::kPre];
#pragma GCC unroll 4
  for (int g = 0; g < Cell::kGates; ++g) {
    saved[g] = load(unit.gates + g * unit.hidden, unit.count);
  }
  if constexpr (Cell::kPre > Cell::kGates) saved[Cell::kGates] = load(unit.apart, unit.count);
  constexpr int kStates = at_least_one(Cell::kStates), kOwn = at_least_one(Cell::kUnitWeights);
  V c_prev[kStates], d_c[kStates], own[kOwn], d_own[kOwn];
  load_each<Cell::kStates>(unit.c_prev, unit.hidden, unit.count, c_prev);
  load_each<Cell::kStates>(unit.d_c, unit.hidden, unit.count, d_c);
  load_each<Cell::kUnitWeights>(unit.unit_weights, unit.hidden, unit.count, own);
  Cell::template backward<Math<T>>(saved, own, load(unit.h_prev, unit.count), c_prev, d_h, d_c,
                                   d_pre, d_own);
  store_each<Cell::kStates>(unit.d_c, unit.hidden, unit.count, d_c);
#pragma GCC unroll 4
  for (int i = 0; i < Cell::kUnitWeights; ++i) {
    T* const sum = unit.d_unit_weights + i * unit.hidden;
    store(sum, load(sum, unit.count) + d_own[i], unit.count);
  }
  store(unit.d_h, d_h, unit.count);
#pragma GCC unroll 4
  for (int g = 0; g < Cell::kGates; ++g) {
    store(unit.d_x_gates + g * unit.hidden, d_pre[g], unit.count);
    if constexpr (Cell::kPre > Cell::kGates) {
      store(unit.d_r_gates + g * unit.hidden, d_pre[Cell::recurrent_slot(g)], unit.count);
    }
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
