// SPDX-License-Identifier: Apache-2.0
// The decoder's backward loop as one launch. The weights are transposed first, so that its products
// are those of the forward loop.
#include "decode_backward.h"

namespace pyseq::cuda {

namespace {

// ---- Kernels ---------------------------------------------------------------------------

// to (columns, rows) = from (rows, columns), whose rows are `stride` apart.
template <class S>
PYSEQ_KERNEL(kPointwiseThreads)
transpose_kernel(const S* from, int64_t stride, int64_t rows, int64_t columns, S* to) {
  each_unit(columns, rows, [&](int64_t column, int64_t row) {
    to[column * rows + row] = from[row * stride + column];
  });
}

// sum of two products for this block's part of `units`, each handed to use.
template <class S, class Use>
PYSEQ_DEVICE void add_two(const DecodePlace& at, const Product<S>& one, const Product<S>& other,
                          int64_t units, const Use& use) {
  for_units<1, S>(
      at, units,
      [&](int64_t unit, int64_t first, int rows, auto& sum) {
        add_product<OneSlot<0>, 1>(one, unit, units, first, rows, sum);
        add_product<OneSlot<0>, 1>(other, unit, units, first, rows, sum);
      },
      [&](int64_t row, int64_t unit, const Accumulate<S>(&sums)[1]) { use(row, unit, sums[0]); });
}

// The states of all layers after step t, or the first ones for t = -1.
template <class S>
PYSEQ_DEVICE void states_back(const DeviceBackward<S>& args, const DecodePlace& at,
                              GroupBarrier& barrier, int64_t t) {
  const int64_t H = args.decode.call.hidden;
  for (int64_t l = args.decode.call.layer_count - 1; l >= 0; --l) {
    const StateTerms<S> terms = args.of_state(l, t);
    for_units<2, S>(
        at, H,
        [&](int64_t unit, int64_t first, int rows, auto& sum) {
          add_product<OneSlot<0>, 1>(terms.above, unit, H, first, rows, sum);
          add_product<OneSlot<0>, 1>(terms.query, unit, H, first, rows, sum);
          add_product<OneSlot<0>, 1>(terms.position, unit, H, first, rows, sum);
          add_product<OneSlot<1>, 1>(terms.after, unit, H, first, rows, sum);
        },
        [&](int64_t row, int64_t unit, const Accumulate<S>(&sums)[2]) {
          state_back(args, terms, l, t, row, unit, sums[0], sums[1]);
        });
    if (t >= 0) meet(barrier);
  }
}

template <class S, class Score>
PYSEQ_KERNEL(kDecodeThreads)
decode_backward_kernel(DeviceBackward<S> args, unsigned* counters) {
  using A = Accumulate<S>;
  GroupBarrier barrier(counters, block_index_y(), grid_size_x());
  const cpu::Decode<S>& decode = args.decode.call;
  const DecodePlace at = DecodePlace::here(decode.batch);
  for (int64_t t = decode.steps - 1; t >= 0; --t) {
    add_two(at, args.of_fed_output(t), {}, decode.hidden,
            [&](int64_t row, int64_t unit, A sum) { output_back(args, t, row, unit, sum); });
    meet(barrier);
    if (decode.attends_first) states_back(args, at, barrier, t);
    add_two(at, args.of_context(t), args.of_fed_context(t), decode.memory_size,
            [&](int64_t row, int64_t unit, A sum) { context_back(args, t, row, unit, sum); });
    meet(barrier);
    attend_rows_back<S, Score>(args, t, at);
    meet(barrier);
    if (!decode.attends_first) states_back(args, at, barrier, t);
  }
  const int64_t F = fed_size(decode);
  add_two(at, args.of_first_fed(), {}, F, [&](int64_t row, int64_t unit, A sum) {
    args.call.d_feed[row * F + unit] = narrow<S>(sum);
  });
  states_back(args, at, barrier, -1);
}

// Takes memory for transposed weights, and fills it unless there is none.
template <class S>
struct Transpose {
  WorkPieces& pieces;
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  const S* operator()(const S* from, int64_t stride, int64_t rows, int64_t columns) {
    if (from == nullptr) return nullptr;
    S* const to = pieces.template take<S>(rows * columns);
    if (to != nullptr && rows * columns > 0 && error == cudaSuccess) {
      error = launch(transpose_kernel<S>, pointwise_grid(rows * columns), stream, from, stride,
                     rows, columns, to);
    }
    return to;
  }

