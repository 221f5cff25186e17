// SPDX-License-Identifier: Apache-2.0
// search_whole as the models of pyseq.seq2seq call it.
#pragma once

#include <pybind11/pybind11.h>

namespace pyseq {

// Defines `search_whole` in the module _C.
void define_search_whole(pybind11::module_& m);

}  // namespace pyseq
