// SPDX-License-Identifier: Apache-2.0
#include "scan.h"

#include <ATen/TensorOperators.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/threads.h"
#include "devices.h"
#include "products.h"
#include "widened.h"

namespace pyseq {

namespace {

// Memory of the CPU for the length of a call, in pieces. Tensors for what nobody reads afterwards
// would take as long as a small step.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(bytes), next_(static_cast<char*>(memory_.data())) {}

  void* take(size_t bytes) { return std::exchange(next_, next_ + bytes); }

 private:
  const cpu::Workspace memory_;
  char* next_;
};

// Writes `from`, which takes so many bytes, or zeros into memory of the CPU.
void fill_memory(void* to, size_t bytes, const OptionalTensor& from) {
  if (bytes == 0) return;
  if (from.has_value()) {
    std::memcpy(to, from->contiguous().const_data_ptr(), bytes);
  } else {
    std::memset(to, 0, bytes);
  }
}

// A tensor on the CPU of what lies in memory there.
Tensor copy_memory(const void* from, at::IntArrayRef sizes, const Tensor& like) {
  const Tensor copy = fresh(sizes, like);
  if (copy.numel() > 0) std::memcpy(copy.data_ptr(), from, copy.nbytes());
  return copy;
}

ScanExtraList join_extras(std::initializer_list<const OptionalTensor*> extras) {
  const bool none = std::none_of(extras.begin(), extras.end(),
                                 [](const OptionalTensor* extra) { return extra->has_value(); });
  if (none) return std::nullopt;
  c10::List<OptionalTensor> list;
  for (const OptionalTensor* extra : extras) list.push_back(*extra);
  return list;
}

// The buffer of states with its first slot filled: with `reset`, or zero, where the first step
// resets.
Tensor first_state(const OptionalTensor& initial, const Tensor& like, int64_t slots, int64_t slot,
                   int64_t batch, int64_t size, const Tensor& cleared,
                   const OptionalTensor& reset) {
  const Tensor states = fresh({slots, batch, size}, like);
  fill_slot(states, slot, initial);
  if (!cleared.defined()) return states;
  Tensor first = states.select(0, slot);
  if (reset.has_value()) {
    first.copy_(at::where(cleared, *reset, first));
  } else if (initial.has_value()) {
    first.masked_fill_(cleared, 0);
  }
  return states;
}

// The states of every step where they are also the gates: (T, B, P).
Tensor gate_slots(const ScanArguments& args, const Tensor& states) {
  return states.narrow(0, args.reverse ? 0 : 1, args.shape.steps);
}

// Every tensor that a pass forward reads and writes beside its arguments.
struct ScanBuffers {
  Tensor x;
  bool reads_input;
  bool save, slots;  // whether the gates, and the states, of every step are kept
  ScanSaved kept;
  Tensor masked, y, c_steps;
  void *states, *cells;           // their slots
  const void *bias, *apart_bias;  // see Bias; or null
};

// Calls the kernels of the device: everything was checked and allocated.
void launch(const ScanArguments& args, const ScanBuffers& all) {
  const auto& [cell, T_, B, I, H, P, projects, heads] = args.shape;
  const ScanExtras& extras = args.extras;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, args.x.scalar_type(), "scan", [&] {
    using Wide = cpu::Accumulate<scalar_t>;
    kernels_of<scalar_t>(args.x).scan_forward({
        .cell = cell.kind,
        .steps = T_,
        .batch = B,
        .input = I,
        .hidden = H,
        .state_size = P,
        .reverse = args.reverse,
        .save = all.save,
        .slots = all.slots,
        .threads = thread_count(),
        .x = all.x.const_data_ptr<scalar_t>(),
        .w_ih = all.reads_input ? args.w_ih.const_data_ptr<scalar_t>() : nullptr,
        .bias = static_cast<const scalar_t*>(all.bias),
        .w_hh = cell.recurrent ? values<scalar_t>(args.w_hh) : nullptr,
        .w_hr = values<scalar_t>(args.w_hr),
        .quantized_hh = quantized(args.w_hh),
        .quantized_hr = quantized(args.w_hr),
        .apart_bias = static_cast<const scalar_t*>(all.apart_bias),
        .lengths = data<int64_t>(args.lengths),
        .resets = data<bool>(args.resets),
        .gates = data_if<scalar_t>(all.kept.gates),
        .apart = data_if<scalar_t>(all.kept.apart),
        .states = static_cast<scalar_t*>(all.states),
        .cells = static_cast<Wide*>(all.cells),
        .inner = data_if<scalar_t>(all.kept.inner),
        .y = all.y.data_ptr<scalar_t>(),
        .c_steps = data_if<Wide>(all.c_steps),
        .unit_weights = data<scalar_t>(args.unit_weights),
        .unit_weights_stride = args.masks_own() ? H : 0,
        .heads = heads,
        .h_mask = args.masks_state() ? data<scalar_t>(extras.h_mask) : nullptr,
        .masked = data_if<scalar_t>(all.masked),
        .zoneout_h = strided<scalar_t>(extras.zoneout_h),
        .zoneout_c = strided<scalar_t>(extras.zoneout_c),
        .reset_h = strided<scalar_t>(extras.reset_h),
        .reset_c = strided<Wide>(extras.reset_c),
        .norm = scan_norm<scalar_t>(extras, all.kept),
    });
  });
}

}  // namespace

