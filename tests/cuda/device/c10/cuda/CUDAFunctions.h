// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda_*.cpp take of torch's header of this name, for the device of tests/cuda/device.
#pragma once

#include <c10/core/Device.h>

namespace c10::cuda {

inline c10::DeviceIndex current_device() { return 0; }

}  // namespace c10::cuda
