// Attention over intervals of keys: the C interface between Python (sightline/native/library.py) and the kernels.
//
// Tensors are given by a data pointer and the strides, in elements, of their batch, head and token dimensions; the last
// dimension is contiguous. Query head h uses key/value head h / (heads / kv_heads).
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SIGHTLINE_FLOAT32 = 0, SIGHTLINE_BFLOAT16 = 1 };

// Return codes. sightline_native_error(code) describes them.
enum {
  SIGHTLINE_OK = 0,
  SIGHTLINE_BAD_SIZES = 1,      // a size is negative, or heads is not a multiple of kv_heads
  SIGHTLINE_BAD_INTERVALS = 2,  // an interval is out of range, unsorted, overlapping, or an empty one precedes others
  SIGHTLINE_BAD_PLAN = 3,       // blocks or chunks do not describe these sizes
  SIGHTLINE_OUT_OF_MEMORY = 4,
  SIGHTLINE_BAD_INSTRUCTION_SET = 5,  // it is not compiled in, or the processor lacks it
};

typedef struct {
  const void* data;
  int64_t stride[3];  // batch, head, token
} sightline_tensor;

typedef struct {
  int64_t batch, queries, keys, heads, kv_heads, head_dim, value_dim, intervals;
  int64_t dtype;            // of q, k, v, out, d_*: SIGHTLINE_FLOAT32 or SIGHTLINE_BFLOAT16
  double scale;             // of the scores
  double softcap;           // 0: none; else scores are softcap * tanh(scale * q k / softcap)
  const int32_t* start;     // [batch, queries, intervals], canonical intervals (see AttentionMask)
  const int32_t* stop;
  const int32_t* blocks;    // [num_blocks, 4] from sightline_attention_plan: row, first query, end, first chunk
  int64_t num_blocks;
  const int32_t* chunks;    // [num_chunks, 2] from sightline_attention_plan: first key, end of keys
  int64_t num_chunks;
  const float* sinks;       // [heads], or NULL
  sightline_tensor q, k, v;
  sightline_tensor out;     // written by forward, read by backward
  float* lse;               // [batch, heads, queries]: log-sum-exp with the sink; +infinity for a fully masked query
  // backward only
  sightline_tensor d_out;
  sightline_tensor d_q, d_k, d_v;  // written; need not be initialized
  float* d_sinks;           // [heads], written; NULL without sinks
} sightline_attention;

typedef void (*sightline_task)(int64_t begin, int64_t end, void* context);
typedef int32_t (*sightline_parallel_for)(
    int64_t begin, int64_t end, int64_t grain, sightline_task task, void* context);
typedef int32_t (*sightline_num_threads)(uint32_t* threads);

// Set the thread pool; NULL, NULL runs everything on the calling thread. Called once, before any other function.
void sightline_native_init(sightline_parallel_for parallel_for, sightline_num_threads num_threads);
// Name of the instruction set in use: "baseline", "avx2" or "avx512".
const char* sightline_native_isa(void);
// Names of the instruction sets compiled in, separated by commas.
const char* sightline_native_compiled(void);
// Names of those that this processor has, separated by commas.
const char* sightline_native_supported(void);
// Use an instruction set, by name, in place of the widest one: SIGHTLINE_BAD_INSTRUCTION_SET if that is not possible.
int32_t sightline_native_select(const char* name);
// Size of sightline_attention, so that the caller can detect a library of another version.
int64_t sightline_native_struct_size(void);
const char* sightline_native_error(int32_t code);

// Split the queries into blocks of at most 64 that read nearby keys, and list the runs of keys that each block reads,
// in ascending order and in chunks. Depends on the mask only, so it is computed once and shared by all layers.
//
// blocks  capacity max_blocks x 4; chunks  capacity max_chunks x 2. If a capacity is too small nothing more is written
// there; the needed numbers are returned in num_blocks and num_chunks either way, so that a second call succeeds.
// A block without visible keys has no chunks. Block i has the chunks from its first chunk to that of block i + 1.
// Checks the intervals: SIGHTLINE_BAD_INTERVALS if they are not canonical.
int32_t sightline_attention_plan(
    const int32_t* start, const int32_t* stop, int64_t batch, int64_t queries, int64_t keys, int64_t intervals,
    int32_t* blocks, int64_t max_blocks, int32_t* chunks, int64_t max_chunks, int64_t* num_blocks, int64_t* num_chunks);

int32_t sightline_attention_forward(const sightline_attention* args);
int32_t sightline_attention_backward(const sightline_attention* args);

#ifdef __cplusplus
}
#endif
