// SPDX-License-Identifier: Apache-2.0
// The product inside a step: some rows of weights, which a block keeps in shared memory for the
// whole launch, times some rows of the batch, which every block of the group reads anew each step.
// Threads share out k as well; their parts are added up in a fixed order.
#pragma once

#include "device.h"

namespace pyseq::cuda {

// Sizes of one block's product; k goes through `segments` runs of `length` numbers.
struct TileShape {
  int rows;     // of weights
  int columns;  // rows of the batch
  int segments, length;
};

PYSEQ_INLINE constexpr int rounded_up(int count, int to) { return (count + to - 1) / to * to; }
PYSEQ_INLINE constexpr int parts_of(int count, int size) { return (count + size - 1) / size; }

// How the threads of a block share a product: `groups` of warps compute one part of the tile
// each, `slices` warps each of them for a part of k.
struct TileSplit {
  int lanes;  // of a warp, that share out a part of the tile; the others share out k
  int groups, slices;
};

// A column of sums is this many numbers long: rows of the batch, and room against two lanes'
// stores meeting in one bank.
PYSEQ_INLINE constexpr int sum_stride(const TileShape& shape) {
  return rounded_up(shape.columns, 8) + 8;
}

// Each thread makes 4 rows by 4 columns, by fused multiply-adds.
template <class S>
struct PlainTile {
  using A = Accumulate<S>;
  static constexpr int kSide = 4;
  static constexpr int kStep = kVector<S>;  // numbers of k that a thread takes at once

  static PYSEQ_INLINE constexpr int padded_rows(const TileShape& shape) {
    return rounded_up(shape.rows, kSide);
  }
  static PYSEQ_INLINE constexpr int positions(const TileShape& shape) {
    return parts_of(shape.rows, kSide) * parts_of(shape.columns, kSide);
  }
  static PYSEQ_INLINE constexpr TileSplit split(const TileShape& shape, int threads) {
    int lanes = 1;
    while (lanes < kWarp && lanes < positions(shape)) lanes *= 2;
    const int groups = parts_of(positions(shape), lanes);
    return {lanes, groups, threads / kWarp / groups};
  }
  static PYSEQ_INLINE constexpr int chunks(const TileShape& shape) {
    return shape.segments * parts_of(shape.length, kStep);
  }
  static PYSEQ_INLINE constexpr int64_t weight_bytes(const TileShape& shape) {
    return int64_t{chunks(shape)} * kStep * padded_rows(shape) * static_cast<int>(sizeof(S));
  }

  // Stores weight(row, segment, k) so that a thread's rows lie side by side: [k][row].
  template <class Weight>
  static PYSEQ_DEVICE void fill(const TileShape& shape, S* weights, const Weight& weight) {
    const int rows = padded_rows(shape), each = parts_of(shape.length, kStep) * kStep;
    const int count = shape.segments * each * rows;
    for (int i = thread_index(); i < count; i += thread_count()) {
      // Neighbouring threads read neighbouring k, as the weights lie in memory.
      const int at = i % (shape.segments * each), row = i / (shape.segments * each);
      const int segment = at / each, k = at % each;
      const bool inside = row < shape.rows && k < shape.length;
      weights[at * rows + row] = inside ? weight(row, segment, k) : narrow<S>(A(0));
    }
  }

