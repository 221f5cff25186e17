// SPDX-License-Identifier: Apache-2.0
#include "quantized.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <numeric>

#include "arguments.h"
#include "check.h"

namespace pyseq {

namespace {

using cpu::QuantizedKind;

constexpr int64_t kAlign = alignof(QuantizedWeights);

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// The largest magnitude of sums of 8 bits, 128 * 127 for each k, must stay below 2^31.
constexpr int64_t kMostColumns = int64_t{1} << 16;

const char* no_weights() {
  return " must be a floating-point matrix or what pyseq.quantize packed, got other bytes";
}

// Whether weights of `rows` rows may have such a header.
bool is_possible(const QuantizedWeights& run, int64_t rows) {
  return (run.kind == QuantizedKind::kInt8 || run.kind == QuantizedKind::kBfloat16) &&
         run.gates > 0 && rows % run.gates == 0 && run.units == rows / run.gates &&
         run.k_count >= 0 && run.k_count <= kMostColumns;
}

// The runs of packed weights, once it is sure that these lie there.
std::vector<const QuantizedWeights*> find_runs(const at::Tensor& weight, const char* name) {
  TORCH_CHECK(weight.is_cpu() && weight.is_contiguous(), name,
              " must be contiguous on the CPU if it is quantized, got ", weight.device());
  const auto& kernels = cpu::tier().quantized;
  const uint8_t* const bytes = weight.const_data_ptr<uint8_t>();
  TORCH_CHECK(reinterpret_cast<uintptr_t>(bytes) % alignof(int64_t) == 0, name, no_weights());
  const int64_t rows = weight.size(0);
  std::vector<const QuantizedWeights*> runs;
  int64_t at = 0;
  while (at + static_cast<int64_t>(sizeof(QuantizedWeights)) <= weight.numel()) {
    const auto* const run = reinterpret_cast<const QuantizedWeights*>(bytes + at);
    if (run->magic != QuantizedWeights::kMagic) break;
    // Damaged bytes may hold any number: sizes are made of those alone that can be.
    TORCH_CHECK(is_possible(*run, rows), name, no_weights());
    const QuantizedWeights own = kernels.shape(run->kind, run->units, run->gates, run->k_count);
    TORCH_CHECK(run->lanes == own.lanes && run->group == own.group, name,
                " was quantized for another machine or instruction set: quantize the module anew");
    at += aligned(kernels.bytes(*run));
    TORCH_CHECK(at <= weight.numel(), name, no_weights());
    runs.push_back(run);
  }
  // Behind the last run a row may be filled up, no more.
  TORCH_CHECK(!runs.empty() && weight.numel() - at < rows, name, no_weights());
  return runs;
}

}  // namespace

const QuantizedWeights* quantized_run(const at::Tensor& weight, size_t index) {
  return is_quantized(weight) ? find_runs(weight, "weight").at(index) : nullptr;
}

void check_weight(const at::Tensor& weight, const char* name, const char* letters, int64_t rows,
                  int64_t gates, c10::IntArrayRef runs, const at::Tensor& like,
                  const char* like_name) {
  const int64_t columns = std::reduce(runs.begin(), runs.end());
  if (!is_quantized(weight)) {
    check_tensor(weight, name, letters, {rows, columns}, like, like_name);
    return;
  }
  TORCH_CHECK(like.scalar_type() == at::kFloat, like_name, " must be float32 for quantized ",
              "weights, got ", like.scalar_type());
  check_dim(weight, name, 2, letters);
  const auto found = find_runs(weight, name);
  int64_t packed = 0;
  bool fits = weight.size(0) == rows && found.size() == runs.size();
  for (size_t i = 0; i < found.size(); ++i) {
    packed += found[i]->k_count;
    fits = fits && found[i]->k_count == runs[i] && found[i]->gates == gates;
  }
  TORCH_CHECK(fits, name, " must be ", letters, " = ", shape_text({rows, columns}), ", got ",
              shape_text({weight.size(0), packed}), " quantized in ", found.size(),
              " runs of columns");
}

at::Tensor quantized_product(const at::Tensor& rows_in, const at::Tensor& weight, size_t index,
                             const std::optional<at::Tensor>& bias) {
  const at::Tensor rows = rows_in.contiguous();
  const at::Tensor out = at::empty({rows.size(0), weight.size(0)}, rows.options());
  cpu::tier().quantized.linear({
      .m = rows.size(0),
      .threads = thread_count(),
      .rows = rows.const_data_ptr<float>(),
      .weights = quantized_run(weight, index),
      .bias = data<float>(bias),
      .out = out.data_ptr<float>(),
  });
  return out;
}

at::Tensor quantize_weight(const at::Tensor& weight, int64_t gates,
                           const std::vector<int64_t>& columns, const std::string& kind) {
  TORCH_CHECK_VALUE(kind == "int8" || kind == "bfloat16",
                    "weights must be one of int8, bfloat16, got ", kind);
  check_dim(weight, "weight", 2, "(rows, columns)");
  TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == at::kFloat,
              "weight must be float32 on the CPU, got ", weight.scalar_type(), " on ",
              weight.device());
  const int64_t rows = weight.size(0);
  TORCH_CHECK(rows > 0 && gates > 0 && rows % gates == 0, "weight must have rows for ", gates,
              " gates, got ", shape_text(weight.sizes()));
  TORCH_CHECK(std::reduce(columns.begin(), columns.end()) == weight.size(1),
              "columns must add up to the ", weight.size(1), " of weight, got ",
              shape_text(columns));
  const auto type = kind == "int8" ? QuantizedKind::kInt8 : QuantizedKind::kBfloat16;
  const auto& kernels = cpu::tier().quantized;
  std::vector<QuantizedWeights> shapes;
  int64_t bytes = 0;
  for (const int64_t count : columns) {
    TORCH_CHECK(count >= 0 && count <= kMostColumns, "weight must have 0 to ", kMostColumns,
                " columns in a run, got ", count);
    shapes.push_back(kernels.shape(type, rows / gates, gates, count));
    bytes += aligned(kernels.bytes(shapes.back()));
  }
  const at::Tensor packed =
      at::zeros({rows, (bytes + rows - 1) / rows}, weight.options().dtype(at::kByte));
  uint8_t* to = packed.data_ptr<uint8_t>();
  int64_t column = 0;
  for (size_t i = 0; i < columns.size(); ++i) {
    const at::Tensor run = weight.narrow(1, column, columns[i]).contiguous();
    kernels.pack(shapes[i], run.const_data_ptr<float>(), to);
    column += columns[i];
    to += aligned(kernels.bytes(shapes[i]));
  }
  return packed;
}

std::vector<std::pair<at::Tensor, at::Tensor>> quantized_values(const at::Tensor& weight) {
  TORCH_CHECK(is_quantized(weight) && weight.dim() == 2, "weight", no_weights());
  std::vector<std::pair<at::Tensor, at::Tensor>> values;
  for (const QuantizedWeights* run : find_runs(weight, "weight")) {
    const bool is_int8 = run->kind == QuantizedKind::kInt8;
    const at::Tensor numbers =
        at::empty({weight.size(0), run->k_count},
                  weight.options().dtype(is_int8 ? at::kChar : at::kBFloat16));
    const at::Tensor scales =
        at::empty({is_int8 ? weight.size(0) : 0}, weight.options().dtype(at::kFloat));
    cpu::tier().quantized.unpack(*run, numbers.data_ptr(), scales.data_ptr<float>());
    values.emplace_back(numbers, scales);
  }
  return values;
}

}  // namespace pyseq
