// Attention over intervals of keys, forward and backward. Compiled once per instruction set: SIGHTLINE_ISA is its name
// and namespace, SIGHTLINE_LANES the floats of a vector.
//
// A block of at most 64 queries reads a list of chunks of keys (see plan.cpp). All scores are kept transposed, keys by
// queries, so that a lane of a vector is one query: the maximum, the sum and the mask of a query are lane-wise, keys and
// values are read where they lie, one float at a time, and only the queries of a block are transposed. For each key one
// 64-bit word says which queries of the block attend to it.
//
// Three products make the forward and five the backward, each from one kernel, `multiply`: S' = K Q', O += P V; and
// S' = K Q', dP' = V dO', dV += P' dO, dK += dS' Q, dQ += dS K (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
// A product skips the vectors of queries, or the keys, in which nothing is visible.
//
// The rules at the top of vector.h hold here too.
#include <stdlib.h>
#include <string.h>

#include "kernel.h"
#include "vector.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

#if SIGHTLINE_LANES == 16 || defined(__aarch64__)
constexpr int ROWS = 6, VECTORS = 4;  // of a tile of `multiply`: 24 accumulators in 32 registers
#elif SIGHTLINE_LANES == 8
constexpr int ROWS = 6, VECTORS = 2;  // 12 accumulators in 16 registers
#else
constexpr int ROWS = 4, VECTORS = 2;
#endif
constexpr int BLOCK = MAX_QUERIES;  // most queries of a block: the bits of a word
constexpr int CHUNK = MAX_KEYS;     // most keys of a chunk
constexpr int MAX_GROUP = 8;        // most query heads that share the packed keys of a chunk

typedef uint16_t HalfInts __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

// tanh(x) = 1 - 2 / (e^(2|x|) + 1), with the sign of x.
inline Vector tanh(Vector x) {
  Vector size = select(x < 0.0f, -x, x);
  Vector e = exp2(size * (-2.0f * LOG2E));  // e^(-2|x|)
  Vector t = (1.0f - e) / (1.0f + e);
  return select(x < 0.0f, -t, t);
}

// Lanes of the bits of a word: all ones where the bit is set.
struct LaneBits {
  Ints bit;
  LaneBits() {
    for (int i = 0; i < LANES; i++) bit[i] = 1 << i;
  }
  Ints of(uint32_t word) const { return ((static_cast<int32_t>(word) - Ints{}) & bit) != 0; }
};
constexpr uint32_t ALL_LANES = (LANES == 32) ? ~0u : (1u << LANES) - 1;

// c [rows, N vectors] = or += a b, with b [depth, N vectors]. a is [rows, depth], or [depth, rows] if TRANSPOSED.
template <int M, int N, bool TRANSPOSED, bool ADD>
void multiply_tile(
    const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc) {
  Vector sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sum[m][n] = ADD ? load(c + m * ldc + n * LANES) : Vector{};
  for (int64_t k = 0; k < depth; k++) {
    Vector x[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) x[n] = load(b + k * ldb + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      Vector y = splat(TRANSPOSED ? a[k * lda + m] : a[m * lda + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sum[m][n] += y * x[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(c + m * ldc + n * LANES, sum[m][n]);
}

template <int M, bool TRANSPOSED, bool ADD>
inline void multiply_vectors(
    const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, int vectors) {
  for (; vectors >= VECTORS; vectors -= VECTORS, b += VECTORS * LANES, c += VECTORS * LANES)
    multiply_tile<M, VECTORS, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc);
  switch (vectors) {
    case 1: multiply_tile<M, 1, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc); break;
    case 2: if (VECTORS > 2) multiply_tile<M, 2, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc); break;
    case 3: if (VECTORS > 3) multiply_tile<M, 3, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc); break;
  }
}

// As multiply_tile, for 1 <= rows <= ROWS and any number of vectors.
template <bool TRANSPOSED, bool ADD>
inline void multiply(
    int rows, int vectors, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
    int64_t ldc) {
  switch (rows) {
    case 1: return multiply_vectors<1, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
    case 2: return multiply_vectors<2, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
    case 3: return multiply_vectors<3, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
    case 4: return multiply_vectors<4, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
    case 5: return multiply_vectors<(ROWS > 4 ? 5 : 4), TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
    case 6: return multiply_vectors<(ROWS > 4 ? 6 : 4), TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
  }
}

template <int STEP>
inline void exchange(Vector& a, Vector& b) {  // one step of the transpose of LANES x LANES
  Ints low, high;
  for (int i = 0; i < LANES; i++) {
    low[i] = i & STEP ? LANES + i - STEP : i;
    high[i] = i & STEP ? LANES + i : i + STEP;
  }
#if defined(__clang__)
  Vector x, y;
  for (int i = 0; i < LANES; i++) {
    x[i] = i & STEP ? b[i - STEP] : a[i];
    y[i] = i & STEP ? b[i] : a[i + STEP];
  }
#else
  Vector x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
#endif
  a = x;
  b = y;
}

template <int STEP>
inline void exchange_all(Vector* x) {
  if constexpr (STEP < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & STEP)) exchange<STEP>(x[i], x[i + STEP]);
    exchange_all<2 * STEP>(x);
  }
}

