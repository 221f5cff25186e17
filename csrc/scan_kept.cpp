// SPDX-License-Identifier: Apache-2.0
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <array>

#include "scan.h"

namespace pyseq {

namespace {

// A stretch of steps between two kept states.
struct Stretch {
  int64_t begin;  // the first of its time steps
  int64_t steps;

  Tensor of(const Tensor& tensor) const { return tensor.narrow(0, begin, steps); }
  OptionalTensor of(const OptionalTensor& tensor) const {
    return tensor.has_value() ? OptionalTensor(of(*tensor)) : std::nullopt;
  }
  OptionalTensor lengths(const OptionalTensor& all) const {
    return all.has_value() ? OptionalTensor((*all - begin).clamp(0, steps)) : std::nullopt;
  }
  ScanExtraList extras(const ScanExtraList& all) const {
    if (!all.has_value()) return std::nullopt;
    c10::List<OptionalTensor> own = all->copy();
    for (const size_t extra : {kZoneoutH, kZoneoutC}) {
      if (extra >= own.size()) break;
      const OptionalTensor share = own.get(extra);
      if (share.has_value() && share->size(0) > 1) own.set(extra, of(*share));
    }
    return own;
  }
};

// In the order of processing.
std::vector<Stretch> stretches(int64_t steps, int64_t keep_every, bool reverse) {
  std::vector<Stretch> list;
  for (int64_t n = 0; n < steps; n += keep_every) {
    const int64_t count = std::min(keep_every, steps - n);
    list.push_back({reverse ? steps - n - count : n, count});
  }
  return list;
}

}  // namespace

ScanKept scan_kept_forward(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                           const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                           const OptionalTensor& w_hr, const OptionalTensor& h_0,
                           const OptionalTensor& c_0, const OptionalTensor& lengths_in,
                           const OptionalTensor& resets, std::string_view name, bool reverse,
                           int64_t keep_every, bool return_states, const OptionalTensor& w_ch,
                           const ScanExtraList& extras) {
  const ScanShape shape = check_scan(x, w_ih, w_hh, b_ih, b_hh, w_hr, h_0, c_0, resets, name, w_ch);
  const auto& [cell, T_, B, I, H, P, projects, heads] = shape;
  check_extras(extras, shape, x, name);
  TORCH_CHECK_VALUE(keep_every > 0, "keep_every must be at least 1, got ", keep_every);
  const OptionalTensor lengths = check_lengths(lengths_in, B, T_, "T");
  const std::vector<Stretch> list = stretches(T_, keep_every, reverse);
  const int64_t count = static_cast<int64_t>(list.size());
  const Tensor y = fresh({T_, B, P}, x);
  const Tensor h_kept = fresh({count, B, P}, x);
  const Tensor c_kept = cell.has_cell ? fresh({count, B, cell.states * H}, x) : nothing(x);
  const bool keeps_c = return_states && cell.has_cell;
  const Tensor c_steps = keeps_c ? fresh({T_, B, cell.states * H}, x) : nothing(x);
  const auto first = [&](const Tensor& kept, const OptionalTensor& given) {
    given.has_value() ? kept.select(0, 0).copy_(*given) : kept.select(0, 0).zero_();
  };
  first(h_kept, h_0);
  if (cell.has_cell) first(c_kept, c_0);
  Tensor h_n, c_n;
  for (int64_t i = 0; i < count; ++i) {
    const Stretch& stretch = list[i];
    const OptionalTensor c = cell.has_cell ? OptionalTensor(c_kept.select(0, i)) : std::nullopt;
    const ScanSaved run = run_scan(stretch.of(x), w_ih, w_hh, b_ih, b_hh, w_hr, h_kept.select(0, i),
                                   c, stretch.lengths(lengths), stretch.of(resets), name, reverse,
                                   /*save=*/false, return_states, w_ch, stretch.extras(extras));
    stretch.of(y).copy_(std::get<0>(run));
    if (keeps_c) stretch.of(c_steps).copy_(std::get<8>(run));
    h_n = std::get<1>(run);
    c_n = std::get<2>(run);
    if (i + 1 < count) {
      h_kept.select(0, i + 1).copy_(h_n);
      if (cell.has_cell) c_kept.select(0, i + 1).copy_(c_n);
    }
  }
  return {y, h_n, c_n, h_kept, c_kept, c_steps};
}

ScanGradients scan_kept_backward(const OptionalTensor& d_y, const OptionalTensor& d_h_n,
                                 const OptionalTensor& d_c_n, const Tensor& x, const Tensor& w_ih,
                                 const Tensor& w_hh, const OptionalTensor& b_ih,
                                 const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                                 const OptionalTensor& lengths_in, const OptionalTensor& resets,
                                 const Tensor& h_kept, const Tensor& c_kept, std::string_view name,
                                 bool reverse, int64_t keep_every, bool needs_x,
                                 const OptionalTensor& d_c_steps, const OptionalTensor& w_ch,
                                 const ScanExtraList& extras) {
  const ScanShape shape =
      check_scan(x, w_ih, w_hh, b_ih, b_hh, w_hr, d_h_n, d_c_n, resets, name, w_ch);
  const auto& [cell, T_, B, I, H, P, projects, heads] = shape;
  check_extras(extras, shape, x, name);
  TORCH_CHECK_VALUE(keep_every > 0, "keep_every must be at least 1, got ", keep_every);
  const OptionalTensor lengths = check_lengths(lengths_in, B, T_, "T");
  check_tensor(d_y, "d_y", "(T, B, P)", {T_, B, P}, x, "x");
  const int64_t cell_size = cell.states * H;
  check_tensor(d_c_steps, "d_c_steps", "(T, B, H)", {T_, B, cell_size}, x, "x");
  const std::vector<Stretch> list = stretches(T_, keep_every, reverse);
  const int64_t count = static_cast<int64_t>(list.size());
  check_saved(h_kept, "h_kept", {count, B, P}, x);
  if (cell.has_cell) check_saved(c_kept, "c_kept", {count, B, cell_size}, x);
  const Tensor d_x = needs_x ? fresh({T_, B, I}, x) : nothing(x);
  std::array<Tensor, 6> weights;  // w_ih, w_hh, b_ih, b_hh, w_hr, w_ch
  std::vector<Tensor> d_extras;
  OptionalTensor d_h = d_h_n, d_c = d_c_n;
  for (int64_t i = count - 1; i >= 0; --i) {
    const Stretch& stretch = list[i];
    const OptionalTensor c = cell.has_cell ? OptionalTensor(c_kept.select(0, i)) : std::nullopt;
    const OptionalTensor own_lengths = stretch.lengths(lengths), own_resets = stretch.of(resets);
    const Tensor own_x = stretch.of(x);
    const ScanExtraList own_extras = stretch.extras(extras);
    const auto [y, h_n, c_n, gates, apart, states, cells, inner, c_steps, x_sums, r_sums, c_sums,
                moments] = run_scan(own_x, w_ih, w_hh, b_ih, b_hh, w_hr, h_kept.select(0, i), c,
                                    own_lengths, own_resets, name, reverse, /*save=*/true,
                                    /*return_states=*/false, w_ch, own_extras);
    const auto [d_own_x, d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_h_0, d_c_0, d_w_ch,
                d_own_extras] =
        scan_backward(stretch.of(d_y), d_h, d_c, own_x, w_ih, w_hh, w_hr, own_lengths, own_resets,
                      gates, apart, states, cells, inner, name, reverse, needs_x,
                      stretch.of(d_c_steps), w_ch, own_extras, x_sums, r_sums, c_sums, moments);
    if (needs_x) stretch.of(d_x).copy_(d_own_x);
    const std::array<Tensor, 6> own{d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_w_hr, d_w_ch};
    for (size_t w = 0; w < own.size(); ++w) {
      i + 1 == count ? weights[w] = own[w] : weights[w].add_(own[w]);
    }
    if (d_extras.empty()) {
      d_extras = d_own_extras;
    } else {
      for (size_t extra = 0; extra < d_extras.size(); ++extra) {
        d_extras[extra].add_(d_own_extras[extra]);
      }
    }
    d_h = d_h_0;
    d_c = cell.has_cell ? OptionalTensor(d_c_0) : std::nullopt;
  }
  return {d_x,        weights[0], weights[1], weights[2],
          weights[3], weights[4], *d_h,       cell.has_cell ? *d_c : nothing(x),
          weights[5], d_extras};
}

}  // namespace pyseq
