// SPDX-License-Identifier: Apache-2.0
// The arithmetic of attention scores for ONE component of the query, as cells.h has it for
// the cells: V is a scalar, a SIMD vector of neighbouring components or a CUDA thread's
// value, M supplies tanh and multiply_add. A score is what `add` makes of zero, component by
// component.
#pragma once

#include "cells.h"

namespace pyseq {

struct DotScore {
  static constexpr bool kAdditive = false;

  template <class M, class V>
  static PYSEQ_INLINE V add(V sum, V query, V key, V) {
    return M::multiply_add(query, key, sum);
  }
};

// v . tanh(q + k): Luong's concat and Bahdanau's additive score, with q and k projected.
struct AdditiveScore {
  static constexpr bool kAdditive = true;

  template <class M, class V>
  static PYSEQ_INLINE V add(V sum, V query, V key, V v) {
    return M::multiply_add(v, M::tanh(query + key), sum);
  }

  // Adds the gradients of one component for the score's gradient d_score. The query's and
  // the key's are the same.
  template <class M, class V>
  static PYSEQ_INLINE V backward(V query, V key, V v, V d_score, V& d_v) {
    const V energy = M::tanh(query + key);
    d_v = d_v + d_score * energy;
    return d_score * v * (1 - energy * energy);
  }
};

}  // namespace pyseq
