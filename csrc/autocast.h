// SPDX-License-Identifier: Apache-2.0
// The operators as the dispatcher's Autocast keys run them: in float32, since the kernels
// know no shorter type, and with autocast off for the products that they call.
#pragma once

#include <ATen/core/List.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "dispatcher.h"
#include "ops.h"

namespace pyseq {

inline Tensor at_least_float(const Tensor& tensor) {
  const bool is_short = tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
  return is_short ? tensor.to(at::kFloat) : tensor;
}
inline OptionalTensor at_least_float(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(at_least_float(*tensor)) : std::nullopt;
}
inline std::vector<Tensor> at_least_float(at::TensorList tensors) {
  std::vector<Tensor> list;
  for (const Tensor& tensor : tensors) list.push_back(at_least_float(tensor));
  return list;
}
inline c10::List<OptionalTensor> at_least_float(const c10::List<OptionalTensor>& tensors) {
  c10::List<OptionalTensor> list;
  for (const OptionalTensor& tensor : tensors) list.push_back(at_least_float(tensor));
  return list;
}
inline std::string_view at_least_float(std::string_view option) { return option; }
inline bool at_least_float(bool option) { return option; }
inline int64_t at_least_float(int64_t option) { return option; }
inline double at_least_float(double option) { return option; }

// AutocastCpu<&scan>::call is what stands before the operator whose kernel is `scan`; the
// name is that of the operator.
template <auto Kernel>
struct AutocastCpu;

template <class Return, class... Args, Return (*Kernel)(Args...)>
struct AutocastCpu<Kernel> {
  static inline const char* name = nullptr;

  static Return call(Args... args) {
    const c10::impl::ExcludeDispatchKeyGuard off(c10::DispatchKey::AutocastCPU);
    static const auto op = find_operator<Kernel>(name);
    return op.call(at_least_float(args)...);
  }

  // The function for m.impl, once it knows its operator.
  static auto of(const char* operator_name) {
    name = operator_name;
    return &call;
  }
};

}  // namespace pyseq
