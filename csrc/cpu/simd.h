// SPDX-License-Identifier: Apache-2.0
// SIMD vectors of the tier that this translation unit is compiled for (kernels.cpp is
// compiled once per tier). Everything lives in the tier's own namespace and nothing here
// instantiates a shared template: the linker keeps one copy of each shared inline function,
// and a copy made for AVX-512 must never run on a machine without it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#define PYSEQ_FORCE_INLINE __attribute__((always_inline)) inline

namespace pyseq::cpu::PYSEQ_TIER {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 24;  // of 32 registers; the rest hold weights
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 12;  // of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kAccumulators = 12;
#endif

PYSEQ_FORCE_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYSEQ_FORCE_INLINE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using VecInt = Vec<typename IntOf<T>::type>;

template <class T>
PYSEQ_FORCE_INLINE Vec<T> load(const T* from) {
  Vec<T> value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
PYSEQ_FORCE_INLINE void store(T* to, Vec<T> value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// The first `count` lanes, the others zero.
template <class T>
PYSEQ_FORCE_INLINE Vec<T> load(const T* from, int count) {
  if (count >= kLanes<T>) return load(from);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
  } else {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
  }
#else
  Vec<T> value = {};
  for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
#endif
}

template <class T>
PYSEQ_FORCE_INLINE void store(T* to, Vec<T> value, int count) {
  if (count >= kLanes<T>) {
    store(to, value);
    return;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), value);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), value);
  }
#else
  for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}

// Minus zero, since the compiler leaves that out: plus zero it would add, for it changes -0, and
// could not broadcast from memory then, which takes no arithmetic unit from the tile.
template <class T>
PYSEQ_FORCE_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// a * b + c, rounded once where the tier can. The compiler contracts sums of products too, but not
// in every copy of a function alike: this is for sums that several copies must make bit by bit.
template <class T>
PYSEQ_FORCE_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_fmadd_ps(a, b, c);
  else
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  if constexpr (sizeof(T) == 4)
    return _mm256_fmadd_ps(a, b, c);
  else
    return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// True in the first `count` lanes.
template <class T>
PYSEQ_FORCE_INLINE VecInt<T> lanes_below(int count) {
  VecInt<T> number;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<T>; ++lane) number[lane] = lane;
  return number < count;
}

// Sum over the lanes, halving the vector: in an order that does not depend on anything.
template <class T>
PYSEQ_FORCE_INLINE T sum_lanes(Vec<T> value) {
  constexpr int kHalf = kLanes<T> / 2;
#pragma GCC unroll 4
  for (int half = kHalf; half >= 1; half /= 2) {
    VecInt<T> other;
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes<T>; ++lane) other[lane] = lane ^ half;
    value += __builtin_shuffle(value, other);
  }
  return value[0];
}

template <class T>
PYSEQ_FORCE_INLINE T max_lanes(Vec<T> value) {
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half >= 1; half /= 2) {
    VecInt<T> other;
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes<T>; ++lane) other[lane] = lane ^ half;
    const Vec<T> shuffled = __builtin_shuffle(value, other);
    value = shuffled > value ? shuffled : value;
  }
  return value[0];
}

// Adds halves of two vectors while it transposes blocks of Size lanes.
template <class T, int Size>
PYSEQ_FORCE_INLINE Vec<T> fold(Vec<T> a, Vec<T> b) {
  VecInt<T> kept, moved;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    const int from = (lane & Size) == 0 ? 0 : kLanes<T>;
    kept[lane] = from + lane;
    moved[lane] = from + (lane ^ Size);
  }
  return __builtin_shuffle(a, b, kept) + __builtin_shuffle(a, b, moved);
}

// The sum over the lanes of each of Count vectors, a power of two and no more than there are
// lanes, that of vector i in lane i. Each is added up in the same order, whatever Count.
template <class T, int Count, int Size = 1>
PYSEQ_FORCE_INLINE Vec<T> sum_each(const Vec<T>* vectors) {
  static_assert(Count * Size <= kLanes<T> || Count == 1);
  if constexpr (Size == kLanes<T>) {
    return vectors[0];
  } else if constexpr (Count == 1) {
    VecInt<T> other;
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes<T>; ++lane) other[lane] = lane ^ Size;
    const Vec<T> sum = vectors[0] + __builtin_shuffle(vectors[0], other);
    return sum_each<T, 1, Size * 2>(&sum);
  } else {
    Vec<T> half[Count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) half[i] = fold<T, Size>(vectors[2 * i], vectors[2 * i + 1]);
    return sum_each<T, Count / 2, Size * 2>(half);
  }
}

// Transposes a square block of as many vectors as a vector has lanes: at each size the
// off-diagonal halves of neighbouring blocks change places.
template <class T>
PYSEQ_FORCE_INLINE void transpose(Vec<T> (&block)[kLanes<T>]) {
  constexpr int N = kLanes<T>;
#pragma GCC unroll 4
  for (int size = N / 2; size >= 1; size /= 2) {
    VecInt<T> low, high;
#pragma GCC unroll 16
    for (int lane = 0; lane < N; ++lane) {
      low[lane] = (lane & size) == 0 ? lane : N + lane - size;
      high[lane] = (lane & size) == 0 ? lane + size : N + lane;
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if ((i & size) != 0) continue;
      const Vec<T> a = block[i], b = block[i + size];
      block[i] = __builtin_shuffle(a, b, low);
      block[i + size] = __builtin_shuffle(a, b, high);
    }
  }
}

template <class T>
PYSEQ_FORCE_INLINE int64_t vectors(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T>;
}

// How many lanes of vector `index` lie inside `count` elements.
template <class T>
PYSEQ_FORCE_INLINE int lanes_inside(int64_t count, int64_t index) {
  const int64_t left = count - index * kLanes<T>;
  return left < kLanes<T> ? static_cast<int>(left) : kLanes<T>;
}

}  // namespace pyseq::cpu::PYSEQ_TIER
