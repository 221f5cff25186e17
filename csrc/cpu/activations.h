// SPDX-License-Identifier: Apache-2.0
// exp, sigmoid and tanh on SIMD vectors: the M of cells.h and scores.h on the CPU.
// Within 3 units in the last place of the exact value for every finite float32, the same
// code at full precision in float64. NaN stays NaN.
#pragma once

#include "simd.h"

namespace pyseq::cpu::PYSEQ_TIER {

template <class T>
struct ExpConstants;

// kRound is 1.5 * 2^mantissa: adding it rounds to an integer, held in the low bits.
// ln 2 is split so that k * kLn2High is exact for every k that occurs, even without fused
// multiply-add. kTerms of exp's series leave a remainder below half a unit in the last
// place for |r| <= ln 2 / 2, and kArtanhTerms of artanh's for |s| <= 1/3.
template <>
struct ExpConstants<float> {
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 8, kArtanhTerms = 7;
  static constexpr float kRound = 0x1.8p23f;
  static constexpr float kLog2E = 0x1.715476p0f;
  static constexpr float kLn2High = 0x1.63p-1f;
  static constexpr float kLn2Low = -0x1.bd0106p-13f;
  static constexpr float kLowest = -104.0f;   // exp of it rounds to zero
  static constexpr float kTanhIsOne = 10.0f;  // tanh of it rounds to one
};

template <>
struct ExpConstants<double> {
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 14, kArtanhTerms = 16;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2E = 0x1.71547652b82fep0;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kLowest = -746.0;
  static constexpr double kTanhIsOne = 20.0;
};

template <class T>
struct Math {
  using V = Vec<T>;
  using I = VecInt<T>;
  using Constants = ExpConstants<T>;

  static PYSEQ_FORCE_INLINE V zero() { return V{}; }

  static PYSEQ_FORCE_INLINE V multiply_add(V a, V b, V c) {
    return PYSEQ_TIER::multiply_add<T>(a, b, c);
  }

  static PYSEQ_FORCE_INLINE V relu(V x) { return x < 0 ? V{} : x; }

  static PYSEQ_FORCE_INLINE V where_positive(V x, V value) { return x > 0 ? value : V{}; }

  static PYSEQ_FORCE_INLINE V minus_infinity() { return broadcast(-T(__builtin_huge_val())); }

  static PYSEQ_FORCE_INLINE V where_zero(V x, V value, V otherwise) {
    return x == 0 ? value : otherwise;
  }

  static PYSEQ_FORCE_INLINE V where_less(V a, V b, V value, V otherwise) {
    return a < b ? value : otherwise;
  }

  static PYSEQ_FORCE_INLINE V abs(V x) {
    return reinterpret_cast<V>(reinterpret_cast<I>(x) & ~sign_bit());
  }

  // exp(x) for x <= 0. Below the normal range the scale is applied in two halves, so that
  // the result is rounded once, into the denormals.
  static PYSEQ_FORCE_INLINE V exp_nonpositive(V x) {
    x = x < Constants::kLowest ? broadcast(Constants::kLowest) : x;
    V r;
    const I k = reduce(x, r);
    const V fraction = 1 + series(r);
#if defined(__AVX512F__)
    return scale(fraction, __builtin_convertvector(k, V));
#else
    const I half = k >> 1;
    return fraction * power_of_two(half) * power_of_two(k - half);
#endif
  }

  // With e = exp(-|x|): 1 / (1 + e) for x >= 0 and e / (1 + e) below, which cancels nowhere.
  static PYSEQ_FORCE_INLINE V sigmoid(V x) {
    const V e = exp_nonpositive(-abs(x));
    return (x < 0 ? e : broadcast(T(1))) / (1 + e);
  }

