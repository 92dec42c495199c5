// Attention over intervals of keys: forward. Compiled once per instruction set: SIGHTLINE_ISA is its name and
// namespace, SIGHTLINE_LANES the floats of a vector.
//
// A block of at most 64 queries reads a list of chunks of keys (see plan.cpp). All scores are kept transposed, keys by
// queries, so that a lane of a vector is one query: the maximum, the sum and the mask of a query are lane-wise, keys
// and values are read one float at a time, and only the queries of a block are transposed. For each key one 64-bit word
// says which queries of the block attend to it.
//
// Two products make the forward and five the backward, each from one kernel, `multiply`: S' = K Q', O += P V; and S' =
// K Q', dP' = V dO', dV += P' dO, dK += dS' Q, dQ += dS K (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2). A
// product skips the vectors of queries, or the keys, in which nothing is visible.
#include "block.h"
#include "jobs.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

constexpr int64_t GROUPED_BLOCKS = 8;  // blocks that a thread computes for one head before it turns to the next head

// Buffers of a thread, for the query heads of a task: 0.8 MB for 8 heads of 128 channels, for any number of tokens.
struct Buffers {
  int64_t floats;     // of all buffers
  float* queries;     // [heads, d, BLOCK], transposed and scaled
  float* outs;        // [heads, BLOCK, dv], weighted sums of the values, not divided yet
  float* maxima;      // [heads, BLOCK], of the scores so far, times log2(e)
  float* sums;        // [heads, BLOCK], of 2^(score - maximum)
  float* scores;      // [CHUNK, BLOCK], then weights
  float* keys;        // [CHUNK, d]
  float* values;      // [CHUNK, dv]
  float* packed;      // [BLOCK, d]

  Buffers(const Sizes& s, float* memory) {
    Arena arena(memory);
    queries = arena.take(s.heads * s.d * BLOCK);
    outs = arena.take(s.heads * BLOCK * s.dv);
    maxima = arena.take(s.heads * BLOCK);
    sums = arena.take(s.heads * BLOCK);
    scores = arena.take(CHUNK * BLOCK);
    keys = arena.take(CHUNK * s.d);
    values = arena.take(CHUNK * s.dv);
    packed = arena.take(BLOCK * s.d);
    floats = arena.used;
  }
};

// Replace the scores of one head by weights 2^(score - maximum), update its maxima [BLOCK] and sums [BLOCK], and
// rescale what earlier chunks added to its outs [BLOCK, dv].
void update_softmax(
    const Block& block, const LaneBits& lanes, float softcap, int64_t dv, float* scores, float* maxima, float* sums,
    float* outs) {
  const float lowest = -INFINITY;
  for (int64_t v = 0; v < block.vectors; v++) {
    float* column = scores + v * LANES;
    const Vector before = load(maxima + v * LANES);
    Vector maximum = before;
    for (int64_t j = 0; j < block.keys; j++) {
      const uint32_t bits = block.bits(j, v);
      if (!bits) continue;
      Vector score = load(column + j * BLOCK);
      if (softcap != 0) score = tanh(score) * (softcap * LOG2E);
      if (bits != ALL_LANES) score = select(lanes.of(bits), score, splat(lowest));
      if (softcap != 0 || bits != ALL_LANES) store(column + j * BLOCK, score);
      maximum = select(score > maximum, score, maximum);
    }
    const Vector safe = select(maximum == lowest, Vector{}, maximum);  // nothing visible: -inf - -inf would be NaN
    const Vector factor = exp2(before - safe);
    Vector sum = {};  // of this chunk: adding it to that of the others at once loses less of it
    for (int64_t j = 0; j < block.keys; j++) {
      Vector weight = {};
      if (block.bits(j, v)) weight = exp2(load(column + j * BLOCK) - safe), sum += weight;
      store(column + j * BLOCK, weight);
    }
    store(maxima + v * LANES, maximum);
    store(sums + v * LANES, load(sums + v * LANES) * factor + sum);
    for (int64_t i = 0; i < LANES; i++) {
      if (factor[i] == 1) continue;
      float* out = outs + (v * LANES + i) * dv;
      for (int64_t c = 0; c < dv; c += LANES) store(out + c, load(out + c) * factor[i]);
    }
  }
}

