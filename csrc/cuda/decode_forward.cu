// SPDX-License-Identifier: Apache-2.0
// The decoder's forward loop as one launch; cpu/decode_forward.h is the same loop on the CPU.
#include "decode_step.h"

namespace pyseq::cuda {

template <class S>
struct ForwardWork {
  S* below;                  // (2, B, H): a layer's output times its dropout mask, in turns
  Accumulate<S>* positions;  // see decode_positions
};

namespace {

// What a step reads and writes.
template <class S>
struct ForwardStep {
  int64_t t, slot;
  int64_t before, after;  // in elements: where the states lie in those of a layer
  const S* fed;           // null without feeding
  S* output;
  S* attn;
};

// ---- Kernels ---------------------------------------------------------------------------

template <class S, class Cell>
PYSEQ_DEVICE void cell_step(const cpu::Decode<S>& call, const cpu::DecoderLayer<S>& layer,
                            bool first, const ForwardStep<S>& step, S* masked_to, int64_t row,
                            int64_t unit, const Accumulate<S> (&sums)[Cell::kPre]) {
  using A = Accumulate<S>;
  constexpr int G = Cell::kGates;
  const int64_t H = call.hidden, B = call.batch, offset = row * H + unit, t = step.t;
  S* const gates = layer.gates + ((first || call.save ? t : 0) * B + row) * G * H + unit;
  A pre[Cell::kPre];
  PYSEQ_UNROLL
  for (int g = 0; g < Cell::kPre; ++g) {
    pre[g] = sums[g];
    if (g < G) pre[g] += widen(first ? gates[g * H] : layer.bias[g * H + unit]);
  }
  if constexpr (Cell::kPre > G) {
    if (layer.apart_bias != nullptr) pre[G] += widen(layer.apart_bias[unit]);
  }
  A h = widen(layer.states[step.before + offset]);
  A c[1] = {};
  if constexpr (Cell::kStates > 0) c[0] = layer.cells[step.before + offset];
  Cell::template forward<Math<A>>(pre, static_cast<const A*>(nullptr), h, c);
  if constexpr (Cell::kStates > 0) layer.cells[step.after + offset] = c[0];
  if (call.save) {
    PYSEQ_UNROLL
    for (int g = 0; g < G; ++g) gates[g * H] = narrow<S>(pre[g]);
    if constexpr (Cell::kPre > G) {
      if (layer.apart != nullptr) layer.apart[t * B * H + offset] = narrow<S>(pre[G]);
    }
  }
  layer.states[step.after + offset] = narrow<S>(h);
  if (masked_to != nullptr) {
    masked_to[offset] = narrow<S>(h * widen(layer.mask[t * B * H + offset]));
  }
}

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
    barrier.arrive();
    barrier.wait();
    below = masked ? masked_to : layer.states + step.after;
  }
  return below;
}

// p = S sigmoid(v . tanh(W h)), of which the tanh is there; the same in every thread.
template <class S>
PYSEQ_DEVICE Accumulate<S> predicted_center(const cpu::Decode<S>& call, int64_t slot, int64_t row) {
  using A = Accumulate<S>;
  const S* const tanh = call.positions + (slot * call.batch + row) * call.position_size;
  A share = 0;
  for (int64_t p = thread_index(); p < call.position_size; p += thread_count()) {
    share = Math<A>::multiply_add(widen(load_shared_by_blocks(tanh + p)), widen(call.position_v[p]),
                                  share);
  }
  share = block_sum(share, static_cast<A*>(shared_memory()));
  sync_threads();
  return A(valid_positions(call.lengths, row, call.source)) * Math<A>::sigmoid(share);
}

