// SPDX-License-Identifier: Apache-2.0
// The operators for tensors on a CUDA device, as the dispatcher knows them. Compiled only against
// a torch that has CUDA; without it the dispatcher says that there are none.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "cuda_kernels.h"
#include "cuda_loss.h"
#include "dispatcher.h"
#include "ops.h"
#include "scan_both.h"
#include "widened.h"

namespace pyseq {

namespace {

// Looks at the tensors among an operator's arguments: all must be on one device, because a kernel
// that follows a pointer elsewhere ends the process, and none quantized.
struct OneDevice {
  std::optional<at::Device> device;

  void check(const std::string& name, const Tensor& tensor) {
    if (!device.has_value()) device = tensor.device();
    TORCH_CHECK(tensor.device() == *device, name, " must be on the device of the other tensors, ",
                *device, ", got ", tensor.device());
    TORCH_CHECK(tensor.scalar_type() != at::kByte, name, " must not be quantized on ", *device,
                ": quantized weights are for the CPU");
  }
  void check(const std::string& name, const OptionalTensor& tensor) {
    if (tensor.has_value()) check(name, *tensor);
  }
  void check(const std::string& name, at::TensorList tensors) {
    for (const Tensor& tensor : tensors) check(name, tensor);
  }
  void check(const std::string& name, const c10::List<OptionalTensor>& tensors) {
    for (const OptionalTensor& tensor : tensors) check(name, tensor);
  }
  void check(const std::string& name, const ScanExtraList& tensors) {
    if (tensors.has_value()) check(name, *tensors);
  }
  template <class Option>
  void check(const std::string&, const Option&) {}
};

// OnDevice<&attend>::call is the kernel `attend` with that checked, on the tensors' device.
template <auto Kernel>
struct OnDevice;

template <class Return, class... Args, Return (*Kernel)(Args...)>
struct OnDevice<Kernel> {
  static inline const char* name = nullptr;

  static Return call(Args... args) {
    static const auto op = find_operator<Kernel>(name);
    const auto& arguments = op.schema().arguments();
    OneDevice one;
    size_t index = 0;
    (one.check(arguments[index++].name(), args), ...);
    const c10::OptionalDeviceGuard guard(one.device);
    // Backward may run inside autocast, which would make the products of a loop short.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return Kernel(args...);
  }

  // The function for m.impl, once it knows its operator.
  static auto of(const char* operator_name) {
    name = operator_name;
    return &call;
  }
};

// Also for float16 and bfloat16, which its kernel computes in float32.
template <auto Kernel>
auto of_every_type(const char* name) {
  OnDevice<Kernel>::of(name);
  return Widened<&OnDevice<Kernel>::call>::of(name);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyseq, CUDA, m) {
  enter_cuda_kernels();
  m.impl("scan", OnDevice<&scan>::of("pyseq::scan"));
  m.impl("scan_forward", OnDevice<&scan_forward>::of("pyseq::scan_forward"));
  m.impl("scan_backward", OnDevice<&scan_backward>::of("pyseq::scan_backward"));
  m.impl("scan_both", OnDevice<&scan_both>::of("pyseq::scan_both"));
  m.impl("attend", OnDevice<&attend>::of("pyseq::attend"));
  m.impl("attend_backward", OnDevice<&attend_backward>::of("pyseq::attend_backward"));
  m.impl("decode", OnDevice<&decode>::of("pyseq::decode"));
  m.impl("decode_forward", OnDevice<&decode_forward>::of("pyseq::decode_forward"));
  m.impl("decode_backward", OnDevice<&decode_backward>::of("pyseq::decode_backward"));
  m.impl("linear_cross_entropy",
         of_every_type<&linear_cross_entropy_on_cuda>("pyseq::linear_cross_entropy"));
  m.impl("linear_cross_entropy_forward", OnDevice<&linear_cross_entropy_forward_on_cuda>::of(
                                             "pyseq::linear_cross_entropy_forward"));
  m.impl("linear", OnDevice<&linear>::of("pyseq::linear"));
}

}  // namespace pyseq
