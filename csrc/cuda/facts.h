// SPDX-License-Identifier: Apache-2.0
// What a plan asks of a device, asked of the device.
#pragma once

#include "plan.h"
#include "types.h"

namespace pyseq::cuda {

// Of the current device.
cudaError_t device_facts(DeviceFacts* facts);

}  // namespace pyseq::cuda
