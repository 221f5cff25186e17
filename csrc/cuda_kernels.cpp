// SPDX-License-Identifier: Apache-2.0
#include "cuda_kernels.h"

#include "cuda/attend.h"
#include "cuda_context.h"
#include "cuda_decode.h"
#include "cuda_plan.h"
#include "cuda_scan.h"
#include "devices.h"

namespace pyseq {

namespace {

using at::Tensor;

template <class T>
void attend_forward(const cpu::Attend<T>& args) {
  const auto own = on_cuda::native(args);
  const Tensor work = on_cuda::scratch(cuda::attend_workspace(own));
  C10_CUDA_CHECK(cuda::attend_forward(own, work.data_ptr(), on_cuda::stream()));
}

template <class T>
void attend_backward(const cpu::AttendBackward<T>& args) {
  const auto own = on_cuda::native(args);
  const Tensor work = on_cuda::scratch(cuda::attend_workspace(own.forward));
  C10_CUDA_CHECK(cuda::attend_backward(own, work.data_ptr(), on_cuda::stream()));
}

template <class T>
const cpu::Kernels<T> kTable{
    .gemm = nullptr,
    .scan_forward = &cuda_scan_forward<T>,
    .replay = nullptr,
    .scan_backward = &cuda_scan_backward<T>,
    .attend_forward = &attend_forward<T>,
    .attend_backward = &attend_backward<T>,
    .decode_forward = &cuda_decode_forward<T>,
    .decode_backward = &cuda_decode_backward<T>,
    .linear_cross_entropy = nullptr,
    .generate = nullptr,
    .sigmoid = nullptr,
    .tanh = nullptr,
    .multiply_add_rate = nullptr,
    .read_rate = nullptr,
};

CudaFacts facts_by_name() {
  const cuda::DeviceFacts facts = on_cuda::facts();
  return {
      {"capability", facts.capability},
      {"multiprocessors", facts.multiprocessors},
      {"shared_per_block", facts.shared_per_block},
      {"shared_per_multiprocessor", facts.shared_per_multiprocessor},
      {"registers_per_multiprocessor", facts.registers_per_multiprocessor},
      {"l2_bytes", facts.l2_bytes},
      {"clock", facts.clock},
      {"bandwidth", facts.bandwidth},
      {"cooperative", int64_t{facts.cooperative}},
  };
}

}  // namespace

void enter_cuda_kernels() {
  present_cuda_device = &facts_by_name;
  cuda_kernels<at::Half> = &kTable<at::Half>;
  cuda_kernels<at::BFloat16> = &kTable<at::BFloat16>;
  cuda_kernels<float> = &kTable<float>;
  cuda_kernels<double> = &kTable<double>;
}

}  // namespace pyseq