  // Leaves in `sums` each slice's part of weights times `columns` (at most shape.columns) rows of
  // the batch. Row b begins at from + b * stride, its segments are segment_stride apart.
  static PYSEQ_DEVICE void multiply(const TileShape& shape, const S* weights, const S* from,
                                    int64_t stride, int64_t segment_stride, int columns, A* sums) {
    const TileSplit split = PlainTile::split(shape, thread_count());
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int group = warp % split.groups, warp_slice = warp / split.groups;
    if (warp_slice >= split.slices) return;
    const int row_parts = parts_of(shape.rows, kSide), rows = padded_rows(shape);
    const int position = group * split.lanes + lane % split.lanes;
    const int row = position % row_parts * kSide, column = position / row_parts * kSide;
    const bool inside = position < positions(shape);
    const int slices = split.slices * (kWarp / split.lanes);
    const int slice = warp_slice * (kWarp / split.lanes) + lane / split.lanes;
    const bool aligned = is_aligned(from) && stride % kStep == 0 && segment_stride % kStep == 0;

    A sum[kSide][kSide] = {};
    const int each = parts_of(shape.length, kStep), all = inside ? chunks(shape) : 0;
    PYSEQ_UNROLL_BY_2
    for (int chunk = slice; chunk < all; chunk += slices) {
      const int segment = chunk / each, k = (chunk - segment * each) * kStep;
      const S* const at = from + segment * segment_stride + k;
      A values[kSide][kStep];
      PYSEQ_UNROLL
      for (int j = 0; j < kSide; ++j) {
        const int count = column + j < columns ? shape.length - k : 0;
        unpack<S>(load_row<S>(at + (column + j) * stride, count, aligned), values[j]);
      }
      const S* const own = weights + int64_t{chunk} * kStep * rows + row;
      PYSEQ_UNROLL
      for (int i = 0; i < kStep; ++i) {
        A weight[kSide];
        PYSEQ_UNROLL
        for (int r = 0; r < kSide; ++r) weight[r] = widen(own[i * rows + r]);
        PYSEQ_UNROLL
        for (int r = 0; r < kSide; ++r) {
          PYSEQ_UNROLL
          for (int j = 0; j < kSide; ++j) {
            sum[r][j] = Math<A>::multiply_add(weight[r], values[j][i], sum[r][j]);
          }
        }
      }
    }
    for (int mask = split.lanes; mask < kWarp; mask *= 2) {
      PYSEQ_UNROLL
      for (int r = 0; r < kSide; ++r) {
        PYSEQ_UNROLL
        for (int j = 0; j < kSide; ++j) sum[r][j] += shuffle_xor(sum[r][j], mask);
      }
    }
    if (!inside || lane >= split.lanes) return;
    PYSEQ_UNROLL
    for (int r = 0; r < kSide; ++r) {
      PYSEQ_UNROLL
      for (int j = 0; j < kSide; ++j) {
        sums[(warp_slice * rows + row + r) * sum_stride(shape) + column + j] = sum[r][j];
      }
    }
  }

  // 16 bytes of a row, of which `count` numbers are there; the others are zero.
  template <class Number>
  static PYSEQ_DEVICE Words load_row(const Number* from, int count, bool aligned) {
    if (aligned && count >= kVector<Number>) return load_words_shared_by_blocks(from);
    Number numbers[kVector<Number>];
    PYSEQ_UNROLL
    for (int i = 0; i < kVector<Number>; ++i) {
      numbers[i] = i < count ? load_shared_by_blocks(from + i) : narrow<Number>(A(0));
    }
    Words words;
    memcpy(&words, numbers, sizeof words);
    return words;
  }
};

// On tensor cores: each warp makes up to 32 rows by 32 columns. k is taken in an order in which
// what a lane multiplies lies in 16 neighbouring bytes, of weights and batch alike.
template <class S>
struct TensorTile {
  static_assert(kIsHalf<S>);
  using A = float;
  static constexpr int kStep = 32;  // numbers of k taken at once: two products of 16
  static constexpr int kSide = 32, kRowTile = 16, kColumnTile = 8;

  static PYSEQ_INLINE constexpr int padded_rows(const TileShape& shape) {
    return rounded_up(shape.rows, kRowTile);
  }
  static PYSEQ_INLINE constexpr TileSplit split(const TileShape& shape, int threads) {
    const int groups = parts_of(shape.rows, kSide) * parts_of(shape.columns, kSide);
    return {1, groups, threads / kWarp / groups};
  }
  static PYSEQ_INLINE constexpr int chunks(const TileShape& shape) {
    return shape.segments * parts_of(shape.length, kStep);
  }
  static PYSEQ_INLINE constexpr int64_t weight_bytes(const TileShape& shape) {
    return int64_t{chunks(shape)} * kStep * padded_rows(shape) * static_cast<int>(sizeof(S));
  }

  // The number of k in a chunk that a lane holds in number `half` of word `word` of the product
  // `product`, of weights; see mma_16x8x16. Words 0 and 1 have the same k, and so have 2 and 3.
  static PYSEQ_INLINE constexpr int k_of(int lane, int product, int word, int half) {
    return lane % 4 * 8 + product * 4 + word / 2 * 2 + half;
  }

  // [chunk][row tile][product][lane][word]
  template <class Weight>
  static PYSEQ_DEVICE void fill(const TileShape& shape, S* weights, const Weight& weight) {
    const int tiles = parts_of(shape.rows, kRowTile), each = parts_of(shape.length, kStep);
    const int count = chunks(shape) * tiles * kStep * kRowTile;
    for (int i = thread_index(); i < count; i += thread_count()) {
      const int half = i % 2, word = i / 2 % 4, lane = i / 8 % kWarp, product = i / 256 % 2;
      const int tile = i / 512 % tiles, chunk = i / 512 / tiles;
      const int row = tile * kRowTile + lane / 4 + word % 2 * 8;
      const int segment = chunk / each;
      const int k = (chunk - segment * each) * kStep + k_of(lane, product, word, half);
      const bool inside = row < shape.rows && k < shape.length;
      weights[i] = inside ? weight(row, segment, k) : narrow<S>(0.0f);
    }
  }

