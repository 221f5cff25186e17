// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace pyseq::cuda {

namespace {

// The model's constants, in cycles of a multiprocessor unless they say otherwise. They come from
// published latencies and rates, not from measurements of these kernels.
constexpr double kBarrierCycles = 1400;     // an atomic and a load that must see it, both in the L2
constexpr double kExchangeCycles = 600;     // a number stored by one block and loaded by another
constexpr double kL2BytesPerCycle = 32;     // that one multiprocessor gets of the L2
constexpr double kProductEfficiency = 0.5;  // of a product from shared memory; of a library's too
constexpr double kEpilogueCycles = 60;      // the activations of a unit of a row, on one thread
constexpr double kLaunchSeconds = 1.8e-6;   // from kernel to kernel, on the device
constexpr double kHostSeconds = 4e-6;       // that the host takes to launch either of the two below
constexpr int kLaunchesPerExchange = 2;     // a product and a pointwise kernel

constexpr int64_t kRegisters = 168;        // of a thread, about what the kernels take
constexpr int64_t kBytesPerBarrier = 128;  // a counter has a line of the cache for itself

int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

int64_t round_up(int64_t count, int64_t multiple) { return divide_up(count, multiple) * multiple; }

// Multiply-adds of one multiprocessor per cycle, dense, accumulated in float32 or better.
double multiply_adds_per_cycle(int64_t capability, Storage storage) {
  const bool data_center = capability == 80 || capability == 90 || capability == 100;
  switch (storage) {
    case Storage::kFloat64:
      return capability == 80 ? 32 : data_center ? 64 : 2;
    case Storage::kFloat32:
      return capability <= 80 ? 64 : 128;
    case Storage::kTf32:
      if (capability < 80) return 64;  // no such unit: as float32
      return capability == 80 ? 512 : data_center ? 1024 : 256;
    case Storage::kFloat16:
    case Storage::kBFloat16:
      return capability == 80 ? 1024 : data_center ? 2048 : 512;
  }
  return 1;
}

double microseconds(const DeviceFacts& device, double cycles) {
  return cycles / device.clock * 1e6;
}

// Multiply-adds of a step in all.
double step_work(const StepShape& shape) {
  const double of_weights = double(shape.units) * shape.unit_weights;
  return double(shape.directions) * shape.batch * (of_weights + shape.row_work);
}

double weight_bytes(const StepShape& shape) {
  return double(shape.directions) * shape.units * shape.unit_weights * bytes_of(shape.storage);
}

double streamed_us(const DeviceFacts& device, const StepShape& shape) {
  const double bytes =
      double(shape.directions) * shape.batch * shape.row_streamed * bytes_of(shape.storage);
  return bytes / device.bandwidth * 1e6;
}

double l2_us(const DeviceFacts& device, double bytes) {
  return microseconds(device, bytes / (kL2BytesPerCycle * device.multiprocessors));
}

double floor_of(const DeviceFacts& device, const StepShape& shape) {
  const double rate = multiply_adds_per_cycle(device.capability, shape.storage);
  const double work = step_work(shape) / rate, bytes = weight_bytes(shape);
  const double everywhere = double(device.multiprocessors);
  // What the chip cannot hold must come from elsewhere at every step.
  const auto cycles = [&](double shares, double held) {
    const double missing = std::max(0.0, bytes - held * device.shared_per_multiprocessor);
    return std::max(work / shares, missing / (kL2BytesPerCycle * shares));
  };
  const double together = kExchangeCycles * shape.exchanges + cycles(everywhere, everywhere);
  // Or every row stays on one multiprocessor, and nobody waits.
  const double rows = std::min(everywhere, double(shape.directions) * shape.batch);
  const double alone = cycles(rows, double(shape.directions));
  return std::max(microseconds(device, std::min(together, alone)), streamed_us(device, shape));
}

// What the persistent kernels multiply in: never in the unit for tf32, which libraries may use.
Storage persistent_storage(const StepShape& shape) {
  const bool is_short = bytes_of(shape.storage) == 2;
  return shape.storage == Storage::kTf32 || (is_short && !shape.tensor) ? Storage::kFloat32
                                                                        : shape.storage;
}

double persistent_cost(const DeviceFacts& device, const StepShape& shape, const StepPlan& plan) {
  const double rate = multiply_adds_per_cycle(device.capability, persistent_storage(shape));
  const double rows = double(plan.group_rows), units = double(plan.tile_units);
  const double waits = plan.tiles > 1 ? kBarrierCycles * shape.exchanges : 0;
  const double exchanged = rows * shape.row_exchanged * bytes_of(shape.storage) / kL2BytesPerCycle;
  const double weights =
      shape.resident ? 0 : units * shape.unit_weights * bytes_of(shape.storage) / kL2BytesPerCycle;
  const double multiplied =
      rows * (units * shape.unit_weights + double(shape.row_work) / plan.tiles);
  const double work = multiplied / (rate * kProductEfficiency);
  const double epilogue = std::ceil(rows * units / plan.threads) * kEpilogueCycles;
  // Rows and weights are loaded while others are multiplied.
  const double cycles = waits + std::max(exchanged + weights, work) + epilogue;
  return std::max(microseconds(device, cycles), streamed_us(device, shape));
}

double alternating_cost(const DeviceFacts& device, const StepShape& shape) {
  const double rate = multiply_adds_per_cycle(device.capability, shape.storage) *
                      device.multiprocessors * kProductEfficiency;
  const double bytes = weight_bytes(shape);
  const double loading =
      bytes > device.l2_bytes ? bytes / device.bandwidth * 1e6 : l2_us(device, bytes);
  const double work = microseconds(device, step_work(shape) / rate);
  const double launches = double(kLaunchesPerExchange) * shape.exchanges * shape.directions;
  const double on_device =
      launches * kLaunchSeconds * 1e6 + std::max({loading, work, streamed_us(device, shape)});
  // The host runs ahead where it can. A captured graph spares it, but is planned alike: the call
  // before the capture must load the kernels that the graph will hold.
  return std::max(on_device, launches * kHostSeconds * 1e6);
}

std::string unfit_reason(const DeviceFacts& device, const StepShape& shape, int64_t blocks,
                         const BlockBytes& bytes) {
  if (!device.cooperative) return "the device cannot launch a grid whose blocks all run at once";
  if (shape.storage == Storage::kBFloat16 && device.capability < 80) {
    return "the device has no bfloat16 arithmetic (compute capability 8.0 and up)";
  }
  if (device.registers_per_multiprocessor < kPlanThreads * kRegisters) {
    return "a multiprocessor has too few registers for a block";
  }
  if (blocks < shape.directions) {
    return "the device runs " + std::to_string(blocks) + " blocks at once, fewer than directions";
  }
  const int64_t tiles = blocks / shape.directions;
  const int64_t units =
      std::min(shape.units, round_up(divide_up(shape.units, tiles), shape.unit_multiple));
  const std::optional<int64_t> fewest = bytes(units, 1);
  if (fewest.value_or(0) > device.shared_per_block) {
    return "a block would hold the weights of " + std::to_string(units) + " units in " +
           std::to_string(*fewest) + " bytes of shared memory, of which a block has " +
           std::to_string(device.shared_per_block);
  }
  return "the batch and the units need more blocks than run at once";
}

}  // namespace

