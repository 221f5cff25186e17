// SPDX-License-Identifier: Apache-2.0
// The product of many rows with quantized weights: the input of a quantized layer, all steps
// at once.
#pragma once

#include "kernels.h"
#include "steps.h"

namespace pyseq::cpu::PYSEQ_TIER {

namespace detail {

// Panels of 16 bits as those of float32 that a tile reads.
inline void widen_panels(const QuantizedWeights& weights, int64_t panel, int64_t count, float* to) {
  const QuantizedLayout layout(weights);
  for (int64_t p = panel; p < panel + count; ++p) {
    const uint8_t* const from = quantized_panels(weights) + p * layout.panel_bytes();
    for (int64_t k = 0; k < weights.k_count; ++k) {
      for (int64_t gate = 0; gate < layout.gates; ++gate) {
        Sums8 two;
        __builtin_memcpy(&two, from + (k / 2 * layout.gates + gate) * kVectorBytes, kVectorBytes);
        const Sums8 one = k % 2 == 0 ? two << 16 : two & ~0xffff;
        store(to, reinterpret_cast<Vec<float>>(one));
        to += kQuantizedLanes;
      }
    }
  }
}

// Rows that are taken at a time: quantized, they stay in the cache while the panels go by.
constexpr int64_t kLinearRows = 256;
// From so many rows on, weights of 16 bits are made wide once for all of them, this many
// panels at a time.
constexpr int64_t kRowsToWiden = 8, kWide = 4;

// The products of all rows with `count` panels, which stand for those from `first` on.
template <int G>
void multiply_panels(const QuantizedLinear& args, const Weights<float>& weights, int64_t begin,
                     int64_t count, int64_t first) {
  const int64_t units = args.weights->units;
  const Segment<float> segment = input_segment(args.rows, weights);
  for (int64_t row = 0; row < args.m; row += kLinearRows) {
    product<float, G, G>(&segment, 1, row, smaller(row + kLinearRows, args.m), begin, begin + count,
                         false, [&](int64_t at, int64_t panel, const float* sums) {
                           const int64_t unit = (panel - begin + first) * kQuantizedLanes;
                           const int inside = lanes_inside<float>(units, panel - begin + first);
                           for (int g = 0; g < G; ++g) {
                             Vec<float> sum = load(sums + g * kQuantizedLanes);
                             if (args.bias != nullptr)
                               sum += load(args.bias + g * units + unit, inside);
                             store(args.out + (at * G + g) * units + unit, sum, inside);
                           }
                         });
  }
}

template <int G>
void multiply_linear(const QuantizedLinear& args) {
  const QuantizedWeights& weights = *args.weights;
  const int64_t units = weights.units, k_count = weights.k_count;
  const bool widens = weights.kind == QuantizedKind::kBfloat16 && args.m >= kRowsToWiden;
  const int64_t work = args.m * G * units * k_count;
  const int64_t wide_size = kWide * k_count * G * kQuantizedLanes;
  const int wanted = static_cast<int>(smaller(args.threads, 1 + work / 1000000));
  Workspace workspace(widens ? static_cast<size_t>(wide_size * wanted) * sizeof(float) : 0);
  parallel(wanted, [&](int thread, int present) {
    const Range mine = share(vectors<float>(units), thread, present);
    if (!widens) {
      const Weights<float> packed{nullptr, 0, units, G, k_count, nullptr, args.weights};
      multiply_panels<G>(args, packed, mine.begin, mine.size(), mine.begin);
      return;
    }
    float* const wide = static_cast<float*>(workspace.data()) + thread * wide_size;
    const Weights<float> packed{nullptr, 0, units, G, k_count, wide};
    for (int64_t panel = mine.begin; panel < mine.end; panel += kWide) {
      const int64_t count = smaller(kWide, mine.end - panel);
      widen_panels(weights, panel, count, wide);
      multiply_panels<G>(args, packed, 0, count, panel);
    }
  });
}

}  // namespace detail

inline void quantized_linear(const QuantizedLinear& args) {
  switch (args.weights->gates) {
    case 3:
      return detail::multiply_linear<3>(args);
    case 4:
      return detail::multiply_linear<4>(args);
    default:
      return detail::multiply_linear<1>(args);
  }
}

}  // namespace pyseq::cpu::PYSEQ_TIER
