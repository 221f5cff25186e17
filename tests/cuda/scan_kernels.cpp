// SPDX-License-Identifier: Apache-2.0
// The scan's kernels for the CPU.
#include "cuda/scan_backward.cu"
#include "cuda/scan_forward.cu"
#include "cuda/scan_step.cu"
#include "exports.h"

using namespace pyseq::cuda;

#define PYSEQ_EXPORT_STEP(S, function, direction, name)                                       \
  PYSEQ_EXPORT int function##_##name(const direction<S>* args, int64_t n, const void* sums) { \
    return function<S>(*args, n, static_cast<const Accumulate<S>*>(sums), nullptr);           \
  }
#define PYSEQ_EXPORT_SCAN(S, name)                                                           \
  PYSEQ_EXPORT int scan_forward_##name(const ScanForward<S>* args, const ScanTiles* tiles,   \
                                       unsigned* counters) {                                 \
    return scan_forward<S>(*args, *tiles, counters, nullptr);                                \
  }                                                                                          \
  PYSEQ_EXPORT int scan_backward_##name(const ScanBackward<S>* args, const ScanTiles* tiles, \
                                        unsigned* counters) {                                \
    return scan_backward<S>(*args, *tiles, counters, nullptr);                               \
  }                                                                                          \
  PYSEQ_EXPORT void scan_needs_##name(const ScanSizes* sizes, const ScanTiles* tiles,        \
                                      ScanNeeds* needs) {                                    \
    needs[0] = scan_forward_needs<S>(*sizes, *tiles);                                        \
    needs[1] = scan_backward_needs<S>(*sizes, *tiles);                                       \
  }                                                                                          \
  PYSEQ_EXPORT_STEP(S, scan_gate_forward, ScanForward, name)                                 \
  PYSEQ_EXPORT_STEP(S, scan_step_forward, ScanForward, name)                                 \
  PYSEQ_EXPORT_STEP(S, scan_project_forward, ScanForward, name)                              \
  PYSEQ_EXPORT_STEP(S, scan_state_backward, ScanBackward, name)                              \
  PYSEQ_EXPORT_STEP(S, scan_project_backward, ScanBackward, name)                            \
  PYSEQ_EXPORT_STEP(S, scan_gate_backward, ScanBackward, name)
PYSEQ_EXPORT_SCAN(float, float32)
PYSEQ_EXPORT_SCAN(double, float64)
PYSEQ_EXPORT_SCAN(Half, float16)
PYSEQ_EXPORT_SCAN(Bfloat16, bfloat16)

// That the tests declare the structures as they are.
PYSEQ_EXPORT int64_t forward_size() { return sizeof(ScanForward<float>); }
PYSEQ_EXPORT int64_t backward_size() { return sizeof(ScanBackward<float>); }
