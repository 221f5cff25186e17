// SPDX-License-Identifier: Apache-2.0
// What the operators hand to the kernels: a number of threads, and pointers that are null
// where there is no tensor.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

namespace pyseq {

inline int thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

inline at::Tensor nothing(const at::Tensor& like) { return at::empty({0}, like.options()); }

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional<at::Tensor>(tensor->contiguous()) : std::nullopt;
}

template <class T>
const T* data(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

// For a result that stands for none: it has no elements.
template <class T>
T* data_or_null(const at::Tensor& tensor, bool present) {
  return present ? tensor.data_ptr<T>() : nullptr;
}

}  // namespace pyseq
