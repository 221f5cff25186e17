// SPDX-License-Identifier: Apache-2.0
// cuda/plan.h for Python: numbers by name, in and out.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>

namespace pyseq {

using PlanValue = std::variant<int64_t, double, std::string>;

// The plan of the operator "scan" or "decode" with the sizes of ScanLoop or DecodeLoop. Facts
// and sizes carry the names of the members; `path` is one of cuda::Choice, or empty for what the
// environment says. Throws std::invalid_argument, which Python sees as ValueError.
std::map<std::string, PlanValue> cuda_plan(const std::string& op,
                                           const std::map<std::string, double>& device,
                                           const std::map<std::string, int64_t>& sizes,
                                           const std::string& dtype, const std::string& path);

// The facts of torch's current CUDA device as the kernels see it, or none where they are not
// compiled in: what enter_cuda_kernels() left here tells.
using CudaFacts = std::map<std::string, PlanValue>;
inline CudaFacts (*present_cuda_device)() = nullptr;

inline CudaFacts cuda_device() {
  return present_cuda_device == nullptr ? CudaFacts() : present_cuda_device();
}

}  // namespace pyseq
