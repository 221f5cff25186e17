// SPDX-License-Identifier: Apache-2.0
// How a loop over time runs on a device: as one persistent kernel or as launches for every step,
// how it is cut into blocks, what that should cost. Host code without a CUDA call: the facts of
// the device come in, so that it runs, and is tested, where there is none.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace pyseq::cuda {

// What the plan asks of a device. Filled in at run time, never assumed.
struct DeviceFacts {
  int64_t capability;        // 10 * major + minor, 90 for an H100
  int64_t multiprocessors;   // those that this process may use
  int64_t shared_per_block;  // bytes, the most that a block may ask for (opt-in)
  int64_t shared_per_multiprocessor;
  int64_t registers_per_multiprocessor;
  int64_t l2_bytes;
  double clock;      // of the multiprocessors, cycles per second
  double bandwidth;  // of the device's memory, bytes per second
  bool cooperative;  // whether a grid can be launched so that all of its blocks run at once
};

enum class Storage { kFloat32, kTf32, kFloat64, kFloat16, kBFloat16 };

// Storage as torch names the dtype ("float32"), or "tf32". Throws std::invalid_argument.
Storage storage_from_name(const std::string& name);
int64_t bytes_of(Storage storage);

enum class Path { kPersistent, kAlternating };
const char* path_name(Path path);

// What the user wishes: the plan's own choice, or one of the paths.
enum class Choice { kAuto, kPersistent, kAlternating };

// From "auto", "persistent" or "alternating"; throws std::invalid_argument.
Choice choice_from_name(const std::string& name);
// That of the environment variable PYSEQ_CUDA_PATH, or kAuto.
Choice choice_from_environment();

// So many multiprocessors, or as many as the environment variable PYSEQ_CUDA_MULTIPROCESSORS allows
// if those are fewer. Throws std::invalid_argument if that is no positive number.
int64_t allowed_multiprocessors(int64_t present);

// What a step multiplies and exchanges. Weights that stay on chip are dealt to the blocks of a
// group by units: a unit is `unit_weights` numbers, all gates of a hidden unit with a row of W_hh
// each; backward it is a column of all gates.
struct StepShape {
  Storage storage;
  int64_t steps;
  int64_t batch;
  int64_t directions;     // loops that run side by side, each with weights of its own
  int64_t units;          // hidden units of a direction
  int64_t unit_rows;      // rows of weight of a unit: gates forward, 1 backward
  int64_t unit_weights;   // numbers of weight of a unit
  int64_t row_exchanged;  // numbers of a row that every block of a group reads at each step
  int64_t row_streamed;   // numbers of a row that a step reads and writes in device memory
  int64_t exchanges;      // times in a step that the blocks of a group wait for one another
  int64_t unit_multiple;  // blocks own a multiple of so many units (or all)
  bool resident;          // whether the persistent kernel holds the weights on chip
  bool tensor;            // whether it multiplies short types in the tensor units
  int64_t row_work;       // multiply-adds of a row besides those of the weights (attention)
  int64_t scratch;        // numbers that a block works in besides its weights and sums
};

struct StepPlan {
  Path path;
  std::string reason;     // why that one, in a sentence
  int64_t tiles;          // blocks of a group: parts of the units
  int64_t groups;         // parts of the batch, each with a barrier of its own
  int64_t tile_units;     // units of a block, at most
  int64_t group_rows;     // rows of a group, at most
  int64_t grid;           // blocks: directions * groups * tiles
  int64_t threads;        // of a block
  int64_t shared_bytes;   // of a block, dynamic
  int64_t barrier_bytes;  // device memory, zeroed before the launch
  double persistent_us;   // what a step should take that way; infinite where it does not fit
  double alternating_us;
  double floor_us;  // what no implementation of the step can be faster than

  double step_us() const { return path == Path::kPersistent ? persistent_us : alternating_us; }
};

constexpr int64_t kPlanThreads = 256;

// Bytes of shared memory of a block with so many units and rows, or nothing if its threads cannot
// make such a tile.
using BlockBytes = std::function<std::optional<int64_t>(int64_t units, int64_t rows)>;

// As the kernels lay out weights and sums; a launch asks the kernel itself.
std::optional<int64_t> block_bytes(const StepShape& shape, int64_t units, int64_t rows);

// The plan, of at most one block for each multiprocessor. Throws std::invalid_argument if `choice`
// asks for the persistent kernel and it does not fit.
StepPlan plan_step(const DeviceFacts& device, const StepShape& shape, Choice choice,
                   const BlockBytes& bytes);
StepPlan plan_step(const DeviceFacts& device, const StepShape& shape, Choice choice);

// Shapes of the operators' loops.
struct ScanLoop {
  int64_t steps, batch, hidden, state_size, gates, sums, states, heads, directions;
  bool recurrent;    // whether a matrix multiplies the state
  bool gates_state;  // whether what it multiplies depends on another gate of the step
  bool backward;
};
StepShape scan_step(const ScanLoop& sizes, Storage storage);

struct DecodeLoop {
  int64_t steps, batch, hidden, layers, gates, source, key_size, memory_size;
  bool additive, projects_query, feeding;
  bool backward;
};
StepShape decode_step(const DecodeLoop& sizes, Storage storage);

}  // namespace pyseq::cuda
