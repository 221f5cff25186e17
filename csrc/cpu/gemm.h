// SPDX-License-Identifier: Apache-2.0
// The large products outside of the loops (input projections, weight gradients), on the tile
// of the loops. torch's own would do, were its library not half as fast on some machines.
#pragma once

#include "kernels.h"
#include "steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

namespace detail {

// k is cut into equal parts of so many at most, so that a packed group of columns stays in the
// second-level cache; columns are taken as many at a time as the widest full tile has.
constexpr int64_t kDepth = 512;
constexpr int kGroup = 4;  // panels
// Rows of a whose columns are copied at a time.
constexpr int64_t kCopiedRows = 384;
// Weights of a product of few rows that repay another thread: reading them takes about as long as
// to wake it.
constexpr int64_t kWorkOfFewRows = 100000;

template <class T>
PYSEQ_FORCE_INLINE Vec<T> gather(const T* from, int64_t stride, int count) {
  Vec<T> value = {};
  for (int i = 0; i < count; ++i) value[i] = from[i * stride];
  return value;
}

// Packs a group of B's columns, `depth` of its rows, as panels of [k][lane].
template <class T>
void pack_group(const Gemm<T>& args, int64_t k0, int64_t depth, int64_t panel, int width,
                T* packed) {
  const int inside = lanes_inside<T>(args.n, panel + width - 1);
  for (int p = 0; p < width; ++p) {
    const T* from = args.b + k0 * args.b_row + (panel + p) * kLanes<T> * args.b_column;
    T* const to = packed + p * depth * kLanes<T>;
    const int count = p == width - 1 ? inside : kLanes<T>;
    if (args.b_column == 1) {
      for (int64_t k = 0; k < depth; ++k) {
        store(to + k * kLanes<T>, load(from + k * args.b_row, count));
      }
    } else {
      for (int64_t k = 0; k < depth; k += kLanes<T>) {
        const int rows = lanes_inside<T>(depth, k / kLanes<T>);
        if (args.b_row == 1) {
          transpose_block(from + k, args.b_column, count, rows, to + k * kLanes<T>, kLanes<T>);
          continue;
        }
        Vec<T> block[kLanes<T>];
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          const T* const column = from + lane * args.b_column + k * args.b_row;
          block[lane] = Vec<T>{};
          if (lane < count) block[lane] = gather(column, args.b_row, rows);
        }
        transpose<T>(block);
        for (int i = 0; i < rows; ++i) store(to + (k + i) * kLanes<T>, block[i]);
      }
    }
  }
}

// Asks for one of `parts` parts of a group's columns before it is packed: those of large weights
// lie in memory, at strides that the hardware does not foresee.
template <class T>
void ask_for_group(const Gemm<T>& args, int64_t k0, int64_t depth, int64_t panel, int width,
                   int part, int parts) {
  const int64_t begin = panel * kLanes<T>;
  if (args.b_column == 1) {
    const Range rows = share(depth, part, parts);
    for (int64_t k = k0 + rows.begin; k < k0 + rows.end; ++k) {
      for (int p = 0; p < width; ++p) {
        __builtin_prefetch(args.b + k * args.b_row + begin + p * kLanes<T>, 0, 2);
      }
    }
  } else if (args.b_row == 1) {
    const Range columns = share(smaller(width * kLanes<T>, args.n - begin), part, parts);
    for (int64_t column = begin + columns.begin; column < begin + columns.end; ++column) {
      for (int64_t k = 0; k < depth; k += kLanes<T>) {
        __builtin_prefetch(args.b + column * args.b_column + k0 + k, 0, 2);
      }
    }
  }
}

// Where a tile of copied columns lies, `depth` rows of kRows at most; its last row is written
// as a vector of kMoved.
constexpr int kMoved = 8;
PYSEQ_FORCE_INLINE int64_t copied_size(int64_t depth) { return depth * kMaxRows<1> + kMoved; }

// Tiles that are copied at a time: their sums fit the registers.
constexpr int kTilesAtOnce = 8;

