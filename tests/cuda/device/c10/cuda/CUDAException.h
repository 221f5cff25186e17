// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda_*.cpp take of torch's header of this name, for the device of tests/cuda/device.
#pragma once

#include <c10/util/Exception.h>

#include "shim.h"

#define C10_CUDA_CHECK(launch) TORCH_CHECK((launch) == 0, "CUDA error: ", shim::device.error)
