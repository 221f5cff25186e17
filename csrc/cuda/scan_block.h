// SPDX-License-Identifier: Apache-2.0
// What both persistent scans share: which units and rows a block has, and the products that it
// makes in a step. A block holds the weights of its units in shared memory.
#pragma once

#include "barrier.h"
#include "scan_unit.h"

namespace pyseq::cuda {

// The products of a step: one with the state (backward: with the gates' gradients), and another one
// that waits for it, of a projection or of a cell that gates its state. Rows of 0: there is none.
struct ScanProducts {
  TileShape first, second;
};

// Where a block's share of something lies.
struct Share {
  int begin, count;
};
PYSEQ_INLINE constexpr Share share_of(int64_t all, int size, int index) {
  const int64_t begin = int64_t{size} * index, left = all - begin;
  return {static_cast<int>(begin), static_cast<int>(left < 0 ? 0 : left < size ? left : size)};
}

// Blocks side by side for one head.
PYSEQ_INLINE constexpr int blocks_of_head(int64_t head_size, int units) {
  return static_cast<int>((head_size + units - 1) / units);
}

// Forward, blocks share out the cell's units, and beside them the numbers of a projected state;
// backward the other way round, the numbers of the state.
template <class Cell>
PYSEQ_INLINE constexpr ScanProducts forward_products(int64_t hidden, int64_t state_size,
                                                     int64_t heads, bool projects,
                                                     const ScanTiles& tiles) {
  if (!Cell::kRecurrent) return {};
  const int kept = Cell::kGatesState ? Cell::kGates - 1 : Cell::kGates;
  const int of_state = static_cast<int>(state_size / heads), H = static_cast<int>(hidden);
  ScanProducts products{{tiles.units * kept, tiles.rows, 1, of_state}, {}};
  if (Cell::kGatesState) products.second = {tiles.units, tiles.rows, 1, H};
  if (projects) {
    const int blocks = blocks_of_head(hidden, tiles.units);
    products.second = {parts_of(static_cast<int>(state_size), blocks), tiles.rows, 1, H};
  }
  return products;
}

template <class Cell>
PYSEQ_INLINE constexpr ScanProducts backward_products(int64_t hidden, int64_t state_size,
                                                      int64_t heads, bool projects,
                                                      const ScanTiles& tiles) {
  if (!Cell::kRecurrent) return {};
  const int kept = Cell::kGatesState ? Cell::kGates - 1 : Cell::kGates;
  ScanProducts products{{tiles.units, tiles.rows, kept, static_cast<int>(hidden / heads)}, {}};
  if (Cell::kGatesState) products.second = {tiles.units, tiles.rows, 1, static_cast<int>(hidden)};
  if (projects) {
    const int blocks = blocks_of_head(state_size, tiles.units);
    products.second = {parts_of(static_cast<int>(hidden), blocks), tiles.rows, 1,
                       static_cast<int>(state_size)};
  }
  return products;
}

// One product's place in shared memory.
template <class S>
struct BlockProduct {
  using A = Accumulate<S>;
  TileShape shape;
  S* weights;
  A* sums;

  static constexpr int64_t bytes(const TileShape& shape, int threads) {
    return shape.rows == 0 ? 0 : Tile<S>::weight_bytes(shape) + sum_bytes<S>(shape, threads);
  }

  // Takes its part of `memory` and stores the weights.
  template <class Weight>
  PYSEQ_DEVICE unsigned char* place(unsigned char* memory, const Weight& weight) {
    if (shape.rows == 0) return memory;
    weights = reinterpret_cast<S*>(memory);
    memory += Tile<S>::weight_bytes(shape);
    sums = reinterpret_cast<A*>(memory);
    memory += sum_bytes<S>(shape, thread_count());
    Tile<S>::fill(shape, weights, weight);
    return memory;
  }

  // Every thread of the block; the sums are there for all of them afterwards.
  PYSEQ_DEVICE void multiply(const S* from, int64_t stride, int64_t segment_stride, int columns) {
    Tile<S>::multiply(shape, weights, from, stride, segment_stride, columns, sums);
    sync_threads();
  }
  PYSEQ_DEVICE A sum(int row, int column) const { return tile_sum<S>(shape, sums, row, column); }
};

// The block's place in the grid: units of a head across, rows of the batch down.
struct BlockPlace {
  int head, blocks, index;  // which of a head's blocks
  Share rows;
  int group;  // of the blocks that meet in a barrier

