// SPDX-License-Identifier: Apache-2.0
// The group barrier on a device, with delays: a program of its own, because a trap ends the context
// of its process. Without arguments the blocks of two groups add up one another's numbers for some
// steps; with the argument `wedged` one block leaves before the last step, for which the others
// wait until they trap. Ends with 0 if that is what happened.
#define PYSEQ_CUDA_DEBUG
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/barrier.h"
#include "cuda/launch.h"

namespace {

using namespace pyseq::cuda;

constexpr int kGroups = 2, kThreads = 64;

PYSEQ_KERNEL(kThreads)
group_kernel(int steps, int absent, unsigned* counters, unsigned* sums) {
  const int blocks = grid_size_x(), group = block_index_y();
  GroupBarrier barrier(counters, group, blocks);
  for (int step = 0; step < steps; ++step) {
    const unsigned* const before = sums + (int64_t{step} * kGroups + group) * blocks;
    if (thread_index() == 0) {
      unsigned sum = 1;
      for (int i = 0; step > 0 && i < blocks; ++i) sum += load_shared_by_blocks(before + i);
      sums[(int64_t{step + 1} * kGroups + group) * blocks + block_index_x()] = sum;
    }
    if (block_index_x() < absent && step + 1 == steps) return;
    barrier.arrive();
    barrier.wait();
  }
}

bool failed(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return false;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const bool wedged = count > 1 && std::strcmp(arguments[1], "wedged") == 0;
  const int steps = wedged ? 2 : 200;
  int each = 0, multiprocessors = 0;
  if (failed("occupancy", resident_blocks(group_kernel, kThreads, 0, &each)) ||
      failed("device", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                              /*device=*/0))) {
    return 1;
  }
  const int blocks = each * multiprocessors / kGroups;  // as many as can run at once
  const auto bytes = static_cast<size_t>(barrier_bytes(kGroups));
  const size_t numbers = static_cast<size_t>(steps + 1) * kGroups * static_cast<size_t>(blocks);
  unsigned *counters = nullptr, *sums = nullptr;
  if (failed("memory", cudaMalloc(&counters, bytes)) ||
      failed("memory", cudaMalloc(&sums, numbers * sizeof(unsigned))) ||
      failed("zero", cudaMemset(counters, 0, bytes))) {
    return 1;
  }
  const Grid grid{blocks, kGroups, kThreads, 0, /*together=*/true};
  if (failed("launch",
             launch(group_kernel, grid, nullptr, steps, wedged ? 1 : 0, counters, sums))) {
    return 1;
  }
  const cudaError_t ended = cudaDeviceSynchronize();
  if (wedged) {
    std::printf("%s\n", cudaGetErrorString(ended));
    return ended == cudaSuccess ? 1 : 0;
  }
  if (failed("kernel", ended)) return 1;
  std::vector<unsigned> found(numbers);
  if (failed("copy",
             cudaMemcpy(found.data(), sums, numbers * sizeof(unsigned), cudaMemcpyDeviceToHost))) {
    return 1;
  }
  unsigned expected = 1;
  for (size_t step = 1; step <= static_cast<size_t>(steps); ++step) {
    const size_t row = kGroups * static_cast<size_t>(blocks);
    for (size_t i = 0; i < row; ++i) {
      if (found[step * row + i] != expected) {
        std::fprintf(stderr, "step %zu: expected %u, got %u\n", step, expected,
                     found[step * row + i]);
        return 1;
      }
    }
    expected = 1 + static_cast<unsigned>(blocks) * expected;  // modulo 2^32, as on the device
  }
  return 0;
}
