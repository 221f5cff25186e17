// SPDX-License-Identifier: Apache-2.0
// What the scans share: one pass over a sequence, and the checks of its tensors.
#pragma once

#include "layers.h"

namespace pyseq {

struct ScanShape {
  CellShape cell;
  int64_t steps, batch, input, hidden, state_size;
  bool projects;
  int64_t heads;
};

ScanShape check_scan(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                     const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                     const OptionalTensor& w_hr, const OptionalTensor& h_0,
                     const OptionalTensor& c_0, const OptionalTensor& resets, std::string_view name,
                     const OptionalTensor& w_ch);

// The extras of a call, checked and contiguous.
struct ScanExtras {
  OptionalTensor h_mask, zoneout_h, zoneout_c, reset_h, reset_c, gain_ih, gain_hh, gain_c, bias_c;
  size_t count = 0;  // elements of the argument

  bool normalises() const { return gain_ih.has_value(); }
};

ScanExtras check_extras(const ScanExtraList& list, const ScanShape& shape, const Tensor& x,
                        std::string_view name);

// Without `save` what is for backward only is left undefined or without use.
ScanSaved run_scan(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                   const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                   const OptionalTensor& w_hr, const OptionalTensor& h_0, const OptionalTensor& c_0,
                   const OptionalTensor& lengths, const OptionalTensor& resets,
                   std::string_view name, bool reverse, bool save, bool return_states,
                   const OptionalTensor& w_ch, const ScanExtraList& extras);

}  // namespace pyseq
