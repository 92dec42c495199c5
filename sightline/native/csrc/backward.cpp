// Attention over intervals of keys: backward. See forward.cpp; compiled once per instruction set too.
//
// The gradients of a key head are sums over the query blocks that read it. One thread adds up those of a key head of
// one row of the batch. If that leaves threads idle, the blocks of a row are split into parts of nearly equal work;
// each part has its own sums, which are added up at the end, always in the same order.
#include "block.h"
#include "parts.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

// Buffers of a thread, for the query heads of a task: 1.6 MB for 8 heads of 128 channels, for any number of tokens.
struct Buffers {
  int64_t floats;        // of all buffers
  float* queries;        // [heads, BLOCK, d]
  float* queries_t;      // [heads, d, BLOCK], transposed and scaled
  float* d_outs;         // [heads, BLOCK, dv]
  float* d_outs_t;       // [heads, dv, BLOCK], transposed
  float* d_queries;      // [heads, BLOCK, d]
  float* lse;            // [heads, BLOCK], times log2(e)
  float* delta;          // [heads, BLOCK], sum of d_out * out over the channels
  float* scores;         // [CHUNK, BLOCK], then weights
  float* gradients;      // [CHUNK, BLOCK], of the weights, then of the scores
  float* keys;           // [CHUNK, d]
  float* values;         // [CHUNK, dv]

  Buffers(const Sizes& s, float* memory) {
    Arena arena(memory);
    queries = arena.take(s.heads * BLOCK * s.d);
    queries_t = arena.take(s.heads * s.d * BLOCK);
    d_outs = arena.take(s.heads * BLOCK * s.dv);
    d_outs_t = arena.take(s.heads * s.dv * BLOCK);
    d_queries = arena.take(s.heads * BLOCK * s.d);
    lse = arena.take(s.heads * BLOCK);
    delta = arena.take(s.heads * BLOCK);
    scores = arena.take(CHUNK * BLOCK);
    gradients = arena.take(CHUNK * BLOCK);
    keys = arena.take(CHUNK * s.d);
    values = arena.take(CHUNK * s.dv);
    floats = arena.used;
  }
};

// Where the gradients of keys or of values are added: rows with a fixed distance, from key `first`.
struct Gradient {
  float* data;
  int64_t stride, first;

  float* at_key(int64_t key) const { return data + (key - first) * stride; }
};

