// SPDX-License-Identifier: Apache-2.0
// How kernels are launched: by name and struct of arguments, on the device or, in the tests, on
// the CPU. Nothing here synchronises.
#pragma once

#include "device.h"

namespace pyseq::cuda {

struct Grid {
  int x, y;
  int threads;            // of a block: whole warps
  int64_t shared = 0;     // bytes of dynamic shared memory
  bool together = false;  // every block must be resident at once, or the launch fails
};

// One thread for each of so many numbers; beyond so many blocks threads take several.
constexpr int kPointwiseThreads = 256;
inline Grid pointwise_grid(int64_t numbers) {
  constexpr int64_t kMost = 1 << 16;
  const int64_t blocks = (numbers + kPointwiseThreads - 1) / kPointwiseThreads;
  return {static_cast<int>(blocks < kMost ? blocks : kMost), 1, kPointwiseThreads};
}

// Calls body(number) for those of `numbers` that are this thread's.
template <class Body>
PYSEQ_DEVICE void each_number(int64_t numbers, const Body& body) {
  const int64_t stride = int64_t{grid_size_x()} * thread_count();
  for (int64_t i = int64_t{block_index_x()} * thread_count() + thread_index(); i < numbers;
       i += stride) {
    body(i);
  }
}

// Calls body(row, unit) for those of `rows` times `units` that are this thread's.
template <class Body>
PYSEQ_DEVICE void each_unit(int64_t rows, int64_t units, const Body& body) {
  each_number(rows * units, [&](int64_t i) { body(i / units, i % units); });
}

#ifdef PYSEQ_CUDA_SHIM

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), const Grid& grid, cudaStream_t, Args... args) {
  return shim::run_grid(grid.x, grid.y, grid.threads, grid.shared, [&] { kernel(args...); });
}

// How many blocks a multiprocessor can hold at once.
template <class... Args>
cudaError_t resident_blocks(void (*)(Args...), int, int64_t, int* blocks) {
  *blocks = shim::kResidentBlocks;
  return cudaSuccess;
}

#else

// More than 48 KB a block must be asked for. It is for as much as there is: a kernel has one such
// limit, and another thread of the host that set a lower one before this one's launch would make
// that fail.
template <class... Args>
cudaError_t allow_shared(void (*kernel)(Args...), int64_t shared) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shared <= kWithoutAsking) return cudaSuccess;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), const Grid& grid, cudaStream_t stream, Args... args) {
  if (const cudaError_t error = allow_shared(kernel, grid.shared); error != cudaSuccess) {
    return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
  config.stream = stream;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = grid.together ? 1 : 0;
  void* pointers[] = {static_cast<void*>(&args)...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
}

// How many blocks a multiprocessor of the current device can hold at once.
template <class... Args>
cudaError_t resident_blocks(void (*kernel)(Args...), int threads, int64_t shared, int* blocks) {
  *blocks = 0;
  if (const cudaError_t error = allow_shared(kernel, shared); error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      blocks, reinterpret_cast<const void*>(kernel), threads, static_cast<size_t>(shared));
}

#endif

}  // namespace pyseq::cuda
