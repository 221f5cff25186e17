// SPDX-License-Identifier: Apache-2.0
// Packed weights and the matrix product over them that every recurrent loop is made of.
// A tile keeps MR batch rows x NP panels x G gates in registers over all k; the epilogue
// that the caller passes then turns its sums into a cell step or an activation.
#pragma once

#include "quantized.h"
#include "simd.h"
#include "threads.h"

namespace pyseq::cpu::PYSEQ_TIER {

// The weights of a product: outputs are `units` units with `gates` gates each, summed over
// k_count. They lie in `source` as rows (gate, unit) of k, or, for the transposed product of
// a backward loop, as rows of units; rows are `stride` apart. Loops of more than a few steps
// read them from `packed`: a panel holds kLanes<T> neighbouring units, all gates of them, as
// [k][gate][lane], the order in which a tile reads it.
template <class T>
struct Weights {
  const T* source;
  int64_t stride;
  int64_t units;
  int gates;
  int64_t k_count;
  T* packed;  // null: used where they lie, which only untransposed weights can be
  const QuantizedWeights* quantized = nullptr;  // in place of all that, float32 only

  int64_t panel_size() const { return k_count * gates * kLanes<T>; }
  int64_t packed_size() const { return vectors<T>(units) * panel_size(); }
};

// Transposes a block of `rows` rows and `columns` columns: each column becomes a vector, `step`
// apart, whose other lanes are zero.
template <class T>
PYSEQ_FORCE_INLINE void transpose_block(const T* from, int64_t stride, int rows, int columns, T* to,
                                        int64_t step) {
  constexpr int N = kLanes<T>;
  Vec<T> block[N];
  if (rows == N && columns == N) {  // by itself, so that the block never leaves the registers
    for (int lane = 0; lane < N; ++lane) block[lane] = load(from + lane * stride);
    transpose<T>(block);
    for (int i = 0; i < N; ++i) store(to + i * step, block[i]);
    return;
  }
  for (int lane = 0; lane < N; ++lane) {
    block[lane] = lane < rows ? load(from + lane * stride, columns) : Vec<T>{};
  }
  transpose<T>(block);
  for (int i = 0; i < columns; ++i) store(to + i * step, block[i]);
}

// Packs this thread's share of the panels. Units past the last are zero.
template <class T>
void pack_rows(const Weights<T>& weights, int thread, int present) {
  if (weights.packed == nullptr) return;
  constexpr int N = kLanes<T>;
  // Lines of a row that follow one another are read together, before the next gate's rows.
  constexpr int64_t kRun = 8 * N;
  const int64_t step = weights.gates * N;
  const Range mine = share(vectors<T>(weights.units), thread, present);
  for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
    const int inside = lanes_inside<T>(weights.units, panel);
    T* const out = weights.packed + panel * weights.panel_size();
    for (int64_t run = 0; run < weights.k_count; run += kRun) {
      const int64_t end = smaller(run + kRun, weights.k_count);
      for (int gate = 0; gate < weights.gates; ++gate) {
        const T* from = weights.source + (gate * weights.units + panel * N) * weights.stride;
        for (int64_t k = run; k < end; k += N) {
          transpose_block(from + k, weights.stride, inside, lanes_inside<T>(weights.k_count, k / N),
                          out + gate * N + k * step, step);
        }
      }
    }
  }
}

// The same for weights that lie transposed, with one gate.
template <class T>
void pack_columns(const Weights<T>& weights, int thread, int present) {
  const Range mine = share(vectors<T>(weights.units), thread, present);
  for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
    T* const out = weights.packed + panel * weights.panel_size();
    const T* const from = weights.source + panel * kLanes<T>;
    const int inside = lanes_inside<T>(weights.units, panel);
    for (int64_t k = 0; k < weights.k_count; ++k) {
      store(out + k * kLanes<T>, load(from + k * weights.stride, inside));
    }
  }
}

// Whether packing the weights of a forward loop repays, whose rows are `length` long. Measured
// with 64 to 1024 units: the lanes of a dot product are summed, which takes as long for a short row
// of weights, so that to pack 64 or 128 repays after 4 or 8 rows, in however many steps, 256 after
// some 30; from 512 on, where a cache further away decides how fast weights are read, after 80. A
// single row gains nothing where memory does. The number of threads has no say, so that it cannot
// change bits.
PYSEQ_FORCE_INLINE bool repays_packing(int64_t steps, int64_t batch, int64_t length,
                                       int64_t weight_bytes) {
  constexpr int64_t kFarWeights = 8 << 20;
  const int64_t rows = smaller(80, larger(4, length * length / 2048));
  return steps * batch > rows && (batch > 1 || weight_bytes <= kFarWeights);
}