// to [size, BLOCK] = factor * from' for from [BLOCK, size], size a multiple of LANES.
void transpose(const float* from, int64_t size, int64_t rows, float factor, float* to) {
  for (int64_t row = 0; row < rows; row += LANES)
    for (int64_t column = 0; column < size; column += LANES) {
      Vector x[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) x[i] = load(from + (row + i) * size + column) * factor;
      exchange_all<1>(x);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) store(to + (column + i) * BLOCK + row, x[i]);
    }
}

// Elements of tensors: float32, or bfloat16 converted to float32.
struct Float32 {
  typedef float Element;
  static Vector load_vector(const float* p) { return load(p); }
  static void store_vector(float* p, Vector x) { store(p, x); }
  static float get(float x) { return x; }
  static float put(float x) { return x; }
};
struct Bfloat16 {
  typedef uint16_t Element;
  static Vector load_vector(const uint16_t* p) {
    Ints bits = __builtin_convertvector(*reinterpret_cast<const HalfInts*>(p), Ints) << 16;
    return reinterpret_cast<Vector>(bits);
  }
  static void store_vector(uint16_t* p, Vector x) {  // rounds to nearest even; NaN stays NaN
    typedef uint32_t Unsigned __attribute__((vector_size(LANES * 4)));
    Unsigned bits = reinterpret_cast<Unsigned>(x);
    Unsigned rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    Unsigned nan = reinterpret_cast<Unsigned>(x != x);
    rounded = (nan & 0x7FC0) | (~nan & rounded);
    *reinterpret_cast<HalfInts*>(p) = __builtin_convertvector(rounded, HalfInts);
  }
  static float get(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
  }
  static uint16_t put(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
};

template <class T>
typename T::Element* at(const sightline_tensor& x, int64_t row, int64_t head, int64_t token) {
  return static_cast<typename T::Element*>(const_cast<void*>(x.data)) + row * x.stride[0] + head * x.stride[1] +
         token * x.stride[2];
}

// Copy `count` tokens of `size` floats to rows of `padded` floats; the padding is 0. Return whether all are finite.
template <class T>
bool pack(const typename T::Element* from, int64_t stride, int64_t count, int64_t size, int64_t padded, float* to) {
  Vector zeros = {};  // 0 * x is NaN for an infinite x
  for (int64_t i = 0; i < count; i++, from += stride, to += padded) {
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) {
      const Vector x = T::load_vector(from + d);
      zeros += x * 0.0f;
      store(to + d, x);
    }
    for (; d < size; d++) {
      to[d] = T::get(from[d]);
      zeros[0] += to[d] * 0.0f;
    }
    for (; d < padded; d++) to[d] = 0;
  }
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += zeros[i];
  return sum == 0;
}

template <class T>
void unpack_row(const float* from, float factor, int64_t size, typename T::Element* to) {
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) T::store_vector(to + d, load(from + d) * factor);
  for (; d < size; d++) to[d] = T::put(from[d] * factor);
}

// Rows of floats with a fixed distance: where they lie in a tensor, or a packed copy. A masked key or query has weight
// 0, but 0 * NaN is NaN: rows that are not finite are multiplied by the weights of visible pairs only.
struct Rows {
  const float* data;
  int64_t stride;
  bool finite;
};

// Memory of one thread.
struct Memory {
  float* data = nullptr;
  bool allocate(int64_t floats) { return posix_memalign(reinterpret_cast<void**>(&data), 64, max(floats, 16) * 4) == 0; }
  ~Memory() { free(data); }
};

// The queries of a block, and which of them attend to each key of the current chunk.
struct Block {
  const sightline_attention& args;
  int64_t row, first, count, chunk, end_chunk;
  int vectors;
  uint64_t everyone;
  int32_t cursor[BLOCK];  // of each query: its first interval that does not end before the current chunk
  uint64_t words[CHUNK + 1];
  int64_t key, keys;  // first key of the current chunk, number of keys
  bool full;          // whether all queries attend to all keys of the chunk

  Block(const sightline_attention& a, int64_t index) : args(a) {
    const int32_t* block = a.blocks + 4 * index;
    row = block[0], first = block[1], count = block[2] - block[1], chunk = block[3];
    end_chunk = index + 1 < a.num_blocks ? block[7] : a.num_chunks;
    vectors = static_cast<int>((count + LANES - 1) / LANES);
    everyone = count == 64 ? ~0ull : (1ull << count) - 1;
    memset(cursor, 0, sizeof(cursor));
  }

  // Go to the next chunk and compute its words; false after the last.
  bool next() {
    if (chunk == end_chunk) return false;
    key = args.chunks[2 * chunk], keys = args.chunks[2 * chunk + 1] - key, chunk++;
    memset(words, 0, (keys + 1) * sizeof(uint64_t));
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
    full = (all & everyone) == everyone;
    return true;
  }

