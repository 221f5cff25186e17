// SPDX-License-Identifier: Apache-2.0
// Weights of 8 or 16 bits for inference: how they are packed, and the products of a tile over
// them. `product` in tile.h comes here for segments whose weights are quantized.
#pragma once

#include <new>

#include "kernels.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyseq::cpu::PYSEQ_TIER {

namespace detail {

constexpr int kQuantizedLanes = kLanes<float>;

// Where things lie in quantized weights. A panel holds the units of a vector, all gates of
// them, as [k / group][gate][lane][group]; behind those of 8 bits come [gate][lane] scales and
// [gate][lane] corrections, the sums to begin with. What is past the last unit or k is zero.
struct QuantizedLayout {
  explicit QuantizedLayout(const QuantizedWeights& weights)
      : is_int8(weights.kind == QuantizedKind::kInt8),
        group(weights.group),
        gates(weights.gates),
        groups((weights.k_count + weights.group - 1) / weights.group) {}

  int64_t vector_bytes() const { return kQuantizedLanes * group * (is_int8 ? 1 : 2); }
  int64_t scales_at() const { return groups * gates * vector_bytes(); }
  int64_t corrections_at() const { return scales_at() + gates * kVectorBytes; }
  int64_t panel_bytes() const { return scales_at() + (is_int8 ? 2 * gates * kVectorBytes : 0); }

  bool is_int8;
  int64_t group, gates, groups;
};

inline const uint8_t* quantized_panels(const QuantizedWeights& weights) {
  return reinterpret_cast<const uint8_t*>(&weights + 1);
}

using Sums8 = VecInt<float>;

// ---- Dots of 8 bits ----
//
// The rows that the weights are multiplied with are quantized too, so that sums are exact in
// 32 bits. A dot adds to each lane its kGroup neighbouring weights times as many values of a
// row, which lie in 4 bytes.

#if defined(__AVX512F__) || !defined(__AVX2__)
// Values of 16 bits.
struct PairDot {
  static constexpr int64_t kGroup = 2;
  static constexpr int kOffset = 0;

#if defined(__AVX512BW__)
  static PYSEQ_FORCE_INLINE __m512i weights(const uint8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static PYSEQ_FORCE_INLINE __m512i values(int32_t pair) { return _mm512_set1_epi32(pair); }
  static PYSEQ_FORCE_INLINE void add(Sums8& sums, __m512i weights, __m512i values) {
    sums += reinterpret_cast<Sums8>(_mm512_madd_epi16(weights, values));
  }
#else
  // 127 * 127 is less than 2^15: the products fit in 16 bits.
  typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 2)));
  typedef int16_t Words __attribute__((vector_size(kVectorBytes)));

  static PYSEQ_FORCE_INLINE Words weights(const uint8_t* from) {
    Bytes bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Words);
  }
  static PYSEQ_FORCE_INLINE Words values(int32_t pair) {
    return reinterpret_cast<Words>(Sums8{} + pair);
  }
  static PYSEQ_FORCE_INLINE void add(Sums8& sums, Words weights, Words values) {
    const auto both = reinterpret_cast<Sums8>(weights * values);
    sums += (both << 16 >> 16) + (both >> 16);
  }
#endif
};
#endif

#if defined(__AVX512F__)
// Values of 8 bits without a sign, kOffset more than they stand for; the corrections take that
// off again. In assembler, since not every machine of the tier has this one instruction:
// compiled for those that do, the whole tile around it would have to be.
struct QuadDot {
  static constexpr int64_t kGroup = 4;
  static constexpr int kOffset = 128;

  static PYSEQ_FORCE_INLINE __m512i weights(const uint8_t* from) {
    return _mm512_loadu_si512(from);
  }
  static PYSEQ_FORCE_INLINE __m512i values(int32_t quad) { return _mm512_set1_epi32(quad); }
  static PYSEQ_FORCE_INLINE void add(Sums8& sums, __m512i weights, __m512i values) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(values), "vm"(weights));
  }
};
#elif defined(__AVX2__)
// Values of 8 bits, whose signs are moved to the weights for an instruction that takes one
// side without. Two products of 127 * 127 do not reach where it saturates, 2^15.
struct QuadDot {
  static constexpr int64_t kGroup = 4;
  static constexpr int kOffset = 0;

