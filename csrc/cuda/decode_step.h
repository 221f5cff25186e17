// SPDX-License-Identifier: Apache-2.0
// What both directions of the decoder share: its place in the grid, the products of a step, the
// view of a row, the workspace. Weights are read through the caches at every step; a warp makes the
// sums of one unit for some rows, its lanes share out k, in an order that depends on shapes alone.
#pragma once

#include "attention.h"
#include "barrier.h"
#include "decode.h"
#include "launch.h"

namespace pyseq::cuda {

template <class S>
struct DeviceDecode {
  cpu::Decode<S> call;
  cpu::DecoderLayer<S> layers[kMostDecoderLayers];
};

template <class S>
DeviceDecode<S> with_layers(const cpu::Decode<S>& call) {
  DeviceDecode<S> all{call, {}};
  for (int64_t l = 0; l < call.layer_count; ++l) all.layers[l] = call.layers[l];
  all.call.layers = nullptr;  // that was the host's memory
  all.call.heads = call.head_count();
  return all;
}

// As cpu::Decode::fed_size, on the device too.
template <class S>
PYSEQ_INLINE int64_t fed_size(const cpu::Decode<S>& call) {
  return call.feeds_context ? call.memory_size : call.hidden;
}

// Calls body with the type of a decoder's score.
template <class Body>
auto with_score(bool additive, const Body& body) {
  return additive ? body(AdditiveScore{}) : body(DotScore{});
}

struct Span {
  int64_t begin, end;
};

PYSEQ_DEVICE Span share_of(int64_t count, int64_t index, int64_t members) {
  return {count * index / members, count * (index + 1) / members};
}

// A block's place: its rows of the batch, shared with the blocks that it waits for.
struct DecodePlace {
  Span rows;
  int tile, tiles;

