// Splits queries into blocks that read nearby keys, and lists the keys that each block reads.
#include <stdlib.h>

#include "kernel.h"

namespace sightline {
namespace {

constexpr int64_t GAP = 16;  // this many hidden keys between two runs are cheaper to compute than to skip

struct Run {
  int32_t first, end;
};

struct Mask {
  const int32_t *start, *stop;
  int64_t batch, queries, keys, intervals;

  int64_t at(int64_t row, int64_t query) const { return (row * queries + query) * intervals; }
};

// Merge sorted runs `a` and the intervals of one query into `out`; join runs at most GAP keys apart. Return their
// number.
int64_t merge(const Run* a, int64_t count, const int32_t* start, const int32_t* stop, int64_t intervals, Run* out) {
  int64_t i = 0, k = 0, n = 0;
  while (i < count || (k < intervals && stop[k] > start[k])) {
    const bool has_interval = k < intervals && stop[k] > start[k];
    Run next;
    if (has_interval && (i == count || start[k] < a[i].first)) {
      next = Run{start[k], stop[k]};
      k++;
    } else {
      next = a[i++];
    }
    if (n > 0 && next.first <= out[n - 1].end + GAP) {
      if (next.end > out[n - 1].end) out[n - 1].end = next.end;
    } else {
      out[n++] = next;
    }
  }
  return n;
}

// End of the block that starts at `first`: it ends early where a document starts, if it is at least half full.
int64_t end_of_block(const Mask& mask, int64_t row, int64_t first) {
  const int64_t end = first + MAX_QUERIES < mask.queries ? first + MAX_QUERIES : mask.queries;
  if (mask.intervals == 0) return end;
  for (int64_t query = first + MAX_QUERIES / 2; query < end; query++)
    if (mask.start[mask.at(row, query)] > mask.start[mask.at(row, query - 1)] + 1) return query;
  return end;
}

// Append the chunks of sorted runs, as far as `capacity` allows; return the number of all chunks.
int64_t add_chunks(const Run* runs, int64_t count, int32_t* chunks, int64_t capacity, int64_t num_chunks) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t first = runs[i].first; first < runs[i].end; first += MAX_KEYS, num_chunks++) {
      if (num_chunks >= capacity) continue;
      chunks[2 * num_chunks] = static_cast<int32_t>(first);
      const int64_t end = first + MAX_KEYS;
      chunks[2 * num_chunks + 1] = end < runs[i].end ? static_cast<int32_t>(end) : runs[i].end;
    }
  return num_chunks;
}

}  // namespace

bool too_large(int64_t a, int64_t b, int64_t c, int64_t d) {
  return static_cast<__int128>(a) * b * c * d > 1ll << 47;
}

int32_t check_intervals(
    const int32_t* start, const int32_t* stop, int64_t num_queries, int64_t keys, int64_t intervals) {
  for (int64_t query = 0; query < num_queries; query++, start += intervals, stop += intervals) {
    int64_t previous = -1;  // an interval starts after the end of the previous one, or at 0
    bool ended = false;
    for (int64_t k = 0; k < intervals; k++) {
      const int64_t first = start[k], end = stop[k];
      if (first < 0 || end > keys || end < first) return SIGHTLINE_BAD_INTERVALS;
      if (end == first) {
        ended = true;
        continue;
      }
      if (ended || first <= previous) return SIGHTLINE_BAD_INTERVALS;
      previous = end;
    }
  }
  return SIGHTLINE_OK;
}

}  // namespace sightline

extern "C" __attribute__((visibility("default"))) int32_t sightline_attention_plan(
    const int32_t* start, const int32_t* stop, int64_t batch, int64_t queries, int64_t keys, int64_t intervals,
    int32_t* blocks, int64_t max_blocks, int32_t* chunks, int64_t max_chunks, int64_t* num_blocks,
    int64_t* num_chunks) {
  using namespace sightline;
  *num_blocks = *num_chunks = 0;
  if (batch < 0 || queries < 0 || keys < 0 || intervals < 0 || keys > INT32_MAX || queries > INT32_MAX ||
      batch > INT32_MAX || intervals > INT32_MAX || too_large(batch, queries, intervals, 1))
    return SIGHTLINE_BAD_SIZES;
  const int32_t code = check_intervals(start, stop, batch * queries, keys, intervals);
  if (code != SIGHTLINE_OK) return code;
  const Mask mask{start, stop, batch, queries, keys, intervals};
  const size_t capacity = static_cast<size_t>(MAX_QUERIES * intervals + 1);
  Run* buffers = static_cast<Run*>(malloc(2 * capacity * sizeof(Run)));
  if (buffers == nullptr) return SIGHTLINE_OUT_OF_MEMORY;
  Run *runs = buffers, *merged = buffers + capacity;
  for (int64_t row = 0; row < batch; row++)
    for (int64_t first = 0, end; first < queries; first = end) {
      end = end_of_block(mask, row, first);
      int64_t count = 0;
      for (int64_t query = first; query < end; query++) {
        const int64_t at = mask.at(row, query);
        count = merge(runs, count, start + at, stop + at, intervals, merged);
        Run* swap = runs;
        runs = merged;
        merged = swap;
      }
      if (*num_blocks < max_blocks) {
        int32_t* block = blocks + 4 * *num_blocks;
        block[0] = static_cast<int32_t>(row);
        block[1] = static_cast<int32_t>(first);
        block[2] = static_cast<int32_t>(end);
        block[3] = static_cast<int32_t>(*num_chunks);
      }
      ++*num_blocks;
      *num_chunks = add_chunks(runs, count, chunks, max_chunks, *num_chunks);
    }
  free(buffers);
  return SIGHTLINE_OK;
}