  static PYSEQ_FORCE_INLINE __m256i weights(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static PYSEQ_FORCE_INLINE __m256i values(int32_t quad) { return _mm256_set1_epi32(quad); }
  static PYSEQ_FORCE_INLINE void add(Sums8& sums, __m256i weights, __m256i values) {
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(values), _mm256_sign_epi8(weights, values));
    sums += reinterpret_cast<Sums8>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#endif

#if defined(__AVX2__)
using Int8Dot = QuadDot;
#else
using Int8Dot = PairDot;
#endif

// Of the dots compiled in, that for this machine.
inline int64_t int8_group() {
#if defined(__AVX512F__)
  if (!has_int8_dots()) return PairDot::kGroup;
#endif
  return Int8Dot::kGroup;
}

// ---- Tiles ----

// Rows of a product as the tiles read them.
struct QuantizedRows {
  const uint8_t* values;  // of 8 bits: a row is `stride` bytes long
  const float* scales;    // of 8 bits: one for each row
  const float* floats;    // of 16 bits
  int64_t stride;
};

// Where the sums of a tile go: vector (panel, row, slot) lies at
// (panel * height + row) * pre + slot.
struct TileSums {
  float* sums;
  int height, pre;
  const int* slot;
  bool accumulate;

  PYSEQ_FORCE_INLINE void put(int panel, int row, int gate, Vec<float> sum) const {
    float* const to = sums + ((panel * height + row) * pre + slot[gate]) * kQuantizedLanes;
    store(to, accumulate ? load(to) + sum : sum);
  }
};

template <class Dot, int G, int MR, int NP>
[[gnu::noinline]] void multiply_int8(const QuantizedLayout& layout, const QuantizedRows& rows,
                                     int row, const uint8_t* panels, const TileSums& out,
                                     int first_panel) {
  constexpr int64_t kStep = kQuantizedLanes * Dot::kGroup;
  const int64_t panel_bytes = layout.panel_bytes();
  Sums8 sum[NP][MR][G];
#pragma GCC unroll 8
  for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const uint8_t* const at = panels + p * panel_bytes + layout.corrections_at();
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        __builtin_memcpy(&sum[p][m][g], at + g * kVectorBytes, kVectorBytes);
      }
    }
  }
  const uint8_t* values = rows.values + row * rows.stride;
  for (int64_t k = 0; k < layout.groups; ++k) {
    const uint8_t* const at = panels + k * G * kStep;
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const auto weights = Dot::weights(at + p * panel_bytes + g * kStep);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          int32_t four;
          __builtin_memcpy(&four, values + m * rows.stride, sizeof four);
          Dot::add(sum[p][m][g], weights, Dot::values(four));
        }
      }
    }
    values += 4;
  }
#pragma GCC unroll 8
  for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      Vec<float> scale;
      __builtin_memcpy(&scale, panels + p * panel_bytes + layout.scales_at() + g * kVectorBytes,
                       kVectorBytes);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Vec<float> exact = __builtin_convertvector(sum[p][m][g], Vec<float>);
        out.put(first_panel + p, row + m, g, exact * (scale * rows.scales[row + m]));
      }
    }
  }
}

// Two weights lie in 32 bits, the first one below; each becomes a float32 by one operation.
template <int G, int MR, int NP>
[[gnu::noinline]] void multiply_bfloat16(const QuantizedLayout& layout, int64_t k_count,
                                         const QuantizedRows& rows, int row, const uint8_t* panels,
                                         const TileSums& out, int first_panel) {
  const int64_t panel_bytes = layout.panel_bytes();
  Vec<float> sum[NP][MR][G] = {};
  const float* values = rows.floats + row * rows.stride;
  const auto add = [&](int64_t k, bool both) {
    const uint8_t* const at = panels + k / 2 * G * kVectorBytes;
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        Sums8 two;
        __builtin_memcpy(&two, at + p * panel_bytes + g * kVectorBytes, kVectorBytes);
        const auto first = reinterpret_cast<Vec<float>>(two << 16);
        const auto second = reinterpret_cast<Vec<float>>(two & ~0xffff);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const float* const value = values + m * rows.stride + k;
          sum[p][m][g] += value[0] * first;
          if (both) sum[p][m][g] += value[1] * second;
        }
      }
    }
  };
  for (int64_t k = 0; k + 2 <= k_count; k += 2) add(k, true);
  if (k_count % 2 != 0) add(k_count - 1, false);
