// Attention over intervals of keys, forward and backward. Compiled once per instruction set, each in a namespace of its
// own (SIGHTLINE_ISA).
//
// Nothing here may use templates or inline functions of the standard library: the linker keeps one copy for all
// instruction sets, possibly one that this processor cannot run. The same holds for headers of our own.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"

#ifndef SIGHTLINE_ISA
#define SIGHTLINE_ISA baseline
#endif

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

typedef uint16_t bfloat16;

float load(const float* x) { return *x; }
float load(const bfloat16* x) {
  const uint32_t bits = static_cast<uint32_t>(*x) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
void store(float* x, float y) { *x = y; }
void store(bfloat16* x, float y) {
  uint32_t bits;
  memcpy(&bits, &y, 4);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *x = static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);  // round to nearest even
}

template <typename T>
T* at(const sightline_tensor& x, int64_t row, int64_t head, int64_t token) {
  T* data = static_cast<T*>(const_cast<void*>(x.data));
  return data + row * x.stride[0] + head * x.stride[1] + token * x.stride[2];
}

template <typename T>
float dot(const T* x, const T* y, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; i++) sum += load(x + i) * load(y + i);
  return sum;
}

template <typename T>
float score(const sightline_attention& args, const T* q, const T* k) {
  const float x = static_cast<float>(args.scale) * dot(q, k, args.head_dim), cap = static_cast<float>(args.softcap);
  return cap > 0 ? cap * tanhf(x / cap) : x;
}

struct Task {
  const sightline_attention* args;
  bool failed;  // out of memory
};

// Compute the output and the log-sum-exp of a query; `sum` is a buffer of value_dim floats.
template <typename T>
void forward_query(const sightline_attention& args, int64_t row, int64_t head, int64_t query, float* sum) {
  const int64_t kv_head = head / (args.heads / args.kv_heads), first = (row * args.queries + query) * args.intervals;
  const T* q = at<T>(args.q, row, head, query);
  float top = args.sinks ? args.sinks[head] : -INFINITY, total = args.sinks ? 1.0f : 0.0f;
  bool visible = false;
  memset(sum, 0, static_cast<size_t>(args.value_dim) * sizeof(float));
  for (int64_t i = first; i < first + args.intervals; i++)
    for (int64_t key = args.start[i]; key < args.stop[i]; key++) {
      const float s = score(args, q, at<T>(args.k, row, kv_head, key));
      const T* v = at<T>(args.v, row, kv_head, key);
      if (s > top) {
        const float rescale = expf(top - s);
        total *= rescale;
        for (int64_t d = 0; d < args.value_dim; d++) sum[d] *= rescale;
        top = s;
      }
      const float weight = expf(s - top);
      total += weight;
      for (int64_t d = 0; d < args.value_dim; d++) sum[d] += weight * load(v + d);
      visible = true;
    }
  T* out = at<T>(args.out, row, head, query);
  for (int64_t d = 0; d < args.value_dim; d++) store(out + d, visible ? sum[d] / total : 0.0f);
  args.lse[(row * args.heads + head) * args.queries + query] = visible ? top + logf(total) : INFINITY;
}

template <typename T>
void forward_task(int64_t begin, int64_t end, void* context) {
  Task* task = static_cast<Task*>(context);
  const sightline_attention& args = *task->args;
  float* sum = static_cast<float*>(malloc(static_cast<size_t>(args.value_dim + 1) * sizeof(float)));
  if (!sum) {
    task->failed = true;
    return;
  }
  for (int64_t i = begin; i < end; i++) {
    const int32_t* block = args.blocks + 4 * (i / args.heads);
    for (int64_t query = block[1]; query < block[2]; query++)
      forward_query<T>(args, block[0], i % args.heads, query, sum);
  }
  free(sum);
}