  uint64_t any(int64_t from, int64_t count) const {
    uint64_t word = 0;
    for (int64_t j = from; j < from + count; j++) word |= words[j];
    return word;
  }
};

inline int first_bit(uint64_t word) { return __builtin_ctzll(word); }
inline int end_bit(uint64_t word) { return 64 - __builtin_clzll(word); }

// scores [keys, BLOCK] = rows columns, where any query of a vector attends to any key of a tile.
void multiply_visible(const Block& block, Rows rows, const float* columns, int64_t depth, float* scores) {
  for (int64_t j = 0; j < block.keys; j += ROWS) {
    int tile = static_cast<int>(min(ROWS, block.keys - j));
    int from = 0, to = block.vectors;
    if (!block.full) {
      uint64_t word = block.any(j, tile);
      if (!word) continue;
      from = first_bit(word) / LANES, to = (end_bit(word) + LANES - 1) / LANES;
    }
    multiply<false, false>(
        tile, to - from, rows.data + j * rows.stride, rows.stride, columns + from * LANES, BLOCK, depth,
        scores + j * BLOCK + from * LANES, BLOCK);
  }
}

// sums [queries, size] += weights' rows: the values of the keys, weighted for each query.
void add_for_queries(const Block& block, const float* weights, Rows rows, int64_t size, float* sums) {
  const int vectors = static_cast<int>(size / LANES);
  auto add = [&](int64_t query, int tile, int64_t from, int64_t to) {
    multiply<true, true>(tile, vectors, weights + from * BLOCK + query, BLOCK, rows.data + from * rows.stride,
                         rows.stride, to - from, sums + query * size, size);
  };
  const int rows_of_tile = block.full || rows.finite ? ROWS : 1;
  for (int64_t i = 0; i < block.count; i += rows_of_tile) {
    int tile = static_cast<int>(min(rows_of_tile, block.count - i));
    int64_t from = 0, to = block.keys;
    if (!block.full) {
      uint64_t queries = ((1ull << tile) - 1) << i;
      while (from < to && !(block.words[from] & queries)) from++;
      while (to > from && !(block.words[to - 1] & queries)) to--;
      if (from == to) continue;
      if (!rows.finite) {
        for (int64_t j = from; j < to; j++)
          if (block.words[j] & queries) add(i, tile, j, j + 1);
        continue;
      }
    }
    add(i, tile, from, to);
  }
}

// sums [keys, size] += weights rows: the rows of the queries, weighted for each key.
void add_for_keys(const Block& block, const float* weights, Rows rows, int64_t size, float* sums, int64_t stride) {
  const int vectors = static_cast<int>(size / LANES);
  auto add = [&](int64_t key, int tile, int64_t from, int64_t to) {
    multiply<false, true>(tile, vectors, weights + key * BLOCK + from, BLOCK, rows.data + from * rows.stride,
                          rows.stride, to - from, sums + key * stride, stride);
  };
  const int rows_of_tile = block.full || rows.finite ? ROWS : 1;
  for (int64_t j = 0; j < block.keys; j += rows_of_tile) {
    int tile = static_cast<int>(min(rows_of_tile, block.keys - j));
    int64_t from = 0, to = block.count;
    if (!block.full) {
      uint64_t word = block.any(j, tile);
      if (!word) continue;
      from = first_bit(word), to = end_bit(word);
      if (!rows.finite) {
        for (int64_t i = from; i < to; i++)
          if (word >> i & 1) add(j, tile, i, i + 1);
        continue;
      }
    }
    add(j, tile, from, to);
  }
}

// Keys or values of a chunk: where they lie if that is possible, else packed.
template <class T>
Rows chunk_rows(
    const sightline_tensor& x, int64_t row, int64_t head, const Block& block, int64_t size, int64_t padded, bool copy,
    float* buffer) {
  const typename T::Element* from = at<T>(x, row, head, block.key);
  if (sizeof(typename T::Element) == 4 && !copy && size == padded)
    return {reinterpret_cast<const float*>(from), x.stride[2], true};
  const bool finite = pack<T>(from, x.stride[2], block.keys, size, padded, buffer);
  return {buffer, padded, finite};
}

struct Sizes {
  int64_t group, d, dv;  // query heads per key head; channels of keys and of values, padded to whole vectors
  explicit Sizes(const sightline_attention& a)
      : group(a.kv_heads ? a.heads / a.kv_heads : 0), d(round_up(a.head_dim, LANES)), dv(round_up(a.value_dim, LANES)) {}
};

// Running softmax of one query head over the chunks of a block.
struct Softmax {
  float* maximum;  // [BLOCK], of the scores so far, times log2(e)
  float* sum;      // [BLOCK], of 2^(score - maximum)
  float* out;      // [BLOCK, dv], weighted sum of the values, not divided yet
};

