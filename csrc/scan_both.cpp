// SPDX-License-Identifier: Apache-2.0
#include "scan_both.h"

#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <vector>

#include "cpu/threads.h"
#include "devices.h"
#include "layers.h"
#include "widened.h"

namespace pyseq {

namespace {

constexpr size_t kDirections = 2;
// w_ih, w_hh, b_ih, b_hh, w_hr; w_ch, which may be left out; the extras of a scan, likewise.
constexpr size_t kWeights = 5, kWithPeepholes = 6, kWithExtras = kWithPeepholes + kScanExtras;

// Whether each direction is better off with one thread, and waits for none, than both in turn
// with all of them: if there are two, or if a step is too short to be shared out; but not if all
// steps take no longer than it may take to wake another thread.
bool one_thread_each(int64_t steps, int64_t batch, int64_t weights, int threads) {
  constexpr int64_t kShortStep = 1 << 19, kShortCall = 1 << 17;  // multiply-adds
  if (threads < 2 || cpu::has_lost_threads()) return false;
  if (steps * batch * weights <= kShortCall) return false;
  return threads == 2 || batch * weights <= kShortStep;
}

// A stream of `device` beside `own`, the same one again: the allocator keeps memory by stream.
c10::Stream stream_beside(const c10::impl::VirtualGuardImpl& streams, c10::Device device,
                          c10::Stream own) {
  thread_local std::map<c10::DeviceIndex, c10::Stream> kept;
  auto& beside = kept.try_emplace(device.index(), own).first->second;
  // At first, and where the caller has taken the very same one from the pool.
  while (beside == own) beside = streams.getStreamFromGlobalPool(device);
  return beside;
}

// Calls run(0) for the caller's stream of `device` and run(1) for `other` beside it; what the
// caller's stream does next waits for both. Nothing waits on the host, so that a graph may hold it.
template <class Run>
void side_by_side(c10::Device device, c10::Stream own, c10::Stream other, const Run& run) {
  const LoopsAtOnce shared(kDirections);
  c10::Event ready(device.type()), done(device.type());
  ready.record(own);
  ready.block(other);
  const auto join = [&] {
    done.record(other);
    done.block(own);
  };
  try {
    {
      const c10::StreamGuard guard(other);
      run(1);
    }
    run(0);
  } catch (...) {
    join();  // before anyone frees what the other stream still reads
    throw;
  }
  join();
}

// The operator's arguments, by direction.
struct BothDirections {
  const Tensor& x;
  const c10::List<OptionalTensor>& weights;
  const OptionalTensor &h_0, &c_0, &lengths, &resets;
  std::string_view cell;
  size_t each = weights.size() / kDirections;  // weights of a direction
  ScanResult results[kDirections] = {};

  void check() const {
    TORCH_CHECK(
        weights.size() % kDirections == 0 &&
            (each == kWeights || each == kWithPeepholes || each == kWithExtras),
        "weights must hold w_ih, w_hh, b_ih, b_hh, w_hr, w_ch of each direction, and behind them "
        "the ",
        static_cast<int64_t>(kScanExtras), " extras of a scan or none, got ", weights.size(),
        " tensors");
    check_dim(x, "x", 3, "(T, B, I)");
    for (const auto& [state, name] : {std::pair{&h_0, "h_0"}, std::pair{&c_0, "c_0"}}) {
      if (!state->has_value()) continue;
      TORCH_CHECK((*state)->dim() == 3 && (*state)->size(0) == static_cast<int64_t>(kDirections),
                  name, " must be (2, B, .), got ", shape_text((*state)->sizes()));
    }
  }

  // Those of one direction.
  struct Inputs {
    Tensor x;
    std::vector<OptionalTensor> weights;
    OptionalTensor h_0, c_0;

    OptionalTensor weight(size_t i) const { return i < weights.size() ? weights[i] : std::nullopt; }

    template <class F>
    void each_tensor(const F& f) {
      f(x);
      for (OptionalTensor* tensor : {&h_0, &c_0}) {
        if (tensor->has_value()) f(**tensor);
      }
      for (OptionalTensor& tensor : weights) {
        if (tensor.has_value()) f(*tensor);
      }
    }
  };

  Inputs inputs(int64_t direction) const {
    const auto state = [&](const OptionalTensor& both) {
      return both.has_value() ? OptionalTensor(both->select(0, direction)) : std::nullopt;
    };
    Inputs own{x, {}, state(h_0), state(c_0)};
    for (size_t i = 0; i < each; ++i) {
      own.weights.push_back(weights.get(static_cast<size_t>(direction) * each + i));
    }
    return own;
  }

