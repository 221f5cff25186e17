// SPDX-License-Identifier: Apache-2.0
// The operators as the dispatcher runs them: with autograd, autocast and tracing.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <type_traits>

namespace pyseq {

// The operator `name`, whose kernels have the signature of `Kernel`.
template <auto Kernel>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .template typed<std::remove_pointer_t<decltype(Kernel)>>();
}

}  // namespace pyseq
