// SPDX-License-Identifier: Apache-2.0
#include "cuda_loss.h"

#include <ATen/Dispatch.h>

#include "cuda/loss.h"
#include "cuda_context.h"
#include "loss.h"

namespace pyseq {

namespace {

void rows_on_cuda(const LossRows& args) {
  AT_DISPATCH_FLOATING_TYPES(args.logits.scalar_type(), "linear_cross_entropy", [&] {
    C10_CUDA_CHECK(cuda::loss_rows<scalar_t>({.rows = args.logits.size(0),
                                              .vocab = args.logits.size(1),
                                              .ignore_index = args.ignore_index,
                                              .label_smoothing = args.label_smoothing,
                                              .differentiates = args.differentiates,
                                              .target = args.target.const_data_ptr<int64_t>(),
                                              .count = args.count.const_data_ptr<int64_t>(),
                                              .logits = args.logits.data_ptr<scalar_t>(),
                                              .losses = args.losses.data_ptr<scalar_t>()},
                                             on_cuda::stream()));
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward_on_cuda(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    int64_t ignore_index, double label_smoothing, bool needs_hidden, bool needs_weight,
    bool needs_bias) {
  return linear_cross_entropy_in_chunks(hidden, weight, target, bias, ignore_index, label_smoothing,
                                        needs_hidden, needs_weight, needs_bias, &rows_on_cuda);
}

Tensor linear_cross_entropy_on_cuda(const Tensor& hidden, const Tensor& weight,
                                    const Tensor& target, const OptionalTensor& bias,
                                    int64_t ignore_index, double label_smoothing) {
  return std::get<0>(linear_cross_entropy_forward_on_cuda(
      hidden, weight, target, bias, ignore_index, label_smoothing, /*needs_hidden=*/false,
      /*needs_weight=*/false, /*needs_bias=*/false));
}

}  // namespace pyseq
