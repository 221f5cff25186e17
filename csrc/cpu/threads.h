// SPDX-License-Identifier: Apache-2.0
// Threads for the recurrent loops: one parallel region per call, split into teams that own
// rows of the batch and never wait for one another; the members of a team split the units
// and meet at a barrier. Compiled once, for the baseline instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyseq::cpu {

// Meeting point of the members of one team. Spins a bounded number of turns and then
// yields, so that it does not collapse when the cores are shared.
class Barrier {
 public:
  Barrier();
  void wait(int members);

 private:
  const int64_t begin_;  // nanoseconds
  alignas(64) int arrived_ = 0;
  alignas(64) int generation_ = 0;
};

struct Range {
  int64_t begin;
  int64_t end;
  [[gnu::always_inline]] int64_t size() const { return end - begin; }
};

// The share of member `index` when `count` things are dealt to `members` in runs.
Range share(int64_t count, int index, int members);

// What one thread does: the rows of its team and its place in it.
struct Place {
  Range rows;
  int team;
  int member;
  int members;
  Barrier* barrier;

  [[gnu::always_inline]] void wait() const {
    if (members > 1) barrier->wait(members);
  }
  [[gnu::always_inline]] Range part(int64_t count) const { return share(count, member, members); }
};

// How a loop of dependent steps is spread over threads, by a small cost model.
struct StepCost {
  int64_t rows;          // rows of the batch
  int64_t weights;       // multiply-adds per row and step: the weights it passes
  int64_t row_work;      // further multiply-adds per row and step (attention)
  int64_t weight_bytes;  // bytes of packed weights read per step
  int64_t state_bytes;   // per row and step: what is read by others than who wrote it when split
  int barriers;          // barriers per step when the units are split
  int64_t steps;         // of one call, which calling other threads is spread over
};

struct Plan {
  int threads;  // how many take part
  int teams;    // into how many teams they are split
};

constexpr int kMaxTeams = 256;

// With no more than `most_teams`, where rows belong together.
Plan plan_steps(const StepCost& cost, int threads, int64_t most_teams = kMaxTeams);

// Runs body(context, thread, threads) on up to `threads` threads; the count passed is what
// the runtime really gave, or one while the cores turn out to be taken by other work. With one
// thread no parallel region is entered; so a forked child, whose runtime is gone, does not hang:
// if the thread that forked had led others in a loop of this library, the child has one thread,
// whatever is asked for later. (Of what torch's own operators led nothing is known.)
void run_parallel(int threads, void (*body)(void* context, int thread, int threads), void* context);

// Whether this thread is a forked child's, and had led others before.
bool has_lost_threads();

// For who leads others otherwise than by run_parallel.
void leads_others();

// Barriers of one call: one for all threads, and one for each team of several members.
struct Teams {
  explicit Teams(const Plan& plan);
  ~Teams();
  Teams(const Teams&) = delete;
  Teams& operator=(const Teams&) = delete;

  Barrier all;
  Barrier* team;
};

// The place of `thread` under `plan`, for a batch of `rows`; `present` threads showed up.
Place place(const Plan& plan, int thread, int present, int64_t rows, Teams& teams);

// 64-byte aligned memory for the length of a call. Each thread keeps its last piece, up to
// kKeptBytes: memory fresh from the system costs a page fault for every 4 KB, which in small
// models is as much as the work itself.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  [[gnu::always_inline]] void* data() const { return data_; }

 private:
  static constexpr size_t kKeptBytes = 32 << 20;
  void* data_;
  bool kept_;
};

// Has every Workspace filled with NaN while `poisons` says so, so that tests see what is read
// before it is written.
void poison_workspaces_if(bool (*poisons)());

}  // namespace pyseq::cpu
