// SPDX-License-Identifier: Apache-2.0
// The pybind11 module _C: names for Python, nothing else.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of pyseq.";
  m.def("build_info", &pyseq::build_info, "What the extension was built with and for.");
}
