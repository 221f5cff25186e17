// SPDX-License-Identifier: Apache-2.0
#include "threads.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "turns.h"

namespace pyseq::cpu {

namespace {

// About 20 µs of pause instructions: longer than any phase whose members are balanced, far
// shorter than a scheduler's time slice.
constexpr int kSpins = 2000;

// A wait this long is no imbalance: the thread waited for does not run, and will not before
// the scheduler's time slice of some milliseconds is over.
constexpr int64_t kLongWait = 500'000;  // nanoseconds

int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// Set by whoever waited long at a barrier, in whichever call: a hint, not an account.
int waited_long = 0;

// Where the cores are taken by other work, one thread is faster than several that wait for one
// another, a time slice at every barrier, and gives the same bits. After a call that waited, its
// caller works alone: the first time for as long as that call took, which a passing interruption
// is worth; for twice as long each time that a new try waits too, so that trying costs little.
struct Crowd {
  static constexpr double kMost = 32, kCalmer = 0.8;
  static constexpr int64_t kLongest = 5'000'000'000;  // nanoseconds
  int64_t alone_until = 0;
  double factor = 1;

  void record(bool waited, int64_t now, int64_t took) {
    if (waited) {
      const auto alone = static_cast<int64_t>(factor * static_cast<double>(took));
      alone_until = now + std::min(alone, kLongest);
    }
    factor = waited ? std::min(2 * factor, kMost) : std::max(kCalmer * factor, 1.0);
  }
};

thread_local Crowd crowd;

// A forked child is a copy of the one thread that forked. If that thread had led others, OpenMP's
// runtime would wait in the child for their copies, which do not exist, for ever.
thread_local bool has_led = false;
thread_local bool has_lost = false;

[[maybe_unused]] const int watches_forks =
    pthread_atfork(nullptr, nullptr, [] { has_lost = has_lost || has_led; });

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Barrier::Barrier() : begin_(nanoseconds()) {}

void Barrier::wait(int members) {
  const int generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == members) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spin = 0; spin < kSpins; ++spin) {
    if (__atomic_load_n(&generation_, __ATOMIC_ACQUIRE) != generation) return;
    pause();
  }
  const int64_t begin = nanoseconds();
  while (__atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation) sched_yield();
  // Of long phases a core that is slower for a while may lose as much.
  const int64_t phase = (begin - begin_) / (generation + 1);
  if (nanoseconds() - begin > std::max(kLongWait, phase)) {
    __atomic_store_n(&waited_long, 1, __ATOMIC_RELAXED);
  }
}

Range share(int64_t count, int index, int members) {
  const int64_t each = count / members;
  const int64_t more = count % members;
  const int64_t begin = index * each + std::min<int64_t>(index, more);
  return {begin, begin + each + (index < more ? 1 : 0)};
}

Plan plan_steps(const StepCost& cost, int threads, int64_t most_teams) {
  // Rates of one core, in multiply-adds and bytes per nanosecond, and the price of a barrier and of
  // calling other threads in nanoseconds, as measured on two cores that share no cache. They only
  // have to rank three plans: one thread, a team per thread, one team of all. (Others answer a call
  // within 2 us, or within 20 if they sleep.)
  constexpr double kMultiplyAdds = 120;
  constexpr double kWeightBytes = 160, kFarWeightBytes = 40;
  constexpr int64_t kFarWeights = 8 << 20;  // bytes that the cores fetch from the same place
  constexpr double kForeignBytes = 2;
  constexpr double kBarrier = 700;
  constexpr double kCall = 5000;
  threads = static_cast<int>(std::min<int64_t>(threads, kMaxTeams));
  if (threads <= 1 || cost.rows == 0) return {1, 1};

  const auto time = [&](double row_share, double unit_share) {
    const double rows = cost.rows * row_share;
    const double work = rows * (cost.weights + cost.row_work) / kMultiplyAdds;
    // The first tile of a panel waits for it.
    const double rate = cost.weight_bytes > kFarWeights ? kFarWeightBytes : kWeightBytes;
    return unit_share * (work + cost.weight_bytes / rate);
  };
  const double alone = time(1, 1);
  const int64_t teams = std::min({int64_t{threads}, cost.rows, most_teams});
  const double largest_slice = static_cast<double>((cost.rows + teams - 1) / teams) / cost.rows;
  const double call = kCall / static_cast<double>(std::max<int64_t>(cost.steps, 1));
  const double sliced = time(largest_slice, 1) + call;
  const double foreign = cost.rows * cost.state_bytes * (1 - 1.0 / threads);
  const double split =
      time(1, 1.0 / threads) + foreign / kForeignBytes + cost.barriers * kBarrier + call;
  if (alone <= 2000 && alone <= 2 * std::min(sliced, split)) return {1, 1};
  if (alone <= std::min(sliced, split)) return {1, 1};
  if (sliced <= split) return {static_cast<int>(teams), static_cast<int>(teams)};
  return {threads, 1};
}

