// SPDX-License-Identifier: Apache-2.0
// Kernels that try the shim itself, the wrappers of device.h and the group barrier.
#include "cuda/barrier.h"
#include "cuda/launch.h"
#include "exports.h"

namespace pyseq::cuda {
namespace {

// Every thread hands its number to another one of the block, without meeting it if `careless`.
void exchange_kernel(const bool careless, int* to) {
  int* const shared = static_cast<int*>(shared_memory());
  const int thread = thread_index(), count = thread_count();
  shared[thread] = thread;
  if (!careless) sync_threads();
  to[block_index_x() * count + thread] = shared[count - 1 - thread];
}

// Every block adds up what all blocks of its group wrote in the step before.
void group_kernel(const int steps, const int absent, unsigned* counters, int* sums) {
  const int blocks = grid_size_x(), group = block_index_y();
  GroupBarrier barrier(counters, group, blocks);
  for (int step = 0; step < steps; ++step) {
    int* const before = sums + (step * grid_size_y() + group) * blocks;
    int* const after = before + grid_size_y() * blocks;
    if (thread_index() == 0) {
      int sum = 1;
      for (int i = 0; step > 0 && i < blocks; ++i) sum += load_shared_by_blocks(before + i);
      after[block_index_x()] = sum;
    }
    if (block_index_x() < absent && step + 1 == steps) continue;
    barrier.arrive();
    barrier.wait();
  }
}

void overrun_kernel(const int past) {
  static_cast<unsigned char*>(shared_memory())[thread_index() + past] = 0;
}

// c (16, 8) = a (16, 16) b (16, 8), numbers in the order of memory; b by columns.
template <class S>
void multiply_kernel(const S* a, const S* b, float* c) {
  const int row = thread_index() / 4, pair = 2 * (thread_index() % 4);
  const auto word = [](const S* from) {
    uint32_t both;
    memcpy(&both, from, sizeof both);
    return both;
  };
  const uint32_t own_a[4] = {word(a + row * 16 + pair), word(a + (row + 8) * 16 + pair),
                             word(a + row * 16 + pair + 8), word(a + (row + 8) * 16 + pair + 8)};
  const uint32_t own_b[2] = {word(b + row * 16 + pair), word(b + row * 16 + pair + 8)};
  float sum[4] = {};
  mma_16x8x16<S>(sum, own_a, own_b);
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + pair + i % 2] = sum[i];
}

// Each function of Math in a row of `count`.
template <class A>
void math_kernel(const A* x, A* y, int count) {
  for (int i = thread_index(); i < count; i += thread_count()) {
    y[i] = Math<A>::sigmoid(x[i]);
    y[count + i] = Math<A>::tanh(x[i]);
    y[2 * count + i] = Math<A>::log_sigmoid(x[i]);
    y[3 * count + i] = Math<A>::relu(x[i]);
  }
}

template <class S>
void round_kernel(const float* from, S* to, float* back, int count) {
  for (int i = thread_index(); i < count; i += thread_count()) {
    to[i] = narrow<S>(from[i]);
    back[i] = widen(to[i]);
  }
}

}  // namespace
}  // namespace pyseq::cuda

using namespace pyseq::cuda;

PYSEQ_EXPORT int exchange(bool careless, int* to) {
  return launch(exchange_kernel, {.x = 2, .y = 1, .threads = 64, .shared = 256}, nullptr, careless,
                to);
}
PYSEQ_EXPORT int groups(int steps, int absent, unsigned* counters, int* sums) {
  return launch(group_kernel, {.x = 3, .y = 2, .threads = 32, .together = true}, nullptr, steps,
                absent, counters, sums);
}
PYSEQ_EXPORT int overrun(int past) {
  return launch(overrun_kernel, {.x = 1, .y = 1, .threads = 32, .shared = 32}, nullptr, past);
}
PYSEQ_EXPORT int multiply_float16(const Half* a, const Half* b, float* c) {
  return launch(multiply_kernel<Half>, {.x = 1, .y = 1, .threads = 32}, nullptr, a, b, c);
}
PYSEQ_EXPORT int multiply_bfloat16(const Bfloat16* a, const Bfloat16* b, float* c) {
  return launch(multiply_kernel<Bfloat16>, {.x = 1, .y = 1, .threads = 32}, nullptr, a, b, c);
}
PYSEQ_EXPORT int math_float32(const float* x, float* y, int count) {
  return launch(math_kernel<float>, {.x = 1, .y = 1, .threads = 32}, nullptr, x, y, count);
}
PYSEQ_EXPORT int math_float64(const double* x, double* y, int count) {
  return launch(math_kernel<double>, {.x = 1, .y = 1, .threads = 32}, nullptr, x, y, count);
}
PYSEQ_EXPORT int round_float16(const float* from, Half* to, float* back, int count) {
  return launch(round_kernel<Half>, {.x = 1, .y = 1, .threads = 32}, nullptr, from, to, back,
                count);
}
PYSEQ_EXPORT int round_bfloat16(const float* from, Bfloat16* to, float* back, int count) {
  return launch(round_kernel<Bfloat16>, {.x = 1, .y = 1, .threads = 32}, nullptr, from, to, back,
                count);
}
