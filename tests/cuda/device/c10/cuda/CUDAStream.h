// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda_*.cpp take of torch's header of this name, for the device of tests/cuda/device.
#pragma once

#include <c10/core/impl/VirtualGuardImpl.h>

namespace c10::cuda {

// The number of the stream is its handle.
inline void* getCurrentCUDAStream() {
  const c10::impl::VirtualGuardImpl device(c10::DeviceType::CUDA);
  return reinterpret_cast<void*>(device.getStream(device.getDevice()).id());
}

}  // namespace c10::cuda
