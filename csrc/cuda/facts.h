// SPDX-License-Identifier: Apache-2.0
// What a plan asks of a device, asked of the device.
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace pyseq::cuda {

// Of the current device.
cudaError_t device_facts(DeviceFacts* facts);

}  // namespace pyseq::cuda