// One summand of a product: rows of `a` times weights. Gate g adds to sum slot[g].
template <class T>
struct Segment {
  const T* a;
  int64_t a_stride;
  Weights<T> weights;
  int slot[4];
};

namespace detail {

// Panels are panel_stride apart. Asks on the way for as many vectors from `ahead` on as k_count.
template <class T, int G, int MR, int NP>
[[gnu::noinline, gnu::noclone]] void multiply(const T* __restrict a, int64_t a_row, int64_t a_k,
                                              const T* __restrict packed, int64_t panel_stride,
                                              int64_t k_count, T* __restrict sums, int pre,
                                              const int* slot, bool accumulate, const T* ahead) {
  using V = Vec<T>;
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
      const V value = broadcast(a[m * a_row]);
#pragma GCC unroll 8
      for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[p][m][g] += value * weight[p][g];
      }
    }
    a += a_k;
    __builtin_prefetch(ahead, 0, 2);
    ahead += kLanes<T>;
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

// The same sums from weights that lie in rows and are not packed, as dot products along k: one
// unit after the other, since the hardware fetches a single stream fastest, and four neighbouring
// vectors of it side by side. More rows than kDotRows do not fit the registers.
constexpr int kDotSides = 4, kDotRows = kAccumulators / kDotSides;
// How far ahead weights are asked for, at least; a stream that ends with every row is foreseen
// late.
constexpr int64_t kAheadBytes = 1024;

// A panel's dot products with Rows rows: a vector for each unit, row m's at parts + m * N.
template <class T, int Rows>
[[gnu::noinline, gnu::noclone]] void dot_panel(const T* a, int64_t a_stride, const T* from,
                                               int64_t stride, int last, int64_t k_count,
                                               Vec<T>* parts) {
  using V = Vec<T>;
  constexpr int N = kLanes<T>;
  const int64_t row_bytes = k_count * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = (kAheadBytes + row_bytes - 1) / larger(1, row_bytes) * stride;
  for (int unit = 0; unit < N; ++unit) {
    // Units past the last are the last again; nobody reads their sums.
    const T* const weights = from + smaller(unit, last) * stride;
    V sum[Rows][kDotSides] = {};
    const auto add = [&](int64_t k, int side, int inside) __attribute__((always_inline)) {
      const V weight = load(weights + k, inside);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        sum[m][side] = multiply_add<T>(load(a + m * a_stride + k, inside), weight, sum[m][side]);
      }
    };
    int64_t k = 0;
    for (; k + kDotSides * N <= k_count; k += kDotSides * N) {
#pragma GCC unroll 4
      for (int side = 0; side < kDotSides; ++side) {
        __builtin_prefetch(weights + ahead + k + side * N);
        add(k + side * N, side, N);
      }
    }
    for (; k < k_count; k += N) add(k, 0, lanes_inside<T>(k_count, k / N));
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      parts[m * N + unit] = (sum[m][0] + sum[m][1]) + (sum[m][2] + sum[m][3]);
    }
  }
}

template <class T>
using DotPanel = void (*)(const T*, int64_t, const T*, int64_t, int, int64_t, Vec<T>*);

template <class T, int Rows = kDotRows>
PYSEQ_FORCE_INLINE DotPanel<T> pick_dot_panel(int rows) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return pick_dot_panel<T, Rows - 1>(rows);
  }
  return dot_panel<T, Rows>;
}