Storage storage_from_name(const std::string& name) {
  if (name == "float32") return Storage::kFloat32;
  if (name == "tf32") return Storage::kTf32;
  if (name == "float64") return Storage::kFloat64;
  if (name == "float16") return Storage::kFloat16;
  if (name == "bfloat16") return Storage::kBFloat16;
  throw std::invalid_argument(
      "dtype must be one of float32, tf32, float64, float16, bfloat16, got " + name);
}

int64_t bytes_of(Storage storage) {
  switch (storage) {
    case Storage::kFloat64:
      return 8;
    case Storage::kFloat16:
    case Storage::kBFloat16:
      return 2;
    default:
      return 4;
  }
}

const char* path_name(Path path) {
  return path == Path::kPersistent ? "persistent" : "alternating";
}

Choice choice_from_name(const std::string& name) {
  if (name == "auto") return Choice::kAuto;
  if (name == "persistent") return Choice::kPersistent;
  if (name == "alternating") return Choice::kAlternating;
  throw std::invalid_argument(
      "PYSEQ_CUDA_PATH must be one of auto, persistent, alternating, got '" + name + "'");
}

Choice choice_from_environment() {
  const char* const value = std::getenv("PYSEQ_CUDA_PATH");
  return value == nullptr ? Choice::kAuto : choice_from_name(value);
}

