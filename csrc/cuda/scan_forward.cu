// SPDX-License-Identifier: Apache-2.0
// The forward scan in one launch. Blocks own units with all their gates, for some rows of the
// batch; the blocks of the same rows meet after each step, because h goes to all of them.
#include "scan_block.h"

namespace pyseq::cuda {

template <class S, class Cell>
PYSEQ_KERNEL(kScanThreads)
scan_forward_kernel(const ScanForward<S> args, const ScanTiles tiles, unsigned* counters) {
  using A = Accumulate<S>;
  constexpr int G = Cell::kGates;
  constexpr int kFirst = Cell::kGatesState ? G - 1 : G;  // gates of the first product
  const int64_t B = args.batch, H = args.hidden, P = args.state_size;
  const int64_t D = H / args.heads;  // units of a head
  const bool projects = args.w_hr != nullptr;
  const BlockPlace place(D, args.heads, B, tiles);
  const Share units = share_of(D, tiles.units, place.index);
  const int64_t first_unit = place.head * D + units.begin;
  const ScanProducts products = forward_products<Cell>(H, P, args.heads, projects, tiles);
  const Share outputs = share_of(P, products.second.rows, place.index);  // of a projection
  GroupBarrier barrier(counters, place.group, place.blocks);

  BlockProduct<S> first{products.first, nullptr, nullptr};
  BlockProduct<S> second{products.second, nullptr, nullptr};
  if constexpr (Cell::kRecurrent) {
    const int64_t columns = P / args.heads;
    auto* memory = static_cast<unsigned char*>(shared_memory());
    memory = first.place(memory, [&](int row, int, int k) {
      const int unit = row / kFirst, gate = row % kFirst;
      if (unit >= units.count) return narrow<S>(A(0));
      return args.w_hh[((place.head * G + gate) * D + units.begin + unit) * columns + k];
    });
    second.place(memory, [&](int row, int, int k) {
      if (projects) {
        return row < outputs.count ? args.w_hr[(outputs.begin + row) * H + k] : narrow<S>(A(0));
      }
      return row < units.count ? args.w_hh[((G - 1) * H + units.begin + row) * columns + k]
                               : narrow<S>(A(0));
    });
    sync_threads();
  }

  const int64_t end = longest(args, place.rows);
  const bool has_pair = thread_index() < units.count * place.rows.count;
  const int own_unit = thread_index() / place.rows.count;
  const int own_row = thread_index() % place.rows.count;
  const auto load = [&](int64_t n, int unit, int row) {
    return load_unit<Cell>(args, forward_step(args, n), place.rows.begin + row, first_unit + unit);
  };
  UnitInputs<S, Cell> next{};
  if (has_pair) next = load(0, own_unit, own_row);

  for (int64_t n = 0; n < args.steps; ++n) {
    const Step step = forward_step(args, n);
    const bool works = step.t < end;  // else every row only carries its state on
    const int64_t row_begin = place.rows.begin;
    if constexpr (Cell::kRecurrent) {
      if (n > 0) barrier.wait();
      if (works) {
        const S* const h = args.h_mask == nullptr ? args.states + step.before * B * P
                                                  : args.masked + (n & 1) * B * P;
        first.multiply(h + row_begin * P + place.head * D, P, 0, place.rows.count);
      }
    }
    if constexpr (Cell::kGatesState) {
      place.each(units.count, [&](int unit, int64_t row, int column) {
        const A sum = works ? first.sum(unit * kFirst, column) : A(0);
        gate_unit<Cell>(args, step, row, first_unit + unit, sum);
      });
      barrier.arrive();
      barrier.wait();
      const S* const gated = args.inner + (args.save ? step.t : 0) * B * H;
      if (works) second.multiply(gated + row_begin * H, H, 0, place.rows.count);
    }
    place.each(units.count, [&](int unit, int64_t row, int column) {
      const bool own = unit == own_unit && column == own_row;
      UnitInputs<S, Cell> in = own ? next : load(n, unit, column);
      A sums[G] = {};
      if (Cell::kRecurrent && works) {
        PYSEQ_UNROLL
        for (int g = 0; g < kFirst; ++g) sums[g] = first.sum(unit * kFirst + g, column);
        if constexpr (Cell::kGatesState) sums[G - 1] = second.sum(unit, column);
      }
      forward_unit<Cell>(args, step, row, first_unit + unit, in, sums);
    });
    if constexpr (Cell::kRecurrent) {
      if (projects) {
        barrier.arrive();
        barrier.wait();
        const S* const inner = args.inner + (args.save ? step.t : 0) * B * H;
        if (works) second.multiply(inner + row_begin * H, H, 0, place.rows.count);
        place.each(outputs.count, [&](int unit, int64_t row, int column) {
          const A sum = works ? second.sum(unit, column) : A(0);
          keep_state(args, step, row, outputs.begin + unit, is_active(args, step.t, row), sum);
        });
      }
      barrier.arrive();
    }
    // While the other blocks finish the step.
    if (has_pair && n + 1 < args.steps) next = load(n + 1, own_unit, own_row);
  }
}

namespace {

struct Forward {
  template <class S>
  using Args = ScanForward<S>;

  template <class S, class Cell>
  static auto kernel() {
    return &scan_forward_kernel<S, Cell>;
  }
  template <class Cell>
  static ScanProducts products(const ScanSizes& sizes, const ScanTiles& tiles) {
    return forward_products<Cell>(sizes.hidden, sizes.state_size, sizes.heads, sizes.projects,
                                  tiles);
  }
  static int64_t units(const ScanSizes& sizes) { return sizes.hidden; }
};

}  // namespace

template <class S>
ScanNeeds scan_forward_needs(const ScanSizes& sizes, const ScanTiles& tiles) {
  return needs_of<Forward, S>(sizes, tiles);
}

template <class S>
cudaError_t scan_forward_resident(const ScanSizes& sizes, const ScanTiles& tiles, int* blocks) {
  return resident_of<Forward, S>(sizes, tiles, blocks);
}

template <class S>
cudaError_t scan_forward(const ScanForward<S>& args, const ScanTiles& tiles, unsigned* counters,
                         cudaStream_t stream) {
  return launch_scan<Forward, S>(args, tiles, counters, stream);
}

#define PYSEQ_INSTANTIATE(S)                                                               \
  template ScanNeeds scan_forward_needs<S>(const ScanSizes&, const ScanTiles&);            \
  template cudaError_t scan_forward_resident<S>(const ScanSizes&, const ScanTiles&, int*); \
  template cudaError_t scan_forward<S>(const ScanForward<S>&, const ScanTiles&, unsigned*, \
                                       cudaStream_t);
PYSEQ_INSTANTIATE(float)
PYSEQ_INSTANTIATE(double)
PYSEQ_INSTANTIATE(Half)
PYSEQ_INSTANTIATE(Bfloat16)
#undef PYSEQ_INSTANTIATE

}  // namespace pyseq::cuda
