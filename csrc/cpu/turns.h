// SPDX-License-Identifier: Apache-2.0
// The order in which loops take their weights, from call to call.
#pragma once

#include <cstdint>

namespace pyseq::cpu {

// Whether this thread's next loop, of so many steps, is to take the panels of its weights backwards
// in its first step. Every step takes them the other way round than the one before, in another call
// too, as where input is streamed: what was read last is still in the cache. Bits do not depend on
// it.
bool begins_backwards(int64_t steps);

}  // namespace pyseq::cpu
