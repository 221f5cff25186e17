// SPDX-License-Identifier: Apache-2.0
// Packed weights and the matrix product over them that every recurrent loop is made of.
// A tile keeps MR batch rows x NP panels x G gates in registers over all k; the epilogue
// that the caller passes then turns its sums into a cell step or an activation.
#pragma once

#include "simd.h"

namespace pyseq::cpu::PYSEQ_TIER {

// A panel holds kLanes<T> neighbouring output units, all gates of them, as [k][gate][lane]:
// the order in which a tile reads it.
template <class T>
PYSEQ_FORCE_INLINE int64_t packed_size(int64_t units, int gates, int64_t k_count) {
  return vectors<T>(units) * k_count * gates * kLanes<T>;
}

// Packs panels [begin, end) of a weight with rows (gate, unit) and columns k; `stride` is
// from row to row. Units past the last are zero.
template <class T>
void pack_gates(const T* weight, int64_t stride, int64_t units, int gates, int64_t k_count,
                int64_t begin, int64_t end, T* packed) {
  constexpr int kBlock = 16;  // columns at a time, so that each cache line is used whole
  const int64_t step = gates * kLanes<T>;
  for (int64_t panel = begin; panel < end; ++panel) {
    T* out = packed + panel * k_count * step;
    const int inside = lanes_inside<T>(units, panel);
    for (int64_t k0 = 0; k0 < k_count; k0 += kBlock) {
      const int64_t k1 = smaller(k0 + kBlock, k_count);
      for (int gate = 0; gate < gates; ++gate) {
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          T* to = out + gate * kLanes<T> + lane;
          if (lane < inside) {
            const T* from = weight + (gate * units + panel * kLanes<T> + lane) * stride;
            for (int64_t k = k0; k < k1; ++k) to[k * step] = from[k];
          } else {
            for (int64_t k = k0; k < k1; ++k) to[k * step] = 0;
          }
        }
      }
    }
  }
}

// Packs panels [begin, end) of the transpose: the outputs are the weight's columns, k runs
// over its rows, and there is one gate.
template <class T>
void pack_columns(const T* weight, int64_t stride, int64_t columns, int64_t k_count, int64_t begin,
                  int64_t end, T* packed) {
  for (int64_t panel = begin; panel < end; ++panel) {
    T* out = packed + panel * k_count * kLanes<T>;
    const T* from = weight + panel * kLanes<T>;
    const int inside = lanes_inside<T>(columns, panel);
    for (int64_t k = 0; k < k_count; ++k) {
      store(out + k * kLanes<T>, load(from + k * stride, inside));
    }
  }
}

// One summand of a product: rows of `a` times packed weights. Gate g adds to sum slot[g].
template <class T>
struct Segment {
  const T* a;
  int64_t a_stride;
  const T* packed;
  int64_t k_count;
  int slot[4];
};

namespace detail {

template <class T, int G, int MR, int NP>
[[gnu::noinline]] void multiply(const T* __restrict a, int64_t a_stride, const T* __restrict packed,
                                int64_t k_count, T* __restrict sums, int pre, const int* slot,
                                bool accumulate) {
  using V = Vec<T>;
  const int64_t panel_stride = k_count * G * kLanes<T>;
  V sum[NP][MR][G];
#pragma GCC unroll 8
  for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        sum[p][m][g] = accumulate ? load(sums + ((p * MR + m) * pre + slot[g]) * kLanes<T>) : V{};
      }
    }
  }
  for (int64_t k = 0; k < k_count; ++k) {
    V weight[NP][G];
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        weight[p][g] = load(packed + p * panel_stride + (k * G + g) * kLanes<T>);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const V value = broadcast(a[m * a_stride + k]);
#pragma GCC unroll 8
      for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[p][m][g] += value * weight[p][g];
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        store(sums + ((p * MR + m) * pre + slot[g]) * kLanes<T>, sum[p][m][g]);
      }
    }
  }
}