// Replace scores by weights 2^(score - maximum), update the sums, and rescale what earlier chunks added.
void update_softmax(const Block& block, const LaneBits& lanes, float softcap, int64_t dv, float* scores, Softmax state) {
  const float lowest = -INFINITY;
  for (int v = 0; v < block.vectors; v++) {
    float* column = scores + v * LANES;
    const Vector before = load(state.maximum + v * LANES);
    Vector maximum = before;
    for (int64_t j = 0; j < block.keys; j++) {
      uint32_t bits = static_cast<uint32_t>(block.words[j] >> (v * LANES)) & ALL_LANES;
      if (!bits) continue;
      Vector score = load(column + j * BLOCK);
      if (softcap != 0) score = tanh(score) * (softcap * LOG2E);
      if (bits != ALL_LANES) score = select(lanes.of(bits), score, splat(lowest));
      if (softcap != 0 || bits != ALL_LANES) store(column + j * BLOCK, score);
      maximum = select(score > maximum, score, maximum);
    }
    const Vector safe = select(maximum == lowest, Vector{}, maximum);
    const Vector factor = exp2(before - safe);
    Vector sum = load(state.sum + v * LANES) * factor;
    for (int64_t j = 0; j < block.keys; j++) {
      uint32_t bits = static_cast<uint32_t>(block.words[j] >> (v * LANES)) & ALL_LANES;
      Vector weight = {};
      if (bits) weight = exp2(load(column + j * BLOCK) - safe), sum += weight;
      store(column + j * BLOCK, weight);
    }
    store(state.maximum + v * LANES, maximum);
    store(state.sum + v * LANES, sum);
    for (int i = 0; i < LANES; i++) {
      if (factor[i] == 1) continue;
      float* out = state.out + (v * LANES + i) * dv;
      for (int64_t d = 0; d < dv; d += LANES) store(out + d, load(out + d) * factor[i]);
    }
  }
}

template <class T>
void forward_block(const sightline_attention& a, const Sizes& sizes, Block block, int64_t kv_head, int64_t first_head,
                   int64_t heads, float* memory) {
  const LaneBits lanes;
  const int64_t d = sizes.d, dv = sizes.dv;
  float* queries = memory;                               // [heads, d, BLOCK], transposed and scaled
  float* outs = queries + heads * d * BLOCK;             // [heads, BLOCK, dv]
  float* maxima = outs + heads * BLOCK * dv;             // [heads, BLOCK]
  float* sums = maxima + heads * BLOCK;                  // [heads, BLOCK]
  float* scores = sums + heads * BLOCK;                  // [CHUNK, BLOCK]
  float* keys = scores + CHUNK * BLOCK;                  // [CHUNK, d]
  float* values = keys + CHUNK * d;                      // [CHUNK, dv]
  float* packed = values + CHUNK * dv;                   // [BLOCK, d]
  const float softcap = static_cast<float>(a.softcap);
  const float factor = static_cast<float>(softcap != 0 ? a.scale / a.softcap : a.scale * LOG2E);
  for (int64_t r = 0; r < heads; r++) {
    pack<T>(at<T>(a.q, block.row, first_head + r, block.first), a.q.stride[2], block.count, a.head_dim, d, packed);
    memset(packed + block.count * d, 0, (round_up(block.count, LANES) - block.count) * d * sizeof(float));
    transpose(packed, d, block.count, factor, queries + r * d * BLOCK);
  }
  memset(outs, 0, heads * BLOCK * dv * sizeof(float));
  memset(sums, 0, heads * BLOCK * sizeof(float));
  for (int64_t i = 0; i < heads * BLOCK; i++) maxima[i] = -INFINITY;
  while (block.next()) {
    Rows k = chunk_rows<T>(a.k, block.row, kv_head, block, a.head_dim, a.head_dim, false, keys);
    Rows v = chunk_rows<T>(a.v, block.row, kv_head, block, a.value_dim, dv, true, values);
    for (int64_t r = 0; r < heads; r++) {
      multiply_visible(block, k, queries + r * d * BLOCK, a.head_dim, scores);
      update_softmax(block, lanes, softcap, dv, scores, {maxima + r * BLOCK, sums + r * BLOCK, outs + r * BLOCK * dv});
      add_for_queries(block, scores, v, dv, outs + r * BLOCK * dv);
    }
  }
  for (int64_t r = 0; r < heads; r++) {
    const int64_t head = first_head + r;
    float* lse = a.lse + (block.row * a.heads + head) * a.queries + block.first;
    for (int64_t i = 0; i < block.count; i++) {
      const float sum = sums[r * BLOCK + i];
      float total = INFINITY, share = 0;
      if (sum != 0) {
        total = maxima[r * BLOCK + i] * LN2 + logf(sum);
        share = 1 / sum;
        if (a.sinks) {
          const float high = a.sinks[head] > total ? a.sinks[head] : total;
          const float with_sink = high + logf(expf(total - high) + expf(a.sinks[head] - high));
          share *= expf(total - with_sink);
          total = with_sink;
        }
      }
      lse[i] = total;
      unpack_row<T>(
          outs + (r * BLOCK + i) * dv, share, a.value_dim, at<T>(a.out, block.row, head, block.first + i));
    }
  }
}

