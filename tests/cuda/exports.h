// SPDX-License-Identifier: Apache-2.0
// What every library of the tests exports besides its kernels: the seed of the schedule, and the
// last launch's error.
#pragma once

#include "shim.h"

#define PYSEQ_EXPORT extern "C" __attribute__((visibility("default")))

PYSEQ_EXPORT void shim_seed(uint64_t seed) { shim::set_seed(seed); }
PYSEQ_EXPORT const char* shim_error() { return shim::device.error.c_str(); }