  void run(OneScan scan, int64_t direction, const Inputs& own) {
    const auto w = [&](size_t i) { return own.weight(i); };
    const OptionalTensor w_ih = w(0), w_hh = w(1);
    TORCH_CHECK(w_ih.has_value() && w_hh.has_value(), "w_ih and w_hh must be given");
    results[direction] = scan(own.x, *w_ih, *w_hh, w(2), w(3), w(4), own.h_0, own.c_0, lengths,
                              resets, cell, /*reverse=*/direction == 1, /*keep_every=*/1,
                              /*return_states=*/false, w(5), w(6), w(7), w(8), w(9), w(10), w(11),
                              w(12), w(13), w(14));
  }

  void run_in_turn(OneScan scan) {
    for (int64_t direction = 0; direction < int64_t{kDirections}; ++direction) {
      run(scan, direction, inputs(direction));
    }
  }

  void run_side_by_side(OneScan scan, bool recorded) {
    const c10::Device device = x.device();
    const c10::impl::VirtualGuardImpl streams(device.type());
    const c10::Stream own = streams.getStream(device), other = stream_beside(streams, device, own);
    const Inputs first = inputs(0);
    Inputs second = inputs(1);
    if (recorded) {
      // So that gradients are handed over to the caller's stream before they are added up there.
      second.each_tensor([](Tensor& tensor) {
        if (tensor.requires_grad()) tensor = tensor.view_as(tensor);
      });
    }
    side_by_side(device, own, other,
                 [&](int64_t direction) { run(scan, direction, direction == 0 ? first : second); });
    if (recorded) {
      // Backward reads them on the other stream, and nobody joins it before they are freed.
      const auto keep = [&](const Tensor& tensor) { tensor.record_stream(other); };
      second.each_tensor(keep);
      for (const OptionalTensor* tensor : {&lengths, &resets}) {
        if (tensor->has_value()) keep(**tensor);
      }
    }
    // These belong to the other stream, and the caller's goes on to read them.
    std::apply([&](const auto&... result) { (result.record_stream(own), ...); }, results[1]);
  }

  std::tuple<Tensor, Tensor, Tensor> joined() const {
    const auto& [y, h_n, c_n, c_steps] = results[0];
    const auto& [y_reverse, h_n_reverse, c_n_reverse, c_steps_reverse] = results[1];
    return {at::cat({y, y_reverse}, 2), at::stack({h_n, h_n_reverse}),
            c_n.dim() > 1 ? at::stack({c_n, c_n_reverse}) : nothing(x)};
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> scan_both(const Tensor& x,
                                             const c10::List<OptionalTensor>& weights,
                                             const OptionalTensor& h_0, const OptionalTensor& c_0,
                                             const OptionalTensor& lengths,
                                             const OptionalTensor& resets, std::string_view cell) {
  BothDirections both{x, weights, h_0, c_0, lengths, resets, cell};
  both.check();
  const OptionalTensor w_hh = weights.get(1);
  if (!x.is_cpu()) {
    both.run_side_by_side(&scan, /*recorded=*/false);
  } else if (one_thread_each(x.size(0), x.size(1), w_hh.has_value() ? w_hh->numel() : 0,
                             thread_count())) {
    const at::ThreadLocalState caller;
    cpu::leads_others();
    at::parallel_for(0, int64_t{kDirections}, 1, [&](int64_t begin, int64_t end) {
      const at::ThreadLocalStateGuard as_the_caller(caller);
      for (int64_t direction = begin; direction < end; ++direction) {
        both.run(&scan, direction, both.inputs(direction));
      }
    });
  } else {
    both.run_in_turn(&scan);
  }
  return both.joined();
}

std::tuple<Tensor, Tensor, Tensor> scan_both_recorded(
    OneScan scan, const Tensor& x, const c10::List<OptionalTensor>& weights,
    const OptionalTensor& h_0, const OptionalTensor& c_0, const OptionalTensor& lengths,
    const OptionalTensor& resets, std::string_view cell) {
  BothDirections both{x, weights, h_0, c_0, lengths, resets, cell};
  both.check();
  // Under a transform of torch.func, and where tensors have no numbers, as under torch.compile,
  // there are no streams.
  if (x.is_cuda() && !is_transformed() && !at::isTensorSubclassLike(x)) {
    both.run_side_by_side(scan, /*recorded=*/true);
  } else {
    both.run_in_turn(scan);
  }
  return both.joined();
}

}  // namespace pyseq
