// SPDX-License-Identifier: Apache-2.0
// A CUDA device for tests, on the CPU: every thread of every block is a fiber, and one scheduler
// goes from fiber to fiber wherever threads meet, poll or share memory, in a random order that a
// seed repeats. All blocks of a grid are alive at once. Shared memory starts as NaN. A schedule in
// which nobody can go on is an error, and so is a write past the shared memory.
#pragma once

#include <ucontext.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace shim {

// ---- Numbers of 16 bits ----------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(Bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // 2^112 moves the exponent from a bias of 15 to one of 127, denormal numbers too.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

template <class S, class A>
S narrow(A value) {
  if constexpr (std::is_same_v<S, A>) {
    return value;
  } else {
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t rest = bits & 0x7fffffffu;
    const bool is_nan = rest > 0x7f800000u;
    if constexpr (std::is_same_v<S, Bfloat16>) {
      if (is_nan) return {static_cast<uint16_t>(sign | 0x7fc0u)};
      return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
    } else {
      if (is_nan) return {static_cast<uint16_t>(sign | 0x7e00u)};
      if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
      if (rest < 0x38800000u) {
        // Denormal: beside 0.5 the last place of a float is that of the smallest half.
        const float shifted = std::bit_cast<float>(rest) + 0.5f;
        const uint32_t low = std::bit_cast<uint32_t>(shifted) - 0x3f000000u;
        return {static_cast<uint16_t>(sign | low)};
      }
      const uint32_t rounded = rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u;
      return {static_cast<uint16_t>(sign | rounded >> 13)};
    }
  }
}

// ---- Fibers ----------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr int kResidentBlocks = 2;  // of a multiprocessor
constexpr size_t kStack = 32 << 10;
constexpr size_t kGuard = 64;  // bytes behind the shared memory
constexpr unsigned char kGuardByte = 0xa5;

enum class State { kReady, kMeeting, kPolling, kEnded };

struct Fiber {
  ucontext_t context;
  State state = State::kReady;
  int block = 0, thread = 0;
  const unsigned* polled = nullptr;  // last, after so many additions, so often
  uint64_t seen = 0;
  int idle = 0;
};

// Threads that wait for one another.
struct Meeting {
  std::vector<int> waiting;
};

// What the lanes of a warp show one another.
struct alignas(16) Slot {
  unsigned char bytes[32];
};

struct Block {
  Meeting all;
  std::vector<Meeting> warps;
  std::vector<Slot> slots;
  std::vector<unsigned char> shared;
  unsigned char* memory = nullptr;
};

struct Device {
  int grid[2] = {0, 0};
  int threads = 0;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<int> ready, polling;
  // Kept from launch to launch. Not initialised: only pages that are used take memory.
  std::unique_ptr<unsigned char[]> stacks;
  size_t stack_count = 0;
  std::function<void()> kernel;
  ucontext_t scheduler;
  int current = -1;
  int ended = 0;
  uint64_t random = 1;
  int64_t clock = 0;
  uint64_t additions = 0;
  bool failed = false;
  std::string error;

  // xorshift64*
  uint64_t next() {
    random ^= random >> 12;
    random ^= random << 25;
    random ^= random >> 27;
    return random * 0x2545f4914f6cdd1dull;
  }
  Fiber& fiber() { return fibers[static_cast<size_t>(current)]; }
  Block& block() { return blocks[static_cast<size_t>(fiber().block)]; }
};

inline Device device;

inline int thread_index() { return device.fiber().thread; }
inline int thread_count() { return device.threads; }
inline int grid_size(int axis) { return device.grid[axis]; }
inline int block_index(int axis) {
  const int block = device.fiber().block;
  return axis == 0 ? block % device.grid[0] : block / device.grid[0];
}
inline void* shared_memory() { return device.block().memory; }
inline int64_t clock_now() { return ++device.clock; }

inline void leave(State state) {
  Fiber& fiber = device.fiber();
  fiber.state = state;
  swapcontext(&fiber.context, &device.scheduler);
}

inline void wake(int index) {
  device.fibers[static_cast<size_t>(index)].state = State::kReady;
  device.ready.push_back(index);
}

// Ends the launch: no fiber goes on.
inline void fail(const std::string& message) {
  device.failed = true;
  device.error = message;
  leave(State::kEnded);
}

inline void meet(Meeting& meeting, int count) {
  meeting.waiting.push_back(device.current);
  if (static_cast<int>(meeting.waiting.size()) == count) {
    for (const int index : meeting.waiting) wake(index);
    meeting.waiting.clear();
    leave(State::kReady);
  } else {
    leave(State::kMeeting);
  }
}

inline void sync_threads() { meet(device.block().all, device.threads); }
inline void sync_warp() {
  meet(device.block().warps[static_cast<size_t>(thread_index() / kWarp)], kWarp);
}

inline void yield() {
  device.ready.push_back(device.current);
  leave(State::kReady);
}
// Now and then: memory that blocks share is read at any time.
inline void maybe_yield() {
  if (device.next() % 16 == 0) yield();
}

