// The work of the backward: the blocks of each row of the batch in parts, which are computed at once.
#pragma once
#include <stdlib.h>

#include "jobs.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

// Memory: the sums of a part have the keys of its span only. All sums together take at most `parts` times the memory of
// the gradients of keys and values in float32: about half of that under a causal mask, and once that memory under a
// window. `parts` is about threads / (batch * kv_heads), rounded up. If it is 1, there are no such sums; each thread
// then has a buffer for the gradients of one key head, or none if they are added in place.
struct BackwardJob : Job {
  int64_t parts;                // of each row
  int64_t* bounds = nullptr;    // [batch, parts + 1], first block of each part
  int64_t* spans = nullptr;     // [batch, parts, 2], first key and end of keys of each part
  int64_t* offsets = nullptr;   // [batch, kv_heads, parts], of the sums of a part
  float* sums = nullptr;        // of each part: gradients of keys [span, d], then of values [span, dv]
  double* d_sinks = nullptr;    // [batch, kv_heads, parts, group]

  BackwardJob(const sightline_attention& a, int64_t number) : Job(a), parts(number) {}
  BackwardJob(const BackwardJob&) = delete;
  ~BackwardJob() {
    free(bounds);
    free(spans);
    free(offsets);
    free(sums);
    free(d_sinks);
  }
  const int64_t* span(int64_t row, int64_t part) const { return spans + (row * parts + part) * 2; }
  int64_t task_of(int64_t row, int64_t kv_head, int64_t part) const {
    return (row * args.kv_heads + kv_head) * parts + part;
  }
};

// As few parts of each row as keep at least 85 % of the threads at work.
inline int64_t choose_parts(int64_t heads, int64_t threads) {
  int64_t parts = 1;
  for (; heads > 0 && parts < threads; parts++) {
    const int64_t tasks = heads * parts, rounds = divide_up(tasks, threads);
    if (tasks * 100 >= rounds * threads * 85) break;
  }
  return parts;
}

// Chunks of a block: the first, and the end.
struct Chunks {
  int64_t first, end;
};
inline Chunks chunks_of(const sightline_attention& args, int64_t block) {
  return {args.blocks[4 * block + 3], block + 1 < args.num_blocks ? args.blocks[4 * block + 7] : args.num_chunks};
}

inline int64_t work_of(const sightline_attention& args, int64_t block) {
  const Chunks chunks = chunks_of(args, block);
  int64_t keys = 16;  // the cost of the block itself
  for (int64_t i = chunks.first; i < chunks.end; i++) keys += args.chunks[2 * i + 1] - args.chunks[2 * i];
  return keys * (args.blocks[4 * block + 2] - args.blocks[4 * block + 1]);
}

// Split blocks [block, end), those of a row, into parts of nearly equal work, and find the keys that each part reads.
inline void split_row(BackwardJob& job, int64_t row, int64_t block, int64_t end) {
  const sightline_attention& args = job.args;
  int64_t total = 0, done = 0;
  for (int64_t i = block; i < end; i++) total += work_of(args, i);
  int64_t* bound = job.bounds + row * (job.parts + 1);
  for (int64_t part = 0; part < job.parts; part++) {
    int64_t low = args.keys, high = 0;
    bound[part] = block;
    for (; block < end && (part == job.parts - 1 || done * job.parts < total * (part + 1)); block++) {
      const Chunks chunks = chunks_of(args, block);
      done += work_of(args, block);
      if (chunks.first == chunks.end) continue;
      low = min(low, args.chunks[2 * chunks.first]), high = max(high, args.chunks[2 * chunks.end - 1]);
    }
    int64_t* span = job.spans + (row * job.parts + part) * 2;
    if (job.parts == 1) low = 0, high = args.keys;  // all gradients are written from its sums
    if (low < high) span[0] = low, span[1] = high;
  }
  bound[job.parts] = block;
}

// Split all rows, and allocate the sums of their parts. Return whether there was memory.
inline bool split_rows(BackwardJob& job) {
  const sightline_attention& args = job.args;
  auto allocate = [](int64_t count) { return calloc(static_cast<size_t>(count) + 1, 8); };
  job.bounds = static_cast<int64_t*>(allocate(args.batch * (job.parts + 1)));
  job.spans = static_cast<int64_t*>(allocate(args.batch * job.parts * 2));
  job.offsets = static_cast<int64_t*>(allocate(job.task_of(args.batch, 0, 0)));
  job.d_sinks = static_cast<double*>(allocate(job.task_of(args.batch, 0, 0) * job.sizes.group));
  if (!job.bounds || !job.spans || !job.offsets || !job.d_sinks) return false;
  int64_t block = 0;
  for (int64_t row = 0; row < args.batch; row++) {
    int64_t end = block;
    while (end < args.num_blocks && args.blocks[4 * end] == row) end++;
    split_row(job, row, block, end);
    block = end;
  }
  if (job.parts == 1) return true;
  int64_t floats = 0;
  for (int64_t task = 0; task < job.task_of(args.batch, 0, 0); task++) {
    const int64_t* span = job.span(task / job.parts / args.kv_heads, task % job.parts);
    job.offsets[task] = floats;
    floats += (span[1] - span[0]) * (job.sizes.d + job.sizes.dv);
  }
  job.sums = static_cast<float*>(malloc(bytes(max(floats, 1))));
  return job.sums != nullptr;
}

}  // namespace
}  // namespace SIGHTLINE_ISA
}  // namespace sightline
