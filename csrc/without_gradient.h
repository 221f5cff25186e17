// SPDX-License-Identifier: Apache-2.0
// The operators that have no derivative, as the dispatcher's Autograd key runs them: below it, so
// that nothing they do is recorded.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>

#include "dispatcher.h"
#include "widened.h"

namespace pyseq {

// WithoutGradient<&generate>::of("pyseq::generate") is what runs that operator, of which the
// argument number `Leading` has the type that is computed in.
template <auto Kernel, size_t Leading = 0>
struct WithoutGradient;

template <class Return, class... Args, Return (*Kernel)(Args...), size_t Leading>
struct WithoutGradient<Kernel, Leading> {
  static inline const char* name = nullptr;

  static Return call(Args... args) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<Kernel>(name);
    return op.call(args...);
  }

  // The function for m.impl, once it knows its operator.
  static auto of(const char* operator_name) {
    name = operator_name;
    return Widened<&WithoutGradient::call, TakesShort::kNowhere, Leading>::of(operator_name);
  }
};

}  // namespace pyseq
