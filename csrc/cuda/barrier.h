// SPDX-License-Identifier: Apache-2.0
// A barrier of some of the blocks of a launch: those that hand one another the states of the same
// rows. One counter for each group, which only grows, so that nobody has to reset it between
// steps; the caller zeroes it on the stream before the launch, and gives each launch its own.
#pragma once

#include "device.h"

namespace pyseq::cuda {

// Counters of neighbouring groups lie in cache lines of their own.
constexpr int kBarrierStride = 32;

// Bytes of the counters of so many groups.
constexpr int64_t barrier_bytes(int64_t groups) {
  return groups * kBarrierStride * static_cast<int64_t>(sizeof(unsigned));
}

#ifdef PYSEQ_CUDA_DEBUG
// Some seconds: no block waits that long for another, unless it waits for ever.
constexpr int64_t kBarrierCycles = int64_t{1} << 34;

// A delay of up to some microseconds that differs from block to block and from step to step.
PYSEQ_DEVICE void delay_block(unsigned meeting) {
  unsigned mixed =
      (static_cast<unsigned>(block_index_y() * grid_size_x() + block_index_x()) * 2654435761u ^
       (meeting + 1) * 2246822519u);
  mixed ^= mixed >> 15;
  mixed *= 2654435761u;
  sleep_nanoseconds(mixed >> 20);
}
#endif

// Of one block. Its threads call everything together.
class GroupBarrier {
 public:
  // `blocks` of the launch share the group.
  PYSEQ_DEVICE GroupBarrier(unsigned* counters, int group, int blocks)
      : counter_(counters + static_cast<int64_t>(group) * kBarrierStride),
        blocks_(static_cast<unsigned>(blocks)),
        target_(0) {}

  // What this block wrote before is there for those who wait.
  PYSEQ_DEVICE void arrive() {
    target_ += blocks_;
    sync_threads();
    if (thread_index() == 0) {
#ifdef PYSEQ_CUDA_DEBUG
      delay_block(target_);
#endif
      add_release(counter_, 1);
    }
  }

  // Until every block of the group has arrived as often as this one.
  PYSEQ_DEVICE void wait() {
    if (thread_index() == 0) {
#ifdef PYSEQ_CUDA_DEBUG
      const int64_t start = clock_now();
#endif
      // The difference, because the counter may pass 2^32.
      while (static_cast<int>(load_acquire(counter_) - target_) < 0) {
#ifdef PYSEQ_CUDA_DEBUG
        if (clock_now() - start > kBarrierCycles) trap();
#endif
      }
    }
    sync_threads();
  }

 private:
  unsigned* counter_;
  unsigned blocks_;
  unsigned target_;
};

}  // namespace pyseq::cuda