int64_t forward_floats(const sightline_attention& a) {
  const Sizes s(a);
  const int64_t heads = min(s.group, MAX_GROUP);
  return heads * (s.d * BLOCK + BLOCK * s.dv + 2 * BLOCK) + CHUNK * (BLOCK + s.d + s.dv) + BLOCK * s.d;
}

// Where the gradients of keys and values are added: [span, size], from key `first`.
struct Gradient {
  float* data;
  int64_t stride, first;
};

// Weights 2^(score - lse) and gradients of the scores, from scores and gradients of the weights.
void weights_and_gradients(const Block& block, const LaneBits& lanes, const float* lse, const float* delta, float scale,
                           float softcap, float* scores, float* gradients) {
  for (int v = 0; v < block.vectors; v++) {
    const Vector total = load(lse + v * LANES), subtract = load(delta + v * LANES);
    float *p = scores + v * LANES, *g = gradients + v * LANES;
    for (int64_t j = 0; j < block.keys; j++, p += BLOCK, g += BLOCK) {
      uint32_t bits = static_cast<uint32_t>(block.words[j] >> (v * LANES)) & ALL_LANES;
      Vector weight = {}, gradient = {};
      if (bits) {
        Vector score = load(p);
        if (softcap == 0) {
          weight = exp2(score - total);
          gradient = weight * ((load(g) - subtract) * scale);
        } else {
          Vector t = tanh(score);
          weight = exp2(t * (softcap * LOG2E) - total);
          gradient = weight * ((load(g) - subtract) * scale) * (1.0f - t * t);
        }
        if (bits != ALL_LANES) {
          Ints visible = lanes.of(bits);
          weight = select(visible, weight, Vector{}), gradient = select(visible, gradient, Vector{});
        }
      }
      store(p, weight);
      store(g, gradient);
    }
  }
}

// delta [BLOCK] = sum over channels of out * d_out, for d_out packed in rows of dv.
template <class T>
void sum_products(const sightline_attention& a, const Block& block, int64_t head, const float* d_out, int64_t dv,
                  float* delta) {
  for (int64_t first = 0; first < block.vectors * LANES; first += LANES) {
    Vector sums[LANES];
    for (int64_t i = 0; i < LANES; i++) {
      sums[i] = Vector{};
      if (first + i >= block.count) continue;
      const typename T::Element* out = at<T>(a.out, block.row, head, block.first + first + i);
      const float* grad = d_out + (first + i) * dv;
      int64_t c = 0;
      for (; c + LANES <= a.value_dim; c += LANES) sums[i] += T::load_vector(out + c) * load(grad + c);
      for (; c < a.value_dim; c++) sums[i][0] += T::get(out[c]) * grad[c];
    }
    exchange_all<1>(sums);  // row n then has lane n of all queries
    Vector total = sums[0];
    for (int i = 1; i < LANES; i++) total += sums[i];
    store(delta + first, total);
  }
}