  PYSEQ_DEVICE BlockPlace(int64_t head_size, int64_t heads, int64_t batch, const ScanTiles& tiles) {
    blocks = blocks_of_head(head_size, tiles.units);
    head = block_index_x() / blocks;
    index = block_index_x() % blocks;
    rows = share_of(batch, tiles.rows, block_index_y());
    group = block_index_y() * static_cast<int>(heads) + head;
  }

  // Calls body(place of the unit among `count`, row of the batch, place of the row) for those that
  // are this thread's.
  template <class Body>
  PYSEQ_DEVICE void each(int count, const Body& body) const {
    for (int pair = thread_index(); pair < count * rows.count; pair += thread_count()) {
      body(pair / rows.count, rows.begin + pair % rows.count, pair % rows.count);
    }
  }
};

// One more than the last time step in which one of the rows takes part.
template <class Args>
PYSEQ_DEVICE int64_t longest(const Args& args, const Share& rows) {
  if (args.lengths == nullptr) return args.steps;
  int64_t steps = 0;
  for (int i = 0; i < rows.count; ++i) {
    const int64_t length = args.lengths[rows.begin + i];
    steps = length > steps ? length : steps;
  }
  return steps;
}

// ---- Launches --------------------------------------------------------------------------

template <class S>
ScanNeeds scan_needs(const ScanProducts& products, int64_t blocks, int64_t groups,
                     const ScanTiles& tiles) {
  const bool possible = tiles.units > 0 && tiles.rows > 0 && tiles.threads >= kWarp &&
                        tiles.threads <= kScanThreads && tiles.threads % kWarp == 0 &&
                        blocks <= INT32_MAX && fits_threads<S>(products.first, tiles.threads) &&
                        fits_threads<S>(products.second, tiles.threads);
  if (!possible) return {0, 0, 0, false};
  const int64_t shared = BlockProduct<S>::bytes(products.first, tiles.threads) +
                         BlockProduct<S>::bytes(products.second, tiles.threads);
  return {static_cast<int>(blocks), shared, barrier_bytes(groups), true};
}

// The launchers of both directions. `Direction` says what differs: the arguments, the kernel, the
// products, and how many units the blocks share out.

template <class Direction, class S, class Cell>
ScanNeeds cell_needs(const ScanSizes& sizes, const ScanTiles& tiles) {
  if (tiles.units <= 0 || tiles.rows <= 0) return {0, 0, 0, false};
  const int64_t groups = (sizes.batch + tiles.rows - 1) / tiles.rows;
  const int64_t across =
      sizes.heads * blocks_of_head(Direction::units(sizes) / sizes.heads, tiles.units);
  return scan_needs<S>(Direction::template products<Cell>(sizes, tiles), groups * across,
                       groups * sizes.heads, tiles);
}

template <class Direction, class S>
ScanNeeds needs_of(const ScanSizes& sizes, const ScanTiles& tiles) {
  return with_any_cell(sizes.cell, [&](auto cell) {
    return cell_needs<Direction, S, decltype(cell)>(sizes, tiles);
  });
}

template <class Direction, class S>
cudaError_t resident_of(const ScanSizes& sizes, const ScanTiles& tiles, int* blocks) {
  return with_any_cell(sizes.cell, [&](auto cell) {
    const ScanNeeds own = cell_needs<Direction, S, decltype(cell)>(sizes, tiles);
    return resident_blocks(Direction::template kernel<S, decltype(cell)>(), tiles.threads,
                           own.shared, blocks);
  });
}

template <class Direction, class S>
cudaError_t launch_scan(const typename Direction::template Args<S>& args, const ScanTiles& tiles,
                        unsigned* counters, cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  return with_any_cell(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    const ScanNeeds own = cell_needs<Direction, S, Cell>(sizes_of(args), tiles);
    const int down = static_cast<int>((args.batch + tiles.rows - 1) / tiles.rows);
    const Grid grid{own.blocks / down, down, tiles.threads, own.shared, Cell::kRecurrent};
    return launch(Direction::template kernel<S, Cell>(), grid, stream, args, tiles, counters);
  });
}

}  // namespace pyseq::cuda
