// SPDX-License-Identifier: Apache-2.0
// Chooses the tier of CPU kernels at run time.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace pyseq::cpu {

// PYSEQ_TIERS, from CMakeLists.txt: X(name) for every tier compiled in, best first.
#define PYSEQ_DECLARE(name) \
  namespace name {          \
  extern const Tier kTier;  \
  }
PYSEQ_TIERS(PYSEQ_DECLARE)
#undef PYSEQ_DECLARE

namespace {

bool machine_has(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
  if (std::strcmp(name, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return true;
}

// torch's own variable, with torch's values: "default" means no more than the baseline.
bool allowed(const char* name) {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  if (capability == nullptr) return true;
  if (std::strcmp(capability, "default") == 0) {
    return std::strcmp(name, "plain") == 0 || std::strcmp(name, "neon") == 0;
  }
  if (std::strcmp(capability, "avx2") == 0) return std::strcmp(name, "avx512") != 0;
  return true;
}

const Tier& choose() {
  const Tier* last = nullptr;
#define PYSEQ_TRY(name) \
  last = &name::kTier;  \
  if (machine_has(#name) && allowed(#name)) return name::kTier;
  PYSEQ_TIERS(PYSEQ_TRY)
#undef PYSEQ_TRY
  return *last;
}

}  // namespace

const Tier& tier() {
  static const Tier& chosen = choose();
  return chosen;
}

bool has_int8_dots() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return std::getenv("ATEN_CPU_CAPABILITY") == nullptr && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

const char* compiled_tiers() {
#define PYSEQ_NAME(name) "," #name
  static const char* const names = PYSEQ_TIERS(PYSEQ_NAME) + 1;
#undef PYSEQ_NAME
  return names;
}

template <>
const Kernels<float>& kernels<float>() {
  return tier().float32;
}

template <>
const Kernels<double>& kernels<double>() {
  return tier().float64;
}

}  // namespace pyseq::cpu