// For `width` panels; a gate's rows of all of them lie side by side, so gates come first.
template <class T, int G>
void multiply_rows(const Segment<T>& segment, int64_t row, int height, int64_t first_panel,
                   int width, T* sums, int pre, bool accumulate) {
  constexpr int N = kLanes<T>;
  const Weights<T>& weights = segment.weights;
  for (int g = 0; g < G; ++g) {
    for (int p = 0; p < width; ++p) {
      const int64_t panel = first_panel + p;
      const int last = lanes_inside<T>(weights.units, panel) - 1;
      const T* const from = weights.source + (g * weights.units + panel * N) * weights.stride;
      for (int m = 0; m < height;) {
        const int rows = static_cast<int>(smaller(height - m, kDotRows));
        Vec<T> parts[kDotRows * N];
        pick_dot_panel<T>(rows)(segment.a + (row + m) * segment.a_stride, segment.a_stride, from,
                                weights.stride, last, weights.k_count, parts);
        for (int i = 0; i < rows; ++i, ++m) {
          T* const to = sums + ((p * height + m) * pre + segment.slot[g]) * N;
          const Vec<T> sum = sum_each<T, N>(parts + i * N);
          store(to, accumulate ? load(to) + sum : sum);
        }
      }
    }
  }
}

// With one gate a tile is at least 4 panels wide, so that a weight vector and a broadcast
// value both serve several multiply-adds.
template <int G>
constexpr int kMaxRows = kAccumulators / (G == 1 ? 4 : G);
constexpr bool fits(int gates, int rows, int panels) {
  return rows * panels * gates <= kAccumulators && panels * gates <= 16;
}

// Of the panels that a tile takes at a time, what all tiles take before they go on where there are
// more than so many pieces, half of the second-level cache; and how many tiles at most.
constexpr int64_t kPieceBytes = 128 << 10, kMostPieces = 4;
constexpr int64_t kTilesTogether = 16;

template <class T>
using Multiply = void (*)(const T*, int64_t, int64_t, const T*, int64_t, int64_t, T*, int,
                          const int*, bool, const T*);

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

// The segments of a product whose weights are quantized.
template <class T>
struct QuantizedInputs {
  QuantizedInputs(const Segment<T>*, int, int64_t, int64_t) {}

  template <int G>
  void multiply(int, int64_t, int64_t, int, T*, int, int, bool) const {}
};

template <>
struct QuantizedInputs<float> {
  const Segment<float>* segments;
  QuantizedInput inputs[2];

  QuantizedInputs(const Segment<float>* segments, int count, int64_t row, int64_t rows)
      : segments(segments) {
    for (int s = 0; s < count; ++s) {
      const Segment<float>& segment = segments[s];
      if (segment.weights.quantized == nullptr) continue;
      inputs[s].prepare(*segment.weights.quantized, segment.a + row * segment.a_stride,
                        segment.a_stride, rows);
    }
  }

  template <int G>
  void multiply(int s, int64_t row, int64_t panel, int width, float* sums, int height, int pre,
                bool accumulate) const {
    multiply_quantized<G>(*segments[s].weights.quantized, inputs[s].from(row), panel, width,
                          {sums, height, pre, segments[s].slot, accumulate});
  }
};

}  // namespace detail