  // tanh |x| = m / (m + 2) with m = exp(2|x|) - 1 = 2^k (exp(r) - 1) + (2^k - 1), which
  // keeps full precision near zero.
  static PYSEQ_FORCE_INLINE V tanh(V x) {
    V a = abs(x);
    a = a > Constants::kTanhIsOne ? broadcast(Constants::kTanhIsOne) : a;
    V r;
    const I k = reduce(a + a, r);
    const V scale = power_of_two(k);
    const V m = series(r) * scale + (scale - 1);
    const V t = m / (m + 2);
    return reinterpret_cast<V>(reinterpret_cast<I>(t) | (reinterpret_cast<I>(x) & sign_bit()));
  }

  // log sigmoid(x) = min(x, 0) - log(1 + e) with e = exp(-|x|), of which both have one sign.
  static PYSEQ_FORCE_INLINE V log_sigmoid(V x) {
    const V e = exp_nonpositive(-abs(x));
    // log(1 + e) = 2 artanh(s) with s = e / (2 + e), at most 1/3, by the series of artanh.
    const V s = e / (2 + e), s2 = s * s;
    V sum = broadcast(T(1) / (2 * Constants::kArtanhTerms + 1));
    for (int k = Constants::kArtanhTerms - 1; k >= 0; --k) sum = sum * s2 + T(1) / (2 * k + 1);
    return (x < 0 ? x : V{}) - 2 * s * sum;
  }

 private:
  static PYSEQ_FORCE_INLINE I sign_bit() {
    return I{} + (typename IntOf<T>::type(1) << (8 * sizeof(T) - 1));
  }

  // x = k ln 2 + r with |r| <= ln 2 / 2.
  static PYSEQ_FORCE_INLINE I reduce(V x, V& r) {
    const V rounded = x * Constants::kLog2E + Constants::kRound;
    const V k = rounded - Constants::kRound;
    r = x - k * Constants::kLn2High - k * Constants::kLn2Low;
    return reinterpret_cast<I>(rounded) - reinterpret_cast<I>(broadcast(Constants::kRound));
  }

#if defined(__AVX512F__)
  // value * 2^k, rounded once. (Of the unmasked form some compilers warn.)
  static PYSEQ_FORCE_INLINE V scale(V value, V k) {
    if constexpr (sizeof(T) == 4) {
      return _mm512_maskz_scalef_ps(static_cast<__mmask16>(-1), value, k);
    } else {
      return _mm512_maskz_scalef_pd(static_cast<__mmask8>(-1), value, k);
    }
  }
#endif

  static PYSEQ_FORCE_INLINE V power_of_two(I k) {
    return reinterpret_cast<V>((k + Constants::kBias) << Constants::kMantissa);
  }

  // exp(r) - 1 = r + r^2 (1/2! + r/3! + ...).
  static PYSEQ_FORCE_INLINE V series(V r) {
    const V r2 = r * r, r4 = r2 * r2;
    return r + r2 * terms<2, Constants::kTerms - 1>(r, r2, r4, r4 * r4);
  }

  // The sum of r^i / (First + i)! for i < Count, halved until two terms are left: a chain of
  // log2 Count multiply-adds, where one after the other they would be what a step waits for.
  template <int First, int Count>
  static PYSEQ_FORCE_INLINE V terms(V r, V r2, V r4, V r8) {
    constexpr T kFirst = T(inverse_factorial(First));
    if constexpr (Count == 1) {
      return broadcast(kFirst);
    } else if constexpr (Count == 2) {
      return r * T(inverse_factorial(First + 1)) + kFirst;
    } else {
      constexpr int kHalf = Count <= 4 ? 2 : (Count <= 8 ? 4 : 8);
      static_assert(Count <= 16);
      const V power = kHalf == 2 ? r2 : (kHalf == 4 ? r4 : r8);
      return terms<First + kHalf, Count - kHalf>(r, r2, r4, r8) * power +
             terms<First, kHalf>(r, r2, r4, r8);
    }
  }

  static constexpr double inverse_factorial(int n) {
    double product = 1;
    for (int i = 2; i <= n; ++i) product *= i;
    return 1 / product;
  }
};

}  // namespace pyseq::cpu::PYSEQ_TIER
