// SPDX-License-Identifier: Apache-2.0
#include "cuda_plan.h"

#include <stdexcept>

#include "cuda/plan.h"

namespace pyseq {

namespace {

// The number called `name`, which must be there.
template <class Number>
Number number(const std::map<std::string, Number>& numbers, const char* name) {
  const auto found = numbers.find(name);
  if (found == numbers.end()) throw std::invalid_argument(std::string(name) + " must be given");
  return found->second;
}

cuda::DeviceFacts device_facts(const std::map<std::string, double>& device) {
  const auto whole = [&](const char* name) { return static_cast<int64_t>(number(device, name)); };
  return {
      .capability = whole("capability"),
      .multiprocessors = cuda::allowed_multiprocessors(whole("multiprocessors")),
      .shared_per_block = whole("shared_per_block"),
      .shared_per_multiprocessor = whole("shared_per_multiprocessor"),
      .registers_per_multiprocessor = whole("registers_per_multiprocessor"),
      .l2_bytes = whole("l2_bytes"),
      .clock = number(device, "clock"),
      .bandwidth = number(device, "bandwidth"),
      .cooperative = whole("cooperative") != 0,
  };
}

cuda::StepShape step_shape(const std::string& op, const std::map<std::string, int64_t>& sizes,
                           cuda::Storage storage) {
  const auto size = [&](const char* name) { return number(sizes, name); };
  if (op == "scan") {
    const cuda::ScanLoop scan{
        .steps = size("steps"),
        .batch = size("batch"),
        .hidden = size("hidden"),
        .state_size = size("state_size"),
        .gates = size("gates"),
        .sums = size("sums"),
        .states = size("states"),
        .heads = size("heads"),
        .directions = size("directions"),
        .recurrent = size("recurrent") != 0,
        .gates_state = size("gates_state") != 0,
        .backward = size("backward") != 0,
    };
    return cuda::scan_step(scan, storage);
  }
  if (op != "decode") throw std::invalid_argument("operator must be scan or decode, got " + op);
  const cuda::DecodeLoop decode{
      .steps = size("steps"),
      .batch = size("batch"),
      .hidden = size("hidden"),
      .layers = size("layers"),
      .gates = size("gates"),
      .source = size("source"),
      .key_size = size("key_size"),
      .memory_size = size("memory_size"),
      .additive = size("additive") != 0,
      .projects_query = size("projects_query") != 0,
      .feeding = size("feeding") != 0,
      .backward = size("backward") != 0,
  };
  return cuda::decode_step(decode, storage);
}

}  // namespace

std::map<std::string, PlanValue> cuda_plan(const std::string& op,
                                           const std::map<std::string, double>& device,
                                           const std::map<std::string, int64_t>& sizes,
                                           const std::string& dtype, const std::string& path) {
  const cuda::Choice choice =
      path.empty() ? cuda::choice_from_environment() : cuda::choice_from_name(path);
  const cuda::StepPlan plan = cuda::plan_step(
      device_facts(device), step_shape(op, sizes, cuda::storage_from_name(dtype)), choice);
  return {
      {"path", cuda::path_name(plan.path)},
      {"reason", plan.reason},
      {"tiles", plan.tiles},
      {"groups", plan.groups},
      {"tile_units", plan.tile_units},
      {"group_rows", plan.group_rows},
      {"grid", plan.grid},
      {"threads", plan.threads},
      {"shared_bytes", plan.shared_bytes},
      {"barrier_bytes", plan.barrier_bytes},
      {"step_us", plan.step_us()},
      {"persistent_us", plan.persistent_us},
      {"alternating_us", plan.alternating_us},
      {"floor_us", plan.floor_us},
  };
}

}  // namespace pyseq
