// SPDX-License-Identifier: Apache-2.0
#include "facts.h"

namespace pyseq::cuda {

cudaError_t device_facts(DeviceFacts* facts) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
    return value;
  };
  const int major = ask(cudaDevAttrComputeCapabilityMajor);
  facts->capability = 10 * major + ask(cudaDevAttrComputeCapabilityMinor);
  facts->multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  facts->shared_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  facts->shared_per_multiprocessor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  facts->registers_per_multiprocessor = ask(cudaDevAttrMaxRegistersPerMultiprocessor);
  facts->l2_bytes = ask(cudaDevAttrL2CacheSize);
  constexpr double kKilo = 1e3;  // rates come in kHz
  facts->clock = kKilo * ask(cudaDevAttrClockRate);
  // Two transfers in a cycle, of so many bits.
  facts->bandwidth =
      2 * kKilo * ask(cudaDevAttrMemoryClockRate) * ask(cudaDevAttrGlobalMemoryBusWidth) / 8;
  // A device that does not tell its rates, as a part of one may not, gets those of an older one:
  // the plan divides by them.
  if (facts->clock <= 0) facts->clock = 1.4e9;
  if (facts->bandwidth <= 0) facts->bandwidth = 1e12;
  facts->cooperative = ask(cudaDevAttrCooperativeLaunch) != 0;
  return error;
}

}  // namespace pyseq::cuda
