// SPDX-License-Identifier: Apache-2.0
// What the operators hand to the kernels: a number of threads, memory, and pointers that are null
// where there is no tensor. A single step of a small layer takes as long as ten calls through the
// dispatcher: what every call needs goes without.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <limits>
#include <optional>

#include "check.h"

namespace pyseq {

inline int thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Whether memory that is not yet written is filled with NaN, as torch fills its own in
// deterministic mode, so that tests see what is read before.
inline bool poisons_memory() {
  const at::Context& context = at::globalContext();
  return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

// A tensor on the device of `like`, not yet written.
inline at::Tensor fresh(at::IntArrayRef sizes, const at::Tensor& like) {
  if (!like.is_cpu()) return at::empty(sizes, like.options());
  at::Tensor tensor(at::detail::empty_cpu(sizes, like.scalar_type()));
  if (poisons_memory() && tensor.is_floating_point()) {
    tensor.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  return tensor;
}

// What tensors are like that hold sums, and what is carried from step to step besides h: of a short
// type float32. It has no elements then.
inline at::Tensor wide_like(const at::Tensor& like) {
  return is_short(like.scalar_type()) ? at::empty({0}, like.options().dtype(at::kFloat)) : like;
}

inline at::Tensor nothing(const at::Tensor& like) { return fresh({0}, like); }

inline char* slot_data(const at::Tensor& slots, int64_t slot) {
  return static_cast<char*>(slots.data_ptr()) + slot * slots.stride(0) * slots.element_size();
}

// Writes `from`, or zeros, into one slot of a contiguous tensor.
inline void fill_slot(const at::Tensor& slots, int64_t slot,
                      const std::optional<at::Tensor>& from) {
  const size_t bytes = static_cast<size_t>(slots.stride(0) * slots.element_size());
  if (slots.numel() == 0) return;
  if (!slots.is_cpu()) {
    const at::Tensor to = slots.select(0, slot);
    from.has_value() ? to.copy_(*from) : to.zero_();
  } else if (!from.has_value()) {
    std::memset(slot_data(slots, slot), 0, bytes);
  } else if (from->is_contiguous()) {
    std::memcpy(slot_data(slots, slot), from->const_data_ptr(), bytes);
  } else {
    slots.select(0, slot).copy_(*from);
  }
}

// A gradient that a kernel adds to: what came in, or zero.
inline at::Tensor copy_or_zero(const std::optional<at::Tensor>& from, at::IntArrayRef sizes,
                               const at::Tensor& like) {
  const at::Tensor to = fresh(sizes, like);
  from.has_value() ? to.copy_(*from) : to.zero_();
  return to;
}

// One that it only reads.
inline at::Tensor or_zero(const std::optional<at::Tensor>& from, at::IntArrayRef sizes,
                          const at::Tensor& like) {
  return from.has_value() ? from->contiguous() : copy_or_zero(std::nullopt, sizes, like);
}

inline at::Tensor copy_slot(const at::Tensor& slots, int64_t slot) {
  if (!slots.is_cpu()) return slots.select(0, slot).clone();
  const at::Tensor copy = fresh(slots.sizes().slice(1), slots);
  if (copy.numel() > 0) std::memcpy(copy.data_ptr(), slot_data(slots, slot), copy.nbytes());
  return copy;
}

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
