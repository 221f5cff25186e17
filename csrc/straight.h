// SPDX-License-Identifier: Apache-2.0
// Whether the dispatcher would hand a call on to the kernels of the CPU and do nothing else: then
// it can be left out, which takes longer than a small step does.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <optional>

namespace pyseq {

// Asked at the beginning of a call, and about each of its tensors.
class StraightCall {
 public:
  // Whether nothing looks on: neither a profiler, nor a mode of Python's, nor forward-mode AD.
  static bool is_open() {
    return !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value() &&
           !at::impl::torch_function_mode_enabled() &&
           torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
  }

  // Whether the tensor, in this thread, has no dispatch key besides those of the CPU and of
  // autograd, which has nothing to record. Autocast, tracing, transforms, modes, subclasses, other
  // devices and layouts each have one.
  bool takes(const at::Tensor& tensor) const {
    const c10::DispatchKeySet keys = (tensor.key_set() | local_.included_) - local_.excluded_;
    return kKnown.isSupersetOf(keys) && !(records_ && tensor.requires_grad());
  }
  bool takes(const std::optional<at::Tensor>& tensor) const {
    return !tensor.has_value() || takes(*tensor);
  }

  // The same of the tensor whose type a call computes in, which kernels have to know.
  bool computes_in(const at::Tensor& tensor) const {
    const at::ScalarType type = tensor.scalar_type();
    return (type == at::kFloat || type == at::kDouble) && takes(tensor);
  }

 private:
  static constexpr c10::DispatchKeySet kKnown{c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                              c10::DispatchKey::ADInplaceOrView,
                                              c10::DispatchKey::BackendSelect};

  const c10::impl::LocalDispatchKeySet local_ = c10::impl::tls_local_dispatch_key_set();
  const bool records_ = at::GradMode::is_enabled();
};

}  // namespace pyseq