template <class T>
void backward_block(const sightline_attention& a, const Sizes& sizes, Block block, int64_t kv_head, int64_t first_head,
                    int64_t heads, Gradient d_key, Gradient d_value, double* d_sinks, float* memory) {
  const LaneBits lanes;
  const int64_t d = sizes.d, dv = sizes.dv;
  float* take = memory;
  auto buffer = [&take](int64_t floats) {
    float* p = take;
    take += floats;
    return p;
  };
  float* queries = buffer(heads * BLOCK * d);     // [heads, BLOCK, d]
  float* queries_t = buffer(heads * BLOCK * d);   // transposed and scaled
  float* d_outs = buffer(heads * BLOCK * dv);     // [heads, BLOCK, dv]
  float* d_outs_t = buffer(heads * BLOCK * dv);   // transposed
  float* d_queries = buffer(heads * BLOCK * d);   // [heads, BLOCK, d]
  float* lse = buffer(heads * BLOCK);             // times log2(e)
  float* delta = buffer(heads * BLOCK);           // sum of d_out * out
  float* scores = buffer(CHUNK * BLOCK);
  float* gradients = buffer(CHUNK * BLOCK);
  float* keys = buffer(CHUNK * d);
  float* values = buffer(CHUNK * dv);
  const float softcap = static_cast<float>(a.softcap), scale = static_cast<float>(a.scale);
  const float factor = static_cast<float>(softcap != 0 ? a.scale / a.softcap : a.scale * LOG2E);
  const int64_t padding = round_up(block.count, LANES) - block.count;
  Rows query_rows[MAX_GROUP], d_out_rows[MAX_GROUP];
  for (int64_t r = 0; r < heads; r++) {
    const int64_t head = first_head + r;
    float *q = queries + r * BLOCK * d, *g = d_outs + r * BLOCK * dv;
    const bool finite = pack<T>(at<T>(a.q, block.row, head, block.first), a.q.stride[2], block.count, a.head_dim, d, q);
    query_rows[r] = {q, d, finite};
    memset(q + block.count * d, 0, padding * d * sizeof(float));
    transpose(q, d, block.count, factor, queries_t + r * BLOCK * d);
    const bool finite_grad =
        pack<T>(at<T>(a.d_out, block.row, head, block.first), a.d_out.stride[2], block.count, a.value_dim, dv, g);
    d_out_rows[r] = {g, dv, finite_grad};
    memset(g + block.count * dv, 0, padding * dv * sizeof(float));
    transpose(g, dv, block.count, 1.0f, d_outs_t + r * BLOCK * dv);
    const float* total = a.lse + (block.row * a.heads + head) * a.queries + block.first;
    sum_products<T>(a, block, head, g, dv, delta + r * BLOCK);
    double sink = 0;
    for (int64_t i = 0; i < BLOCK; i++) {
      lse[r * BLOCK + i] = i < block.count ? total[i] * LOG2E : INFINITY;
      if (a.sinks && i < block.count) sink -= expf(a.sinks[head] - total[i]) * delta[r * BLOCK + i];
    }
    if (a.sinks) d_sinks[r] += sink;
  }
  memset(d_queries, 0, heads * BLOCK * d * sizeof(float));
  while (block.next()) {
    Rows k = chunk_rows<T>(a.k, block.row, kv_head, block, a.head_dim, d, true, keys);
    Rows v = chunk_rows<T>(a.v, block.row, kv_head, block, a.value_dim, a.value_dim, false, values);
    for (int64_t r = 0; r < heads; r++) {
      multiply_visible(block, k, queries_t + r * BLOCK * d, a.head_dim, scores);
      multiply_visible(block, v, d_outs_t + r * BLOCK * dv, a.value_dim, gradients);
      weights_and_gradients(block, lanes, lse + r * BLOCK, delta + r * BLOCK, scale, softcap, scores, gradients);
      add_for_keys(block, scores, d_out_rows[r], dv,
                   d_value.data + (block.key - d_value.first) * d_value.stride, d_value.stride);
      add_for_keys(block, gradients, query_rows[r], d,
                   d_key.data + (block.key - d_key.first) * d_key.stride, d_key.stride);
      add_for_queries(block, gradients, k, d, d_queries + r * BLOCK * d);
    }
  }
  for (int64_t r = 0; r < heads; r++)
    for (int64_t i = 0; i < block.count; i++)
      unpack_row<T>(d_queries + (r * BLOCK + i) * d, 1.0f, a.head_dim,
                    at<T>(a.d_q, block.row, first_head + r, block.first + i));
}

int64_t backward_floats(const sightline_attention& a) {
  const Sizes s(a);
  const int64_t heads = min(s.group, MAX_GROUP);
  return heads * BLOCK * (3 * s.d + 2 * s.dv + 2) + CHUNK * (2 * BLOCK + s.d + s.dv);
}

// Work that is shared by the threads: each takes the next task until none is left. The result of a task does not
// depend on the thread that computes it.
struct Job {
  const sightline_attention& a;
  Sizes sizes;
  int64_t tasks = 0, taken = 0;
  int32_t error = SIGHTLINE_OK;
  // Of backward: the blocks of a row are split into parts, which are computed at once.
  int64_t parts = 1;
  int64_t* bounds = nullptr;    // [batch, parts + 1], first block of each part
  int64_t* spans = nullptr;     // [batch, parts, 2], the keys that a part reads
  int64_t* offsets = nullptr;   // [batch, kv_heads, parts], of the sums of a part
  float* sums = nullptr;        // gradients of keys, then of values, of each part: [span, d], [span, dv]
  double* d_sinks = nullptr;    // [batch, kv_heads, parts, group]

  explicit Job(const sightline_attention& args) : a(args), sizes(args) {}
  ~Job() { free(bounds), free(spans), free(offsets), free(sums), free(d_sinks); }
  int64_t take() { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); }
  void fail() { __atomic_store_n(&error, SIGHTLINE_OUT_OF_MEMORY, __ATOMIC_RELAXED); }
  void run(sightline_task worker, int64_t number) {
    tasks = number, taken = 0;
    parallel_for(min(num_threads(), number), 1, worker, this);
  }
};

template <class T>
void forward_worker(int64_t, int64_t, void* context) {
  Job& job = *static_cast<Job*>(context);
  const sightline_attention& a = job.a;
  Memory memory;
  if (!memory.allocate(forward_floats(a))) return job.fail();
  const int64_t group = job.sizes.group, subgroups = (group + MAX_GROUP - 1) / MAX_GROUP;
  for (int64_t task; (task = job.take()) < job.tasks;) {
    // The blocks of a head follow each other, from the last, which often has the most keys.
    const int64_t index = a.num_blocks - 1 - task % a.num_blocks, kv_head = task / a.num_blocks / subgroups;
    const int64_t first = task / a.num_blocks % subgroups * MAX_GROUP;
    forward_block<T>(a, job.sizes, Block(a, index), kv_head, kv_head * group + first, min(MAX_GROUP, group - first),
                     memory.data);
  }
}

