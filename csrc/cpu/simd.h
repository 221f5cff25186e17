// SPDX-License-Identifier: Apache-2.0
// SIMD vectors of the tier that this translation unit is compiled for (kernels.cpp is
// compiled once per tier). Everything lives in the tier's own namespace and nothing here
// instantiates a shared template: the linker keeps one copy of each shared inline function,
// and a copy made for AVX-512 must never run on a machine without it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__)
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

template <class T>
PYSEQ_FORCE_INLINE Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
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

PYSEQ_FORCE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYSEQ_FORCE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace pyseq::cpu::PYSEQ_TIER
