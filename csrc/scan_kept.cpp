// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>

#include "scan.h"
#include "widened.h"

namespace pyseq {

namespace {

// A run of steps between two kept states.
struct Stretch {
  int64_t begin;  // the first of its time steps
  int64_t steps;

  Tensor of(const Tensor& tensor) const { return tensor.narrow(0, begin, steps); }
  OptionalTensor of(const OptionalTensor& tensor) const {
    return tensor.has_value() ? OptionalTensor(of(*tensor)) : std::nullopt;
  }
};

// In the order of processing.
std::vector<Stretch> stretches(const ScanArguments& args, int64_t keep_every) {
  TORCH_CHECK_VALUE(keep_every > 0, "keep_every must be at least 1, got ", keep_every);
  const int64_t steps = args.shape.steps;
  std::vector<Stretch> list;
  for (int64_t n = 0; n < steps; n += keep_every) {
    const int64_t count = std::min(keep_every, steps - n);
    list.push_back({args.reverse ? steps - n - count : n, count});
  }
  return list;
}

// The arguments of the i-th of them.
ScanArguments arguments_of(const ScanArguments& args, const Stretch& stretch, int64_t i,
                           const Tensor& h, const Tensor& c) {
  return args.stretch(stretch.begin, stretch.steps, h.select(0, i),
                      c.defined() ? c.select(0, i) : Tensor());
}

}  // namespace

ScanKept run_scan_kept(const ScanArguments& args, int64_t keep_every, bool return_states) {
  const auto& [cell, T_, B, I, H, P, projects, heads] = args.shape;
  const Tensor &x = args.x, wide = wide_like(x);
  const int64_t cell_size = args.shape.cell_size();
  const std::vector<Stretch> list = stretches(args, keep_every);
  const int64_t count = static_cast<int64_t>(list.size());
  const bool keeps_c = return_states && cell.has_cell;
  ScanKept kept{
      {fresh({T_, B, P}, x), {}, {}, keeps_c ? fresh({T_, B, cell_size}, wide) : Tensor(), {}},
      fresh({count, B, P}, x),
      cell.has_cell ? fresh({count, B, cell_size}, wide) : Tensor()};
  fill_slot(kept.h, 0, args.h_0);
  if (cell.has_cell) fill_slot(kept.c, 0, args.c_0);
  for (int64_t i = 0; i < count; ++i) {
    const Stretch& stretch = list[i];
    const ScanRun run =
        run_scan(arguments_of(args, stretch, i, kept.h, kept.c), Keep::kNothing, return_states);
    stretch.of(kept.run.y).copy_(run.y);
    if (keeps_c) stretch.of(kept.run.c_steps).copy_(run.c_steps);
    kept.run.h_n = run.h_n;
    kept.run.c_n = run.c_n;
    if (i + 1 < count) {
      fill_slot(kept.h, i + 1, run.h_n);
      if (cell.has_cell) fill_slot(kept.c, i + 1, run.c_n);
    }
  }
  return kept;
}

ScanGradients run_scan_kept_backward(const ScanArguments& args, int64_t keep_every, const Tensor& h,
                                     const Tensor& c, const ScanIncoming& incoming, bool needs_x) {
  const auto& [cell, T_, B, I, H, P, projects, heads] = args.shape;
  const std::vector<Stretch> list = stretches(args, keep_every);
  const int64_t count = static_cast<int64_t>(list.size());
  const Tensor h_kept = check_saved(h, "h_kept", {count, B, P}, args.x);
  const Tensor c_kept = cell.has_cell ? check_saved(c, "c_kept", {count, B, args.shape.cell_size()},
                                                    wide_like(args.x))
                                      : Tensor();
  const Tensor d_x = needs_x ? fresh({T_, B, I}, args.x) : nothing(args.x);
  std::array<Tensor, 6> weights;  // w_ih, w_hh, b_ih, b_hh, w_hr, w_ch
  std::vector<Tensor> d_extras;
  const auto given = [](const Tensor& tensor) {
    return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
  };
  Tensor d_h = incoming.h_n.value_or(Tensor()), d_c = incoming.c_n.value_or(Tensor());
  for (int64_t i = count - 1; i >= 0; --i) {
    const Stretch& stretch = list[i];
    const ScanArguments part = arguments_of(args, stretch, i, h_kept, c_kept);
    const ScanRun run = run_scan(part, Keep::kAll, /*return_states=*/false);
    const auto [d_own_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_h_0, d_c_0, d_w_ch,
                d_own_extras] = run_scan_backward(part, run.saved,
                                                  {stretch.of(incoming.y), given(d_h), given(d_c),
                                                   stretch.of(incoming.c_steps)},
                                                  needs_x);
    if (needs_x) stretch.of(d_x).copy_(d_own_x);
    const std::array<Tensor, 6> own{d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_w_ch};
    for (size_t w = 0; w < own.size(); ++w) {
      i + 1 == count ? weights[w] = at_least_float(own[w]) : weights[w].add_(own[w]);
    }
    if (d_extras.empty()) {
      d_extras = at_least_float(d_own_extras);
    } else {
      for (size_t extra = 0; extra < d_extras.size(); ++extra) {
        d_extras[extra].add_(d_own_extras[extra]);
      }
    }
    d_h = d_h_0;
    d_c = cell.has_cell ? d_c_0 : Tensor();
  }
  return {d_x,        weights[0], weights[1], weights[2],
          weights[3], weights[4], d_h,        or_nothing(d_c, args.x),
          weights[5], d_extras};
}

}  // namespace pyseq