// Write the sums of gradients of one head's tokens [first, end) to a tensor; `sums` starts at token `first`.
template <class T>
void write_gradient(const sightline_tensor& to, int64_t row, int64_t head, int64_t first, int64_t end, int64_t size,
                    int64_t padded, const float* sums) {
  for (int64_t t = first; t < end; t++, sums += padded) unpack_row<T>(sums, 1.0f, size, at<T>(to, row, head, t));
}

template <class T>
void zero_gradient(const sightline_tensor& to, int64_t row, int64_t head, int64_t tokens, int64_t size) {
  for (int64_t t = 0; t < tokens; t++) memset(at<T>(to, row, head, t), 0, size * sizeof(typename T::Element));
}

template <class T>
void backward_worker(int64_t, int64_t, void* context) {
  Job& job = *static_cast<Job*>(context);
  const sightline_attention& a = job.a;
  const Sizes& s = job.sizes;
  // Gradients are added where they belong if they are whole vectors of float32, else in a buffer of one head.
  const bool in_place = job.parts == 1 && sizeof(typename T::Element) == 4 && s.d == a.head_dim && s.dv == a.value_dim;
  const int64_t buffer = in_place || job.parts > 1 ? 0 : a.keys * (s.d + s.dv);
  Memory memory;
  if (!memory.allocate(backward_floats(a) + buffer)) return job.fail();
  for (int64_t task; (task = job.take()) < job.tasks;) {
    const int64_t part = task % job.parts, kv_head = task / job.parts % a.kv_heads, row = task / job.parts / a.kv_heads;
    Gradient d_key, d_value;
    if (in_place) {
      zero_gradient<T>(a.d_k, row, kv_head, a.keys, a.head_dim);
      zero_gradient<T>(a.d_v, row, kv_head, a.keys, a.value_dim);
      d_key = {reinterpret_cast<float*>(at<T>(a.d_k, row, kv_head, 0)), a.d_k.stride[2], 0};
      d_value = {reinterpret_cast<float*>(at<T>(a.d_v, row, kv_head, 0)), a.d_v.stride[2], 0};
    } else {
      const int64_t *span = job.spans + (row * job.parts + part) * 2, keys = span[1] - span[0];
      float* sums = job.parts > 1 ? job.sums + job.offsets[task] : memory.data + backward_floats(a);
      memset(sums, 0, keys * (s.d + s.dv) * sizeof(float));
      d_key = {sums, s.d, span[0]}, d_value = {sums + keys * s.d, s.dv, span[0]};
    }
    const int64_t* bound = job.bounds + row * (job.parts + 1) + part;
    for (int64_t index = bound[0]; index < bound[1]; index++)
      for (int64_t first = 0; first < s.group; first += MAX_GROUP)
        backward_block<T>(a, s, Block(a, index), kv_head, kv_head * s.group + first, min(MAX_GROUP, s.group - first),
                          d_key, d_value, job.d_sinks + task * s.group + first, memory.data);
    if (!in_place && job.parts == 1) {
      write_gradient<T>(a.d_k, row, kv_head, 0, a.keys, a.head_dim, s.d, d_key.data);
      write_gradient<T>(a.d_v, row, kv_head, 0, a.keys, a.value_dim, s.dv, d_value.data);
    }
  }
}

constexpr int64_t SUM_KEYS = 64;  // keys of a task of sum_worker

// Add up the gradients of the parts, always in the same order.
template <class T>
void sum_worker(int64_t, int64_t, void* context) {
  Job& job = *static_cast<Job*>(context);
  const sightline_attention& a = job.a;
  const Sizes& s = job.sizes;
  Memory memory;
  if (!memory.allocate(SUM_KEYS * (s.d + s.dv))) return job.fail();
  const int64_t ranges = (a.keys + SUM_KEYS - 1) / SUM_KEYS;
  for (int64_t task; (task = job.take()) < job.tasks;) {
    const int64_t first = task % ranges * SUM_KEYS, end = min(a.keys, first + SUM_KEYS);
    const int64_t kv_head = task / ranges % a.kv_heads, row = task / ranges / a.kv_heads;
    float *d_key = memory.data, *d_value = memory.data + SUM_KEYS * s.d;
    memset(memory.data, 0, SUM_KEYS * (s.d + s.dv) * sizeof(float));
    for (int64_t part = 0; part < job.parts; part++) {
      const int64_t* span = job.spans + (row * job.parts + part) * 2;
      const float* sums = job.sums + job.offsets[(row * a.kv_heads + kv_head) * job.parts + part];
      for (int64_t t = max(first, span[0]); t < min(end, span[1]); t++) {
        const float *key = sums + (t - span[0]) * s.d, *value = sums + (span[1] - span[0]) * s.d + (t - span[0]) * s.dv;
        for (int64_t c = 0; c < s.d; c++) d_key[(t - first) * s.d + c] += key[c];
        for (int64_t c = 0; c < s.dv; c++) d_value[(t - first) * s.dv + c] += value[c];
      }
    }
    write_gradient<T>(a.d_k, row, kv_head, first, end, a.head_dim, s.d, d_key);
    write_gradient<T>(a.d_v, row, kv_head, first, end, a.value_dim, s.dv, d_value);
  }
}

