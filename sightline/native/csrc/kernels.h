// Shared by the C++ files: sizes, the thread pool, and the kernels of each instruction set.
#pragma once
#include "attention.h"

constexpr int SIGHTLINE_BLOCK = 64;   // most queries of a block
constexpr int SIGHTLINE_CHUNK = 192;  // most keys of a chunk

// Calls worker(i, i + 1, context) for each of 0 <= i < threads, at once where the pool has threads.
struct sightline_pool {
  int64_t threads;
  void (*run)(int64_t threads, sightline_task worker, void* context);
};
