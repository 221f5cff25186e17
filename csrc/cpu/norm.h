// SPDX-License-Identifier: Apache-2.0
// Layer normalisation of one row at a time, forward and backward, for the scan. A row is summed
// up by whoever needs its moments, always from its first number to its last, so that bits do not
// depend on how its units are shared out.
#pragma once

#include "simd.h"

namespace pyseq::cpu::PYSEQ_TIER {

// Added to the variance: the usual number, torch's and that of the papers' own code.
constexpr double kNormEpsilon = 1e-5;

// The vector with lanes past `count` zero.
template <class T>
PYSEQ_FORCE_INLINE Vec<T> inside(Vec<T> value, int count) {
  if (count >= kLanes<T>) return value;
  T lanes[kLanes<T>];
  store(lanes, value);
  return load(lanes, count);
}

// The mean of term(offset, count) over a row of `size` numbers; four sums, so that the additions
// do not wait for one another.
template <class T, class Term>
PYSEQ_FORCE_INLINE T row_mean(int64_t size, const Term& term) {
  constexpr int64_t N = kLanes<T>;
  Vec<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * N <= size; i += 4 * N) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) sum[part] += term(i + part * N, kLanes<T>);
  }
  for (; i < size; i += N) {
    const int count = static_cast<int>(smaller(N, size - i));
    sum[0] += inside<T>(term(i, count), count);
  }
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<T>(size);
}

// What a row is normalised with: (value - mean) * scale.
template <class T>
struct Moments {
  T mean, scale;

  PYSEQ_FORCE_INLINE Vec<T> normed(Vec<T> value) const { return (value - mean) * scale; }
};

template <class T>
T inverse_root(T value) {
  return 1 / __builtin_sqrt(value);
}
template <>
inline float inverse_root(float value) {
  return 1 / __builtin_sqrtf(value);
}

// In two passes: the mean of squares less the square of the mean would cancel.
template <class T>
PYSEQ_FORCE_INLINE Moments<T> moments(const T* row, int64_t size) {
  const T mean = row_mean<T>(size, [&](int64_t i, int count) { return load(row + i, count); });
  const T variance = row_mean<T>(size, [&](int64_t i, int count) {
    const Vec<T> deviation = load(row + i, count) - mean;
    return deviation * deviation;
  });
  return {mean, inverse_root(variance + static_cast<T>(kNormEpsilon))};
}

// What the gradient of a normalised row, times its gain, has to lose: both means over the row.
//   d_value = scale * (d_normed - mean(d_normed) - normed * mean(d_normed * normed))
template <class T>
struct NormGradient {
  Moments<T> moments;
  T mean, mean_normed;

  PYSEQ_FORCE_INLINE Vec<T> of(Vec<T> value, Vec<T> d_normed) const {
    return moments.scale * (d_normed - mean - moments.normed(value) * mean_normed);
  }
};

// d_normed(offset, count): what the gradient of the normalised row is there.
template <class T, class Gradient>
PYSEQ_FORCE_INLINE NormGradient<T> norm_gradient(const T* row, const Moments<T>& of, int64_t size,
                                                 const Gradient& d_normed) {
  const T mean = row_mean<T>(size, d_normed);
  const T mean_normed = row_mean<T>(size, [&](int64_t i, int count) {
    return d_normed(i, count) * of.normed(load(row + i, count));
  });
  return {of, mean, mean_normed};
}

// The sum over rows of `size` numbers, in the order of the rows.
template <class T>
void sum_rows(const T* rows, int64_t count, int64_t size, T* to) {
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const int inside_row = static_cast<int>(smaller(kLanes<T>, size - i));
    Vec<T> sum = {};
    for (int64_t row = 0; row < count; ++row) sum += load(rows + row * size + i, inside_row);
    store(to + i, sum, inside_row);
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