// As few parts of each row as keep at least 85 % of the threads at work.
int64_t choose_parts(int64_t heads, int64_t threads) {
  int64_t parts = 1;
  for (; heads > 0 && parts < threads; parts++) {
    const int64_t tasks = heads * parts, rounds = (tasks + threads - 1) / threads;
    if (tasks * 100 >= rounds * threads * 85) break;
  }
  return parts;
}

// Split the blocks of each row into parts of nearly equal work, and find the keys that each part reads.
bool split_rows(Job& job) {
  const sightline_attention& a = job.a;
  const int64_t parts = job.parts;
  job.bounds = static_cast<int64_t*>(calloc(a.batch * (parts + 1) + 1, sizeof(int64_t)));
  job.spans = static_cast<int64_t*>(calloc(a.batch * parts * 2 + 1, sizeof(int64_t)));
  job.offsets = static_cast<int64_t*>(calloc(a.batch * a.kv_heads * parts + 1, sizeof(int64_t)));
  job.d_sinks = static_cast<double*>(calloc(a.batch * a.kv_heads * parts * job.sizes.group + 1, sizeof(double)));
  if (!job.bounds || !job.spans || !job.offsets || !job.d_sinks) return false;
  auto work = [&a](int64_t block) {
    const int64_t end = block + 1 < a.num_blocks ? a.blocks[4 * block + 7] : a.num_chunks;
    int64_t keys = 16;  // the cost of the block itself
    for (int64_t chunk = a.blocks[4 * block + 3]; chunk < end; chunk++)
      keys += a.chunks[2 * chunk + 1] - a.chunks[2 * chunk];
    return keys * (a.blocks[4 * block + 2] - a.blocks[4 * block + 1]);
  };
  int64_t block = 0, floats = 0;
  for (int64_t row = 0; row < a.batch; row++) {
    int64_t end = block, total = 0, done = 0;
    for (; end < a.num_blocks && a.blocks[4 * end] == row; end++) total += work(end);
    int64_t* bound = job.bounds + row * (parts + 1);
    for (int64_t part = 0; part < parts; part++) {
      bound[part] = block;
      int64_t low = a.keys, high = 0;
      for (; block < end && (part == parts - 1 || done * parts < total * (part + 1)); block++) {
        done += work(block);
        const int64_t first = a.blocks[4 * block + 3];
        const int64_t last = block + 1 < a.num_blocks ? a.blocks[4 * block + 7] : a.num_chunks;
        if (first < last) low = min(low, a.chunks[2 * first]), high = max(high, a.chunks[2 * last - 1]);
      }
      int64_t* span = job.spans + (row * parts + part) * 2;
      if (parts == 1) span[0] = 0, span[1] = a.keys;
      else if (low < high) span[0] = low, span[1] = high;
    }
    bound[parts] = block;
  }
  if (parts == 1) return true;
  for (int64_t task = 0; task < a.batch * a.kv_heads * parts; task++) {
    const int64_t* span = job.spans + (task / parts / a.kv_heads * parts + task % parts) * 2;
    job.offsets[task] = floats;
    floats += (span[1] - span[0]) * (job.sizes.d + job.sizes.dv);
  }
  job.sums = static_cast<float*>(malloc(max(floats, 1) * sizeof(float)));
  return job.sums != nullptr;
}

}  // namespace

int32_t forward(const sightline_attention& args) {
  Job job(args);
  const int64_t subgroups = (job.sizes.group + MAX_GROUP - 1) / MAX_GROUP;
  job.run(args.dtype == SIGHTLINE_FLOAT32 ? forward_worker<Float32> : forward_worker<Bfloat16>,
          args.num_blocks * args.kv_heads * subgroups);
  return job.error;
}

int32_t backward(const sightline_attention& args) {
  Job job(args);
  const int64_t heads = args.batch * args.kv_heads, group = job.sizes.group;
  job.parts = choose_parts(heads, num_threads());
  if (!split_rows(job)) return SIGHTLINE_OUT_OF_MEMORY;
  const bool float32 = args.dtype == SIGHTLINE_FLOAT32;
  job.run(float32 ? backward_worker<Float32> : backward_worker<Bfloat16>, heads * job.parts);
  if (job.parts > 1 && !job.error)
    job.run(float32 ? sum_worker<Float32> : sum_worker<Bfloat16>, heads * ((args.keys + SUM_KEYS - 1) / SUM_KEYS));
  for (int64_t head = 0; args.sinks && head < args.heads; head++) {
    double sum = 0;
    for (int64_t row = 0; row < args.batch; row++)
      for (int64_t part = 0; part < job.parts; part++)
        sum += job.d_sinks[((row * args.kv_heads + head / group) * job.parts + part) * group + head % group];
    args.d_sinks[head] = static_cast<float>(sum);
  }
  return job.error;
}

}  // namespace SIGHTLINE_ISA
}  // namespace sightline