// Copies `count` columns of a (rows of a transpose, which would be read at large strides, over
// and over), `depth` long: tile by tile, as [k][column]. The rows are read along, some tiles of
// them, since each line would be fetched again for the next tile; a tile's share of one is moved as
// a vector, of which the end is overwritten by the next.
template <class T>
void copy_columns(const Gemm<T>& args, int64_t begin, int64_t count, int tiles, int64_t k0,
                  int64_t depth, T* copied, T* sums, bool adds) {
  typedef T Moved __attribute__((vector_size(kMoved * sizeof(T))));
  static_assert(kMaxRows<1> <= kMoved);
  for (int first = 0; first < tiles; first += kTilesAtOnce) {
    const int wide = static_cast<int>(smaller(kTilesAtOnce, tiles - first));
    const T* from[kTilesAtOnce];
    T* to[kTilesAtOnce];
    int64_t size[kTilesAtOnce];
    Moved total[kTilesAtOnce] = {};
    bool inside[kTilesAtOnce];  // a vector may not reach past the end of a row
    bool whole = wide == kTilesAtOnce;
    for (int i = 0; i < wide; ++i) {
      const Range part = share(count, first + i, tiles);
      const int64_t column = begin + part.begin;
      from[i] = args.a + column * args.a_row + k0 * args.a_column;
      to[i] = copied + (first + i) * copied_size(depth);
      size[i] = part.size();
      inside[i] = args.a_row == 1 && column + kMoved <= args.m;
      whole = whole && inside[i];
    }
    const auto move = [&](int64_t k, int i, const Moved& value) __attribute__((always_inline)) {
      __builtin_memcpy(to[i] + k * size[i], &value, sizeof value);
      total[i] += value;
    };
    if (whole) {
      for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
        for (int i = 0; i < kTilesAtOnce; ++i) {
          Moved value;
          __builtin_memcpy(&value, from[i] + k * args.a_column, sizeof value);
          move(k, i, value);
        }
      }
    } else {
      for (int64_t k = 0; k < depth; ++k) {
        for (int i = 0; i < wide; ++i) {
          const T* const row = from[i] + k * args.a_column;
          Moved value = {};
          if (inside[i]) {
            __builtin_memcpy(&value, row, sizeof value);
          } else {
            for (int64_t m = 0; m < size[i]; ++m) value[m] = row[m * args.a_row];
          }
          move(k, i, value);
        }
      }
    }
    for (int i = 0; sums != nullptr && i < wide; ++i) {
      T* const own = sums + begin + share(count, first + i, tiles).begin;
      for (int64_t m = 0; m < size[i]; ++m) own[m] = total[i][m] + (adds ? own[m] : T(0));
    }
  }
}

// Where a tile's sums go: rows `stride` apart. Only the first `inside` columns of the last panel
// are c's.
template <class T>
struct TileOfC {
  T* c;
  int64_t stride;
  int inside;
  const T* bias;  // as wide, or null
  bool adds;
};

// Multiplies MR rows of a with NP packed panels, in the order of k, straight into c, whose lines
// are asked for at the beginning: of a large c they lie in memory.
template <class T, int MR, int NP>
[[gnu::noinline, gnu::noclone]] void multiply_into(const T* __restrict a, int64_t a_row,
                                                   int64_t a_k, const T* __restrict packed,
                                                   int64_t depth, const TileOfC<T>& to) {
  using V = Vec<T>;
  constexpr int N = kLanes<T>;
  if (to.adds) {
    for (int m = 0; m < MR; ++m) {
      for (int p = 0; p < NP; ++p) __builtin_prefetch(to.c + m * to.stride + p * N, 1);
    }
  }
  V sum[NP][MR] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V weight[NP];
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) weight[p] = load(packed + (p * depth + k) * N);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const V value = broadcast(a[m * a_row]);
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) sum[p][m] += value * weight[p];
    }
    a += a_k;
  }
#pragma GCC unroll 4
  for (int p = 0; p < NP; ++p) {
    const int inside = p == NP - 1 ? to.inside : N;
    const V bias = to.bias == nullptr ? V{} : load(to.bias + p * N, inside);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      T* const c = to.c + m * to.stride + p * N;
      store(c, to.adds ? load(c, inside) + sum[p][m] : sum[p][m] + bias, inside);
    }
  }
}

template <class T>
using MultiplyInto = void (*)(const T*, int64_t, int64_t, const T*, int64_t, const TileOfC<T>&);

// A last group of three panels is a tile of two and one of one.
template <class T, int MR = kMaxRows<1>>
PYSEQ_FORCE_INLINE MultiplyInto<T> pick_multiply_into(int rows, int panels) {
  if constexpr (MR > 1) {
    if (rows < MR) return pick_multiply_into<T, MR - 1>(rows, panels);
  }
  if (panels >= 4) return multiply_into<T, MR, 4>;
  return panels >= 2 ? multiply_into<T, MR, 2> : multiply_into<T, MR, 1>;
}

// Whether so few rows do not repay packing b, as measured for rows of 64 to 1024. Those of a loop
// come a few at a time, and repay it later: see repays_packing.
PYSEQ_FORCE_INLINE bool are_few_rows(int64_t m, int64_t k) {
  return m <= larger(2, smaller(k / 20, 12 + k / 64));
}

// The product of a few rows, which would not repay packing b, whose columns lie as the rows of
// weights do.
template <class T>
void gemm_of_few_rows(const Gemm<T>& args) {
  const Weights<T> weights{args.b, args.b_column, args.n, 1, args.k, nullptr};
  const Segment<T> segment{args.a, args.a_row, weights, {}};
  const int64_t panels = vectors<T>(args.n);
  const int wanted = static_cast<int>(smaller(args.threads, 1 + args.n * args.k / kWorkOfFewRows));
  parallel(wanted, [&](int thread, int present) {
    const Range mine = share(panels, thread, present);
    product<T, 1, 1>(&segment, 1, 0, args.m, mine.begin, mine.end, false,
                     [&](int64_t row, int64_t panel, const T* sums) {
                       const int64_t column = panel * kLanes<T>;
                       const int inside = lanes_inside<T>(args.n, panel);
                       Vec<T> sum = load(sums);
                       if (args.bias != nullptr) sum += load(args.bias + column, inside);
                       store(args.c + row * args.c_row + column, sum, inside);
                     });
  });
}

}  // namespace detail