// Weights 2^(score - lse) and gradients of the scores, from scores and gradients of the weights, of one head.
void weights_and_gradients(
    const Block& block, const LaneBits& lanes, const float* lse, const float* delta, float scale, float softcap,
    float* scores, float* gradients) {
  for (int64_t v = 0; v < block.vectors; v++) {
    const Vector total = load(lse + v * LANES), subtract = load(delta + v * LANES);
    float *p = scores + v * LANES, *g = gradients + v * LANES;
    for (int64_t j = 0; j < block.keys; j++, p += BLOCK, g += BLOCK) {
      const uint32_t bits = block.bits(j, v);
      Vector weight = {}, gradient = {};
      if (bits) {
        const Vector score = load(p);
        if (softcap == 0) {
          weight = exp2(score - total);
          gradient = weight * ((load(g) - subtract) * scale);
        } else {
          const Vector t = tanh(score);
          weight = exp2(t * (softcap * LOG2E) - total);
          gradient = weight * ((load(g) - subtract) * scale) * (1.0f - t * t);
        }
        if (bits != ALL_LANES) {
          const Ints visible = lanes.of(bits);
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
void sum_products(
    const sightline_attention& args, const Block& block, int64_t head, const float* d_out, int64_t dv, float* delta) {
  for (int64_t first = 0; first < block.count; first += LANES) {
    Vector sums[LANES];  // of LANES queries; a lane has every LANES-th channel
    for (int64_t i = 0; i < LANES; i++) {
      sums[i] = Vector{};
      if (first + i >= block.count) continue;
      const typename T::Element* out = at<T>(args.out, block.row, head, block.first + first + i);
      const float* gradient = d_out + (first + i) * dv;
      int64_t c = 0;
      for (; c + LANES <= args.value_dim; c += LANES) sums[i] += T::load_vector(out + c) * load(gradient + c);
      for (; c < args.value_dim; c++) sums[i][0] += T::get(out[c]) * gradient[c];
    }
    transpose_lanes<1>(sums);
    Vector total = sums[0];
    for (int64_t i = 1; i < LANES; i++) total += sums[i];
    store(delta + first, total);
  }
}

// Fill the buffers of query head `r` of a task, `head` of all, for a block; add to the gradient of its sink. Return the
// packed queries and gradients of the output.
struct HeadRows {
  Rows queries, d_out;
};
template <class T>
HeadRows load_head(
    const BackwardJob& job, const Block& block, int64_t head, int64_t r, const Buffers& to, double* d_sink) {
  const sightline_attention& args = job.args;
  const int64_t d = job.sizes.d, dv = job.sizes.dv;
  float *q = to.queries + r * BLOCK * d, *d_out = to.d_outs + r * BLOCK * dv, *delta = to.delta + r * BLOCK;
  HeadRows rows;
  rows.queries =
      pack<T>(at<T>(args.q, block.row, head, block.first), args.q.stride[2], block.count, args.head_dim, d, q);
  zero_padding(block, d, q);
  transpose(q, d, block.count, query_factor(args), to.queries_t + r * d * BLOCK);
  rows.d_out = pack<T>(
      at<T>(args.d_out, block.row, head, block.first), args.d_out.stride[2], block.count, args.value_dim, dv, d_out);
  zero_padding(block, dv, d_out);
  transpose(d_out, dv, block.count, 1.0f, to.d_outs_t + r * dv * BLOCK);
  sum_products<T>(args, block, head, d_out, dv, delta);
  const float* total = args.lse + (block.row * args.heads + head) * args.queries + block.first;
  for (int64_t i = 0; i < BLOCK; i++) to.lse[r * BLOCK + i] = i < block.count ? total[i] * LOG2E : INFINITY;
  if (args.sinks)
    for (int64_t i = 0; i < block.count; i++)
      if (!block.is_masked(i)) *d_sink -= expf(args.sinks[head] - total[i]) * delta[i];
  return rows;
}

// Compute the gradients of query heads [first_head, first_head + heads), which share a key head, for one block of
// queries: write those of the queries, add to those of keys, values and sinks.
template <class T>
void compute_block(
    const BackwardJob& job, Block block, int64_t kv_head, int64_t first_head, int64_t heads, Gradient d_key,
    Gradient d_value, double* d_sinks, const Buffers& to) {
  const LaneBits lanes;
  const sightline_attention& args = job.args;
  const int64_t d = job.sizes.d, dv = job.sizes.dv;
  const float softcap = static_cast<float>(args.softcap), scale = static_cast<float>(args.scale);
  HeadRows rows[MAX_GROUP];
  for (int64_t r = 0; r < heads; r++) rows[r] = load_head<T>(job, block, first_head + r, r, to, d_sinks + r);
  memset(to.d_queries, 0, bytes(heads * BLOCK * d));
  while (block.next()) {
    const Rows k = pack_chunk<T>(args.k, kv_head, block, args.head_dim, d, to.keys);
    const Rows v = read_chunk<T>(args.v, kv_head, block, args.value_dim, to.values);
    float *key = d_key.at_key(block.key), *value = d_value.at_key(block.key);
    for (int64_t r = 0; r < heads; r++) {
      multiply_visible(block, k, to.queries_t + r * d * BLOCK, args.head_dim, to.scores);
      multiply_visible(block, v, to.d_outs_t + r * dv * BLOCK, args.value_dim, to.gradients);
      weights_and_gradients(
          block, lanes, to.lse + r * BLOCK, to.delta + r * BLOCK, scale, softcap, to.scores, to.gradients);
      add_for_keys(block, to.scores, rows[r].d_out, dv, value, d_value.stride);
      add_for_keys(block, to.gradients, rows[r].queries, d, key, d_key.stride);
      add_for_queries(block, to.gradients, k, d, to.d_queries + r * BLOCK * d);
    }
  }
  for (int64_t r = 0; r < heads; r++)
    for (int64_t i = 0; i < block.count; i++)
      unpack_row<T>(to.d_queries + (r * BLOCK + i) * d, 1.0f, args.head_dim,
                    at<T>(args.d_q, block.row, first_head + r, block.first + i));
}

// Write gradients of tokens [first, end) of one head, packed in rows of `padded` floats, to a tensor.
template <class T>
void write_gradient(
    const sightline_tensor& to, int64_t row, int64_t head, int64_t first, int64_t end, int64_t size, int64_t padded,
    const float* sums) {
  for (int64_t t = first; t < end; t++, sums += padded) unpack_row<T>(sums, 1.0f, size, at<T>(to, row, head, t));
}

// A tensor of gradients of one head, zeroed, to which float32 is added.
inline Gradient zero_gradient(const sightline_tensor& to, int64_t row, int64_t head, int64_t tokens, int64_t size) {
  for (int64_t t = 0; t < tokens; t++) memset(at<Float32>(to, row, head, t), 0, bytes(size));
  return {at<Float32>(to, row, head, 0), to.stride[2], 0};
}

template <class T>
void backward_worker(int64_t, int64_t, void* context) {
  BackwardJob& job = static_cast<BackwardJob&>(*static_cast<Job*>(context));
  const sightline_attention& args = job.args;
  const Sizes& s = job.sizes;
  // Gradients are added where they belong if they are whole vectors of float32, else in a buffer of one head.
  const bool is_float = sizeof(typename T::Element) == sizeof(float);
  const bool in_place = job.parts == 1 && is_float && s.d == args.head_dim && s.dv == args.value_dim;
  const int64_t floats = Buffers(s, nullptr).floats, sums_size = args.keys * (s.d + s.dv);
  Memory memory;
  if (!memory.allocate(floats + (in_place || job.parts > 1 ? 0 : sums_size))) return job.fail();
  const Buffers buffers(s, memory.data);
  for (int64_t task; (task = job.take()) < job.tasks;) {
    const int64_t part = task % job.parts, kv_head = task / job.parts % args.kv_heads;
    const int64_t row = task / job.parts / args.kv_heads;
    Gradient d_key, d_value;
    if (in_place) {
      d_key = zero_gradient(args.d_k, row, kv_head, args.keys, args.head_dim);
      d_value = zero_gradient(args.d_v, row, kv_head, args.keys, args.value_dim);
    } else {
      const int64_t *span = job.span(row, part), keys = span[1] - span[0];
      float* sums = job.parts > 1 ? job.sums + job.offsets[task] : memory.data + floats;
      memset(sums, 0, bytes(keys * (s.d + s.dv)));
      d_key = {sums, s.d, span[0]}, d_value = {sums + keys * s.d, s.dv, span[0]};
    }
    const int64_t* bound = job.bounds + row * (job.parts + 1) + part;
    for (int64_t index = bound[0]; index < bound[1]; index++)
      for (int64_t first = 0; first < s.group; first += MAX_GROUP)
        compute_block<T>(
            job, Block(args, index), kv_head, kv_head * s.group + first, min(MAX_GROUP, s.group - first), d_key,
            d_value, job.d_sinks + task * s.group + first, buffers);
    if (!in_place && job.parts == 1) {
      write_gradient<T>(args.d_k, row, kv_head, 0, args.keys, args.head_dim, s.d, d_key.data);
      write_gradient<T>(args.d_v, row, kv_head, 0, args.keys, args.value_dim, s.dv, d_value.data);
    }
  }
}

constexpr int64_t SUM_KEYS = 64;  // keys of a task of sum_worker

// Add up the gradients of the parts and write them.
template <class T>
void sum_worker(int64_t, int64_t, void* context) {
  BackwardJob& job = static_cast<BackwardJob&>(*static_cast<Job*>(context));
  const sightline_attention& args = job.args;
  const Sizes& s = job.sizes;
  Memory memory;
  if (!memory.allocate(SUM_KEYS * (s.d + s.dv))) return job.fail();
  const int64_t ranges = divide_up(args.keys, SUM_KEYS);
  for (int64_t task; (task = job.take()) < job.tasks;) {
    const int64_t first = task % ranges * SUM_KEYS, end = min(args.keys, first + SUM_KEYS);
    const int64_t kv_head = task / ranges % args.kv_heads, row = task / ranges / args.kv_heads;
    float *d_key = memory.data, *d_value = memory.data + SUM_KEYS * s.d;
    memset(memory.data, 0, bytes(SUM_KEYS * (s.d + s.dv)));
    for (int64_t part = 0; part < job.parts; part++) {
      const int64_t* span = job.span(row, part);
      const float* keys = job.sums + job.offsets[job.task_of(row, kv_head, part)];
      const float* values = keys + (span[1] - span[0]) * s.d;
      for (int64_t t = max(first, span[0]); t < min(end, span[1]); t++) {
        for (int64_t c = 0; c < s.d; c++) d_key[(t - first) * s.d + c] += keys[(t - span[0]) * s.d + c];
        for (int64_t c = 0; c < s.dv; c++) d_value[(t - first) * s.dv + c] += values[(t - span[0]) * s.dv + c];
      }
    }
    write_gradient<T>(args.d_k, row, kv_head, first, end, args.head_dim, s.d, d_key);
    write_gradient<T>(args.d_v, row, kv_head, first, end, args.value_dim, s.dv, d_value);
  }
}

// Add up the gradients of the sinks over rows and parts.
void sum_sinks(const BackwardJob& job) {
  const sightline_attention& args = job.args;
  const int64_t group = job.sizes.group;
  for (int64_t head = 0; head < args.heads; head++) {
    double sum = 0;
    for (int64_t row = 0; row < args.batch; row++)
      for (int64_t part = 0; part < job.parts; part++)
        sum += job.d_sinks[job.task_of(row, head / group, part) * group + head % group];
    args.d_sinks[head] = static_cast<float>(sum);
  }
}

}  // namespace

int32_t backward(const sightline_attention& args) {
  const int64_t heads = args.batch * args.kv_heads;
  const bool is_float = args.dtype == SIGHTLINE_FLOAT32;
  BackwardJob job(args, choose_parts(heads, num_threads()));
  if (!split_rows(job)) return SIGHTLINE_OUT_OF_MEMORY;
  job.run(is_float ? backward_worker<Float32> : backward_worker<Bfloat16>, heads * job.parts);
  if (job.parts > 1 && !job.error)
    job.run(is_float ? sum_worker<Float32> : sum_worker<Bfloat16>, heads * divide_up(args.keys, SUM_KEYS));
  if (args.sinks && !job.error) sum_sinks(job);
  return job.error;
}

}  // namespace SIGHTLINE_ISA
}  // namespace sightline
