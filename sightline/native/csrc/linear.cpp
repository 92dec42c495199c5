// Products of few tokens with large weights. Compiled once per instruction set: SIGHTLINE_ISA is its name and namespace,
// SIGHTLINE_LANES the floats of a vector.
//
// Such a product takes as long as its weight takes to be read from memory. A row of the weight is read once, in order and
// alone, which is what the prefetchers of processors expect, for up to TOKENS tokens; further tokens find a block of LANES
// rows in the cache. The partial sums of these rows are added up together: a vector holds the results of LANES features.
//
// Nothing here may use templates or inline functions of the standard library: see vectors.h.
#include <stdlib.h>

#include "kernel.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

constexpr int LANES = SIGHTLINE_LANES;
constexpr int UNROLL = 2;           // vectors of partial sums of an output
constexpr int TOKENS = 4;           // tokens of a panel; with more, the processor no longer reads ahead far enough
constexpr int CACHE_LINE = 16;      // floats
constexpr int64_t AHEAD = 1024;     // floats that are prefetched ahead of the computation
constexpr int64_t GRAIN = 1 << 15;  // least floats of the weight for a thread

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

inline Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
inline void store(float* p, Vector x) { *reinterpret_cast<UnalignedVector*>(p) = x; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Vector whose lanes are sums of two lanes: of `a` where the lane's bit STEP is 0, of `b` where it is 1.
template <int STEP>
inline Vector add_pairs(Vector a, Vector b) {
#if defined(__clang__)
  Vector x, y;
  for (int i = 0; i < LANES; i++) {
    x[i] = i & STEP ? b[i] : a[i];
    y[i] = i & STEP ? b[i ^ STEP] : a[i ^ STEP];
  }
#else
  Ints same, other;
  for (int i = 0; i < LANES; i++) {
    same[i] = i & STEP ? LANES + i : i;
    other[i] = i & STEP ? LANES + (i ^ STEP) : i ^ STEP;
  }
  Vector x = __builtin_shuffle(a, b, same), y = __builtin_shuffle(a, b, other);
#endif
  return x + y;
}

// Vector whose lane i is the sum of the lanes of x[i].
template <int STEP = LANES / 2>
inline Vector add_lanes(Vector* x) {
  if constexpr (STEP > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < STEP; i++) x[i] = add_pairs<STEP>(x[i], x[i + STEP]);
    return add_lanes<STEP / 2>(x);
  }
  return x[0];
}

// Channels of a token as vectors. The last LANES channels are one vector of their own, `tail`, if their number is no
// multiple of LANES; its first lanes belong to the vector before, and are masked.
struct Channels {
  int64_t count, full, vectors;  // channels, full vectors, vectors with the tail
  Ints tail;

  explicit Channels(int64_t channels) : count(channels), full(channels / LANES) {
    vectors = full + (channels % LANES > 0);
    for (int i = 0; i < LANES; i++) tail[i] = i >= LANES - channels % LANES ? -1 : 0;
  }
  Vector load_tail(const float* row) const {
    return reinterpret_cast<Vector>(tail & reinterpret_cast<Ints>(load(row + count - LANES)));
  }
};

// to [vectors, rows, LANES] = x [rows, channels]
void pack(const float* x, int64_t stride, int64_t rows, const Channels& channels, float* to) {
  for (int64_t i = 0; i < rows; i++, x += stride) {
    for (int64_t k = 0; k < channels.full; k++) store(to + (k * rows + i) * LANES, load(x + k * LANES));
    if (channels.vectors > channels.full) store(to + (channels.full * rows + i) * LANES, channels.load_tail(x));
  }
}

// Partial sums of one feature for M packed tokens, one vector each, LANES vectors apart.
template <int M>
inline void multiply(const float* x, const float* weight, const Channels& channels, Vector* out) {
  Vector sum[UNROLL][M] = {};
  const float *end = weight + channels.full * LANES, *row = weight;
  for (; weight + UNROLL * LANES <= end; weight += UNROLL * LANES) {
    for (int i = 0; M > 1 && i < UNROLL * LANES; i += CACHE_LINE) __builtin_prefetch(weight + i + AHEAD);
#pragma GCC unroll 2
    for (int u = 0; u < UNROLL; u++, x += M * LANES) {
      const Vector w = load(weight + u * LANES);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sum[u][m] += w * load(x + m * LANES);
    }
  }
  if (weight < end) {
    const Vector w = load(weight);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum[0][m] += w * load(x + m * LANES);
    x += M * LANES;
  }
  if (channels.vectors > channels.full) {
    const Vector w = channels.load_tail(row);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum[1][m] += w * load(x + m * LANES);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) out[m * LANES] = sum[0][m] + sum[1][m];
}

