// SPDX-License-Identifier: Apache-2.0
// decode_whole as the decoder of pyseq.nn calls it.
#pragma once

#include <pybind11/pybind11.h>

namespace pyseq {

// Defines `decode_whole` in the module _C.
void define_decode_whole(pybind11::module_& m);

}  // namespace pyseq
