// SPDX-License-Identifier: Apache-2.0
// The pybind11 module _C: names for Python, nothing else.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of pyseq; its operators are under torch.ops.pyseq.";
  m.def("build_info", &pyseq::build_info, "What the extension was built with and for.");
  m.def("compiled_tiers", &pyseq::cpu::compiled_tiers, "The CPU tiers compiled in.");
  m.def("cpu_tier", [] { return pyseq::cpu::tier().name; }, "The CPU tier in use.");
}