ScanResult ScanRun::results(at::ScalarType type) const {
  return rounded(ScanResult{y, h_n, or_nothing(c_n, y), or_nothing(c_steps, y)}, type);
}

ScanRun run_scan(const ScanArguments& args, Keep keep, bool return_states) {
  const auto& [cell, T_, B, I, H, P, projects, heads] = args.shape;
  const Tensor &x = args.x, wide = wide_like(x);
  const ScanExtras& extras = args.extras;
  const bool save = keep != Keep::kNothing;
  const int64_t rows = args.shape.rows(), kept = save ? T_ : 1;
  // Where the loop does not multiply all gates at once, the input is multiplied ahead; so it is on
  // other devices.
  const bool normalises = extras.normalises();
  const bool at_once =
      x.is_cpu() && !is_quantized(args.w_hh) && !cell.gates_state && !cell.has_heads && !normalises;
  ScanBuffers all{.x = x.contiguous(),
                  .reads_input = cpu::reads_input(T_, B, args.weight_bytes()) && I > 0 && at_once,
                  .save = save,
                  .slots = keep == Keep::kAll || (save && args.keeps_states()),
                  .kept = {},
                  .masked = {},
                  .y = fresh({T_, B, P}, x),
                  .c_steps = {},
                  .states = nullptr,
                  .cells = nullptr,
                  .bias = nullptr,
                  .apart_bias = nullptr};
  const int64_t slots = all.slots ? T_ + 1 : 2, first = all.slots && args.reverse ? T_ : 0;
  const int64_t last = all.slots ? (args.reverse ? 0 : T_) : T_ % 2;
  ScanSaved& to = all.kept;
  Tensor cleared;
  if (args.resets.has_value()) {
    const int64_t first_step = args.reverse ? T_ - 1 : 0;
    cleared = args.resets->select(0, first_step);
    if (args.lengths.has_value()) cleared = cleared.logical_and(args.lengths->gt(first_step));
    cleared = cleared.unsqueeze(1);
  }
  // Slots that take turns are nobody's afterwards, and neither are folded biases.
  const bool passing = x.is_cpu() && !all.slots && !cleared.defined() && !args.masks_state();
  const size_t size = x.element_size(), h_bytes = B * P * size,
               c_bytes = B * args.shape.cell_size() * size;
  Scratch scratch(passing ? 2 * (h_bytes + c_bytes) + (rows + H) * size : 0);
  if (passing) {
    all.states = scratch.take(2 * h_bytes);
    fill_memory(all.states, h_bytes, args.h_0);
    if (cell.has_cell) {
      all.cells = scratch.take(2 * c_bytes);
      fill_memory(all.cells, c_bytes, args.c_0);
    }
  } else {
    to.states = first_state(args.h_0, x, slots, first, B, P, cleared, extras.reset_h);
    all.states = to.states.data_ptr();
    if (cell.has_cell) {
      to.cells = first_state(args.c_0, wide, slots, first, B, args.shape.cell_size(), cleared,
                             extras.reset_c);
      all.cells = to.cells.data_ptr();
    }
  }
  Bias bias;
  if (passing && all.reads_input && args.b_ih.has_value() && args.b_hh.has_value()) {
    void* const sum = scratch.take(rows * size);
    void* const apart = cell.has_apart ? scratch.take(H * size) : nullptr;
    add_biases(*args.b_ih, *args.b_hh, H, sum, apart);
    all.bias = sum;
    all.apart_bias = apart;
  } else {
    bias = fold_bias(args.b_ih, args.b_hh, cell, H);
    all.bias = bias.sum.has_value() ? bias.sum->const_data_ptr() : nullptr;
    all.apart_bias = bias.apart.has_value() ? bias.apart->const_data_ptr() : nullptr;
  }
  // In the memory of the states where they are the same.
  if (save && !args.keeps_gates()) to.gates = gate_slots(args, to.states);
  if (normalises) {
    if (!to.gates.defined()) to.gates = fresh({kept, B, rows}, x);
    to.x_sums = project_input(x, args.w_ih, std::nullopt);
    to.r_sums = fresh({kept, B, rows}, wide);
    if (cell.has_cell) to.c_sums = fresh({kept, B, H}, wide);
    if (save) to.moments = fresh({T_, B, 3, 2}, wide);
  } else if (!all.reads_input) {
    to.gates = project_input(x, args.w_ih, bias.sum, to.gates);
  } else if (save && !to.gates.defined()) {
    to.gates = fresh({T_, B, rows}, x);
  }
  if (save && cell.has_apart) to.apart = fresh({T_, B, H}, x);
  if (args.has_inner()) to.inner = fresh({kept, B, H}, x);
  if (args.masks_state()) {
    all.masked = fresh({2, B, P}, x);
    all.masked.select(0, 0).copy_(to.states.select(0, first) * *extras.h_mask);
  }
  if (return_states && cell.has_cell) all.c_steps = fresh({T_, B, args.shape.cell_size()}, wide);
  launch(args, all);
  const auto last_of = [&](const Tensor& states, void* slots, size_t bytes, int64_t width,
                           const Tensor& like) {
    return passing ? copy_memory(static_cast<char*>(slots) + last * bytes, {B, width}, like)
                   : copy_slot(states, last);
  };
  return {std::move(all.y), last_of(to.states, all.states, h_bytes, P, x),
          cell.has_cell ? last_of(to.cells, all.cells, c_bytes, args.shape.cell_size(), wide)
                        : Tensor(),
          std::move(all.c_steps), std::move(to)};
}

