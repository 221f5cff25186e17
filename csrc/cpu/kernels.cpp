// SPDX-License-Identifier: Apache-2.0
// The kernels of one tier. CMakeLists.txt compiles this file once per tier, with its flags
// and with PYSEQ_TIER as the name of its namespace.
#include "kernels.h"

#include "attend_history.h"
#include "decode_backward.h"
#include "decode_forward.h"
#include "gemm.h"
#include "linear.h"
#include "loss.h"
#include "peak.h"
#include "replay.h"
#include "scan_backward.h"
#include "scan_forward.h"
#include "search.h"

namespace pyseq::cpu::PYSEQ_TIER {

namespace {

template <class T>
void sigmoid(const T* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int inside = lanes_inside<T>(count, i / kLanes<T>);
    store(to + i, Math<T>::sigmoid(load(from + i, inside)), inside);
  }
}

template <class T>
void tanh(const T* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int inside = lanes_inside<T>(count, i / kLanes<T>);
    store(to + i, Math<T>::tanh(load(from + i, inside)), inside);
  }
}

template <class T>
constexpr Kernels<T> table() {
  return {gemm<T>,
          scan_forward<T>,
          replay<T>,
          scan_backward<T>,
          attend_forward<T>,
          attend_backward<T>,
          decode_forward<T>,
          decode_backward<T>,
          linear_cross_entropy<T>,
          generate<T>,
          sigmoid<T>,
          tanh<T>,
          multiply_add_rate<T>,
          read_rate<T>};
}

}  // namespace

#define PYSEQ_STRING_(name) #name
#define PYSEQ_STRING(name) PYSEQ_STRING_(name)

extern const Tier kTier;
const Tier kTier = {
    PYSEQ_STRING(PYSEQ_TIER),
    table<float>(),
    table<double>(),
    {quantized_shape, quantized_bytes, pack_quantized, unpack_quantized, quantized_linear}};

}  // namespace pyseq::cpu::PYSEQ_TIER
