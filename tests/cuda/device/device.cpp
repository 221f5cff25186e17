// SPDX-License-Identifier: Apache-2.0
// A CUDA device for torch, in the memory of the host: pyseq's kernels run on it by the shim,
// torch's operators by its CPU's kernels on the same memory. A module built with PYSEQ_CUDA=shim
// holds it, so that the tests can take the whole way from Python to the kernels where there is no
// device. It has streams and events, which are numbers: all of its work is done when a call
// returns.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "cuda/facts.h"

namespace {

using at::Tensor;

const at::Device kDevice(at::kCUDA, 0);

// ---- Memory ----------------------------------------------------------------------------

void release(void* memory) { std::free(memory); }

// Starts as NaN in every type.
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, kDevice};
    constexpr size_t kAlignment = 256;  // as torch's
    void* const memory =
        std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    TORCH_CHECK(memory != nullptr, "the host has no ", bytes, " bytes for the device");
    std::memset(memory, 0xff, bytes);
    return {memory, memory, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
Allocator allocator;
const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> type,
             std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &allocator, kKeys,
                                   c10::dtype_or_default(type), format);
}

Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                     std::optional<at::ScalarType> type, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes),
                                           C10_AS_INTARRAYREF_SLOW(strides), &allocator, kKeys,
                                           c10::dtype_or_default(type));
}

// ---- Torch's operators -----------------------------------------------------------------

// The same numbers as a tensor of the host; one without numbers may be resized.
Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  const at::TensorOptions options = tensor.options().device(at::kCPU);
  if (tensor.numel() == 0) return at::empty(tensor.sizes(), options);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

// The inverse, which keeps what is given alive.
Tensor on_device(const Tensor& tensor, const std::vector<Tensor>& alive) {
  if (!tensor.defined()) return tensor;
  return at::for_blob(tensor.data_ptr(), tensor.sizes())
      .strides(tensor.strides())
      .deleter([tensor, alive](void*) {})
      .options(tensor.options().device(kDevice))
      .target_device(kDevice)
      .make_tensor();
}

// A call's tensors of the device, and what they are on the host.
struct Aliases {
  std::vector<Tensor> own, host;

  Tensor take(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    own.push_back(tensor);
    host.push_back(on_host(tensor));
    return host.back();
  }

  // An output that was resized has new memory.
  void resize() const {
    for (size_t i = 0; i < own.size(); ++i) {
      if (own[i].sizes() == host[i].sizes()) continue;
      const Tensor now = on_device(host[i], {});
      c10::TensorImpl* const to = own[i].unsafeGetTensorImpl();
      to->set_storage_keep_dtype(now.storage());
      to->set_sizes_and_strides(now.sizes(), now.strides());
    }
  }

  Tensor back(const Tensor& result) const {
    for (size_t i = 0; i < own.size(); ++i) {
      if (result.is_same(host[i])) return own[i];
    }
    return on_device(result, own);
  }
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size(), first = stack->size() - count;
  Aliases aliases;
  for (size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = aliases.take(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(aliases.take(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor.has_value() ? std::optional<Tensor>(aliases.take(*tensor)) : tensor);
      }
      value = list;
    } else if (value.isDevice()) {
      value = at::Device(at::kCPU);
    }
  }
  op.callBoxed(stack);
  aliases.resize();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = aliases.back(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(aliases.back(tensor));
      value = list;
    }
  }
}

Tensor& copy_(Tensor& to, const Tensor& from, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

// Products of short types with results in float32, which torch has for devices only.
Tensor mm_dtype(const Tensor& a, const Tensor& b, at::ScalarType type) {
  return on_device(at::mm(on_host(a).to(type), on_host(b).to(type)), {});
}
Tensor& mm_dtype_out(const Tensor& a, const Tensor& b, at::ScalarType type, Tensor& out) {
  return copy_(out, mm_dtype(a, b, type), false);
}
Tensor bmm_dtype(const Tensor& a, const Tensor& b, at::ScalarType type) {
  return on_device(at::bmm(on_host(a).to(type), on_host(b).to(type)), {});
}

void record_stream(Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("copy_", &copy_);
  m.impl("mm.dtype", &mm_dtype);
  m.impl("mm.dtype_out", &mm_dtype_out);
  m.impl("bmm.dtype", &bmm_dtype);
  m.impl("record_stream", &record_stream);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

// ---- Streams ---------------------------------------------------------------------------

thread_local c10::StreamId current_stream = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, id);
  }

  c10::DeviceType type() const override { return at::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    constexpr c10::StreamId kStreams = 32;
    static std::atomic<c10::StreamId> next = 0;
    return stream(1 + next++ % kStreams);
  }
  c10::Stream exchangeStream(c10::Stream to) const override {
    return stream(std::exchange(current_stream, to.id()));
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// What torch made of these when it was imported knows no device: they take its place.
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
[[maybe_unused]] const auto* const hooks =
    new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;

}  // namespace

namespace pyseq::cuda {

// Of an H200, but for fewer multiprocessors.
cudaError_t device_facts(DeviceFacts* facts) {
  *facts = {.capability = 90,
            .multiprocessors = 6,
            .shared_per_block = 232448,
            .shared_per_multiprocessor = 233472,
            .registers_per_multiprocessor = 65536,
            .l2_bytes = 50 << 20,
            .clock = 1.98e9,
            .bandwidth = 4.8e12,
            .cooperative = true};
  return cudaSuccess;
}

}  // namespace pyseq::cuda
