// SPDX-License-Identifier: Apache-2.0
// SIMD vectors of the tier that this translation unit is compiled for (kernels.cpp is
// compiled once per tier). Everything lives in the tier's own namespace and nothing here
// instantiates a shared function template: the linker keeps one copy of each shared inline
// function, and a copy made for AVX-512 must never run on a machine without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

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

namespace detail {

template <class T, class Index, int... kLane>
PYSEQ_FORCE_INLINE Vec<T> choose(Vec<T> a, Vec<T> b, Index, std::integer_sequence<int, kLane...>) {
  return __builtin_shuffle(a, b, VecInt<T>{Index{}(kLane)...});
}

// Lane i is lane index(i) of a, or if that is no lane of a, of b behind it. A list of constants: of
// indices that a loop writes the compiler makes no instruction, but vectors anew at every call.
template <class T, class Index>
PYSEQ_FORCE_INLINE Vec<T> choose(Vec<T> a, Vec<T> b, Index index) {
  return choose<T>(a, b, index, std::make_integer_sequence<int, kLanes<T>>{});
}

// Vectors as blocks of 16 bytes, within which most instructions move numbers.
template <class T>
constexpr int kInBlock = 16 / sizeof(T);
template <class T>
constexpr int kBlocks = kLanes<T> / kInBlock<T>;

// Lanes Lane, Lane + Step, ... of each block of a, then of the same one of b.
template <class T, int Lane, int Step>
PYSEQ_FORCE_INLINE Vec<T> lanes_of(Vec<T> a, Vec<T> b) {
  return choose<T>(a, b, [](int lane) {
    constexpr int kHalf = kInBlock<T> / 2;
    const int inside = lane % kInBlock<T>, block = lane - inside;
    return (inside < kHalf ? 0 : kLanes<T>)+block + Lane + inside % kHalf * Step;
  });
}

// The same of blocks in the vectors.
template <class T, int Block, int Step>
PYSEQ_FORCE_INLINE Vec<T> blocks_of(Vec<T> a, Vec<T> b) {
  return choose<T>(a, b, [](int lane) {
    constexpr int kHalf = kBlocks<T> / 2;
    const int inside = lane % kInBlock<T>, block = lane / kInBlock<T>;
    return (block < kHalf ? 0 : kLanes<T>)+inside + (Block + block % kHalf * Step) * kInBlock<T>;
  });
}

// Of each block the lanes in the half from Lane on, of a and b in turns.
template <class T, int Lane>
PYSEQ_FORCE_INLINE Vec<T> interleaved(Vec<T> a, Vec<T> b) {
  return choose<T>(a, b, [](int lane) {
    const int inside = lane % kInBlock<T>, block = lane - inside;
    return (inside % 2 == 0 ? 0 : kLanes<T>)+block + Lane + inside / 2;
  });
}

template <class T, int Distance>
PYSEQ_FORCE_INLINE Vec<T> swapped(Vec<T> value) {
  return choose<T>(value, value, [](int lane) { return lane ^ Distance; });
}

// Adds up halves of a and b, first of blocks and then of the vectors: level by level the numbers
// that belong together move side by side.
template <class T, int Level>
PYSEQ_FORCE_INLINE Vec<T> add_halves(Vec<T> a, Vec<T> b) {
  constexpr int kInside = kInBlock<T> / 2;  // levels within a block: 2 or 1
  if constexpr (Level < kInside) {
    return lanes_of<T, 0, 2>(a, b) + lanes_of<T, 1, 2>(a, b);
  } else if constexpr (Level == kInside && kBlocks<T> == 4) {
    return blocks_of<T, 0, 1>(a, b) + blocks_of<T, 2, 1>(a, b);
  } else {
    return blocks_of<T, 0, 2>(a, b) + blocks_of<T, 1, 2>(a, b);
  }
}

}  // namespace detail

// Sum over the lanes, halving the vector: in an order that does not depend on anything.
template <class T, int Half = kLanes<T> / 2>
PYSEQ_FORCE_INLINE T sum_lanes(Vec<T> value) {
  value += detail::swapped<T, Half>(value);
  if constexpr (Half > 1) {
    return sum_lanes<T, Half / 2>(value);
  } else {
    return value[0];
  }
}

template <class T, int Half = kLanes<T> / 2>
PYSEQ_FORCE_INLINE T max_lanes(Vec<T> value) {
  const Vec<T> other = detail::swapped<T, Half>(value);
  value = other > value ? other : value;
  if constexpr (Half > 1) {
    return max_lanes<T, Half / 2>(value);
  } else {
    return value[0];
  }
}

// The sum over the lanes of each of Count vectors, a power of two and no more than there are
// lanes, that of vector i in lane i. Each is added up in the same order, whatever Count.
template <class T, int Count, int Level = 0>
PYSEQ_FORCE_INLINE Vec<T> sum_each(const Vec<T>* vectors) {
  static_assert(Count << Level <= kLanes<T> || Count == 1);
  if constexpr (1 << Level == kLanes<T>) {
    return vectors[0];
  } else {
    constexpr int kCount = Count == 1 ? 1 : Count / 2;
    Vec<T> half[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      half[i] = detail::add_halves<T, Level>(vectors[Count == 1 ? 0 : 2 * i],
                                             vectors[Count == 1 ? 0 : 2 * i + 1]);
    }
    return sum_each<T, kCount, Level + 1>(half);
  }
}

// Transposes a square block of as many vectors as a vector has lanes: first blocks of 16 bytes, of
// vectors that lie as far apart as they have lanes, then the numbers in them.
template <class T>
PYSEQ_FORCE_INLINE void transpose(Vec<T> (&block)[kLanes<T>]) {
  using detail::blocks_of;
  using detail::interleaved;
  using detail::lanes_of;
  constexpr int E = detail::kInBlock<T>, Q = detail::kBlocks<T>;
#pragma GCC unroll 4
  for (int i = 0; i < E; ++i) {
    if constexpr (Q == 4) {
      const Vec<T> a = blocks_of<T, 0, 1>(block[i], block[i + E]);
      const Vec<T> b = blocks_of<T, 0, 1>(block[i + 2 * E], block[i + 3 * E]);
      const Vec<T> c = blocks_of<T, 2, 1>(block[i], block[i + E]);
      const Vec<T> d = blocks_of<T, 2, 1>(block[i + 2 * E], block[i + 3 * E]);
      block[i] = blocks_of<T, 0, 2>(a, b);
      block[i + E] = blocks_of<T, 1, 2>(a, b);
      block[i + 2 * E] = blocks_of<T, 0, 2>(c, d);
      block[i + 3 * E] = blocks_of<T, 1, 2>(c, d);
    } else if constexpr (Q == 2) {
      const Vec<T> a = block[i], b = block[i + E];
      block[i] = blocks_of<T, 0, 1>(a, b);
      block[i + E] = blocks_of<T, 1, 1>(a, b);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes<T>; i += E) {
    Vec<T>* const x = block + i;
    const Vec<T> a = interleaved<T, 0>(x[0], x[1]), b = interleaved<T, E / 2>(x[0], x[1]);
    if constexpr (E == 4) {
      const Vec<T> c = interleaved<T, 0>(x[2], x[3]), d = interleaved<T, 2>(x[2], x[3]);
      x[0] = lanes_of<T, 0, 1>(a, c);
      x[1] = lanes_of<T, 2, 1>(a, c);
      x[2] = lanes_of<T, 0, 1>(b, d);
      x[3] = lanes_of<T, 2, 1>(b, d);
    } else {
      x[0] = a;
      x[1] = b;
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