// Compute d_q of a query, and add its part to d_k and d_v of its key head: float buffers [keys, dim].
template <typename T>
void backward_query(const sightline_attention& args, int64_t row, int64_t head, int64_t query, float* d_k, float* d_v,
                    float* d_q) {
  const int64_t kv_head = head / (args.heads / args.kv_heads), first = (row * args.queries + query) * args.intervals;
  const T *q = at<T>(args.q, row, head, query), *d_out = at<T>(args.d_out, row, head, query);
  const float lse = args.lse[(row * args.heads + head) * args.queries + query];
  const float delta = dot(at<T>(args.out, row, head, query), d_out, args.value_dim);
  const float scale = static_cast<float>(args.scale), cap = static_cast<float>(args.softcap);
  memset(d_q, 0, static_cast<size_t>(args.head_dim) * sizeof(float));
  for (int64_t i = first; i < first + args.intervals; i++)
    for (int64_t key = args.start[i]; key < args.stop[i]; key++) {
      const T *k = at<T>(args.k, row, kv_head, key), *v = at<T>(args.v, row, kv_head, key);
      const float s = score(args, q, k), weight = expf(s - lse);
      float d_score = weight * (dot(d_out, v, args.value_dim) - delta) * scale;
      if (cap > 0) d_score *= 1 - (s / cap) * (s / cap);
      for (int64_t d = 0; d < args.value_dim; d++) d_v[key * args.value_dim + d] += weight * load(d_out + d);
      for (int64_t d = 0; d < args.head_dim; d++) {
        d_k[key * args.head_dim + d] += d_score * load(q + d);
        d_q[d] += d_score * load(k + d);
      }
    }
  T* target = at<T>(args.d_q, row, head, query);
  for (int64_t d = 0; d < args.head_dim; d++) store(target + d, d_q[d]);
}

// One item per row and key head, so that no two threads write the same gradient.
template <typename T>
void backward_task(int64_t begin, int64_t end, void* context) {
  Task* task = static_cast<Task*>(context);
  const sightline_attention& args = *task->args;
  const int64_t group = args.heads / args.kv_heads, size = args.keys * (args.head_dim + args.value_dim);
  float* d_k = static_cast<float*>(malloc(static_cast<size_t>(size + args.head_dim + 1) * sizeof(float)));
  if (!d_k) {
    task->failed = true;
    return;
  }
  float *d_v = d_k + args.keys * args.head_dim, *d_q = d_k + size;
  for (int64_t i = begin; i < end; i++) {
    const int64_t row = i / args.kv_heads, kv_head = i % args.kv_heads;
    memset(d_k, 0, static_cast<size_t>(size) * sizeof(float));
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
      for (int64_t query = 0; query < args.queries; query++)
        backward_query<T>(args, row, head, query, d_k, d_v, d_q);
    for (int64_t key = 0; key < args.keys; key++) {
      T *k = at<T>(args.d_k, row, kv_head, key), *v = at<T>(args.d_v, row, kv_head, key);
      for (int64_t d = 0; d < args.head_dim; d++) store(k + d, d_k[key * args.head_dim + d]);
      for (int64_t d = 0; d < args.value_dim; d++) store(v + d, d_v[key * args.value_dim + d]);
    }
  }
  free(d_k);
}

// The gradient of a sink's logit: minus the sum of its weight times delta over all queries.
template <typename T>
void sinks_task(int64_t begin, int64_t end, void* context) {
  const sightline_attention& args = *static_cast<Task*>(context)->args;
  for (int64_t head = begin; head < end; head++) {
    float sum = 0;
    for (int64_t row = 0; row < args.batch; row++)
      for (int64_t query = 0; query < args.queries; query++) {
        const float lse = args.lse[(row * args.heads + head) * args.queries + query];
        const float delta =
            dot(at<T>(args.out, row, head, query), at<T>(args.d_out, row, head, query), args.value_dim);
        if (lse < INFINITY) sum -= expf(args.sinks[head] - lse) * delta;
      }
    args.d_sinks[head] = sum;
  }
}

}  // namespace

int32_t forward(const sightline_attention& args) {
  Task task{&args, false};
  const bool is_float = args.dtype == SIGHTLINE_FLOAT32;
  parallel_for(args.num_blocks * args.heads, 1, is_float ? forward_task<float> : forward_task<bfloat16>, &task);
  return task.failed ? SIGHTLINE_OUT_OF_MEMORY : SIGHTLINE_OK;
}

int32_t backward(const sightline_attention& args) {
  Task task{&args, false};
  const bool is_float = args.dtype == SIGHTLINE_FLOAT32;
  parallel_for(args.batch * args.kv_heads, 1, is_float ? backward_task<float> : backward_task<bfloat16>, &task);
  if (args.sinks) parallel_for(args.heads, 1, is_float ? sinks_task<float> : sinks_task<bfloat16>, &task);
  return task.failed ? SIGHTLINE_OUT_OF_MEMORY : SIGHTLINE_OK;
}

}  // namespace SIGHTLINE_ISA
}  // namespace sightline