#pragma GCC unroll 8
  for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) out.put(first_panel + p, row + m, g, sum[p][m][g]);
    }
  }
}

// At most 4 rows: a weight is unpacked once for them, and more would add little.
template <int G>
constexpr int kQuantizedRows = kAccumulators / G < 4 ? kAccumulators / G : 4;

// As many panels as registers allow.
template <int G, int MR>
constexpr int kQuantizedPanels = MR * G * 8 <= kAccumulators   ? 8
                                 : MR * G * 4 <= kAccumulators ? 4
                                 : MR * G * 2 <= kAccumulators ? 2
                                                               : 1;

template <int G, int MR, int NP>
void multiply_block(const QuantizedWeights& weights, const QuantizedLayout& layout,
                    const QuantizedRows& rows, int row, const uint8_t* panels, const TileSums& out,
                    int first_panel) {
  const uint8_t* const from = panels + first_panel * layout.panel_bytes();
  if (!layout.is_int8) {
    multiply_bfloat16<G, MR, NP>(layout, weights.k_count, rows, row, from, out, first_panel);
    return;
  }
#if defined(__AVX512F__)
  if (layout.group == PairDot::kGroup) {
    multiply_int8<PairDot, G, MR, NP>(layout, rows, row, from, out, first_panel);
    return;
  }
#endif
  multiply_int8<Int8Dot, G, MR, NP>(layout, rows, row, from, out, first_panel);
}

template <int G, int MR>
void multiply_rows_of(const QuantizedWeights& weights, const QuantizedLayout& layout,
                      const QuantizedRows& rows, int row, const uint8_t* panels, int width,
                      const TileSums& out) {
  constexpr int NP = kQuantizedPanels<G, MR>;
  int p = 0;
  for (; p + NP <= width; p += NP) {
    multiply_block<G, MR, NP>(weights, layout, rows, row, panels, out, p);
  }
  for (; p < width; ++p) multiply_block<G, MR, 1>(weights, layout, rows, row, panels, out, p);
}

// The sums of `width` panels from `panel` on, for the rows of a tile.
template <int G>
void multiply_quantized(const QuantizedWeights& weights, const QuantizedRows& rows, int64_t panel,
                        int width, const TileSums& out) {
  const QuantizedLayout layout(weights);
  const uint8_t* const panels = quantized_panels(weights) + panel * layout.panel_bytes();
  for (int row = 0; row < out.height;) {
    const int left = out.height - row;
    if (left >= 4 && kQuantizedRows<G> >= 4) {
      multiply_rows_of<G, kQuantizedRows<G>>(weights, layout, rows, row, panels, width, out);
      row += kQuantizedRows<G>;
    } else if (left >= 3) {
      multiply_rows_of<G, 3>(weights, layout, rows, row, panels, width, out);
      row += 3;
    } else if (left == 2) {
      multiply_rows_of<G, 2>(weights, layout, rows, row, panels, width, out);
      row += 2;
    } else {
      multiply_rows_of<G, 1>(weights, layout, rows, row, panels, width, out);
      row += 1;
    }
  }
}

// ---- Rows of 8 bits ----

// Rows of smaller numbers only count as zero: divided by them, others would overflow.
constexpr float kLeastMagnitude = 0x1p-100f;