  // As PlainTile::multiply.
  static PYSEQ_DEVICE void multiply(const TileShape& shape, const S* weights, const S* from,
                                    int64_t stride, int64_t segment_stride, int columns, A* sums) {
    constexpr int kRowTiles = kSide / kRowTile, kColumnTiles = kSide / kColumnTile;
    const TileSplit split = TensorTile::split(shape, thread_count());
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int group = warp % split.groups, slice = warp / split.groups;
    if (slice >= split.slices) return;
    const int row_parts = parts_of(shape.rows, kSide), tiles = parts_of(shape.rows, kRowTile);
    const int row_tile = group % row_parts * kRowTiles, column = group / row_parts * kSide;
    const bool aligned = is_aligned(from) && stride % 8 == 0 && segment_stride % 8 == 0;
    // Of tiles that lie outside nothing is computed: the same for the whole warp.
    const int row_tiles = tiles - row_tile, column_tiles = parts_of(columns - column, kColumnTile);

    float sum[kRowTiles][kColumnTiles][4] = {};
    const int each = parts_of(shape.length, kStep), all = chunks(shape);
    PYSEQ_UNROLL_BY_2
    for (int chunk = slice; chunk < all; chunk += split.slices) {
      const int segment = chunk / each, k = (chunk - segment * each) * kStep + lane % 4 * 8;
      const S* const at = from + segment * segment_stride + k;
      Words batch[kColumnTiles];
      PYSEQ_UNROLL
      for (int j = 0; j < kColumnTiles; ++j) {
        const int own = column + j * kColumnTile + lane / 4;
        const int count = own < columns ? shape.length - k : 0;
        batch[j] = PlainTile<S>::load_row(at + own * stride, count, aligned);
      }
      const Words* const own =
          reinterpret_cast<const Words*>(weights) + (chunk * tiles + row_tile) * 2 * kWarp + lane;
      PYSEQ_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        if (r >= row_tiles) break;
        PYSEQ_UNROLL
        for (int product = 0; product < 2; ++product) {
          const Words a = own[(r * 2 + product) * kWarp];
          PYSEQ_UNROLL
          for (int j = 0; j < kColumnTiles; ++j) {
            if (j >= column_tiles) break;
            const uint32_t b[2] = {batch[j].word[2 * product], batch[j].word[2 * product + 1]};
            mma_16x8x16<S>(sum[r][j], a.word, b);
          }
        }
      }
    }
    PYSEQ_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
      if (r >= row_tiles) break;
      PYSEQ_UNROLL
      for (int j = 0; j < kColumnTiles; ++j) {
        if (j >= column_tiles) break;
        PYSEQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = (row_tile + r) * kRowTile + lane / 4 + i / 2 * 8;
          const int to = column + j * kColumnTile + lane % 4 * 2 + i % 2;
          sums[(slice * padded_rows(shape) + row) * sum_stride(shape) + to] = sum[r][j][i];
        }
      }
    }
  }
};

template <class S>
struct TileOf {
  using type = TensorTile<S>;
};
template <>
struct TileOf<float> {
  using type = PlainTile<float>;
};
template <>
struct TileOf<double> {
  using type = PlainTile<double>;
};
template <class S>
using Tile = typename TileOf<S>::type;

// Whether so many threads can make the product, if there is one. None makes more than a part of the
// tile; that is asked of each side alone first, because the number of parts may be beyond an int.
template <class S>
constexpr bool fits_threads(const TileShape& shape, int threads) {
  const int most = threads * Tile<S>::kSide;
  return shape.rows == 0 ||
         (shape.rows <= most && shape.columns <= most && Tile<S>::split(shape, threads).slices > 0);
}

template <class S>
PYSEQ_INLINE constexpr int64_t sum_bytes(const TileShape& shape, int threads) {
  return int64_t{Tile<S>::split(shape, threads).slices} * Tile<S>::padded_rows(shape) *
         sum_stride(shape) * static_cast<int>(sizeof(Accumulate<S>));
}

// The sum of all slices' parts.
template <class S>
PYSEQ_DEVICE Accumulate<S> tile_sum(const TileShape& shape, const Accumulate<S>* sums, int row,
                                    int column) {
  const int slices = Tile<S>::split(shape, thread_count()).slices;
  const int slice_size = Tile<S>::padded_rows(shape) * sum_stride(shape);
  const Accumulate<S>* part = sums + row * sum_stride(shape) + column;
  Accumulate<S> sum = 0;
  for (int slice = 0; slice < slices; ++slice) sum += part[slice * slice_size];
  return sum;
}

}  // namespace pyseq::cuda