// The attention of one step by `state`, (B, H), which leaves the context.
template <class S, class Score>
PYSEQ_DEVICE void attend_step(const cpu::Decode<S>& call, const ForwardWork<S>& work,
                              const ForwardStep<S>& step, const DecodePlace& at,
                              GroupBarrier& barrier, const S* state) {
  using A = Accumulate<S>;
  const int64_t B = call.batch, H = call.hidden, N = call.heads, S_ = call.source,
                M = call.memory_size;
  const auto project = [&](const S* weights, int64_t size, const auto& use) {
    const Product<S> product{state, H, weights, H, H};
    for_units<1, S>(
        at, size,
        [&](int64_t unit, int64_t first, int rows, auto& sum) {
          add_product<OneSlot<0>, 1>(product, unit, size, first, rows, sum);
        },
        use);
  };
  const S* queries = state;
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
    queries = to;
  }
  if (call.w_position != nullptr || call.w_query != nullptr) {
    barrier.arrive();
    barrier.wait();
  }
  const A* past = nullptr;
  A* past_after = nullptr;
  if (call.taps > 0) {
    past = call.past + (call.save ? step.t : step.t & 1) * B * N * S_;
    past_after = call.past + (call.save ? step.t + 1 : (step.t + 1) & 1) * B * N * S_;
  }
  S* const context = call.context + step.slot * B * M;
  for_attention_rows(call, at, [&](int64_t row, int64_t head, int64_t end) {
    A center = given_center(call, step.t, row);
    if (call.w_position != nullptr) {
      center = predicted_center(call, step.slot, row);
      if (thread_index() == 0) call.centers[step.slot * B + row] = center;
    }
    for (; head < end; ++head) {
      const int64_t own = row * N + head;
      S* const attn = step.attn + own * S_;
      attend_row<S, Score>(decoder_row(call, own, center, queries, past, work.positions), attn,
                           context + own * (M / N));
      if (call.taps == 0) continue;
      for (int64_t s = thread_index(); s < S_; s += thread_count()) {
        const A sum = call.cumulative ? past[own * S_ + s] : A(0);
        past_after[own * S_ + s] = sum + widen(attn[s]);
      }
      sync_threads();
    }
  });
  barrier.arrive();
  barrier.wait();
}

// Luong's combination of the context and the top state.
template <class S>
PYSEQ_DEVICE void combine_step(const cpu::Decode<S>& call, const ForwardStep<S>& step,
                               const DecodePlace& at, GroupBarrier& barrier, const S* top) {
  using A = Accumulate<S>;
  const int64_t B = call.batch, H = call.hidden, M = call.memory_size;
  const Product<S> of_context{call.context + step.slot * B * M, M, call.combine, M + H, M};
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
  barrier.arrive();
  barrier.wait();
}

template <class S, class Cell, class Score>
PYSEQ_KERNEL(kDecodeThreads)
decode_forward_kernel(DeviceDecode<S> args, unsigned* counters, ForwardWork<S> work) {
  const cpu::Decode<S>& call = args.call;
  const int64_t B = call.batch, H = call.hidden, L = call.layer_count, M = call.memory_size;
  const DecodePlace at = DecodePlace::here(B);
  GroupBarrier barrier(counters, block_index_y(), grid_size_x());
  for (int64_t t = 0; t < call.steps; ++t) {
    const int64_t slot = call.save ? t : 0;
    S* const output = call.output + t * B * H;
    const S* const context = call.context + slot * B * M;
    const S* const fed = t == 0               ? call.feed
                         : call.feeds_context ? (call.save ? context - B * M : context)
                                              : output - B * H;
    ForwardStep<S> step{t,
                        slot,
                        (call.save ? t : t & 1) * B * H,
                        (call.save ? t + 1 : (t + 1) & 1) * B * H,
                        call.feeding ? fed : nullptr,
                        output,
                        call.attn + t * call.attn_step};
    if (call.attends_first) {
      attend_step<S, Score>(call, work, step, at, barrier, args.layers[L - 1].states + step.before);
      step.fed = context;
    }
    const S* const top = step_cells<S, Cell>(args, work, step, at, barrier);
    if (!call.attends_first) attend_step<S, Score>(call, work, step, at, barrier, top);
    combine_step(call, step, at, barrier, top);
  }
}

template <class S>
int64_t below_numbers(const cpu::Decode<S>& args) {
  return 2 * args.batch * args.hidden;
}

}  // namespace

// ---- Launchers -------------------------------------------------------------------------

template <class S>
DecodeNeeds decode_forward_needs(const cpu::Decode<S>& args, const DecodeTiles& tiles) {
  return {barrier_bytes(tiles.groups), (below_numbers(args) + decode_positions(args, tiles)) *
                                           static_cast<int64_t>(sizeof(Accumulate<S>))};
}

template <class S>
cudaError_t decode_forward_resident(const cpu::Decode<S>& args, int* blocks) {
  return with_cell_and_score(args.cell, args.additive, [&](auto cell, auto score) {
    return resident_blocks(decode_forward_kernel<S, decltype(cell), decltype(score)>,
                           kDecodeThreads, decode_shared(args), blocks);
  });
}

template <class S>
cudaError_t decode_forward(const cpu::Decode<S>& args, const DecodeTiles& tiles, unsigned* counters,
                           void* workspace, cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  const Grid grid{tiles.tiles, tiles.groups, tiles.threads, decode_shared(args), true};
  auto* const positions = static_cast<Accumulate<S>*>(workspace);
  const ForwardWork<S> work{reinterpret_cast<S*>(positions + decode_positions(args, tiles)),
                            positions};
  return with_cell_and_score(args.cell, args.additive, [&](auto cell, auto score) {
    return launch(decode_forward_kernel<S, decltype(cell), decltype(score)>, grid, stream,
                  with_layers(args), counters, work);
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
