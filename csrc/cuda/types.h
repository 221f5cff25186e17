// SPDX-License-Identifier: Apache-2.0
// What the launchers' callers need to name: the types that kernels hold numbers in and add them up
// in, a stream, an error. Host code includes this without the compiler for devices.
#pragma once

#ifdef PYSEQ_CUDA_SHIM
#include "shim.h"
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#endif

namespace pyseq::cuda {

#ifdef PYSEQ_CUDA_SHIM
using Half = shim::Half;
using Bfloat16 = shim::Bfloat16;
#else
using Half = __half;
using Bfloat16 = __nv_bfloat16;
#endif

// What numbers of a storage type are computed and added up in.
template <class S>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class S>
using Accumulate = typename AccumulateOf<S>::type;

}  // namespace pyseq::cuda