// Quantizes `k_count` numbers by their largest magnitude, to -127 ... 127, and returns what one
// unit is worth. What is no number, or none of the finite ones, makes that NaN.
inline float quantize_row(const float* from, int64_t k_count, int64_t group, uint8_t* to) {
  using V = Vec<float>;
  typedef uint8_t Bytes __attribute__((vector_size(kQuantizedLanes)));
  typedef int16_t Words __attribute__((vector_size(2 * kQuantizedLanes)));
  constexpr float kMost = 127, kRound = 0x1.8p23f;  // adding kRound rounds to an integer
  V largest = {}, poison = {};
  for (int64_t k = 0; k < k_count; k += kQuantizedLanes) {
    const V value = load(from + k, lanes_inside<float>(k_count, k / kQuantizedLanes));
    const V negative = -value, magnitude = value < 0 ? negative : value;
    largest = magnitude > largest ? magnitude : largest;
    poison += value - value;
  }
  float most = 0;
  for (int lane = 0; lane < kQuantizedLanes; ++lane) {
    most = largest[lane] > most ? largest[lane] : most;
  }
  const float factor = most < kLeastMagnitude ? 0 : kMost / most;
  for (int64_t k = 0; k < k_count; k += kQuantizedLanes) {
    const V value = load(from + k, lanes_inside<float>(k_count, k / kQuantizedLanes)) * factor;
    const Sums8 whole =
        reinterpret_cast<Sums8>(value + kRound) - reinterpret_cast<Sums8>(broadcast(kRound));
    if (group == 4) {
      const Bytes bytes = __builtin_convertvector(whole + Int8Dot::kOffset, Bytes);
      __builtin_memcpy(to + k, &bytes, sizeof bytes);
    } else {
      const Words words = __builtin_convertvector(whole, Words);
      __builtin_memcpy(to + 2 * k, &words, sizeof words);
    }
  }
  return (most < kLeastMagnitude ? 0 : most / kMost) + sum_lanes<float>(poison);
}

// The rows of a product as its weights want them, made once for all panels.
class QuantizedInput {
 public:
  QuantizedInput() = default;
  ~QuantizedInput() {
    if (more_ != nullptr) more_->~Workspace();
  }
  QuantizedInput(const QuantizedInput&) = delete;
  QuantizedInput& operator=(const QuantizedInput&) = delete;

  void prepare(const QuantizedWeights& weights, const float* rows, int64_t stride, int64_t count) {
    if (weights.kind != QuantizedKind::kInt8) {
      rows_ = {nullptr, nullptr, rows, stride};
      return;
    }
    const int64_t bytes =
        vectors<float>(weights.k_count) * kQuantizedLanes * 4 / weights.group;  // of a row
    const auto size = static_cast<size_t>(count * (bytes + static_cast<int64_t>(sizeof(float))));
    uint8_t* memory = near_;
    if (size > sizeof near_) {
      more_ = new (place_) Workspace(size);
      memory = static_cast<uint8_t*>(more_->data());
    }
    auto* const scales = reinterpret_cast<float*>(memory);
    uint8_t* const values = memory + count * static_cast<int64_t>(sizeof(float));
    for (int64_t row = 0; row < count; ++row) {
      scales[row] =
          quantize_row(rows + row * stride, weights.k_count, weights.group, values + row * bytes);
    }
    rows_ = {values, scales, nullptr, bytes};
  }

  QuantizedRows from(int64_t row) const {
    if (rows_.floats != nullptr)
      return {nullptr, nullptr, rows_.floats + row * rows_.stride, rows_.stride};
    return {rows_.values + row * rows_.stride, rows_.scales + row, nullptr, rows_.stride};
  }

 private:
  alignas(64) uint8_t near_[8192];  // enough for the few rows that this is for
  alignas(Workspace) uint8_t place_[sizeof(Workspace)];
  Workspace* more_ = nullptr;  // at that place, or none
  QuantizedRows rows_{};
};

}  // namespace detail

// ---- Packing ----

inline int64_t quantized_bytes(const QuantizedWeights& shape) {
  return static_cast<int64_t>(sizeof shape) +
         vectors<float>(shape.units) * detail::QuantizedLayout(shape).panel_bytes();
}

// The shape that weights packed here have: `gates` rows of k_count for each of the units.
inline QuantizedWeights quantized_shape(QuantizedKind kind, int64_t units, int64_t gates,
                                        int64_t k_count) {
  QuantizedWeights shape{};
  shape.magic = QuantizedWeights::kMagic;
  shape.kind = kind;
  shape.lanes = detail::kQuantizedLanes;
  shape.group = kind == QuantizedKind::kInt8 ? static_cast<int32_t>(detail::int8_group()) : 2;
  shape.gates = static_cast<int32_t>(gates);
  shape.units = units;
  shape.k_count = k_count;
  return shape;
}

