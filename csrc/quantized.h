// SPDX-License-Identifier: Apache-2.0
// Quantized weights as tensors. Operators take them in the place of the matrix that they stand
// for: uint8, with a row for each of its rows, in which runs of its columns lie one behind the
// other as the kernels read them.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace pyseq {

using cpu::QuantizedWeights;

inline bool is_quantized(const at::Tensor& weight) { return weight.scalar_type() == at::kByte; }

// The weights of one run; null if they are not quantized.
const QuantizedWeights* quantized_run(const at::Tensor& weight, size_t index = 0);

// A matrix of rows (gate, unit) and runs of columns: floating like `like`, or quantized in these
// runs, and then `like` is float32.
void check_weight(const at::Tensor& weight, const char* name, const char* letters, int64_t rows,
                  int64_t gates, c10::IntArrayRef runs, const at::Tensor& like,
                  const char* like_name);

// rows (N, I) times one run, plus bias: (N, rows of the weight).
at::Tensor quantized_product(const at::Tensor& rows, const at::Tensor& weight, size_t index,
                             const std::optional<at::Tensor>& bias);

// Packs a float32 matrix; `kind` is "int8" or "bfloat16". Not operators: what they give
// depends on the machine.
at::Tensor quantize_weight(const at::Tensor& weight, int64_t gates,
                           const std::vector<int64_t>& columns, const std::string& kind);

// For each run the weights (rows, columns), int8 or bfloat16, and for int8 the scales (rows,).
std::vector<std::pair<at::Tensor, at::Tensor>> quantized_values(const at::Tensor& weight);

}  // namespace pyseq
