// SPDX-License-Identifier: Apache-2.0
// Checks of an operator's tensors; every message gives what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace pyseq {

inline std::string shape_text(c10::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  }
  return text + (sizes.size() == 1 ? ",)" : ")");
}

// The number of dimensions only; `letters` names them: "(T, B, I)".
inline void check_dim(const at::Tensor& tensor, const char* name, int64_t dim,
                      const char* letters) {
  TORCH_CHECK(tensor.dim() == dim, name, " must be ", letters, ", got ",
              shape_text(tensor.sizes()));
}

// Shape, and the same dtype and device as the operator's first tensor.
inline void check_tensor(const at::Tensor& tensor, const char* name, const char* letters,
                         c10::IntArrayRef sizes, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK(tensor.sizes() == sizes, name, " must be ", letters, " = ", shape_text(sizes),
              ", got ", shape_text(tensor.sizes()));
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of ",
              like_name, ", ", like.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == like.device(), name, " must be on the device of ", like_name, ", ",
              like.device(), ", got ", tensor.device());
}

inline void check_tensor(const std::optional<at::Tensor>& tensor, const char* name,
                         const char* letters, c10::IntArrayRef sizes, const at::Tensor& like,
                         const char* like_name) {
  if (tensor.has_value()) check_tensor(*tensor, name, letters, sizes, like, like_name);
}

// float16 and bfloat16, which are too short to add up in.
inline bool is_short(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

// Of a type that the kernels of its device compute in.
inline void check_floating(const at::Tensor& tensor, const char* name) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || (is_short(type) && tensor.is_cuda()),
              name, " must be ", tensor.is_cuda() ? "float16, bfloat16, " : "",
              "float32 or float64, got ", type);
}

// A tensor that forward saved. Hooks may have packed and unpacked it in another layout, and
// who calls a backward operator by hand may pass anything.
inline at::Tensor check_saved(const at::Tensor& tensor, const char* name, c10::IntArrayRef sizes,
                              const at::Tensor& like) {
  check_tensor(tensor, name, "as forward gave it,", sizes, like, "x");
  return tensor.contiguous();
}

// Lengths as contiguous int64, every one in [0, limit]. On another device nobody looks: that would
// wait for it; its kernels stay within their memory whatever lengths hold.
inline std::optional<at::Tensor> check_lengths(const std::optional<at::Tensor>& lengths,
                                               int64_t batch, int64_t limit,
                                               const char* limit_letter) {
  if (!lengths.has_value()) return std::nullopt;
  TORCH_CHECK(c10::isIntegralType(lengths->scalar_type(), /*includeBool=*/false),
              "lengths must be int64, got ", lengths->scalar_type());
  TORCH_CHECK(lengths->sizes() == c10::IntArrayRef{batch}, "lengths must be (B,) = (", batch,
              ",), got ", shape_text(lengths->sizes()));
  const at::Tensor checked = lengths->to(at::kLong).contiguous();
  if (!checked.is_cpu()) return checked;
  const int64_t* values = checked.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < batch; ++row) {
    TORCH_CHECK(values[row] >= 0 && values[row] <= limit, "lengths must be between 0 and ",
                limit_letter, " = ", limit, ", got ", values[row], " at row ", row);
  }
  return checked;
}

}  // namespace pyseq
