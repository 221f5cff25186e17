// SPDX-License-Identifier: Apache-2.0
#include "products.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include "devices.h"
#include "layers.h"

namespace pyseq {

namespace {

// The same by torch's library, on any device.
void multiply_by_torch(Tensor c, const Tensor& a, const Tensor& b, const OptionalTensor& bias,
                       bool accumulate, const OptionalTensor& a_sums) {
  if (accumulate) {
    c.addmm_(a, b);
  } else if (bias.has_value()) {
    at::addmm_out(c, *bias, a, b);
  } else {
    at::mm_out(c, a, b);
  }
  if (!a_sums.has_value()) return;
  Tensor sums = *a_sums;
  accumulate ? sums.add_(a.sum(1)) : at::sum_out(sums, a, 1);
}

}  // namespace

void multiply_into(const Tensor& c, const Tensor& a, const Tensor& b, const OptionalTensor& bias,
                   bool accumulate, const OptionalTensor& a_sums) {
  if (!c.is_cpu()) return multiply_by_torch(c, a, b, bias, accumulate, a_sums);
  AT_DISPATCH_FLOATING_TYPES(c.scalar_type(), "gemm", [&] {
    kernels_of<scalar_t>(c).gemm({
        .m = c.size(0),
        .n = c.size(1),
        .k = a.size(1),
        .threads = thread_count(),
        .a = a.const_data_ptr<scalar_t>(),
        .a_row = a.stride(0),
        .a_column = a.stride(1),
        .b = b.const_data_ptr<scalar_t>(),
        .b_row = b.stride(0),
        .b_column = b.stride(1),
        .bias = data<scalar_t>(bias),
        .c = c.data_ptr<scalar_t>(),
        .c_row = c.stride(0),
        .accumulate = accumulate,
        .a_sums = a_sums.has_value() ? a_sums->data_ptr<scalar_t>() : nullptr,
    });
  });
}

Tensor matrix_product(const Tensor& a, const Tensor& b, const OptionalTensor& bias) {
  const Tensor c = fresh({a.size(0), b.size(1)}, a);
  multiply_into(c, a, b, bias);
  return c;
}

namespace {

// The operands of x W^T for rows x (N, I), which takes the first I columns of W. Contiguous,
// because how few rows are multiplied depends on the layout.
std::pair<Tensor, Tensor> operands(const Tensor& x, const Tensor& weight) {
  return {x.contiguous(), weight.contiguous().slice(1, 0, x.size(1)).t()};
}

}  // namespace

Tensor project_input(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const Tensor& into) {
  const c10::SmallVector<int64_t, 3> sizes{x.size(0), x.size(1), weight.size(0)};
  if (is_quantized(weight)) return quantized_product(flat(x), weight, 0, bias).view(sizes);
  const Tensor product = into.defined() ? into : fresh(sizes, x);
  const auto [rows, columns] = operands(flat(x), weight);
  multiply_into(flat(product), rows, columns, bias);
  return product;
}

std::pair<Tensor, Tensor> weight_gradient(const Tensor& d_rows, const Tensor& inputs) {
  const Tensor weight = fresh({d_rows.size(1), inputs.size(1)}, d_rows);
  const Tensor bias = fresh({d_rows.size(1)}, d_rows);
  multiply_into(weight, d_rows.t(), inputs, std::nullopt, /*accumulate=*/false, bias);
  return {weight, bias};
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_floating(x, "x");
  TORCH_CHECK(x.dim() > 0, "x must be (..., I), got a tensor without dimensions");
  check_dim(weight, "weight", 2, "(O, I)");
  const int64_t inputs = x.size(-1), outputs = weight.size(0);
  check_tensor(weight, "weight", "(O, I)", {outputs, inputs}, x, "x");
  check_tensor(bias, "bias", "(O,)", {outputs}, x, "x");
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.pop_back();
  const Tensor rows = x.reshape({c10::multiply_integers(sizes), inputs});
  sizes.push_back(outputs);
  const auto [a, b] = operands(rows, weight);
  return matrix_product(a, b, contiguous(bias)).view(sizes);
}

namespace {

Tensor map_activation(const Tensor& x_in, bool is_tanh) {
  check_floating(x_in, "x");
  const Tensor x = x_in.contiguous();
  const Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "activation", [&] {
    const auto& kernels = kernels_of<scalar_t>(x);
    (is_tanh ? kernels.tanh : kernels.sigmoid)(x.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>(),
                                               x.numel());
  });
  return y;
}

}  // namespace

Tensor sigmoid(const Tensor& x) { return map_activation(x, false); }

Tensor tanh(const Tensor& x) { return map_activation(x, true); }

namespace {

void check_positive(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value > 0, name, " must be positive, got ", value);
}

}  // namespace

double multiply_add_rate(int64_t threads, int64_t rounds) {
  check_positive("threads", threads);
  check_positive("rounds", rounds);
  return cpu::kernels<float>().multiply_add_rate(static_cast<int>(threads), rounds);
}

double read_rate(int64_t threads, int64_t bytes, int64_t passes) {
  check_positive("threads", threads);
  check_positive("bytes", bytes);
  check_positive("passes", passes);
  return cpu::kernels<float>().read_rate(static_cast<int>(threads), bytes, passes);
}

}  // namespace pyseq