  BackwardWeights<S> weights(const cpu::Decode<S>& call) {
    Transpose& transpose = *this;
    const int64_t H = call.hidden, M = call.memory_size, rows = cell_shape(call.cell).gates * H;
    BackwardWeights<S> all{};
    all.transposed = true;
    for (int64_t l = 0; l < call.layer_count; ++l) {
      const cpu::DecoderLayer<S>& layer = call.layers[l];
      const int64_t below = l == 0 ? call.fed_size() : H;
      all.w_in[l] = transpose(layer.w_in, layer.w_in_stride, rows, below);
      all.w_hh[l] = transpose(layer.w_hh, H, rows, H);
    }
    all.of_context = transpose(call.combine, M + H, H, M);
    all.of_top = transpose(call.combine + M, M + H, H, H);
    all.w_query = transpose(call.w_query, H, call.key_size, H);
    all.w_position = transpose(call.w_position, H, call.position_size, H);
    return all;
  }
};

}  // namespace

// ---- Launchers -------------------------------------------------------------------------

template <class S>
DecodeNeeds decode_backward_needs(const cpu::Decode<S>& args, const DecodeTiles& tiles) {
  WorkPieces count(nullptr);
  take_backward_work(args, int64_t{tiles.tiles} * tiles.groups, count);
  Transpose<S>{count, nullptr}.weights(args);
  return {barrier_bytes(tiles.groups), count.used()};
}

template <class S>
cudaError_t decode_backward_resident(const cpu::Decode<S>& args, int* blocks) {
  return with_score(args.additive, [&](auto score) {
    return resident_blocks(decode_backward_kernel<S, decltype(score)>, kDecodeThreads,
                           decode_shared(args), blocks);
  });
}

template <class S>
cudaError_t decode_backward(const cpu::DecodeBackward<S>& args, const DecodeTiles& tiles,
                            unsigned* counters, void* workspace, cudaStream_t stream) {
  const cpu::Decode<S>& call = args.forward;
  if (call.batch == 0) return cudaSuccess;
  WorkPieces pieces(workspace);
  DeviceBackward<S> all = backward_arguments(
      args, take_backward_work(call, int64_t{tiles.tiles} * tiles.groups, pieces));
  Transpose<S> transpose{pieces, stream};
  all.weights = transpose.weights(call);
  if (transpose.error != cudaSuccess) return transpose.error;
  const Grid grid{tiles.tiles, tiles.groups, tiles.threads, decode_shared(call), true};
  const cudaError_t error = with_score(call.additive, [&](auto score) {
    return launch(decode_backward_kernel<S, decltype(score)>, grid, stream, all, counters);
  });
  return error == cudaSuccess ? source_gradients(args, stream) : error;
}

#define PYSEQ_INSTANTIATE(S)                                                                 \
  template DecodeNeeds decode_backward_needs<S>(const cpu::Decode<S>&, const DecodeTiles&);  \
  template cudaError_t decode_backward_resident<S>(const cpu::Decode<S>&, int*);             \
  template cudaError_t decode_backward<S>(const cpu::DecodeBackward<S>&, const DecodeTiles&, \
                                          unsigned*, void*, cudaStream_t);
PYSEQ_INSTANTIATE(float)
PYSEQ_INSTANTIATE(double)
PYSEQ_INSTANTIATE(Half)
PYSEQ_INSTANTIATE(Bfloat16)
#undef PYSEQ_INSTANTIATE

}  // namespace pyseq::cuda
