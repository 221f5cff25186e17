// SPDX-License-Identifier: Apache-2.0
// What the launchers' callers need to name: the types that kernels hold numbers in and add them up
// in, a stream, an error. Host code includes this without the compiler for devices.
#pragma once

#include "../cpu/kernels.h"

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

using cpu::Accumulate;

}  // namespace pyseq::cuda

template <>
struct pyseq::cpu::AccumulateOf<pyseq::cuda::Half> {
  using type = float;
};
template <>
struct pyseq::cpu::AccumulateOf<pyseq::cuda::Bfloat16> {
  using type = float;
};