bool has_lost_threads() { return has_lost; }

void leads_others() { has_led = true; }

void run_parallel(int threads, void (*body)(void* context, int thread, int threads),
                  void* context) {
  if (threads <= 1 || has_lost || omp_in_parallel()) {
    body(context, 0, 1);
    return;
  }
  const int64_t begin = nanoseconds();
  if (begin < crowd.alone_until) {
    body(context, 0, 1);
    return;
  }
  leads_others();
  __atomic_store_n(&waited_long, 0, __ATOMIC_RELAXED);
  int64_t end = begin;  // of this thread's own share
  // Without num_threads(): a count that changes from call to call makes the runtime take
  // its pool apart. Threads that are not needed leave at once.
#pragma omp parallel
  {
    const int present = std::min(omp_get_num_threads(), threads);
    const int thread = omp_get_thread_num();
    if (thread < present) body(context, thread, present);
    if (thread == 0) end = nanoseconds();
  }
  const int64_t now = nanoseconds();
  // The shares are alike: who comes in so much later has not been running.
  const bool late = now - end > std::max(kLongWait, (end - begin) / 2);
  const bool waited = late || __atomic_load_n(&waited_long, __ATOMIC_RELAXED) != 0;
  crowd.record(waited, now, now - begin);
}

Teams::Teams(const Plan& plan) : team(plan.threads > 1 ? new Barrier[plan.teams] : nullptr) {}

Teams::~Teams() { delete[] team; }

Place place(const Plan& plan, int thread, int present, int64_t rows, Teams& teams) {
  // The runtime may give fewer threads than were asked for.
  const int count = plan.teams == 1 ? 1 : std::min(plan.teams, present);
  const int team = thread % count;
  const int members = present / count + (team < present % count ? 1 : 0);
  return {share(rows, team, count), team, thread / count, members, teams.team + team};
}

bool begins_backwards(int64_t steps) {
  thread_local bool backwards = true;  // in the last step of the last loop
  const bool begins = !backwards;
  backwards = begins != (steps % 2 == 0);
  return begins;
}

namespace {

constexpr std::align_val_t kAlign{64};

struct Kept {
  void* data = nullptr;
  size_t bytes = 0;

  ~Kept() { ::operator delete(data, kAlign); }
};

// One for each call inside a call: a scan has its states, the loop in it its workspace, the
// products in that theirs, of which a quantized one has two.
constexpr int kNested = 4;
thread_local Kept kept[kNested];
thread_local int nested = 0;

bool (*poisons)() = nullptr;

}  // namespace

void poison_workspaces_if(bool (*when)()) { poisons = when; }

Workspace::Workspace(size_t bytes) : kept_(nested < kNested && bytes <= kKeptBytes) {
  if (!kept_) {
    data_ = ::operator new(bytes, kAlign);
  } else {
    Kept& mine = kept[nested];
    if (bytes > mine.bytes) {
      ::operator delete(mine.data, kAlign);
      mine.data = nullptr;
      mine.bytes = 0;
      mine.data = ::operator new(bytes, kAlign);
      mine.bytes = bytes;
    }
    data_ = mine.data;
  }
  // All bits set are NaN in either type.
  if (poisons != nullptr && poisons()) std::memset(data_, 0xff, bytes);
  ++nested;
}

Workspace::~Workspace() {
  --nested;
  if (!kept_) ::operator delete(data_, kAlign);
}

}  // namespace pyseq::cpu
