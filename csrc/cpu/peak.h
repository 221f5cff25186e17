// SPDX-License-Identifier: Apache-2.0
// What the machine can do at most with the tier's vectors: the floor that benchmarks compare
// the kernels with. No operator calls it. Rates count the time between two meetings of all
// threads; starting them and filling memory come before.
#pragma once

#include <time.h>

#include "kernels.h"
#include "steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

namespace detail {

PYSEQ_FORCE_INLINE double clock_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Calls prepare(memory), then the timed body(memory), on every thread, each with `bytes` of its
// own. Returns calls of body per second, over all threads.
template <class Prepare, class Body>
double calls_per_second(int threads, int64_t bytes, const Prepare& prepare, const Body& body) {
  // Pages of their own, so that no two threads share a line or an adjacent-line prefetch.
  const int64_t own = (bytes / 4096 + 2) * 4096;
  Workspace workspace(static_cast<size_t>(own * threads));
  Barrier all;
  double seconds = 0;
  int count = 1;
  parallel(threads, [&](int thread, int present) {
    char* const memory = static_cast<char*>(workspace.data()) + thread * own;
    prepare(memory);
    if (present > 1) all.wait(present);
    const double begin = clock_seconds();
    body(memory);
    if (present > 1) all.wait(present);
    if (thread == 0) {
      seconds = clock_seconds() - begin;
      count = present;
    }
  });
  return count / seconds;
}

}  // namespace detail

// Floating-point operations per second of all threads: chains of multiply-adds in registers, as
// many as a tile has sums. More than latency times units of any machine so far (4 cycles, 2
// units), so only the units bound it.
template <class T>
double multiply_add_rate(int threads, int64_t rounds) {
  const auto body = [rounds](char* memory) {
    Vec<T> sums[kAccumulators];
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i) sums[i] = broadcast<T>(static_cast<T>(i));
    const Vec<T> factor = broadcast<T>(T(0.5)), summand = broadcast<T>(T(1));
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
      for (int i = 0; i < kAccumulators; ++i) sums[i] = sums[i] * factor + summand;
    }
    // Written, so that none of it can be left out.
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i)
      store(reinterpret_cast<T*>(memory) + i * kLanes<T>, sums[i]);
  };
  const double each = 2.0 * kAccumulators * kLanes<T> * static_cast<double>(rounds);
  return each * detail::calls_per_second(threads, kAccumulators * kVectorBytes, [](char*) {}, body);
}

// Bytes per second that all threads read, each over and over its own `bytes` of memory: where
// those lie is decided by their number.
template <class T>
double read_rate(int threads, int64_t bytes, int64_t passes) {
  constexpr int kSums = 8;
  const int64_t runs = larger(1, bytes / (kSums * kVectorBytes)), size = runs * kSums * kLanes<T>;
  const auto prepare = [size](char* memory) {
    T* const data = reinterpret_cast<T*>(memory);
    for (int64_t i = 0; i < size; i += kLanes<T>) store(data + i, Vec<T>{});
  };
  const auto body = [=](char* memory) {
    Vec<T> sums[kSums] = {};
    for (int64_t pass = 0; pass < passes; ++pass) {
      // Volatile, so that the loads stay in the order of their addresses: where the compiler let
      // two pairs of eight change places, Zen 5 read from L2 at half the rate.
      const volatile Vec<T>* from = reinterpret_cast<const volatile Vec<T>*>(memory);
      for (int64_t run = 0; run < runs; ++run, from += kSums) {
#pragma GCC unroll 8
        for (int i = 0; i < kSums; ++i) sums[i] += from[i];
      }
    }
    Vec<T> sum = sums[0];
    for (int i = 1; i < kSums; ++i) sum += sums[i];
    store(reinterpret_cast<T*>(memory), sum);
  };
  const int64_t read = size * static_cast<int64_t>(sizeof(T));
  return static_cast<double>(read) * static_cast<double>(passes) *
         detail::calls_per_second(threads, read, prepare, body);
}

}  // namespace pyseq::cpu::PYSEQ_TIER