ScanRun run_inference(const ScanArguments& args, bool return_states) {
  // With few rows the input is multiplied ahead. Of a long sequence a stretch at a time, so that
  // what is written is read again from the cache.
  constexpr int64_t kAhead = 1 << 19, kLeast = 64;  // numbers; steps
  const int64_t step = std::max<int64_t>(1, args.shape.batch * args.shape.rows());
  const int64_t stretch = std::max(kLeast, kAhead / step);
  const bool few =
      args.x.is_cpu() && !cpu::reads_input(args.shape.steps, args.shape.batch, args.weight_bytes());
  return few && args.shape.steps > 2 * stretch ? run_scan_kept(args, stretch, return_states).run
                                               : run_scan(args, Keep::kNothing, return_states);
}

namespace {

// The tensors that are kept, in the order in which they are handed over.
std::vector<Tensor> packed(const ScanArguments& args, const ScanSaved& saved) {
  std::vector<Tensor> list;
  const auto add = [&](bool is_kept, const Tensor& tensor) {
    if (is_kept && tensor.defined()) list.push_back(tensor);
  };
  const bool states = args.keeps_states();
  add(args.keeps_gates(), saved.gates);
  add(true, saved.apart);
  add(states, saved.states);
  add(states, saved.cells);
  for (const Tensor& tensor :
       {saved.inner, saved.x_sums, saved.r_sums, saved.c_sums, saved.moments}) {
    add(true, tensor);
  }
  return list;
}

// The inverse, checked.
ScanSaved unpacked(const ScanArguments& args, at::TensorList list) {
  const auto& [cell, T_, B, I, H, P, projects, heads] = args.shape;
  const int64_t rows = args.shape.rows();
  SavedList kept(list, args.x);
  const bool states = args.keeps_states(), normalises = args.extras.normalises();
  ScanSaved saved;
  saved.gates = kept.take(args.keeps_gates(), "gates", {T_, B, rows});
  saved.apart = kept.take(cell.has_apart, "apart", {T_, B, H});
  saved.states = kept.take(states, "states", {T_ + 1, B, P});
  saved.cells =
      kept.take_wide(states && cell.has_cell, "cells", {T_ + 1, B, args.shape.cell_size()});
  saved.inner = kept.take(args.has_inner(), "inner", {T_, B, H});
  saved.x_sums = kept.take(normalises, "x_sums", {T_, B, rows});
  saved.r_sums = kept.take_wide(normalises, "r_sums", {T_, B, rows});
  saved.c_sums = kept.take_wide(normalises && cell.has_cell, "c_sums", {T_, B, H});
  saved.moments = kept.take_wide(normalises, "moments", {T_, B, 3, 2});
  kept.check_end();
  return saved;
}

// Fills in what of them was not kept.
void complete(const ScanArguments& args, ScanSaved& saved) {
  if (!args.keeps_gates()) saved.gates = gate_slots(args, saved.states);
  if (args.keeps_states()) return;
  const auto& [cell, T_, B, I, H, P, projects, heads] = args.shape;
  const int64_t first = args.reverse ? T_ : 0;
  saved.states = fresh({T_ + 1, B, H}, args.x);
  fill_slot(saved.states, first, args.h_0);
  if (cell.has_cell) {
    saved.cells = fresh({T_ + 1, B, H}, args.x);
    fill_slot(saved.cells, first, args.c_0);
  }
  AT_DISPATCH_FLOATING_TYPES(args.x.scalar_type(), "scan_replay", [&] {
    kernels_of<scalar_t>(args.x).replay({
        .cell = cell.kind,
        .steps = T_,
        .batch = B,
        .hidden = H,
        .reverse = args.reverse,
        .threads = thread_count(),
        .lengths = data<int64_t>(args.lengths),
        .gates = saved.gates.const_data_ptr<scalar_t>(),
        .states = saved.states.data_ptr<scalar_t>(),
        .cells = data_if<scalar_t>(saved.cells),
    });
  });
}

}  // namespace

