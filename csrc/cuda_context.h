// SPDX-License-Identifier: Apache-2.0
// What launches on the current CUDA device and stream need of torch: the stream, memory, tensors
// around a kernel's memory. For the files that are compiled only against a torch that has CUDA.
#pragma once

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <bit>
#include <map>
#include <mutex>
#include <type_traits>

#include "check.h"
#include "cuda/facts.h"
#include "cuda/types.h"
#include "devices.h"

namespace pyseq::on_cuda {

inline cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }

inline at::TensorOptions options(at::ScalarType type) {
  return at::TensorOptions().dtype(type).device(at::kCUDA, c10::cuda::current_device());
}

// Memory for one launch. Freed on return: the allocator hands it out again to what comes later on
// the same stream only.
inline at::Tensor scratch(int64_t bytes) { return at::empty({bytes}, options(at::kByte)); }

// Counters of barriers, zero, for one launch.
inline at::Tensor counters(int64_t bytes) {
  return at::zeros({bytes / static_cast<int64_t>(sizeof(int32_t))}, options(at::kInt));
}
inline unsigned* as_counters(const at::Tensor& tensor) {
  return static_cast<unsigned*>(tensor.data_ptr());
}

// The memory at `data` as a tensor, which must not outlive it; nothing for null, which is also
// where no numbers lie. The device is named, because torch would ask the driver for it.
template <class T>
at::Tensor view(const T* data, at::IntArrayRef sizes,
                at::OptionalIntArrayRef strides = std::nullopt) {
  const at::TensorOptions own = options(c10::CppTypeToScalarType<T>::value);
  if (c10::multiply_integers(sizes) == 0) return at::empty(sizes, own);
  if (data == nullptr) return {};
  return at::for_blob(const_cast<T*>(data), sizes)
      .strides(strides)
      .options(own)
      .target_device(own.device())
      .make_tensor();
}

// What the plan asks of the current device. Asked once, because the driver takes long to tell some
// of it, but for how much of it the environment allows.
inline cuda::DeviceFacts facts() {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, cuda::DeviceFacts> known;
  const c10::DeviceIndex device = c10::cuda::current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace(device);
  if (is_new) {
    const cudaError_t error = cuda::device_facts(&found->second);
    if (error != cudaSuccess) known.erase(device);
    C10_CUDA_CHECK(error);
  }
  cuda::DeviceFacts facts = found->second;
  constexpr int64_t kOldest = 80;
  TORCH_CHECK(facts.capability >= kOldest,
              "pyseq's CUDA kernels need compute capability 8.0 or newer, got ",
              facts.capability / 10, ".", facts.capability % 10);
  facts.multiprocessors = cuda::allowed_multiprocessors(facts.multiprocessors);
  return facts;
}

// Whether the blocks of a persistent launch can all be resident, of which a multiprocessor holds
// `each`: they wait for one another. Raises if they cannot and the environment asks for it.
inline bool run_at_once(int64_t blocks, int64_t each, const cuda::DeviceFacts& facts,
                        cuda::Choice choice) {
  const int64_t most = each * facts.multiprocessors;
  TORCH_CHECK(blocks <= most || choice != cuda::Choice::kPersistent,
              "PYSEQ_CUDA_PATH asks for the persistent kernel, whose blocks must run at once, ",
              most, " of them on this device, got ", blocks);
  return blocks <= most;
}

// What a loop over numbers of type T is planned for: torch may be allowed to round the factors of a
// library's products of float32, which makes those faster than the persistent kernel's.
template <class T>
cuda::Storage storage() {
  if constexpr (std::is_same_v<T, float>) {
    const at::Float32Precision products =
        at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
    return products == at::Float32Precision::TF32 ? cuda::Storage::kTf32 : cuda::Storage::kFloat32;
  } else if constexpr (std::is_same_v<T, double>) {
    return cuda::Storage::kFloat64;
  } else {
    return std::is_same_v<T, at::BFloat16> ? cuda::Storage::kBFloat16 : cuda::Storage::kFloat16;
  }
}

// What kernels call torch's types.
template <class T>
struct NativeOf {
  using type = T;
};
template <>
struct NativeOf<at::Half> {
  using type = cuda::Half;
};
template <>
struct NativeOf<at::BFloat16> {
  using type = cuda::Bfloat16;
};
template <class T>
using Native = typename NativeOf<T>::type;

template <class T>
Native<T>* native(T* data) {
  return reinterpret_cast<Native<T>*>(data);
}
template <class T>
const Native<T>* native(const T* data) {
  return reinterpret_cast<const Native<T>*>(data);
}
// A call's arguments, which hold pointers to numbers on the device.
template <template <class> class Arguments, class T>
Arguments<Native<T>> native(const Arguments<T>& call) {
  return std::bit_cast<Arguments<Native<T>>>(call);
}

// a b, in the type that numbers of theirs are added up in.
inline at::Tensor wide_product(const at::Tensor& a, const at::Tensor& b) {
  return is_short(a.scalar_type()) ? at::mm(a, b, at::kFloat) : at::mm(a, b);
}

}  // namespace pyseq::on_cuda