// The product for M packed tokens and at most LANES features.
template <int M>
void multiply_features(
    const float* x, const float* weight, int64_t stride, const float* bias, int64_t features, const Channels& channels,
    float* out, int64_t out_stride) {
  Vector partial[M * LANES];
  for (int64_t i = 0; i < features; i++) multiply<M>(x, weight + i * stride, channels, partial + i);
  for (int m = 0; m < M; m++, out += out_stride) {
    for (int64_t i = features; i < LANES; i++) partial[m * LANES + i] = Vector{};
    const Vector result = add_lanes(partial + m * LANES);
    if (features == LANES) {
      store(out, bias ? result + load(bias) : result);
    } else {
      for (int64_t i = 0; i < features; i++) out[i] = bias ? result[i] + bias[i] : result[i];
    }
  }
}

struct Product {
  const sightline_linear_arguments& args;
  Channels channels;
  float* packed;  // all rows, in panels of at most TOKENS rows of one group
};

// Blocks [first, last) of LANES features of a group with the rows [row, row + count).
void multiply_blocks(const Product& product, int64_t group, int64_t row, int64_t count, int64_t first, int64_t last) {
  const sightline_linear_arguments& args = product.args;
  for (int64_t feature = first * LANES; feature < last * LANES; feature += LANES) {
    const int64_t features = min(args.features - feature, LANES);
    const float* weight = args.weight + group * args.group_stride + feature * args.weight_stride;
    const float* bias = args.bias ? args.bias + group * args.bias_stride + feature : nullptr;
    for (int64_t i = row; i < row + count; i += TOKENS) {
      const float* x = product.packed + i * product.channels.vectors * LANES;
      float* out = args.out + i * args.features + feature;
#define SIGHTLINE_CASE(M)                                                                                      \
  case M:                                                                                                      \
    multiply_features<M>(x, weight, args.weight_stride, bias, features, product.channels, out, args.features); \
    break;
      switch (min(row + count - i, TOKENS)) {
        SIGHTLINE_CASE(1)
        SIGHTLINE_CASE(2)
        SIGHTLINE_CASE(3)
        SIGHTLINE_CASE(4)
      }
#undef SIGHTLINE_CASE
    }
  }
}

// Blocks [begin, end) of LANES features, counted over all groups that have rows.
void multiply_range(int64_t begin, int64_t end, void* context) {
  const Product& product = *static_cast<const Product*>(context);
  const sightline_linear_arguments& args = product.args;
  const int64_t blocks = (args.features + LANES - 1) / LANES;
  int64_t row = 0, before = 0;  // rows and blocks of the groups before
  for (int64_t group = 0; group < args.groups && before < end; group++) {
    const int64_t count = args.counts ? args.counts[group] : args.rows;
    if (count == 0) continue;
    multiply_blocks(product, group, row, count, begin > before ? begin - before : 0, min(end - before, blocks));
    row += count, before += blocks;
  }
}

}  // namespace

int32_t linear(const sightline_linear_arguments& args) {
  const Channels channels(args.channels);
  char* memory = static_cast<char*>(malloc(args.rows * channels.vectors * sizeof(Vector) + sizeof(Vector)));
  if (!memory) return SIGHTLINE_OUT_OF_MEMORY;
  // Aligned, so that no vector of a token crosses cache lines.
  float* packed = reinterpret_cast<float*>(memory + sizeof(Vector) - reinterpret_cast<uintptr_t>(memory) % sizeof(Vector));
  int64_t row = 0, used = 0;  // used: groups with rows
  for (int64_t group = 0; group < args.groups; group++) {
    const int64_t end = row + (args.counts ? args.counts[group] : args.rows);
    used += row < end;
    for (int64_t i = row; i < end; i += TOKENS)
      pack(args.x + i * args.x_stride, args.x_stride, min(end - i, TOKENS), channels, packed + i * channels.vectors * LANES);
    row = end;
  }
  Product product = {args, channels, packed};
  const int64_t blocks = (args.features + LANES - 1) / LANES;
  parallel_for(used * blocks, GRAIN / (LANES * args.channels) + 1, multiply_range, &product);
  free(memory);
  return SIGHTLINE_OK;
}

}  // namespace SIGHTLINE_ISA
}  // namespace sightline
