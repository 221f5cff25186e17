// SPDX-License-Identifier: Apache-2.0
// One recurrent layer over a whole sequence, on CUDA: what the glue hands over, and the launchers.
// A persistent launch does all steps; or else the glue alternates a product of its own and the
// launch of one step's arithmetic. Raw device pointers to contiguous memory; shapes were checked.
//
// Letters as in cpu/kernels.h. S is the storage type: float, double, Half, Bfloat16; numbers of
// type Accumulate<S> are float or double. The input's product was made ahead, biases added, and so
// will the weights' gradients be made afterwards, by products over all steps at once.
#pragma once

#include <cstdint>

#include "../cpu/kernels.h"
#include "types.h"

namespace pyseq::cuda {

// As cpu::Strided.
template <class T>
struct Strided {
  const T* data;
  int64_t step, row;
};

// Layer normalisation, as cpu::ScanNorm; for steps that alternate with products only.
template <class S>
struct ScanNorm {
  using A = Accumulate<S>;
  const S* gain_ih;  // (G*H), or null: nothing is normalised
  const S* gain_hh;  // (G*H)
  const S* gain_c;   // (H), LSTM
  const S* bias_c;   // (H), LSTM
  const S* bias;     // (G*H) or null: added to the normalised sums of the input
  const S* x_sums;   // (T, B, G*H): W_ih x
  A* r_sums;         // (T or 1, B, G*H): W_hh h, which the caller's product leaves there
  A* c_sums;         // (T or 1, B, H), LSTM: c as the cell gave it
  A* moments;        // (T, B, 3, 2): mean and scale of the rows of these three; with `save` only
};

template <class S>
struct ScanForward {
  using A = Accumulate<S>;
  CellKind cell;
  int64_t steps, batch, hidden, state_size, heads;
  bool reverse, save;
  const S* w_hh;          // (G*H, P), with several heads (heads, G*D, D); null where there is none
  const S* w_hr;          // (P, H) or null
  const S* apart_bias;    // (H) or null: added to the sum that stays apart (GRU)
  const S* unit_weights;  // (U*H) or null
  int64_t unit_weights_stride;  // from those of a row to those of the next, 0 where all share them
  const int64_t* lengths;       // (B) or null
  const bool* resets;           // (T, B) or null
  S* gates;         // (T, B, G*H): in the input's product, out with `save` what backward needs
                    // (with norm only the latter: (T or 1, B, G*H))
  S* apart;         // (T, B, H) or null: the same for the sum that stays apart
  S* states;        // (slots, B, P), slots as on the CPU: T + 1 with `save`, else 2; the
                    // state before the first step, reset if it resets, is filled in
  A* cells;         // (slots, B, K*H) or null
  S* inner;         // (T or 1, B, H) or null: as on the CPU
  S* y;             // (T, B, P)
  A* c_steps;       // (T, B, K*H) or null
  const S* h_mask;  // (B, P) or null
  S* masked;        // with it: (2, B, P); the first is filled in
  Strided<S> zoneout_h;
  Strided<S> zoneout_c;
  Strided<S> reset_h;
  Strided<A> reset_c;
  ScanNorm<S> norm;
};

template <class S>
struct ScanBackward {
  using A = Accumulate<S>;
  CellKind cell;
  int64_t steps, batch, hidden, state_size, heads;
  bool reverse;
  const S* w_hh;
  const S* w_hr;
  const S* unit_weights;
  int64_t unit_weights_stride;
  const int64_t* lengths;
  const bool* resets;
  const S* gates;
  const S* apart;
  const S* states;
  const A* cells;
  const S* d_y;        // (T, B, P)
  const A* d_c_steps;  // (T, B, K*H) or null
  A* d_h;              // (B, P): in of the last state, out of the first
  A* d_c;              // (B, K*H) or null: likewise
  S* d_x_gates;        // (T, B, G*H): out, gradients of the input's product
  S* d_r_gates;        // (T, B, G*H): out, of the recurrent one; d_x_gates unless a sum stays
                       // apart or the sums are normalised
  S* d_projected;      // (T, B, P) or null: out, with w_hr, of h before it is shared out
  A* d_unit_weights;   // (B, U*H) or null: one summand per row, zero at first
  const S* h_mask;
  Strided<S> zoneout_h;
  Strided<S> zoneout_c;
  A* d_reset_h;  // (B, P) or null: added to
  A* d_reset_c;  // (B, K*H) or null: added to
  ScanNorm<S> norm;
  A* row_gain_ih;  // these with norm, zero at first: what each row adds to the gradient of
  A* row_gain_hh;  // gain_ih and gain_hh (B, G*H),
  A* row_bias;     // of the biases (B, G*H),
  A* row_apart;    // of that of a sum that stays apart (B, H),
  A* row_gain_c;   // of gain_c and bias_c (B, H)
  A* row_bias_c;
  A* scratch;  // (B, (2*G + 2)*H), with norm: to work in
};

// ---- All steps in one launch -----------------------------------------------------------

// How the work is shared out: the units of a head over `units` per block, the batch over `rows`
// per block. Backward, units are those whose h gets its gradient.
struct ScanTiles {
  int units, rows, threads;  // threads at most kScanThreads
};
constexpr int kScanThreads = 256;

// What a launch with these tiles takes: of a block and of the device.
struct ScanNeeds {
  int blocks;       // which must all be resident at once, unless the cell has no product
  int64_t shared;   // bytes of a block's shared memory
  int64_t barrier;  // bytes of device memory for the barriers
  bool possible;    // false: so few threads cannot make such a tile
};

// Sizes of the layer, of which the tiles' needs depend.
struct ScanSizes {
  CellKind cell;
  int64_t batch, hidden, state_size, heads;
  bool projects;
};

// Those of a call.
template <class Args>
ScanSizes sizes_of(const Args& args) {
  return {args.cell, args.batch, args.hidden, args.state_size, args.heads, args.w_hr != nullptr};
}

template <class S>
ScanNeeds scan_forward_needs(const ScanSizes& sizes, const ScanTiles& tiles);
template <class S>
ScanNeeds scan_backward_needs(const ScanSizes& sizes, const ScanTiles& tiles);

// How many such blocks a multiprocessor of the current device can hold at once.
template <class S>
cudaError_t scan_forward_resident(const ScanSizes& sizes, const ScanTiles& tiles, int* blocks);
template <class S>
cudaError_t scan_backward_resident(const ScanSizes& sizes, const ScanTiles& tiles, int* blocks);

// `counters`: as many bytes as the tiles need, zero, and of this launch alone. Not with norm.
template <class S>
cudaError_t scan_forward(const ScanForward<S>& args, const ScanTiles& tiles, unsigned* counters,
                         cudaStream_t stream);
template <class S>
cudaError_t scan_backward(const ScanBackward<S>& args, const ScanTiles& tiles, unsigned* counters,
                          cudaStream_t stream);

// ---- One step at a time ----------------------------------------------------------------
//
// Forward, for n = 0 .. T-1, where h is `masked` slot n % 2 with h_mask, else the state before the
// step:
//   sums = W_hh h                      (B, G*H); norm: into r_sums; no product: sums is null
//   scan_gate_forward                  a cell that gates its state: makes `inner` of the first
//                                      gate's sums; then the last gate's sums = W_hh,last inner
//   scan_step_forward
//   sums = W_hr inner                  (B, P), with w_hr
//   scan_project_forward
//
// Backward, for n = T-1 .. -1, of which the last only brings the gradient to the first state:
//   sums = d_r_gates[n+1] W_hh         (B, P); null for n = T-1 and where there is no product; of
//                                      a cell that gates its state without the last gate
//   scan_state_backward
//   sums = d_projected[n] W_hr         (B, H), with w_hr and n >= 0
//   scan_project_backward
//   sums = d_r_gates[n],last W_hh,last (B, H), of a cell that gates its state and n >= 0
//   scan_gate_backward

template <class S>
cudaError_t scan_gate_forward(const ScanForward<S>& args, int64_t n, const Accumulate<S>* sums,
                              cudaStream_t stream);
template <class S>
cudaError_t scan_step_forward(const ScanForward<S>& args, int64_t n, const Accumulate<S>* sums,
                              cudaStream_t stream);
template <class S>
cudaError_t scan_project_forward(const ScanForward<S>& args, int64_t n, const Accumulate<S>* sums,
                                 cudaStream_t stream);
template <class S>
cudaError_t scan_state_backward(const ScanBackward<S>& args, int64_t n, const Accumulate<S>* sums,
                                cudaStream_t stream);
template <class S>
cudaError_t scan_project_backward(const ScanBackward<S>& args, int64_t n, const Accumulate<S>* sums,
                                  cudaStream_t stream);
template <class S>
cudaError_t scan_gate_backward(const ScanBackward<S>& args, int64_t n, const Accumulate<S>* sums,
                               cudaStream_t stream);

}  // namespace pyseq::cuda