  static PYSEQ_DEVICE DecodePlace here(int64_t batch) {
    return {share_of(batch, block_index_y(), grid_size_y()), block_index_x(), grid_size_x()};
  }
  PYSEQ_DEVICE Span part(int64_t count) const { return share_of(count, tile, tiles); }
};

// Rows whose sums a warp makes at a time.
constexpr int kRowsOfWarp = 8;

// sum[Slots::of(g)][r] += the product of gate g of `unit` with row first + r, this lane's part.
template <class Slots, int G, int Sums, class S>
PYSEQ_DEVICE void add_product(const Product<S>& product, int64_t unit, int64_t units, int64_t first,
                              int rows, Accumulate<S> (&sum)[Sums][kRowsOfWarp]) {
  using A = Accumulate<S>;
  if (product.weights == nullptr) return;
  for (int64_t k = thread_index() % kWarp; k < product.count; k += kWarp) {
    A weight[G];
    PYSEQ_UNROLL
    for (int g = 0; g < G; ++g) {
      weight[g] = widen(product.weights[(g * units + unit) * product.weight_stride + k]);
    }
    PYSEQ_UNROLL
    for (int r = 0; r < kRowsOfWarp; ++r) {
      if (r >= rows) continue;
      const A value = widen(load_shared_by_blocks(product.from + (first + r) * product.stride + k));
      PYSEQ_UNROLL
      for (int g = 0; g < G; ++g) {
        A& own = sum[Slots::of(g)][r];
        own = Math<A>::multiply_add(weight[g], value, own);
      }
    }
  }
}

// Where the sums of gates go.
struct InputSlots {
  static PYSEQ_INLINE constexpr int of(int gate) { return gate; }
};
template <class Cell>
struct RecurrentSlots {
  static PYSEQ_INLINE constexpr int of(int gate) { return Cell::recurrent_slot(gate); }
};
template <int Slot>
struct OneSlot {
  static PYSEQ_INLINE constexpr int of(int) { return Slot; }
};

// For this block's part of `units` and all rows of its group: `add(unit, first row, rows, sums)`
// adds products, then use(row, unit, sums) gets the totals. The same thread uses the same row and
// unit at every step.
template <int Sums, class S, class Add, class Use>
PYSEQ_DEVICE void for_units(const DecodePlace& at, int64_t units, const Add& add, const Use& use) {
  using A = Accumulate<S>;
  const Span own = at.part(units);
  const int64_t row_count = at.rows.end - at.rows.begin;
  const int64_t blocks = (row_count + kRowsOfWarp - 1) / kRowsOfWarp;
  const int lane = thread_index() % kWarp;
  for (int64_t i = thread_index() / kWarp; i < (own.end - own.begin) * blocks;
       i += thread_count() / kWarp) {
    const int64_t unit = own.begin + i / blocks;
    const int64_t first = at.rows.begin + i % blocks * kRowsOfWarp;
    const int64_t left = at.rows.end - first;
    const int rows = left < kRowsOfWarp ? static_cast<int>(left) : kRowsOfWarp;
    A sum[Sums][kRowsOfWarp] = {};
    add(unit, first, rows, sum);
    A mine[Sums] = {};
    PYSEQ_UNROLL
    for (int r = 0; r < kRowsOfWarp; ++r) {
      PYSEQ_UNROLL
      for (int s = 0; s < Sums; ++s) {
        const A total = warp_sum(sum[s][r]);
        if (lane == r) mine[s] = total;
      }
    }
    if (lane < rows) use(first + lane, unit, mine);
  }
}

// Hands out pieces of the workspace; without memory it counts bytes.
class WorkPieces {
 public:
  explicit WorkPieces(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <class Number>
  Number* take(int64_t count) {
    unsigned char* const piece = memory_ == nullptr ? nullptr : memory_ + used_;
    constexpr int64_t kAlignment = 128;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Number));
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<Number*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

PYSEQ_DEVICE void meet(GroupBarrier& barrier) {
  barrier.arrive();
  barrier.wait();
}

// How many rows of attention weights a block can hold in shared memory.
constexpr int64_t kSharedPositions = 4096;

template <class S>
int64_t decode_shared(const cpu::Decode<S>& call) {
  const int64_t held = call.source <= kSharedPositions ? call.source : 0;
  return (kDecodeThreads / kWarp + held) * static_cast<int64_t>(sizeof(Accumulate<S>));
}

// Numbers of workspace for the attention weights of so many blocks, if they do not fit.
template <class S>
int64_t decode_positions(const cpu::Decode<S>& call, int64_t blocks) {
  return call.source <= kSharedPositions ? 0 : call.source * blocks;
}

// The attention of `row` of B*N in a step. `center` is that of its window.
template <class S>
PYSEQ_DEVICE AttentionRow<S> decoder_row(const cpu::Decode<S>& call, int64_t row,
                                         Accumulate<S> center, const S* queries,
                                         const Accumulate<S>* past, Accumulate<S>* positions) {
  using A = Accumulate<S>;
  const int64_t N = call.heads, S_ = call.source, A_ = call.key_size / N, M = call.memory_size / N;
  const int64_t valid = valid_positions(call.lengths, row / N, S_);
  A* const scratch = static_cast<A*>(shared_memory());
  const int64_t block = int64_t{block_index_y()} * grid_size_x() + block_index_x();
  return {S_,
          A_,
          M,
          call.window > 0 ? window_view(center, call.window, call.w_position != nullptr, valid)
                          : whole_view<A>(valid),
          queries + row * A_,
          call.keys + row * S_ * A_,
          call.memory + row * S_ * M,
          call.v == nullptr ? nullptr : call.v + row % N * A_,
          call.taps,
          call.w_history == nullptr ? nullptr : call.w_history + row % N * call.taps * A_,
          past == nullptr ? nullptr : past + row * S_,
          S_ <= kSharedPositions ? scratch + thread_count() / kWarp : positions + block * S_,
          scratch};
}

// The centre of a window at step t that no W predicts.
template <class S>
PYSEQ_DEVICE Accumulate<S> given_center(const cpu::Decode<S>& call, int64_t t, int64_t row) {
  return static_cast<Accumulate<S>>(t + (call.first_step == nullptr ? 0 : call.first_step[row]));
}

// Calls body(row of the batch, first head, end of its heads) for the rows of attention that are
// this block's. A block takes all heads of a row where they share a predicted window.
template <class S, class Body>
PYSEQ_DEVICE void for_attention_rows(const cpu::Decode<S>& call, const DecodePlace& at,
                                     const Body& body) {
  const int64_t N = call.heads, together = call.w_position == nullptr ? 1 : N;
  const int64_t each = N / together, count = (at.rows.end - at.rows.begin) * each;
  for (int64_t i = at.tile; i < count; i += at.tiles) {
    const int64_t head = i % each * together;
    body(at.rows.begin + i / each, head, head + together);
  }
}

}  // namespace pyseq::cuda
