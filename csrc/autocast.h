// SPDX-License-Identifier: Apache-2.0
// The operators as the dispatcher's Autocast keys run them: in float32, on every
// device alike, and with autocast off for the products that they call.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

#include "dispatcher.h"
#include "widened.h"

namespace pyseq {

// Autocast<key, &scan>::call is what stands before the operator whose kernel is `scan`; the
// name is that of the operator.
template <c10::DispatchKey Key, auto Kernel>
struct Autocast;

template <c10::DispatchKey Key, class Return, class... Args, Return (*Kernel)(Args...)>
struct Autocast<Key, Kernel> {
  static inline const char* name = nullptr;

  static Return call(Args... args) {
    const c10::impl::ExcludeDispatchKeyGuard off(Key);
    static const auto op = find_operator<Kernel>(name);
    return op.call(at_least_float(args)...);
  }

  // The function for m.impl, once it knows its operator.
  static auto of(const char* operator_name) {
    name = operator_name;
    return &call;
  }
};

}  // namespace pyseq
