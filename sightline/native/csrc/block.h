// A block of queries: which of them attend to which keys, and the products over the visible pairs.
#pragma once
#include "multiply.h"
#include "tensors.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

// A block of queries and its current chunk of keys.
struct Block {
  const sightline_attention& args;
  int64_t row, first, count;  // row of the batch, first query, number of queries
  int64_t vectors;            // of queries
  int64_t key = 0, keys = 0;  // first key of the chunk, number of keys
  bool full = false;          // whether all queries attend to all keys of the chunk
  uint64_t words[CHUNK + 1];  // of each key of the chunk: bit i is set if query i attends to it

  Block(const sightline_attention& a, int64_t index) : args(a) {
    const int32_t* block = a.blocks + 4 * index;
    row = block[0], first = block[1], count = block[2] - block[1], chunk = block[3];
    end_chunk = index + 1 < a.num_blocks ? block[7] : a.num_chunks;
    vectors = divide_up(count, LANES);
    memset(cursor, 0, sizeof(cursor));
  }

  // Go to the next chunk and compute its words; false after the last.
  bool next() {
    if (chunk == end_chunk) return false;
    key = args.chunks[2 * chunk], keys = args.chunks[2 * chunk + 1] - key, chunk++;
    memset(words, 0, static_cast<size_t>(keys + 1) * sizeof(uint64_t));
    // First set bits where an interval starts and where it stops; then each word is the exclusive or of those before.
    const int64_t intervals = args.intervals, offset = (row * args.queries + first) * intervals;
    for (int64_t i = 0; i < count; i++) {
      const int32_t *start = args.start + offset + i * intervals, *stop = args.stop + offset + i * intervals;
      int32_t k = cursor[i];
      while (k < intervals && stop[k] <= key && stop[k] > start[k]) k++;
      cursor[i] = k;
      for (; k < intervals && stop[k] > start[k] && start[k] < key + keys; k++) {
        words[max(start[k] - key, 0)] ^= 1ull << i;
        words[min(stop[k] - key, keys)] ^= 1ull << i;
      }
    }
    uint64_t word = 0, all = ~0ull;
    for (int64_t j = 0; j < keys; j++) {
      word ^= words[j];
      words[j] = word;
      all &= word;
    }
    full = all == ~0ull >> (BLOCK - count);
    return true;
  }

  // Bits of the queries that attend to any of `number` keys.
  uint64_t any(int64_t from, int64_t number) const {
    uint64_t word = 0;
    for (int64_t j = from; j < from + number; j++) word |= words[j];
    return word;
  }

  // Bits of the queries of vector `v` that attend to key `j`.
  uint32_t bits(int64_t j, int64_t v) const { return static_cast<uint32_t>(words[j] >> (v * LANES)) & ALL_LANES; }

  // Whether a query is fully masked. Empty intervals follow the others.
  bool is_masked(int64_t i) const {
    const int64_t offset = (row * args.queries + first + i) * args.intervals;
    return args.intervals == 0 || args.start[offset] == args.stop[offset];
  }

 private:
  int64_t chunk, end_chunk;
  int32_t cursor[BLOCK];  // of each query: its first interval that does not end before the chunk
};

inline int64_t first_bit(uint64_t word) { return __builtin_ctzll(word); }
inline int64_t end_bit(uint64_t word) { return 64 - __builtin_clzll(word); }

// scores [keys, BLOCK] = rows columns, where any query of a vector attends to any key of a tile; else not written.
inline void multiply_visible(const Block& block, Rows rows, const float* columns, int64_t depth, float* scores) {
  for (int64_t j = 0; j < block.keys; j += ROWS) {
    const int64_t tile = min(ROWS, block.keys - j);
    int64_t from = 0, to = block.vectors;
    if (!block.full) {
      const uint64_t word = block.any(j, tile);
      if (!word) continue;
      from = first_bit(word) / LANES, to = divide_up(end_bit(word), LANES);
    }
    multiply<false, false>(
        tile, to - from, rows.data + j * rows.stride, rows.stride, columns + from * LANES, BLOCK, depth,
        scores + j * BLOCK + from * LANES, BLOCK);
  }
}

// sums [queries, size] += weights' rows: the rows of the keys, weighted for each query.
inline void add_for_queries(const Block& block, const float* weights, Rows rows, int64_t size, float* sums) {
  auto add = [&](int64_t query, int64_t tile, int64_t from, int64_t to) {
    multiply<true, true>(
        tile, size / LANES, weights + from * BLOCK + query, BLOCK, rows.data + from * rows.stride, rows.stride,
        to - from, sums + query * size, size);
  };
  const int64_t most = block.full || rows.finite ? ROWS : 1;
  for (int64_t i = 0; i < block.count; i += most) {
    const int64_t tile = min(most, block.count - i);
    const uint64_t queries = ((1ull << tile) - 1) << i;
    int64_t from = 0, to = block.keys;
    while (from < to && !(block.words[from] & queries)) from++;
    while (to > from && !(block.words[to - 1] & queries)) to--;
    if (from == to) continue;
    if (block.full || rows.finite) {
      add(i, tile, from, to);
      continue;
    }
    for (int64_t j = from; j < to; j++)
      if (block.words[j] & queries) add(i, tile, j, j + 1);
  }
}

// sums [keys, size] += weights rows: the rows of the queries, weighted for each key.
inline void add_for_keys(
    const Block& block, const float* weights, Rows rows, int64_t size, float* sums, int64_t stride) {
  auto add = [&](int64_t key, int64_t tile, int64_t from, int64_t to) {
    multiply<false, true>(
        tile, size / LANES, weights + key * BLOCK + from, BLOCK, rows.data + from * rows.stride, rows.stride,
        to - from, sums + key * stride, stride);
  };
  const int64_t most = block.full || rows.finite ? ROWS : 1;
  for (int64_t j = 0; j < block.keys; j += most) {
    const int64_t tile = min(most, block.keys - j);
    const uint64_t word = block.any(j, tile);
    if (!word) continue;
    const int64_t from = first_bit(word), to = end_bit(word);
    if (block.full || rows.finite) {
      add(j, tile, from, to);
      continue;
    }
    for (int64_t i = from; i < to; i++)
      if (word >> i & 1) add(j, tile, i, i + 1);
  }
}

// Zero the rows [BLOCK, size] of queries that fill up the last vector of queries.
inline void zero_padding(const Block& block, int64_t size, float* rows) {
  memset(rows + block.count * size, 0, bytes((block.vectors * LANES - block.count) * size));
}

// Keys or values of the chunk, packed.
template <class T>
Rows pack_chunk(
    const sightline_tensor& x, int64_t head, const Block& block, int64_t size, int64_t padded, float* buffer) {
  return pack<T>(at<T>(x, block.row, head, block.key), x.stride[2], block.keys, size, padded, buffer);
}

// Keys or values of the chunk as an operand of `multiply_visible` alone: not padded, and not copied if they are
// float32. Whether they are finite does not matter there: each pair has a score of its own.
template <class T>
Rows read_chunk(const sightline_tensor& x, int64_t head, const Block& block, int64_t size, float* buffer) {
  if constexpr (sizeof(typename T::Element) == sizeof(float))
    return {at<T>(x, block.row, head, block.key), x.stride[2], true};
  return pack_chunk<T>(x, head, block, size, size, buffer);
}

}  // namespace
}  // namespace SIGHTLINE_ISA
}  // namespace sightline
