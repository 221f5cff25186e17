// SPDX-License-Identifier: Apache-2.0
// What kernels need of the device, each instruction behind a name, and the arithmetic that
// cells.h and scores.h ask for. The only file with PTX. Where PYSEQ_CUDA_SHIM is defined the
// same names run on the CPU: the tests compile every kernel with it (tests/cuda/shim.h).
// Kernels use dynamic shared memory only, and blocks of whole warps.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef PYSEQ_CUDA_SHIM
#define PYSEQ_DEVICE inline
#define PYSEQ_KERNEL(threads) void
#define PYSEQ_UNROLL
#define PYSEQ_UNROLL_BY_2
#else
#define PYSEQ_DEVICE __device__ __forceinline__
// One block of a persistent kernel has a multiprocessor to itself.
#define PYSEQ_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define PYSEQ_UNROLL _Pragma("unroll")
#define PYSEQ_UNROLL_BY_2 _Pragma("unroll 2")
#endif

#include "../cells.h"
#include "types.h"

namespace pyseq::cuda {

constexpr int kWarp = 32;

// ---- Numbers ---------------------------------------------------------------------------

template <class S>
constexpr bool kIsHalf = sizeof(S) == 2;

PYSEQ_DEVICE float widen(float value) { return value; }
PYSEQ_DEVICE double widen(double value) { return value; }
#ifdef PYSEQ_CUDA_SHIM
PYSEQ_DEVICE float widen(Half value) { return shim::to_float(value); }
PYSEQ_DEVICE float widen(Bfloat16 value) { return shim::to_float(value); }
#else
PYSEQ_DEVICE float widen(Half value) { return __half2float(value); }
PYSEQ_DEVICE float widen(Bfloat16 value) { return __bfloat162float(value); }
#endif

// To the nearest number of the storage type, ties to even.
template <class S>
PYSEQ_DEVICE S narrow(Accumulate<S> value) {
#ifdef PYSEQ_CUDA_SHIM
  return shim::narrow<S>(value);
#else
  if constexpr (sizeof(S) == sizeof(Accumulate<S>)) {
    return value;
  } else if constexpr (std::is_same_v<S, Half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
#endif
}

// ---- The M of cells.h and scores.h -----------------------------------------------------

// For float and double, at the precision of the device's own functions.
template <class A>
struct Math {
  static PYSEQ_DEVICE A zero() { return A(0); }
  static PYSEQ_DEVICE A multiply_add(A a, A b, A c) { return ::fma(a, b, c); }
  // NaN stays NaN.
  static PYSEQ_DEVICE A relu(A x) { return x < 0 ? A(0) : x; }
  static PYSEQ_DEVICE A where_positive(A x, A value) { return x > 0 ? value : A(0); }
  static PYSEQ_DEVICE A minus_infinity() { return -A(HUGE_VAL); }
  static PYSEQ_DEVICE A where_zero(A x, A value, A otherwise) { return x == 0 ? value : otherwise; }
  static PYSEQ_DEVICE A where_less(A a, A b, A value, A otherwise) {
    return a < b ? value : otherwise;
  }
  static PYSEQ_DEVICE A exp_nonpositive(A x) { return ::exp(x); }
  // With e = exp(-|x|): 1 / (1 + e) for x >= 0 and e / (1 + e) below, which cancels nowhere.
  static PYSEQ_DEVICE A sigmoid(A x) {
    const A e = ::exp(-::fabs(x));
    return (x < 0 ? e : A(1)) / (1 + e);
  }
  static PYSEQ_DEVICE A tanh(A x) { return ::tanh(x); }
  static PYSEQ_DEVICE A log_sigmoid(A x) { return (x < 0 ? x : A(0)) - ::log1p(::exp(-::fabs(x))); }
  static PYSEQ_DEVICE A inverse_root(A x) { return 1 / ::sqrt(x); }
};

#ifdef PYSEQ_CUDA_SHIM

// ---- Threads, on the CPU ---------------------------------------------------------------

inline int thread_index() { return shim::thread_index(); }
inline int thread_count() { return shim::thread_count(); }
inline int block_index_x() { return shim::block_index(0); }
inline int block_index_y() { return shim::block_index(1); }
inline int grid_size_x() { return shim::grid_size(0); }
inline int grid_size_y() { return shim::grid_size(1); }
inline void sync_threads() { shim::sync_threads(); }
inline void sync_warp() { shim::sync_warp(); }
template <class A>
A shuffle_xor(A value, int mask) {
  return shim::exchange(value, mask);
}
inline void* shared_memory() { return shim::shared_memory(); }
inline unsigned load_acquire(const unsigned* from) { return shim::poll(from); }
inline void add_release(unsigned* to, unsigned value) { shim::add(to, value); }
inline void sleep_nanoseconds(unsigned) {}
inline int64_t clock_now() { return shim::clock_now(); }
inline void trap() { shim::fail("a kernel trapped"); }

template <class S>
void mma_16x8x16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  shim::mma_16x8x16<S>(sum, a, b);
}

#else

// ---- Threads ---------------------------------------------------------------------------

PYSEQ_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
PYSEQ_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
PYSEQ_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }
PYSEQ_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
PYSEQ_DEVICE int grid_size_x() { return static_cast<int>(gridDim.x); }
PYSEQ_DEVICE int grid_size_y() { return static_cast<int>(gridDim.y); }

