// SPDX-License-Identifier: Apache-2.0
// float16 and bfloat16: tensors are held in them and summed up in float32. Kernels that do not know
// them get float32. The conversions lie outside the operators then, where autograd and tracing see
// them, and gradients come in the type of what they belong to.
#pragma once

#include <ATen/core/List.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "check.h"
#include "dispatcher.h"
#include "ops.h"

namespace pyseq {

inline Tensor at_least_float(const Tensor& tensor) {
  return is_short(tensor.scalar_type()) ? tensor.to(at::kFloat) : tensor;
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

// What was computed in float32, in `type`.
inline Tensor rounded(const Tensor& result, at::ScalarType type) {
  return is_short(type) && result.scalar_type() == at::kFloat ? result.to(type) : result;
}
inline std::vector<Tensor> rounded(const std::vector<Tensor>& results, at::ScalarType type) {
  std::vector<Tensor> list;
  for (const Tensor& result : results) list.push_back(rounded(result, type));
  return list;
}
template <class... Results>
std::tuple<Results...> rounded(const std::tuple<Results...>& results, at::ScalarType type) {
  return std::apply(
      [&](const Results&... each) { return std::tuple<Results...>(rounded(each, type)...); },
      results);
}

// Raises unless the floating-point tensors of an argument have the type of the leading one.
struct SameType {
  const std::string& like;
  at::ScalarType type;

  void check(const std::string& name, const Tensor& tensor) const {
    TORCH_CHECK(!at::isFloatingType(tensor.scalar_type()) || tensor.scalar_type() == type, name,
                " must have the dtype of ", like, ", ", type, ", got ", tensor.scalar_type());
  }
  void check(const std::string& name, const OptionalTensor& tensor) const {
    if (tensor.has_value()) check(name, *tensor);
  }
  void check(const std::string& name, at::TensorList tensors) const {
    for (const Tensor& tensor : tensors) check(name, tensor);
  }
  void check(const std::string& name, const c10::List<OptionalTensor>& tensors) const {
    for (const OptionalTensor& tensor : tensors) check(name, tensor);
  }
  template <class Option>
  void check(const std::string&, const Option&) const {}
};

// Whether a transform of torch.func is at work. It cannot see into autograd Functions, so the
// operator's specification takes their place, which is made of torch's own operators.
inline bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// Where a kernel takes the short types as they are.
enum class TakesShort { kNowhere, kOnCuda };

// Widened<&scan>::of("pyseq::scan") is the kernel `scan` of that operator for every type, which
// is that of the argument number `Leading`.
template <auto Kernel, TakesShort Where = TakesShort::kNowhere, size_t Leading = 0>
struct Widened;

template <class Return, class... Args, Return (*Kernel)(Args...), TakesShort Where, size_t Leading>
struct Widened<Kernel, Where, Leading> {
  static inline const char* name = nullptr;

  static Return call(Args... args) {
    const Tensor& leading = std::get<Leading>(std::tie(args...));
    const at::ScalarType type = leading.scalar_type();
    if (type == at::kFloat || type == at::kDouble) return Kernel(args...);
    static const auto op = find_operator<Kernel>(name);
    const auto& arguments = op.schema().arguments();
    const SameType same{arguments[Leading].name(), type};
    TORCH_CHECK(is_short(type), same.like, " must be float16, bfloat16, float32 or float64, got ",
                type);
    size_t index = 0;
    (same.check(arguments[index++].name(), args), ...);
    if constexpr (Where == TakesShort::kOnCuda) {
      if (leading.is_cuda() && !is_transformed()) return Kernel(args...);
    }
    return rounded(op.call(at_least_float(args)...), type);
  }

  // The function for m.impl, once it knows its operator.
  static auto of(const char* operator_name) {
    name = operator_name;
    return &call;
  }
};

}  // namespace pyseq
