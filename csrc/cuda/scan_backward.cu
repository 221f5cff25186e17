// SPDX-License-Identifier: Apache-2.0
// The backward scan in one launch. Blocks own numbers of the state, for some rows of the batch; the
// blocks of the same rows meet after each step, because the gates' gradients go to all of them.
#include "scan_block.h"

namespace pyseq::cuda {

template <class S, class Cell>
PYSEQ_KERNEL(kScanThreads)
scan_backward_kernel(const ScanBackward<S> args, const ScanTiles tiles, unsigned* counters) {
  using A = Accumulate<S>;
  constexpr int G = Cell::kGates;
  const int64_t B = args.batch, H = args.hidden, P = args.state_size;
  const int64_t D = H / args.heads, state = P / args.heads;  // of a head
  const bool projects = args.w_hr != nullptr;
  const BlockPlace place(state, args.heads, B, tiles);
  const Share units = share_of(state, tiles.units, place.index);
  const int64_t first_unit = place.head * state + units.begin;
  const ScanProducts products = backward_products<Cell>(H, P, args.heads, projects, tiles);
  const Share inner = share_of(H, products.second.rows, place.index);  // behind a projection
  GroupBarrier barrier(counters, place.group, place.blocks);

  BlockProduct<S> first{products.first, nullptr, nullptr};
  BlockProduct<S> second{products.second, nullptr, nullptr};
  if constexpr (Cell::kRecurrent) {
    auto* memory = static_cast<unsigned char*>(shared_memory());
    memory = first.place(memory, [&](int row, int gate, int k) {
      if (row >= units.count) return narrow<S>(A(0));
      return args.w_hh[((place.head * G + gate) * D + k) * state + units.begin + row];
    });
    second.place(memory, [&](int row, int, int k) {
      if (projects) {
        return row < inner.count ? args.w_hr[k * H + inner.begin + row] : narrow<S>(A(0));
      }
      return row < units.count ? args.w_hh[((G - 1) * H + k) * state + units.begin + row]
                               : narrow<S>(A(0));
    });
    sync_threads();
  }

  const int64_t end = longest(args, place.rows), row_begin = place.rows.begin;
  const bool has_pair = !projects && thread_index() < units.count * place.rows.count;
  const int own_unit = thread_index() / place.rows.count;
  const int own_row = thread_index() % place.rows.count;
  const auto load = [&](int64_t n, int unit, int row) {
    return load_saved<Cell>(args, backward_step(args, n), row_begin + row, first_unit + unit);
  };
  UnitSaved<S, Cell> next{};
  if (has_pair) next = load(args.steps - 1, own_unit, own_row);

  for (int64_t n = args.steps - 1; n >= -1; --n) {
    const Step step = backward_step(args, n);
    // Whether the step after, and this one, gave the gates any gradient.
    const bool follows =
        Cell::kRecurrent && n + 1 < args.steps && backward_step(args, n + 1).t < end;
    const bool works = n >= 0 && step.t < end;
    if constexpr (Cell::kRecurrent) {
      if (n + 1 < args.steps) barrier.wait();
      if (follows) {
        const int64_t t = backward_step(args, n + 1).t;
        first.multiply(args.d_r_gates + (t * B + row_begin) * G * H + place.head * D, G * H, H,
                       place.rows.count);
      }
    }
    place.each(units.count, [&](int unit, int64_t row, int column) {
      const A sum = follows ? first.sum(unit, column) : A(0);
      if (projects) return project_back(args, step, row, first_unit + unit, sum);
      const bool own = unit == own_unit && column == own_row;
      const UnitSaved<S, Cell> in = own ? next : load(n, unit, column);
      backward_unit<Cell>(args, step, row, first_unit + unit, in, sum);
    });
    if constexpr (Cell::kRecurrent) {
      if (projects) {
        barrier.arrive();
        barrier.wait();
        if (works) {
          second.multiply(args.d_projected + (step.t * B + row_begin) * P, P, 0, place.rows.count);
        }
        place.each(inner.count, [&](int unit, int64_t row, int column) {
          const A sum = works ? second.sum(unit, column) : A(0);
          projected_back<Cell>(args, step, row, inner.begin + unit, sum);
        });
      }
      if constexpr (Cell::kGatesState) {
        barrier.arrive();
        barrier.wait();
        if (works) {
          second.multiply(args.d_r_gates + ((step.t * B + row_begin) * G + G - 1) * H, G * H, 0,
                          place.rows.count);
          place.each(units.count, [&](int unit, int64_t row, int column) {
            gate_back<Cell>(args, step, row, first_unit + unit, second.sum(unit, column));
          });
        }
      }
      barrier.arrive();
    }
    // While the other blocks finish the step.
    if (has_pair && n >= 0) next = load(n - 1, own_unit, own_row);
  }
}

namespace {

struct Backward {
  template <class S>
  using Args = ScanBackward<S>;

  template <class S, class Cell>
  static auto kernel() {
    return &scan_backward_kernel<S, Cell>;
  }
  template <class Cell>
  static ScanProducts products(const ScanSizes& sizes, const ScanTiles& tiles) {
    return backward_products<Cell>(sizes.hidden, sizes.state_size, sizes.heads, sizes.projects,
                                   tiles);
  }
  static int64_t units(const ScanSizes& sizes) { return sizes.state_size; }
};

}  // namespace

template <class S>
ScanNeeds scan_backward_needs(const ScanSizes& sizes, const ScanTiles& tiles) {
  return needs_of<Backward, S>(sizes, tiles);
}

template <class S>
cudaError_t scan_backward_resident(const ScanSizes& sizes, const ScanTiles& tiles, int* blocks) {
  return resident_of<Backward, S>(sizes, tiles, blocks);
}

template <class S>
cudaError_t scan_backward(const ScanBackward<S>& args, const ScanTiles& tiles, unsigned* counters,
                          cudaStream_t stream) {
  return launch_scan<Backward, S>(args, tiles, counters, stream);
}

#define PYSEQ_INSTANTIATE(S)                                                                 \
  template ScanNeeds scan_backward_needs<S>(const ScanSizes&, const ScanTiles&);             \
  template cudaError_t scan_backward_resident<S>(const ScanSizes&, const ScanTiles&, int*);  \
  template cudaError_t scan_backward<S>(const ScanBackward<S>&, const ScanTiles&, unsigned*, \
                                        cudaStream_t);
PYSEQ_INSTANTIATE(float)
PYSEQ_INSTANTIATE(double)
PYSEQ_INSTANTIATE(Half)
PYSEQ_INSTANTIATE(Bfloat16)
#undef PYSEQ_INSTANTIATE

}  // namespace pyseq::cuda
