// SPDX-License-Identifier: Apache-2.0
// The kernels of a tensor's device. CUDA's stand in a table of their own, which cuda_kernels.cpp
// fills in where it is compiled in; their functions take the current stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>
#include <utility>

#include "cpu/kernels.h"

// As torch calls the short types, which kernels of devices know.
template <>
struct pyseq::cpu::AccumulateOf<at::Half> {
  using type = float;
};
template <>
struct pyseq::cpu::AccumulateOf<at::BFloat16> {
  using type = float;
};

namespace pyseq {

template <class T>
inline const cpu::Kernels<T>* cuda_kernels = nullptr;

// How many loops this thread is launching to run at once on the device: each is planned for its
// share of it.
inline thread_local int64_t loops_at_once = 1;

// Says so as long as it lives.
class LoopsAtOnce {
 public:
  explicit LoopsAtOnce(int64_t count) : before_(std::exchange(loops_at_once, count)) {}
  ~LoopsAtOnce() { loops_at_once = before_; }
  LoopsAtOnce(const LoopsAtOnce&) = delete;
  LoopsAtOnce& operator=(const LoopsAtOnce&) = delete;

 private:
  const int64_t before_;
};

template <class T>
const cpu::Kernels<T>& kernels_of(const at::Tensor& tensor) {
  if constexpr (std::is_same_v<T, cpu::Accumulate<T>>) {
    if (tensor.is_cpu()) return cpu::kernels<T>();
  }
  TORCH_CHECK(tensor.is_cuda() && cuda_kernels<T> != nullptr,
              "this build of pyseq has kernels for ",
              cuda_kernels<T> == nullptr ? "the CPU" : "the CPU and CUDA", ", got a tensor on ",
              tensor.device());
  return *cuda_kernels<T>;
}

}  // namespace pyseq
