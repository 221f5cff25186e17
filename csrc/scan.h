// SPDX-License-Identifier: Apache-2.0
// What the files of the scan share: its arguments, checked once and handed on, and one pass over a
// sequence in each direction.
#pragma once

#include <vector>

#include "layers.h"

namespace pyseq {

// The arguments as the operators get them; functional/scans.py says what they are.
struct ScanInputs {
  const Tensor &x, &w_ih, &w_hh;
  const OptionalTensor &b_ih, &b_hh, &w_hr, &h_0, &c_0, &lengths, &resets, &w_ch;
  const ScanExtraList& extras;
  std::string_view cell;
  bool reverse;
};

struct ScanShape {
  CellShape cell;
  int64_t steps, batch, input, hidden, state_size;
  bool projects;
  int64_t heads;

  int64_t rows() const { return cell.gates * hidden; }
  int64_t cell_size() const { return cell.states * hidden; }
};

// The extras of a call, checked and contiguous.
struct ScanExtras {
  OptionalTensor h_mask, zoneout_h, zoneout_c, reset_h, reset_c, gain_ih, gain_hh, gain_c, bias_c;
  size_t count = 0;  // elements of the argument

  bool normalises() const { return gain_ih.has_value(); }
};

// The arguments checked, and as the kernels read them. x and the states may have any strides.
struct ScanArguments {
  ScanShape shape;
  bool reverse;
  Tensor x, w_ih;
  Tensor w_hh;  // rows (gate, unit), or with heads (head, gate, unit)
  OptionalTensor b_ih, b_hh, w_hr, h_0, c_0, lengths, resets;
  OptionalTensor unit_weights;  // (U*H,), or (B, H) of each row
  ScanExtras extras;

  bool has_inner() const { return shape.projects || shape.cell.gates_state; }
  // h_mask scales what a matrix multiplies; without one each row's own weights.
  bool masks_state() const { return shape.cell.recurrent && extras.h_mask.has_value(); }
  bool masks_own() const { return !shape.cell.recurrent && extras.h_mask.has_value(); }
  int64_t weight_bytes() const { return static_cast<int64_t>(w_ih.nbytes() + w_hh.nbytes()); }
  // What of a step is kept for backward. The gates of an RNN are its states; those of other cells
  // give the states once more, which is cheaper than to keep them. On the CPU; and where nothing
  // else has changed them.
  bool keeps_gates() const;
  bool keeps_states() const;

  // The same for a run of steps that starts with these states.
  ScanArguments stretch(int64_t begin, int64_t steps, const Tensor& h, const Tensor& c) const;
};

ScanArguments check_scan(const ScanInputs& inputs);

// What a pass leaves for backward; see kernels.h. Undefined where there is no such thing.
struct ScanSaved {
  Tensor gates, apart, states, cells, inner, x_sums, r_sums, c_sums, moments;
};

// What a scan with layer normalisation works on; r_sums, c_sums and moments are written.
template <class T>
cpu::ScanNorm<T> scan_norm(const ScanExtras& extras, const ScanSaved& saved) {
  if (!extras.normalises()) return {};
  return {.gain_ih = data<T>(extras.gain_ih),
          .gain_hh = data<T>(extras.gain_hh),
          .gain_c = data<T>(extras.gain_c),
          .bias_c = data<T>(extras.bias_c),
          .x_sums = saved.x_sums.const_data_ptr<T>(),
          .r_sums = saved.r_sums.data_ptr<cpu::Accumulate<T>>(),
          .c_sums = data_if<cpu::Accumulate<T>>(saved.c_sums),
          .moments = data_if<cpu::Accumulate<T>>(saved.moments)};
}

// Numbers for each step and row, as kernels take them.
template <class T>
cpu::Strided<T> strided(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  const auto stride = [&](int64_t from_last) {
    const int64_t dim = tensor->dim() - 1 - from_last;
    return dim < 0 || tensor->size(dim) == 1 ? 0 : tensor->stride(dim);
  };
  return {tensor->const_data_ptr<T>(), stride(2), stride(1)};
}

// How much a pass leaves: nothing; what there is no other way to; all that backward reads.
enum class Keep { kNothing, kLeast, kAll };

// c_n and c_steps are undefined where there is no such thing; of short types they are float32.
struct ScanRun {
  Tensor y, h_n, c_n, c_steps;
  ScanSaved saved;

  // What the operator returns, in the type of its arguments.
  ScanResult results(at::ScalarType type) const;
};

// Checks no more, allocates, and calls the kernels.
ScanRun run_scan(const ScanArguments& args, Keep keep, bool return_states);

// The pass that leaves nothing, as it is fastest.
ScanRun run_inference(const ScanArguments& args, bool return_states);

// The gradients of a scan's results; those that are not there are zero. Of the results themselves
// and of what is summed up the gradients that a pass gives are float32 for short types.
struct ScanIncoming {
  OptionalTensor y, h_n, c_n, c_steps;

  ScanIncoming checked(const ScanArguments& args) const;
};

ScanGradients run_scan_backward(const ScanArguments& args, const ScanSaved& saved,
                                const ScanIncoming& incoming, bool needs_x);

// The same with no state kept but that before every `keep_every`-th step: (B, P) and (B, K*H), the
// latter of short types in float32.
struct ScanKept {
  ScanRun run;
  Tensor h, c;
};

ScanKept run_scan_kept(const ScanArguments& args, int64_t keep_every, bool return_states);

ScanGradients run_scan_kept_backward(const ScanArguments& args, int64_t keep_every, const Tensor& h,
                                     const Tensor& c, const ScanIncoming& incoming, bool needs_x);

}  // namespace pyseq
