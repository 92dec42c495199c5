// Tasks that are shared by the threads, and the memory of a thread.
#pragma once
#include <stdlib.h>

#include "tensors.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

// Each thread runs a worker, which takes the next task until none is left. The result of a task does not depend on the
// thread that computes it, so that results are the same in each run.
struct Job {
  const sightline_attention& args;
  const Sizes sizes;
  int64_t tasks = 0, taken = 0;
  int32_t error = SIGHTLINE_OK;

  explicit Job(const sightline_attention& a) : args(a), sizes(a) {}
  int64_t take() { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); }
  void fail() { __atomic_store_n(&error, SIGHTLINE_OUT_OF_MEMORY, __ATOMIC_RELAXED); }
  // Call worker(_, _, job) on as many threads as there are, or as there are tasks.
  void run(sightline_task worker, int64_t number) {
    tasks = number, taken = 0;
    parallel_for(min(num_threads(), number), 1, worker, this);
  }
};

// Memory of one thread, aligned to a cache line.
struct Memory {
  float* data = nullptr;

  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() { free(data); }
  bool allocate(int64_t floats) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes(max(floats, 16))) != 0) return false;
    data = static_cast<float*>(memory);
    return true;
  }
};

// Hands out consecutive parts of a memory, or only counts them if the memory is null.
struct Arena {
  float* base;
  int64_t used = 0;

  explicit Arena(float* memory) : base(memory) {}
  float* take(int64_t floats) {
    float* part = base ? base + used : nullptr;
    used += floats;
    return part;
  }
};

}  // namespace
}  // namespace SIGHTLINE_ISA
}  // namespace sightline