// Every thread of the block, or of the warp, comes here, and what each wrote is seen by all.
PYSEQ_DEVICE void sync_threads() { __syncthreads(); }
PYSEQ_DEVICE void sync_warp() { __syncwarp(); }

// The value of the lane whose number differs in the bits of `mask`; every lane takes part.
template <class A>
PYSEQ_DEVICE A shuffle_xor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The block's dynamic shared memory, aligned to 16 bytes.
PYSEQ_DEVICE void* shared_memory() {
  extern __shared__ uint4 pyseq_shared_memory[];
  return pyseq_shared_memory;
}

// Loads and adds that carry an order among all threads of the device: what was written, by this
// thread or by one that it met in sync_threads, before add_release is seen after a load_acquire
// that saw the addition.
PYSEQ_DEVICE unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
PYSEQ_DEVICE void add_release(unsigned* to, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

PYSEQ_DEVICE void sleep_nanoseconds(unsigned count) {
  asm volatile("nanosleep.u32 %0;" ::"r"(count));
}
// In cycles of the multiprocessor.
PYSEQ_DEVICE int64_t clock_now() { return clock64(); }
PYSEQ_DEVICE void trap() { asm volatile("trap;"); }

// sum += a b for a (16, 16) and b (16, 8) of half or bfloat16. Lane l holds, with row = l / 4 and
// pair = 2 (l % 4): of a (row, pair), (row + 8, pair), (row, pair + 8), (row + 8, pair + 8), of b
// (pair, row), (pair + 8, row), two neighbours in k in each word; of the sum (row, pair),
// (row, pair + 1), (row + 8, pair), (row + 8, pair + 1).
template <class S>
PYSEQ_DEVICE void mma_16x8x16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<S, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#endif

// ---- Memory ----------------------------------------------------------------------------

// 16 bytes, which a thread loads at once.
struct alignas(16) Words {
  uint32_t word[4];
};

template <class S>
constexpr int kVector = static_cast<int>(sizeof(Words) / sizeof(S));

// What another block wrote in this launch, past the cache of the multiprocessor, and at every step
// anew: __ldcg of the types of 16 bits is not volatile in CUDA's headers, so that a compiler may
// keep what it loaded from an address before others wrote there.
#ifdef PYSEQ_CUDA_SHIM

template <class S>
S load_shared_by_blocks(const S* from) {
  shim::maybe_yield();
  return *from;
}
inline Words load_words_shared_by_blocks(const void* from) {
  shim::maybe_yield();
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

#else

template <class S>
PYSEQ_DEVICE S load_shared_by_blocks(const S* from) {
  S value;
  if constexpr (sizeof(S) == 2) {
    uint16_t bits;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(from) : "memory");
    memcpy(&value, &bits, sizeof value);
  } else if constexpr (sizeof(S) == 4) {
    uint32_t bits;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(from) : "memory");
    memcpy(&value, &bits, sizeof value);
  } else {
    static_assert(sizeof(S) == 8);
    uint64_t bits;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
    memcpy(&value, &bits, sizeof value);
  }
  return value;
}
PYSEQ_DEVICE Words load_words_shared_by_blocks(const void* from) {
  Words words;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
               : "l"(from)
               : "memory");
  return words;
}

#endif

// The numbers in 16 bytes.
template <class S>
PYSEQ_DEVICE void unpack(const Words& words, Accumulate<S> (&values)[kVector<S>]) {
  S numbers[kVector<S>];
  memcpy(numbers, &words, sizeof words);
  PYSEQ_UNROLL
  for (int i = 0; i < kVector<S>; ++i) values[i] = widen(numbers[i]);
}

PYSEQ_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Words) == 0;
}

// ---- Warps -----------------------------------------------------------------------------

// Over the lanes of a warp, the same in each of them and always in the same order.
template <class A>
PYSEQ_DEVICE A warp_sum(A value) {
  PYSEQ_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <class A>
PYSEQ_DEVICE A warp_max(A value) {
  PYSEQ_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const A other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Over the threads of a block, the same in each; `scratch` holds one number for each warp, and
// may be used again after the next sync_threads.
template <class A>
PYSEQ_DEVICE A block_sum(A value, A* scratch) {
  value = warp_sum(value);
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = value;
  sync_threads();
  A sum = 0;
  for (int warp = 0; warp < thread_count() / kWarp; ++warp) sum += scratch[warp];
  return sum;
}
template <class A>
PYSEQ_DEVICE A block_max(A value, A* scratch) {
  value = warp_max(value);
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = value;
  sync_threads();
  A largest = scratch[0];
  for (int warp = 1; warp < thread_count() / kWarp; ++warp) {
    largest = scratch[warp] > largest ? scratch[warp] : largest;
  }
  return largest;
}

}  // namespace pyseq::cuda
