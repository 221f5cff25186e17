// SPDX-License-Identifier: Apache-2.0
// The decoder's forward loop as one launch.
#include "decode_forward.h"

namespace pyseq::cuda {

template <class S>
struct ForwardWork {
  S* below;                  // (2, B, H): a layer's output times its dropout mask, in turns
  Accumulate<S>* positions;  // see decode_positions
};

namespace {

// ---- Kernels ---------------------------------------------------------------------------

// The stacked cells of one step. Returns the state of the top layer.
template <class S, class Cell>
PYSEQ_DEVICE const S* step_cells(const DeviceDecode<S>& args, const ForwardWork<S>& work,
                                 const ForwardStep<S>& step, const DecodePlace& at,
                                 GroupBarrier& barrier) {
  constexpr int G = Cell::kGates;
  const cpu::Decode<S>& call = args.call;
  const int64_t B = call.batch, H = call.hidden, L = call.layer_count;
  const S* below = step.fed;
  for (int64_t l = 0; l < L; ++l) {
    const cpu::DecoderLayer<S>& layer = args.layers[l];
    const int64_t width = l == 0 ? fed_size(call) : H;
    const Product<S> from_below{below, width, layer.w_in, layer.w_in_stride, width};
    const Product<S> from_state{layer.states + step.before, H, layer.w_hh, H, H};
    const bool masked = layer.mask != nullptr && l + 1 < L;
    S* const masked_to = masked ? work.below + (l & 1) * B * H : nullptr;
    for_units<Cell::kPre, S>(
        at, H,
        [&](int64_t unit, int64_t first, int rows, auto& sum) {
          add_product<InputSlots, G>(from_below, unit, H, first, rows, sum);
          add_product<RecurrentSlots<Cell>, G>(from_state, unit, H, first, rows, sum);
        },
        [&](int64_t row, int64_t unit, const auto& sums) {
          cell_step<S, Cell>(call, layer, l == 0, step, masked_to, row, unit, sums);
        });
    meet(barrier);
    below = masked ? masked_to : layer.states + step.after;
  }
  return below;
}

// The attention of one step by `state`, (B, H), which leaves the context.
template <class S, class Score>
PYSEQ_DEVICE void attend_step(const cpu::Decode<S>& call, const ForwardWork<S>& work,
                              const ForwardStep<S>& step, const DecodePlace& at,
                              GroupBarrier& barrier, const S* state) {
  using A = Accumulate<S>;
  const int64_t B = call.batch, H = call.hidden;
  const auto project = [&](const S* weights, int64_t size, const auto& use) {
    const Product<S> product{state, H, weights, H, H};
    for_units<1, S>(
        at, size,
        [&](int64_t unit, int64_t first, int rows, auto& sum) {
          add_product<OneSlot<0>, 1>(product, unit, size, first, rows, sum);
        },
        use);
  };
  if (call.w_position != nullptr) {
    S* const to = call.positions + step.slot * B * call.position_size;
    project(call.w_position, call.position_size, [&](int64_t row, int64_t unit, const A(&sums)[1]) {
      to[row * call.position_size + unit] = narrow<S>(Math<A>::tanh(sums[0]));
    });
  }
  if (call.w_query != nullptr) {
    S* const to = call.query + step.slot * B * call.key_size;
    project(call.w_query, call.key_size, [&](int64_t row, int64_t unit, const A(&sums)[1]) {
      to[row * call.key_size + unit] = narrow<S>(sums[0]);
    });
  }
  if (call.w_position != nullptr || call.w_query != nullptr) meet(barrier);
  attend_rows<S, Score>(call, step, at, step_queries(call, step, state), work.positions);
  meet(barrier);
}

// Luong's combination of the context and the top state.
template <class S>
PYSEQ_DEVICE void combine_step(const cpu::Decode<S>& call, const ForwardStep<S>& step,
                               const DecodePlace& at, GroupBarrier& barrier, const S* top) {
  using A = Accumulate<S>;
  const int64_t H = call.hidden, M = call.memory_size;
  const Product<S> of_context{step.context, M, call.combine, M + H, M};
  const Product<S> of_top{top, H, call.combine + M, M + H, H};
  for_units<1, S>(
      at, H,
      [&](int64_t unit, int64_t first, int rows, auto& sum) {
        add_product<OneSlot<0>, 1>(of_top, unit, H, first, rows, sum);
        add_product<OneSlot<0>, 1>(of_context, unit, H, first, rows, sum);
      },
      [&](int64_t row, int64_t unit, const A(&sums)[1]) {
        step.output[row * H + unit] = narrow<S>(Math<A>::tanh(sums[0]));
      });
  meet(barrier);
}

template <class S, class Cell, class Score>
PYSEQ_KERNEL(kDecodeThreads)
decode_forward_kernel(DeviceDecode<S> args, unsigned* counters, ForwardWork<S> work) {
  const cpu::Decode<S>& call = args.call;
  const DecodePlace at = DecodePlace::here(call.batch);
  GroupBarrier barrier(counters, block_index_y(), grid_size_x());
  for (int64_t t = 0; t < call.steps; ++t) {
    const ForwardStep<S> step = forward_step(call, t);
    if (call.attends_first) {
      const S* const asking = args.layers[call.layer_count - 1].states + step.before;
      attend_step<S, Score>(call, work, step, at, barrier, asking);
    }
    const S* const top = step_cells<S, Cell>(args, work, step, at, barrier);
    if (!call.attends_first) attend_step<S, Score>(call, work, step, at, barrier, top);
    combine_step(call, step, at, barrier, top);
  }
}

template <class S>
ForwardWork<S> take_work(const cpu::Decode<S>& args, const DecodeTiles& tiles, WorkPieces& pieces) {
  ForwardWork<S> work{};
  work.below = pieces.take<S>(2 * args.batch * args.hidden);
  work.positions =
      pieces.take<Accumulate<S>>(decode_positions(args, int64_t{tiles.tiles} * tiles.groups));
  return work;
}

// Calls body with the kernel for the call.
template <class S, class Body>
cudaError_t with_forward_kernel(const cpu::Decode<S>& args, const Body& body) {
  return with_cell(args.cell, [&](auto cell) {
    return with_score(args.additive, [&](auto score) {
      return body(&decode_forward_kernel<S, decltype(cell), decltype(score)>);
    });
  });
}

}  // namespace

// ---- Launchers -------------------------------------------------------------------------

template <class S>
DecodeNeeds decode_forward_needs(const cpu::Decode<S>& args, const DecodeTiles& tiles) {
  WorkPieces count(nullptr);
  take_work(args, tiles, count);
  return {barrier_bytes(tiles.groups), count.used()};
}

template <class S>
cudaError_t decode_forward_resident(const cpu::Decode<S>& args, int* blocks) {
  return with_forward_kernel(args, [&](auto kernel) {
    return resident_blocks(kernel, kDecodeThreads, decode_shared(args), blocks);
  });
}

template <class S>
cudaError_t decode_forward(const cpu::Decode<S>& args, const DecodeTiles& tiles, unsigned* counters,
                           void* workspace, cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  WorkPieces pieces(workspace);
  const Grid grid{tiles.tiles, tiles.groups, tiles.threads, decode_shared(args), true};
  return with_forward_kernel(args, [&](auto kernel) {
    return launch(kernel, grid, stream, with_layers(args), counters,
                  take_work(args, tiles, pieces));
  });
}

#define PYSEQ_INSTANTIATE(S)                                                                   \
  template DecodeNeeds decode_forward_needs<S>(const cpu::Decode<S>&, const DecodeTiles&);     \
  template cudaError_t decode_forward_resident<S>(const cpu::Decode<S>&, int*);                \
  template cudaError_t decode_forward<S>(const cpu::Decode<S>&, const DecodeTiles&, unsigned*, \
                                         void*, cudaStream_t);
PYSEQ_INSTANTIATE(float)
PYSEQ_INSTANTIATE(double)
PYSEQ_INSTANTIATE(Half)
PYSEQ_INSTANTIATE(Bfloat16)
#undef PYSEQ_INSTANTIATE

}  // namespace pyseq::cuda