// For every row in `rows` and every panel in `panels`: the sums over all segments, handed
// to epilogue(row, panel, sums), where sums holds Pre vectors. A sum is added up in the
// order of the segments and of k, however the rows and panels are cut into tiles, so that
// the number of threads cannot change a bit. Panels are the outer loop: one comes from far
// memory once and serves all rows. Where those that a tile takes at a time are more than a part of
// the second-level cache, all tiles take a piece of them before any goes on to the next. A loop
// that comes back to the same weights takes them backwards every other time, and finds the last
// ones still in the cache.
template <class T, int G, int Pre, class Epilogue>
PYSEQ_FORCE_INLINE void product(const Segment<T>* segments, int segment_count, int64_t row_begin,
                                int64_t row_end, int64_t panel_begin, int64_t panel_end,
                                bool backwards, Epilogue&& epilogue) {
  using detail::fits;
  using detail::kMaxRows;
  const int64_t rows = row_end - row_begin;
  if (rows <= 0) return;
  const int64_t tiles = (rows + kMaxRows<G> - 1) / kMaxRows<G>;
  // Tiles of equal height, give or take one row.
  const int64_t low = rows / tiles, higher = rows % tiles;
  const int64_t tile_rows = low + (higher > 0 ? 1 : 0);
  int64_t longest = 0;
  bool all_packed = segment_count > 0;
  for (int s = 0; s < segment_count; ++s) {
    longest = larger(longest, segments[s].weights.k_count);
    all_packed = all_packed && segments[s].weights.packed != nullptr;
  }
  constexpr int64_t kTileSize = kMaxRows<G> * (G == 1 ? 4 : 1) * Pre * kLanes<T>;
  alignas(64) T sums[detail::kTilesTogether * kTileSize];
  detail::QuantizedInputs<T> quantized(segments, segment_count, row_begin, rows);

  for (int64_t left_panels = panel_end - panel_begin; left_panels > 0;) {
    int width = 8;
    while (width > 1 && (width > left_panels || !fits(G, static_cast<int>(tile_rows), width))) {
      width /= 2;
    }
    left_panels -= width;
    const int64_t panel = backwards ? panel_begin + left_panels : panel_end - left_panels - width;
    // Each tile asks for its share of the panels that come next, which far memory would else have
    // to bring as fast as the first tile takes them.
    const int64_t next = backwards ? panel - width : panel + width;
    const bool comes_next = next >= panel_begin && next + width <= panel_end;
    const detail::Multiply<T> multiply[] = {detail::pick<T, G>(static_cast<int>(low), width),
                                            detail::pick<T, G>(static_cast<int>(tile_rows), width)};
    const int64_t piece = detail::kPieceBytes / (G * width * kVectorBytes);
    const bool in_pieces = all_packed && longest > detail::kMostPieces * piece;
    const int64_t together = in_pieces ? detail::kTilesTogether : 1;
    const auto row_of = [&](int64_t tile) {
      return row_begin + tile * low + smaller(tile, higher);
    };
    for (int64_t first = 0; first < tiles; first += together) {
      const int64_t last = smaller(tiles, first + together);
      if (in_pieces) {
        if constexpr (Pre > G) __builtin_memset(sums, 0, sizeof sums);
        for (int s = 0; s < segment_count; ++s) {
          const Segment<T>& segment = segments[s];
          const Weights<T>& weights = segment.weights;
          const int pieces = static_cast<int>(larger(1, weights.k_count / piece));
          for (int i = 0; i < pieces; ++i) {
            const Range k = share(weights.k_count, i, pieces);
            const T* const from =
                weights.packed + panel * weights.panel_size() + k.begin * G * kLanes<T>;
            // The same panels further on, or the next ones.
            const T* ahead = from;
            if (i + 1 < pieces) {
              ahead += k.size() * G * kLanes<T>;
            } else if (comes_next) {
              ahead = weights.packed + next * weights.panel_size();
            }
            for (int64_t tile = first; tile < last; ++tile) {
              const int64_t row = row_of(tile);
              multiply[tile < higher](
                  segment.a + row * segment.a_stride + k.begin, segment.a_stride, 1, from,
                  weights.panel_size(), k.size(), sums + (tile - first) * kTileSize, Pre,
                  segment.slot, Pre > G || s + i > 0, ahead + tile % width * weights.panel_size());
            }
          }
        }
      } else {
        const int64_t row = row_of(first);
        const int height = static_cast<int>(low + (first < higher ? 1 : 0));
        if (Pre > G || segment_count == 0) {
          for (int i = 0; i < height * width * Pre * kLanes<T>; ++i) sums[i] = 0;
        }
        for (int s = 0; s < segment_count; ++s) {
          const Segment<T>& segment = segments[s];
          const Weights<T>& weights = segment.weights;
          const bool accumulate = Pre > G || s > 0;
          if (weights.quantized != nullptr) {
            quantized.template multiply<G>(s, row - row_begin, panel, width, sums, height, Pre,
                                           accumulate);
            continue;
          }
          if (weights.packed == nullptr) {
            detail::multiply_rows<T, G>(segment, row, height, panel, width, sums, Pre, accumulate);
            continue;
          }
          const int64_t asked =
              comes_next && first < G * width
                  ? next * weights.panel_size() + first * weights.k_count * kLanes<T>
                  : panel * weights.panel_size();
          multiply[first < higher](segment.a + row * segment.a_stride, segment.a_stride, 1,
                                   weights.packed + panel * weights.panel_size(),
                                   weights.panel_size(), weights.k_count, sums, Pre, segment.slot,
                                   accumulate, weights.packed + asked);
        }
      }
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t row = row_of(tile);
        const int height = static_cast<int>(low + (tile < higher ? 1 : 0));
        const T* const own = sums + (tile - first) * kTileSize;
        for (int p = 0; p < width; ++p) {
          for (int m = 0; m < height; ++m) {
            epilogue(row + m, panel + p, own + (p * height + m) * Pre * kLanes<T>);
          }
        }
      }
    }
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
