// SPDX-License-Identifier: Apache-2.0
// scan_layers as the modules of pyseq.nn call it.
#pragma once

#include <pybind11/pybind11.h>

namespace pyseq {

// Defines `scan_layers` in the module _C.
void define_scan_layers(pybind11::module_& m);

}  // namespace pyseq