int64_t allowed_multiprocessors(int64_t present) {
  const char* const value = std::getenv("PYSEQ_CUDA_MULTIPROCESSORS");
  if (value == nullptr) return present;
  int64_t allowed = 0;
  const char* const end = value + std::strlen(value);
  const auto [rest, error] = std::from_chars(value, end, allowed);
  if (error != std::errc() || rest != end || allowed < 1) {
    throw std::invalid_argument("PYSEQ_CUDA_MULTIPROCESSORS must be a positive number, got '" +
                                std::string(value) + "'");
  }
  return std::min(allowed, present);
}

std::optional<int64_t> block_bytes(const StepShape& shape, int64_t units, int64_t rows) {
  const int64_t element = bytes_of(shape.storage), sum = std::max<int64_t>(element, 4);
  const int64_t scratch = round_up(shape.scratch * sum, 16);
  if (!shape.resident || shape.unit_weights == 0) return scratch;
  const int64_t warps = kPlanThreads / 32;
  const bool tensor = element == 2;
  const int64_t weight_rows = round_up(units * shape.unit_rows, tensor ? 16 : 4);
  // Warps that make one part of the tile each; further ones share out k.
  const int64_t parts = tensor ? divide_up(weight_rows, 32) * divide_up(rows, 32)
                               : divide_up(weight_rows / 4 * divide_up(rows, 4), 32);
  if (parts > warps) return std::nullopt;
  const int64_t length =
      round_up(divide_up(shape.unit_weights, shape.unit_rows), tensor ? 32 : 16 / element);
  return weight_rows * length * element +
         warps / parts * weight_rows * (round_up(rows, 8) + 8) * sum + scratch;
}

StepPlan plan_step(const DeviceFacts& device, const StepShape& shape, Choice choice) {
  return plan_step(device, shape, choice,
                   [&](int64_t units, int64_t rows) { return block_bytes(shape, units, rows); });
}

StepPlan plan_step(const DeviceFacts& device, const StepShape& shape, Choice choice,
                   const BlockBytes& bytes) {
  StepPlan best{};
  best.persistent_us = std::numeric_limits<double>::infinity();
  const int64_t blocks = device.multiprocessors;
  const bool supported = device.cooperative && blocks >= shape.directions &&
                         (shape.storage != Storage::kBFloat16 || device.capability >= 80) &&
                         device.registers_per_multiprocessor >= kPlanThreads * kRegisters;
  const int64_t most_groups =
      supported ? std::min(shape.batch, blocks / shape.directions) : int64_t{0};
  int64_t rows_before = 0;
  for (int64_t wanted = 1; wanted <= most_groups; ++wanted) {
    const int64_t rows = divide_up(shape.batch, wanted), groups = divide_up(shape.batch, rows);
    if (rows == rows_before) continue;  // as many groups as before
    rows_before = rows;
    const int64_t most_tiles = blocks / shape.directions / groups;
    const int64_t fewest =
        std::min(shape.units, round_up(divide_up(shape.units, most_tiles), shape.unit_multiple));
    // From as few units for a block as the device has blocks for up to all of them.
    for (int64_t units = fewest; units <= shape.units;
         units = units == shape.units ? units + 1
                                      : std::min(shape.units, round_up(units + units / 2 + 1,
                                                                       shape.unit_multiple))) {
      StepPlan plan{};
      plan.tile_units = units;
      plan.tiles = divide_up(shape.units, units);
      plan.groups = groups;
      plan.group_rows = rows;
      plan.grid = shape.directions * groups * plan.tiles;
      plan.threads = kPlanThreads;
      const std::optional<int64_t> own = bytes(units, rows);
      if (!own.has_value()) break;  // nor do more units fit the threads
      plan.shared_bytes = *own;
      plan.barrier_bytes = shape.directions * groups * kBytesPerBarrier;
      if (plan.shared_bytes > device.shared_per_block) break;  // more units take more
      plan.persistent_us = persistent_cost(device, shape, plan);
      if (plan.persistent_us < best.persistent_us) best = plan;
    }
  }
  const bool fits = std::isfinite(best.persistent_us);
  best.alternating_us = alternating_cost(device, shape);
  best.floor_us = floor_of(device, shape);
  if (choice == Choice::kPersistent && !fits) {
    throw std::invalid_argument("the persistent kernel was asked for, but does not fit: " +
                                unfit_reason(device, shape, blocks, bytes));
  }
  const bool persistent = choice == Choice::kAuto ? best.persistent_us <= best.alternating_us
                                                  : choice == Choice::kPersistent;
  best.path = persistent ? Path::kPersistent : Path::kAlternating;
  if (choice != Choice::kAuto) {
    best.reason = "asked for";
  } else if (!fits) {
    best.reason = unfit_reason(device, shape, blocks, bytes);
  } else {
    best.reason = persistent ? "the weights fit on the chip, and waiting costs less than launching"
                             : "launches for every step should cost less";
    if (persistent && !shape.resident) best.reason = "waiting costs less than launching";
  }
  return best;
}