// Write the output and the log-sum-exp of query `i` of the block, for one head with its sums of weights and values.
template <class T>
void write_query(
    const sightline_attention& args, const Block& block, int64_t head, int64_t i, float maximum, float sum,
    const float* weighted) {
  maximum *= LN2;
  float total, share;  // log-sum-exp; factor of the weighted values
  if (block.is_masked(i)) {
    total = INFINITY, share = 0;  // so that all weights are 0 in the backward too
  } else if (!args.sinks) {
    total = maximum + logf(sum), share = 1 / sum;  // NaN if all scores are -inf, as a softmax is
  } else {
    const float sink = args.sinks[head], high = sink > maximum ? sink : maximum;
    const float own = expf(maximum - high), denominator = sum * own + expf(sink - high);
    total = high + logf(denominator), share = own / denominator;
  }
  args.lse[(block.row * args.heads + head) * args.queries + block.first + i] = total;
  unpack_row<T>(weighted, share, args.value_dim, at<T>(args.out, block.row, head, block.first + i));
}

// Compute query heads [first_head, first_head + heads), which share a key head, for one block of queries.
template <class T>
void compute_block(const Job& job, Block block, int64_t kv_head, int64_t first_head, int64_t heads, const Buffers& to) {
  const LaneBits lanes;
  const sightline_attention& args = job.args;
  const int64_t d = job.sizes.d, dv = job.sizes.dv;
  const float softcap = static_cast<float>(args.softcap);
  for (int64_t r = 0; r < heads; r++) {
    pack<T>(at<T>(args.q, block.row, first_head + r, block.first), args.q.stride[2], block.count, args.head_dim, d,
            to.packed);
    zero_padding(block, d, to.packed);
    transpose(to.packed, d, block.count, query_factor(args), to.queries + r * d * BLOCK);
  }
  memset(to.outs, 0, bytes(heads * BLOCK * dv));
  memset(to.sums, 0, bytes(heads * BLOCK));
  for (int64_t i = 0; i < heads * BLOCK; i++) to.maxima[i] = -INFINITY;
  while (block.next()) {
    const Rows k = read_chunk<T>(args.k, kv_head, block, args.head_dim, to.keys);
    const Rows v = pack_chunk<T>(args.v, kv_head, block, args.value_dim, dv, to.values);
    for (int64_t r = 0; r < heads; r++) {
      float* outs = to.outs + r * BLOCK * dv;
      multiply_visible(block, k, to.queries + r * d * BLOCK, args.head_dim, to.scores);
      update_softmax(block, lanes, softcap, dv, to.scores, to.maxima + r * BLOCK, to.sums + r * BLOCK, outs);
      add_for_queries(block, to.scores, v, dv, outs);
    }
  }
  for (int64_t r = 0; r < heads; r++)
    for (int64_t i = 0; i < block.count; i++)
      write_query<T>(args, block, first_head + r, i, to.maxima[r * BLOCK + i], to.sums[r * BLOCK + i],
                     to.outs + (r * BLOCK + i) * dv);
}

template <class T>
void forward_worker(int64_t, int64_t, void* context) {
  Job& job = *static_cast<Job*>(context);
  const int64_t blocks = job.args.num_blocks, group = job.sizes.group, subgroups = divide_up(group, MAX_GROUP);
  const int64_t heads = job.args.kv_heads * subgroups;
  Memory memory;
  if (!memory.allocate(Buffers(job.sizes, nullptr).floats)) return job.fail();
  const Buffers buffers(job.sizes, memory.data);
  for (int64_t task; (task = job.take()) < job.tasks;) {
    // Groups of blocks from the last, which often has the most keys; in a group, head by head: neighbors in time are then
    // neighbors in memory, where all heads of a token lie together.
    const int64_t rank = task / (GROUPED_BLOCKS * heads) * GROUPED_BLOCKS, place = task % (GROUPED_BLOCKS * heads);
    const int64_t count = min(GROUPED_BLOCKS, blocks - rank), index = blocks - 1 - rank - place % count;
    const int64_t kv_head = place / count / subgroups, first = place / count % subgroups * MAX_GROUP;
    compute_block<T>(
        job, Block(job.args, index), kv_head, kv_head * group + first, min(MAX_GROUP, group - first), buffers);
  }
}

}  // namespace

int32_t forward(const sightline_attention& args) {
  Job job(args);
  const int64_t subgroups = divide_up(job.sizes.group, MAX_GROUP);
  job.run(args.dtype == SIGHTLINE_FLOAT32 ? forward_worker<Float32> : forward_worker<Bfloat16>,
          args.num_blocks * args.kv_heads * subgroups);
  return job.error;
}

}  // namespace SIGHTLINE_ISA
}  // namespace sightline