// Where row (gate, unit) of the weights lies, in bytes from the first panel.
struct PackedRow {
  PackedRow(const QuantizedWeights& shape, const detail::QuantizedLayout& layout, int64_t row)
      : layout(layout),
        gate(row / shape.units),
        lane(row % shape.units % detail::kQuantizedLanes),
        panel(row % shape.units / detail::kQuantizedLanes * layout.panel_bytes()) {}

  int64_t weight(int64_t k) const {
    const int64_t number = lane * layout.group + k % layout.group;
    return panel + (k / layout.group * layout.gates + gate) * layout.vector_bytes() +
           number * (layout.is_int8 ? 1 : 2);
  }
  int64_t scale() const { return panel + layout.scales_at() + number() * 4; }
  int64_t correction() const { return panel + layout.corrections_at() + number() * 4; }
  int64_t number() const { return gate * detail::kQuantizedLanes + lane; }

  const detail::QuantizedLayout& layout;
  int64_t gate, lane, panel;
};

// To the nearest, ties to even.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Writes `shape` and, behind it, the panels. `weight` holds rows (gate, unit) of k, all finite.
// A row of 8 bits is scaled by its largest magnitude.
inline void pack_quantized(const QuantizedWeights& shape, const float* weight, void* packed) {
  const detail::QuantizedLayout layout(shape);
  __builtin_memset(packed, 0, static_cast<size_t>(quantized_bytes(shape)));
  __builtin_memcpy(packed, &shape, sizeof shape);
  uint8_t* const panels = static_cast<uint8_t*>(packed) + sizeof shape;
  for (int64_t row = 0; row < shape.gates * shape.units; ++row) {
    const PackedRow to(shape, layout, row);
    const float* const from = weight + row * shape.k_count;
    if (!layout.is_int8) {
      for (int64_t k = 0; k < shape.k_count; ++k) {
        const uint16_t bits = to_bfloat16(from[k]);
        __builtin_memcpy(panels + to.weight(k), &bits, sizeof bits);
      }
      continue;
    }
    float most = 0;
    for (int64_t k = 0; k < shape.k_count; ++k) {
      const float magnitude = __builtin_fabsf(from[k]);
      most = magnitude > most ? magnitude : most;
    }
    const float scale = most < detail::kLeastMagnitude ? 0 : most / 127;
    int32_t sum = 0;
    for (int64_t k = 0; k < shape.k_count; ++k) {
      const auto whole = static_cast<int8_t>(scale == 0 ? 0 : __builtin_rintf(from[k] / scale));
      panels[to.weight(k)] = static_cast<uint8_t>(whole);
      sum += whole;
    }
    const int32_t correction = layout.group == 4 ? -detail::Int8Dot::kOffset * sum : 0;
    __builtin_memcpy(panels + to.scale(), &scale, sizeof scale);
    __builtin_memcpy(panels + to.correction(), &correction, sizeof correction);
  }
}

// What was packed: rows (gate, unit) of k, as the bits of bfloat16 or as int8, for which a
// scale of each row is written too.
inline void unpack_quantized(const QuantizedWeights& weights, void* values, float* scales) {
  const detail::QuantizedLayout layout(weights);
  const uint8_t* const panels = detail::quantized_panels(weights);
  const int64_t size = layout.is_int8 ? 1 : 2;
  for (int64_t row = 0; row < weights.gates * weights.units; ++row) {
    const PackedRow from(weights, layout, row);
    uint8_t* const to = static_cast<uint8_t*>(values) + row * weights.k_count * size;
    for (int64_t k = 0; k < weights.k_count; ++k) {
      __builtin_memcpy(to + k * size, panels + from.weight(k), static_cast<size_t>(size));
    }
    if (layout.is_int8) __builtin_memcpy(scales + row, panels + from.scale(), sizeof(float));
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
