// SPDX-License-Identifier: Apache-2.0
// What the loops of a scan share, forward and backward: which rows a step is for, heads, zoneout.
#pragma once

#include "kernels.h"
#include "steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

// Which rows take part in a step, and which start it afresh.
struct Steps {
  int64_t steps, batch;
  bool reverse;
  const int64_t* lengths;
  const bool* resets;

  int64_t time(int64_t n) const { return reverse ? steps - 1 - n : n; }
  bool active(int64_t n, int64_t row) const { return lengths == nullptr || time(n) < lengths[row]; }
  bool any_active(int64_t n, const Range& rows) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (active(n, row)) return true;
    }
    return false;
  }
  // Whether the row's state is cleared before the n-th step; there is no step `steps`.
  bool cleared(int64_t n, int64_t row) const {
    return resets != nullptr && n < steps && resets[time(n) * batch + row] && active(n, row);
  }
};

// The cost of a unit's arithmetic, in multiply-adds.
constexpr int64_t kUnitCost = 16;

// The plan of a loop in which no thread waits for another: all share the units.
inline Plan plan_free(int64_t multiply_adds, int threads) {
  return {static_cast<int>(smaller(threads, 1 + multiply_adds / 1000000)), 1};
}

// Calls body(head, its panels in `panels`, counted from its first) for each head that has some.
template <class Body>
PYSEQ_FORCE_INLINE void for_each_head(const Range& panels, int64_t head_panels, const Body& body) {
  for (int64_t begin = panels.begin; begin < panels.end;) {
    const int64_t head = begin / head_panels, first = head * head_panels;
    const int64_t end = smaller(panels.end, first + head_panels);
    body(head, Range{begin - first, end - first});
    begin = end;
  }
}

// Zoneout: the share of the old value in the new one. In this form a share of 0 or 1 gives one of
// them exactly.
template <class V>
PYSEQ_FORCE_INLINE V zone_out(V old_share, V old_value, V new_value) {
  return old_share * old_value + (1 - old_share) * new_value;
}

// Adds to `count` of the numbers at to + offset; to nothing where there are none.
template <class T>
PYSEQ_FORCE_INLINE void add_to(T* to, int64_t offset, Vec<T> value, int count) {
  if (to != nullptr) store(to + offset, load(to + offset, count) + value, count);
}

}  // namespace pyseq::cpu::PYSEQ_TIER