StepShape scan_step(const ScanLoop& sizes, Storage storage) {
  const int64_t G = sizes.gates, H = sizes.hidden, P = sizes.state_size;
  StepShape shape{};
  shape.storage = storage;
  shape.steps = sizes.steps;
  shape.batch = sizes.batch;
  shape.directions = sizes.directions;
  shape.units = sizes.backward ? P : H;
  shape.unit_rows = sizes.backward ? 1 : G;
  shape.unit_weights = sizes.recurrent ? G * (sizes.backward ? H : P) / sizes.heads : 0;
  shape.row_exchanged = sizes.recurrent ? (sizes.backward ? G * H : P) : 0;
  // Forward reads the input's part of the gates and writes what backward needs; backward reads
  // that and the gradient of the output.
  shape.row_streamed = 2 * sizes.sums * H + (2 + sizes.states) * P;
  shape.exchanges = sizes.recurrent ? 1 + (sizes.gates_state ? 1 : 0) + (P != H ? 1 : 0) : 0;
  if (P != H) shape.unit_weights += P;  // W_hr, a column of it
  shape.unit_multiple = 4;
  shape.resident = true;
  shape.tensor = true;
  return shape;
}

StepShape decode_step(const DecodeLoop& sizes, Storage storage) {
  const int64_t H = sizes.hidden, M = sizes.memory_size, A = sizes.key_size, G = sizes.gates;
  StepShape shape{};
  shape.storage = storage;
  shape.steps = sizes.steps;
  shape.batch = sizes.batch;
  shape.directions = 1;
  shape.units = H;
  shape.unit_rows = sizes.backward ? 1 : G;
  const int64_t fed = sizes.feeding ? G * H : 0;
  shape.unit_weights = sizes.layers * G * H + (sizes.layers - 1) * G * H + fed + M + H +
                       (sizes.projects_query ? A : 0);
  shape.row_exchanged = 2 * sizes.layers * H + M + (sizes.backward ? 2 * G * H * sizes.layers : 0);
  shape.row_streamed = 2 * G * H * sizes.layers + 2 * H + A + M;
  shape.exchanges = sizes.layers + 2 + (sizes.projects_query ? 1 : 0) + (sizes.backward ? 1 : 0);
  shape.unit_multiple = 4;
  // A step has too many weights for shared memory beside the row of attention: they stay in L2.
  shape.resident = false;
  shape.tensor = false;
  const int64_t tanh_work = sizes.additive ? 16 : 1;
  shape.scratch = std::min<int64_t>(sizes.source, 4096) + kPlanThreads / 32;
  shape.row_work = sizes.source * (A * tanh_work + M) * (sizes.backward ? 2 : 1);
  return shape;
}

}  // namespace pyseq::cuda
