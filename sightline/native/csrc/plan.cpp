// Split the queries of a mask into blocks, and list the chunks of keys that each block reads.
#include <stdlib.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "attention.h"
#include "kernels.h"

namespace {

constexpr int64_t SMALL_GAP = 16;  // up to this many masked keys between two runs are cheaper to compute than to skip

bool is_canonical(const int32_t* start, const int32_t* stop, int64_t intervals, int64_t keys) {
  int64_t end = -1;  // of the previous interval
  for (int64_t k = 0; k < intervals; k++) {
    if (stop[k] <= start[k]) {  // unused: all further ones must be as well
      for (; k < intervals; k++)
        if (start[k] != 0 || stop[k] != 0) return false;
      return true;
    }
    if (start[k] < 0 || start[k] <= end || stop[k] > keys) return false;
    end = stop[k];
  }
  return true;
}

// Runs of keys that are visible to any query of a block, in ascending order.
class Runs {
 public:
  void add(const int32_t* start, const int32_t* stop, int64_t intervals) {
    for (int64_t k = 0; k < intervals && stop[k] > start[k]; k++) {
      // The same runs come from query to query: they extend the run that the last query's interval belongs to.
      if (k < static_cast<int64_t>(runs_.size()) && start[k] >= runs_[k].first && start[k] <= runs_[k].second)
        runs_[k].second = std::max(runs_[k].second, stop[k]);
      else
        runs_.push_back({start[k], stop[k]});
    }
  }

  const std::vector<std::pair<int32_t, int32_t>>& merged() {
    std::sort(runs_.begin(), runs_.end());
    size_t count = 0;
    for (const auto& run : runs_) {
      if (count && run.first <= runs_[count - 1].second + SMALL_GAP)
        runs_[count - 1].second = std::max(runs_[count - 1].second, run.second);
      else
        runs_[count++] = run;
    }
    runs_.resize(count);
    return runs_;
  }

  void clear() { runs_.clear(); }

 private:
  std::vector<std::pair<int32_t, int32_t>> runs_;
};

}  // namespace

extern "C" int32_t sightline_attention_plan(
    const int32_t* start, const int32_t* stop, int64_t batch, int64_t queries, int64_t keys, int64_t intervals,
    int32_t* blocks, int64_t max_blocks, int32_t* chunks, int64_t max_chunks, int64_t* num_blocks,
    int64_t* num_chunks) {
  if (batch < 0 || queries < 0 || keys < 0 || intervals < 1 || keys > INT32_MAX || queries > INT32_MAX)
    return SIGHTLINE_BAD_SIZES;
  *num_blocks = *num_chunks = 0;
  Runs runs;
  for (int64_t row = 0; row < batch; row++) {
    for (int64_t first = 0; first < queries;) {
      const int64_t end = std::min(queries, first + SIGHTLINE_BLOCK);
      runs.clear();
      for (int64_t q = first; q < end; q++) {
        const int64_t offset = (row * queries + q) * intervals;
        if (!is_canonical(start + offset, stop + offset, intervals, keys)) return SIGHTLINE_BAD_INTERVALS;
        runs.add(start + offset, stop + offset, intervals);
      }
      if (*num_blocks < max_blocks) {
        int32_t* block = blocks + 4 * *num_blocks;
        block[0] = static_cast<int32_t>(row), block[1] = static_cast<int32_t>(first);
        block[2] = static_cast<int32_t>(end), block[3] = static_cast<int32_t>(*num_chunks);
      }
      ++*num_blocks;
      for (const auto& run : runs.merged()) {
        for (int32_t key = run.first; key < run.second; key += SIGHTLINE_CHUNK) {
          if (*num_chunks < max_chunks) {
            chunks[2 * *num_chunks] = key;
            chunks[2 * *num_chunks + 1] = std::min<int32_t>(run.second, key + SIGHTLINE_CHUNK);
          }
          ++*num_chunks;
        }
      }
      first = end;
    }
  }
  return SIGHTLINE_OK;
}
