// SPDX-License-Identifier: Apache-2.0
// scan_layers as the modules of pyseq.nn call it.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "scan_layers.h"

namespace pyseq {

// The weights of all layers and directions of a module of pyseq.nn, by their names, as they are
// now; false where one is none that the operators read, or would be made and `may_make` is false.
bool read_layers(pybind11::handle module, const pybind11::dict& parameters,
                 const pybind11::list& names, bool may_make, std::vector<DirectionWeights>& to);

// Defines `scan_layers` in the module _C.
void define_scan_layers(pybind11::module_& m);

}  // namespace pyseq
