// SPDX-License-Identifier: Apache-2.0
// The kernels of the loss for the tests: sizes, options and pointers in the order of the struct.
#include "cuda/loss.cu"
#include "exports.h"

namespace {

template <class S>
int loss_rows(const int64_t* sizes, double label_smoothing, void* const* data) {
  const auto indices = [&](int i) { return static_cast<const int64_t*>(data[i]); };
  const auto numbers = [&](int i) { return static_cast<S*>(data[i]); };
  return pyseq::cuda::loss_rows<S>({sizes[0], sizes[1], sizes[2], label_smoothing, sizes[3] != 0,
                                    indices(0), indices(1), numbers(2), numbers(3)},
                                   nullptr);
}

}  // namespace

PYSEQ_EXPORT int loss_rows_float32(const int64_t* sizes, double smoothing, void* const* data) {
  return loss_rows<float>(sizes, smoothing, data);
}
PYSEQ_EXPORT int loss_rows_float64(const int64_t* sizes, double smoothing, void* const* data) {
  return loss_rows<double>(sizes, smoothing, data);
}