// A load that waits for others. A fiber that sees no news runs again when there is some.
inline unsigned poll(const unsigned* from) {
  constexpr int kPatience = 3;
  Fiber& fiber = device.fiber();
  const bool again = fiber.polled == from && fiber.seen == device.additions;
  fiber.idle = again ? fiber.idle + 1 : 0;
  if (fiber.idle < kPatience) {
    yield();
  } else {
    device.polling.push_back(device.current);
    leave(State::kPolling);
  }
  fiber.polled = from;
  fiber.seen = device.additions;
  return *from;
}
inline void add(unsigned* to, unsigned value) {
  *to += value;
  ++device.additions;
  for (const int index : device.polling) wake(index);
  device.polling.clear();
  yield();
}

// Shows `value` to the warp and returns a function that looks at a lane's.
template <class T, class Look>
auto among_lanes(const T& value, const Look& look) {
  static_assert(sizeof(T) <= sizeof(Slot));
  const int first = thread_index() / kWarp * kWarp;
  Slot* const slots = device.block().slots.data();
  std::memcpy(slots[thread_index()].bytes, &value, sizeof value);
  sync_warp();
  const auto result = look([&](int lane) {
    T other;
    std::memcpy(&other, slots[first + lane].bytes, sizeof other);
    return other;
  });
  sync_warp();
  return result;
}

template <class T>
T exchange(T value, int mask) {
  const int lane = thread_index() % kWarp;
  return among_lanes(value, [&](const auto& of) { return of(lane ^ mask); });
}

template <class S>
float element(uint32_t word, int index) {
  return to_float(S{static_cast<uint16_t>(word >> (16 * index))});
}

// The layout is written down where device.h declares it.
template <class S>
void mma_16x8x16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Words {
    uint32_t a[4], b[2];
  };
  Words own;
  std::memcpy(own.a, a, sizeof a);
  std::memcpy(own.b, b, sizeof b);
  struct Sums {
    float at[4];
  };
  const int row = thread_index() % kWarp / 4, pair = 2 * (thread_index() % 4);
  const Sums added = among_lanes(own, [&](const auto& of) {
    Sums sums{};
    for (int k = 0; k < 16; ++k) {
      const Words left = of(4 * row + k % 8 / 2);
      for (int i = 0; i < 4; ++i) {
        const float a_k = element<S>(left.a[i / 2 + k / 8 * 2], k % 2);
        const Words right = of(4 * (pair + i % 2) + k % 8 / 2);
        sums.at[i] += a_k * element<S>(right.b[k / 8], k % 2);
      }
    }
    return sums;
  });
  for (int i = 0; i < 4; ++i) sum[i] += added.at[i];
}

// ---- Launches --------------------------------------------------------------------------

inline void fiber_main() {
  device.kernel();
  ++device.ended;
  leave(State::kEnded);
}

inline void set_seed(uint64_t seed) { device.random = 2 * seed + 1; }

inline int run_grid(int x, int y, int threads, int64_t shared, std::function<void()> kernel) {
  device.error.clear();
  device.failed = false;
  if (x < 1 || y < 1 || threads < 1 || threads > 1024 || threads % kWarp != 0 || shared < 0) {
    device.error = "a grid needs blocks of whole warps";
    return 1;
  }
  const int count = x * y * threads;
  device.grid[0] = x;
  device.grid[1] = y;
  device.threads = threads;
  device.kernel = std::move(kernel);
  device.ended = 0;
  device.blocks.assign(static_cast<size_t>(x * y), {});
  for (Block& block : device.blocks) {
    block.warps.resize(static_cast<size_t>(threads / kWarp));
    block.slots.resize(static_cast<size_t>(threads));
    const auto size = static_cast<size_t>(shared);
    block.shared.assign(size + kGuard + 16, 0xff);  // NaN in every type
    block.memory = block.shared.data();
    block.memory += (16 - reinterpret_cast<uintptr_t>(block.memory) % 16) % 16;
    std::memset(block.memory + size, kGuardByte, kGuard);
  }
  if (device.stack_count < static_cast<size_t>(count)) {
    device.stack_count = static_cast<size_t>(count);
    device.stacks.reset(new unsigned char[device.stack_count * kStack]);
  }
  device.fibers = std::vector<Fiber>(static_cast<size_t>(count));
  device.ready.clear();
  device.polling.clear();
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = device.fibers[static_cast<size_t>(i)];
    fiber.block = i / threads;
    fiber.thread = i % threads;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = device.stacks.get() + static_cast<size_t>(i) * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    device.ready.push_back(i);
  }
  while (!device.failed && !device.ready.empty()) {
    const size_t pick = device.next() % device.ready.size();
    device.current = device.ready[pick];
    device.ready[pick] = device.ready.back();
    device.ready.pop_back();
    swapcontext(&device.scheduler, &device.fiber().context);
  }
  if (!device.failed && device.ended < count) {
    device.failed = true;
    device.error = "stuck: " + std::to_string(device.ended) + " of " + std::to_string(count) +
                   " threads ended, " + std::to_string(device.polling.size()) +
                   " poll, the others wait for one another";
  }
  for (const Block& block : device.blocks) {
    for (size_t i = 0; i < kGuard && !device.failed; ++i) {
      if (block.memory[static_cast<size_t>(shared) + i] != kGuardByte) {
        device.failed = true;
        device.error = "a block wrote past its shared memory";
      }
    }
  }
  device.fibers.clear();
  device.blocks.clear();
  return device.failed ? 1 : 0;
}

}  // namespace shim