// c = a b + bias, or c += a b. An element is summed in the order of k, cut into runs,
// whoever computes it: the bits do not depend on the number of threads.
template <class T>
void gemm(const Gemm<T>& args) {
  using detail::kCopiedRows;
  using detail::kDepth;
  using detail::kGroup;
  constexpr int kRows = detail::kMaxRows<1>;
  const bool copies_a = args.a_column != 1 || args.a_sums != nullptr;
  if (detail::are_few_rows(args.m, args.k) && args.b_row == 1 && !copies_a && !args.accumulate &&
      args.beside == nullptr) {
    return detail::gemm_of_few_rows(args);
  }
  const auto groups_of = [](const Gemm<T>& one) {
    return (vectors<T>(one.n) + kGroup - 1) / kGroup;
  };
  const int64_t first_groups = groups_of(args);
  const int64_t groups = first_groups + (args.beside == nullptr ? 0 : groups_of(*args.beside));
  const int64_t work = args.m * (args.n + (args.beside == nullptr ? 0 : args.beside->n)) * args.k;
  const int wanted = static_cast<int>(smaller(args.threads, 1 + work / 1000000));
  const int64_t packed_size = kDepth * kGroup * kLanes<T>;
  const int cuts = static_cast<int>(larger(1, (args.k + kDepth - 1) / kDepth));
  const int64_t block_tiles = (smaller(args.m, kCopiedRows) + kRows - 1) / kRows;
  const int64_t own_size = packed_size + (copies_a ? block_tiles * detail::copied_size(kDepth) : 0);
  Workspace workspace(static_cast<size_t>(own_size * wanted) * sizeof(T));

  parallel(wanted, [&](int thread, int present) {
    // Threads in a grid: columns first, since each packs those that it uses.
    const int across = static_cast<int>(larger(1, smaller(present, groups)));
    const int down = present / across;
    if (thread >= across * down) return;
    const Range columns = share(groups, thread % across, across);
    const Range rows = share(args.m, thread / across, down);
    const int64_t block = copies_a ? kCopiedRows : larger(1, rows.size());
    T* const packed = static_cast<T*>(workspace.data()) + thread * own_size;
    T* const copied = packed + packed_size;
    for (int cut = 0; cut < cuts; ++cut) {
      const Range part_of_k = share(args.k, cut, cuts);
      const int64_t k0 = part_of_k.begin, depth = part_of_k.size();
      const bool adds = args.accumulate || cut > 0;
      for (int64_t begin = rows.begin; begin < rows.end; begin += block) {
        const int64_t count = smaller(block, rows.end - begin);
        const int tiles = static_cast<int>((count + kRows - 1) / kRows);
        if (copies_a) {
          T* const sums_of_a = columns.begin == 0 ? args.a_sums : nullptr;
          detail::copy_columns(args, begin, count, tiles, k0, depth, copied, sums_of_a, adds);
        }
        for (int64_t group = columns.begin; group < columns.end; ++group) {
          const Gemm<T>& own = group < first_groups ? args : *args.beside;
          const int64_t first = group < first_groups ? 0 : first_groups;
          const int64_t panels = vectors<T>(own.n), panel = (group - first) * kGroup;
          const int width = static_cast<int>(smaller(kGroup, panels - panel));
          detail::pack_group(own, k0, depth, panel, width, packed);
          for (int tile = 0; tile < tiles; ++tile) {
            const int64_t next = panel + kGroup;
            if (group + 1 < columns.end && next < panels) {
              detail::ask_for_group(own, k0, depth, next,
                                    static_cast<int>(smaller(kGroup, panels - next)), tile, tiles);
            }
            const Range part = share(count, tile, tiles);
            const int height = static_cast<int>(part.size());
            const T* const a = copies_a ? copied + tile * detail::copied_size(depth)
                                        : args.a + (begin + part.begin) * args.a_row + k0;
            for (int done = 0; done < width;) {
              const int step = width - done >= 4 ? 4 : (width - done >= 2 ? 2 : 1);
              const int64_t column = (panel + done) * kLanes<T>;
              const T* const bias = own.bias == nullptr ? nullptr : own.bias + column;
              detail::pick_multiply_into<T>(height, step)(
                  a, copies_a ? 1 : args.a_row, copies_a ? height : 1,
                  packed + done * depth * kLanes<T>, depth,
                  {own.c + (begin + part.begin) * own.c_row + column, own.c_row,
                   lanes_inside<T>(own.n, panel + done + step - 1), bias, adds});
              done += step;
            }
          }
        }
      }
    }
  });
}

}  // namespace pyseq::cpu::PYSEQ_TIER