// With one gate a tile is at least 4 panels wide, so that a weight vector and a broadcast
// value both serve several multiply-adds.
template <int G>
constexpr int kMaxRows = kAccumulators / (G == 1 ? 4 : G);
template <int G>
constexpr int kMaxPanels = G == 1 ? 8 : (G == 2 ? 4 : 4);

constexpr bool fits(int gates, int rows, int panels) {
  return rows * panels * gates <= kAccumulators && panels * gates <= 16;
}

template <class T>
using Multiply = void (*)(const T*, int64_t, const T*, int64_t, T*, int, const int*, bool);

template <class T, int G, int MR>
PYSEQ_FORCE_INLINE Multiply<T> pick_panels(int panels) {
  if constexpr (fits(G, MR, 8)) {
    if (panels == 8) return multiply<T, G, MR, 8>;
  }
  if constexpr (fits(G, MR, 4)) {
    if (panels == 4) return multiply<T, G, MR, 4>;
  }
  if constexpr (fits(G, MR, 2)) {
    if (panels == 2) return multiply<T, G, MR, 2>;
  }
  return multiply<T, G, MR, 1>;
}

template <class T, int G, int MR = kMaxRows<G>>
PYSEQ_FORCE_INLINE Multiply<T> pick(int rows, int panels) {
  if constexpr (MR > 1) {
    if (rows < MR) return pick<T, G, MR - 1>(rows, panels);
  }
  return pick_panels<T, G, MR>(panels);
}

}  // namespace detail

// For every row in `rows` and every panel in `panels`: the sums over all segments, handed
// to epilogue(row, panel, sums), where sums holds Pre vectors. A sum is added up in the
// order of the segments and of k, whatever the tiling, so the bits depend on neither the
// number of threads nor the batch. Panels are the outer loop: one comes from far memory
// once and serves all rows.
template <class T, int G, int Pre, class Epilogue>
PYSEQ_FORCE_INLINE void product(const Segment<T>* segments, int segment_count, int64_t row_begin,
                                int64_t row_end, int64_t panel_begin, int64_t panel_end,
                                Epilogue&& epilogue) {
  using detail::fits;
  const int64_t rows = row_end - row_begin;
  if (rows <= 0) return;
  const int64_t tiles = (rows + detail::kMaxRows<G> - 1) / detail::kMaxRows<G>;
  const int64_t tile_rows = (rows + tiles - 1) / tiles;
  alignas(64) T sums[kAccumulators * Pre * kLanes<T>];

  for (int64_t panel = panel_begin; panel < panel_end;) {
    int width = 8;
    while (width > 1 &&
           (width > panel_end - panel || !fits(G, static_cast<int>(tile_rows), width))) {
      width /= 2;
    }
    for (int64_t row = row_begin; row < row_end;) {
      // Tiles of equal height, give or take one row.
      const int64_t left = (row_end - row + tile_rows - 1) / tile_rows;
      const int height = static_cast<int>((row_end - row + left - 1) / left);
      const auto multiply = detail::pick<T, G>(height, width);
      if constexpr (Pre > G) {
        for (int i = 0; i < height * width * Pre * kLanes<T>; ++i) sums[i] = 0;
      } else if (segment_count == 0) {
        for (int i = 0; i < height * width * Pre * kLanes<T>; ++i) sums[i] = 0;
      }
      for (int s = 0; s < segment_count; ++s) {
        const Segment<T>& segment = segments[s];
        multiply(segment.a + row * segment.a_stride, segment.a_stride,
                 segment.packed + panel * segment.k_count * G * kLanes<T>, segment.k_count, sums,
                 Pre, segment.slot, Pre > G || s > 0);
      }
      for (int p = 0; p < width; ++p) {
        for (int m = 0; m < height; ++m) {
          epilogue(row + m, panel + p, sums + (p * height + m) * Pre * kLanes<T>);
        }
      }
      row += height;
    }
    panel += width;
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