ScanResult scan(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                const OptionalTensor& b_hh, const OptionalTensor& w_hr, const OptionalTensor& h_0,
                const OptionalTensor& c_0, const OptionalTensor& lengths,
                const OptionalTensor& resets, std::string_view cell, bool reverse,
                int64_t /*keep_every*/, bool return_states, const OptionalTensor& w_ch,
                const OptionalTensor& h_mask, const OptionalTensor& zoneout_h,
                const OptionalTensor& zoneout_c, const OptionalTensor& reset_h,
                const OptionalTensor& reset_c, const OptionalTensor& gain_ih,
                const OptionalTensor& gain_hh, const OptionalTensor& gain_c,
                const OptionalTensor& bias_c) {
  const ScanArguments args =
      check_scan({x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, w_ch,
                  join_extras({&h_mask, &zoneout_h, &zoneout_c, &reset_h, &reset_c, &gain_ih,
                               &gain_hh, &gain_c, &bias_c}),
                  cell, reverse});
  return run_inference(args, return_states).results(x.scalar_type());
}

std::vector<Tensor> scan_forward(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                                 const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                 const OptionalTensor& w_hr, const OptionalTensor& h_0,
                                 const OptionalTensor& c_0, const OptionalTensor& lengths,
                                 const OptionalTensor& resets, std::string_view cell, bool reverse,
                                 int64_t keep_every, bool return_states, const OptionalTensor& w_ch,
                                 const ScanExtraList& extras) {
  const ScanArguments args = check_scan(
      {x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, w_ch, extras, cell, reverse});
  check_differentiable(w_hh);
  std::vector<Tensor> results;
  const auto add = [&](const ScanRun& run, at::TensorList saved) {
    const auto [y, h_n, c_n, c_steps] = run.results(x.scalar_type());
    results = {y, h_n, c_n, c_steps};
    results.insert(results.end(), saved.begin(), saved.end());
  };
  if (keep_every == 1) {
    const ScanRun run = run_scan(args, Keep::kLeast, return_states);
    add(run, packed(args, run.saved));
  } else {
    const ScanKept kept = run_scan_kept(args, keep_every, return_states);
    if (kept.c.defined()) {
      add(kept.run, {kept.h, kept.c});
    } else {
      add(kept.run, kept.h);
    }
  }
  return results;
}

ScanGradients scan_backward(const OptionalTensor& d_y, const OptionalTensor& d_h_n,
                            const OptionalTensor& d_c_n, const OptionalTensor& d_c_steps,
                            const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                            const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                            const OptionalTensor& w_hr, const OptionalTensor& h_0,
                            const OptionalTensor& c_0, const OptionalTensor& lengths,
                            const OptionalTensor& resets, at::TensorList saved,
                            std::string_view cell, bool reverse, int64_t keep_every, bool needs_x,
                            const OptionalTensor& w_ch, const ScanExtraList& extras) {
  const ScanArguments args = check_scan(
      {x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, lengths, resets, w_ch, extras, cell, reverse});
  const ScanIncoming incoming = ScanIncoming{d_y, d_h_n, d_c_n, d_c_steps}.checked(args);
  if (keep_every != 1) {
    const size_t count = args.shape.cell.has_cell ? 2 : 1;
    TORCH_CHECK(saved.size() == count, "saved must be as forward gave it, ", count,
                " tensors, got ", saved.size());
    return rounded(run_scan_kept_backward(args, keep_every, saved[0],
                                          count > 1 ? saved[1] : Tensor(), incoming, needs_x),
                   x.scalar_type());
  }
  ScanSaved all = unpacked(args, saved);
  complete(args, all);
  return rounded(run_scan_backward(args, all, incoming, needs_x), x.scalar_type());
}

}  // namespace pyseq
