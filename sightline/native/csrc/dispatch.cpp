// The C entry points: check the arguments, and run the kernel that is compiled for the widest instruction set of the
// processor.
#include <string.h>

#include "kernel.h"

#define SIGHTLINE_EXPORT extern "C" __attribute__((visibility("default")))

namespace sightline {

namespace {

struct Kernel {
  const char* name;
  int32_t (*forward)(const sightline_attention&);
  int32_t (*backward)(const sightline_attention&);
  decltype(baseline::rms_norm_forward)* rms_norm_forward;
  decltype(baseline::rms_norm_backward)* rms_norm_backward;
  decltype(baseline::linear)* linear;
  bool (*supported)();
};

bool always() { return true; }

#ifdef SIGHTLINE_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#define SIGHTLINE_KERNEL(isa, supported) \
  {#isa, isa::forward, isa::backward, isa::rms_norm_forward, isa::rms_norm_backward, isa::linear, supported}
const Kernel KERNELS[] = {  // widest first
#ifdef SIGHTLINE_X86
    SIGHTLINE_KERNEL(avx512, has_avx512),
    SIGHTLINE_KERNEL(avx2, has_avx2),
#endif
    SIGHTLINE_KERNEL(baseline, always),
};
#undef SIGHTLINE_KERNEL

const Kernel* widest() {
#ifdef SIGHTLINE_X86
  __builtin_cpu_init();
#endif
  for (const Kernel& kernel : KERNELS)
    if (kernel.supported()) return &kernel;
  return nullptr;  // not reached: baseline is always supported
}

const Kernel* selected = widest();
sightline_parallel_for pool_parallel_for = nullptr;
sightline_num_threads pool_num_threads = nullptr;

// Names of the kernels, separated by commas; all of them, or those that this processor supports.
const char* join_names(char* text, bool only_supported) {
  text[0] = 0;
  for (const Kernel& kernel : KERNELS) {
    if (only_supported && !kernel.supported()) continue;
    if (text[0]) strcat(text, ",");
    strcat(text, kernel.name);
  }
  return text;
}

bool missing(const sightline_tensor& tensor, int64_t elements) { return elements > 0 && tensor.data == nullptr; }

// Whether the chunks [first_chunk, last_chunk) contain all visible keys of a block.
bool covers(const sightline_attention& args, const int32_t* block, int64_t first_chunk, int64_t last_chunk) {
  for (int64_t query = block[1]; query < block[2]; query++) {
    const int64_t at = (block[0] * args.queries + query) * args.intervals;
    int64_t chunk = first_chunk;
    for (int64_t k = at; k < at + args.intervals; k++)
      for (int64_t key = args.start[k]; key < args.stop[k]; key = args.chunks[2 * chunk + 1]) {
        while (chunk < last_chunk && args.chunks[2 * chunk + 1] <= key) chunk++;
        if (chunk == last_chunk || args.chunks[2 * chunk] > key) return false;
      }
  }
  return true;
}

int32_t check_plan(const sightline_attention& args) {
  if ((args.num_blocks > 0 && !args.blocks) || (args.num_chunks > 0 && !args.chunks)) return SIGHTLINE_BAD_PLAN;
  if (args.num_blocks < 0 || args.num_chunks < 0) return SIGHTLINE_BAD_PLAN;
  int64_t row = 0, query = 0, chunk = 0;  // where the next block must start: the blocks contain each query once
  for (int64_t i = 0; i < args.num_blocks; i++) {
    const int32_t* block = args.blocks + 4 * i;
    if (query == args.queries) row++, query = 0;
    const bool follows = block[0] == row && row < args.batch && block[1] == query;
    const int64_t last_chunk = i + 1 < args.num_blocks ? block[7] : args.num_chunks;
    if (!follows || block[2] <= block[1] || block[2] > args.queries || block[2] - block[1] > MAX_QUERIES)
      return SIGHTLINE_BAD_PLAN;
    if (block[3] != chunk || last_chunk < chunk || last_chunk > args.num_chunks) return SIGHTLINE_BAD_PLAN;
    const int64_t first_chunk = chunk;
    int64_t end = 0;
    for (; chunk < last_chunk; chunk++) {
      const int32_t* keys = args.chunks + 2 * chunk;
      if (keys[0] < end || keys[1] <= keys[0] || keys[1] > args.keys || keys[1] - keys[0] > MAX_KEYS)
        return SIGHTLINE_BAD_PLAN;
      end = keys[1];
    }
    if (!covers(args, block, first_chunk, last_chunk)) return SIGHTLINE_BAD_PLAN;
    query = block[2];
  }
  const bool has_queries = args.batch > 0 && args.queries > 0;
  const bool complete = has_queries ? row == args.batch - 1 && query == args.queries : args.num_blocks == 0;
  return complete && chunk == args.num_chunks ? SIGHTLINE_OK : SIGHTLINE_BAD_PLAN;
}

int32_t check(const sightline_attention& args, bool backward) {
  const int64_t sizes[] = {args.batch,    args.queries,  args.keys,      args.heads,
                           args.kv_heads, args.head_dim, args.value_dim, args.intervals};
  for (int64_t size : sizes)
    if (size < 0 || size > INT32_MAX) return SIGHTLINE_BAD_SIZES;
  const int64_t channels = args.head_dim + args.value_dim;
  if (too_large(args.batch, args.queries, args.heads, channels) ||
      too_large(args.batch, args.keys, args.kv_heads, channels) ||
      too_large(args.batch, args.queries, args.intervals, 1))
    return SIGHTLINE_BAD_SIZES;
  if (args.kv_heads == 0 ? args.heads != 0 : args.heads % args.kv_heads != 0) return SIGHTLINE_BAD_SIZES;
  if (args.dtype != SIGHTLINE_FLOAT32 && args.dtype != SIGHTLINE_BFLOAT16) return SIGHTLINE_BAD_SIZES;
  const int64_t queries = args.batch * args.queries;
  const int64_t q = queries * args.heads, k = args.batch * args.keys * args.kv_heads;
  const bool no_head_dim = args.head_dim == 0, no_value_dim = args.value_dim == 0;
  if (missing(args.q, no_head_dim ? 0 : q) || missing(args.out, no_value_dim ? 0 : q) || (q > 0 && !args.lse) ||
      missing(args.k, no_head_dim ? 0 : k) || missing(args.v, no_value_dim ? 0 : k))
    return SIGHTLINE_BAD_SIZES;
  if (backward) {
    if (missing(args.d_q, no_head_dim ? 0 : q) || missing(args.d_out, no_value_dim ? 0 : q) ||
        missing(args.d_k, no_head_dim ? 0 : k) || missing(args.d_v, no_value_dim ? 0 : k) ||
        (args.sinks && !args.d_sinks))
      return SIGHTLINE_BAD_SIZES;
  }
  if (queries > 0 && args.intervals > 0 && (!args.start || !args.stop)) return SIGHTLINE_BAD_INTERVALS;
  const int32_t code = check_intervals(args.start, args.stop, queries, args.keys, args.intervals);
  return code == SIGHTLINE_OK ? check_plan(args) : code;
}

bool is_matrix(int64_t rows, int64_t size) {
  return rows >= 0 && size > 0 && size <= INT32_MAX && rows <= INT64_MAX / 8 / size;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, sightline_task task, void* context) {
  if (count <= 0) return;
  if (!pool_parallel_for || pool_parallel_for(0, count, grain, task, context) != 0) task(0, count, context);
}

int64_t num_threads() {
  uint32_t threads = 1;
  return pool_num_threads && pool_num_threads(&threads) == 0 && threads > 0 ? threads : 1;
}

}  // namespace sightline

using namespace sightline;

SIGHTLINE_EXPORT void sightline_native_init(sightline_parallel_for parallel, sightline_num_threads threads) {
  pool_parallel_for = parallel;
  pool_num_threads = threads;
}

SIGHTLINE_EXPORT const char* sightline_native_isa(void) { return selected->name; }

SIGHTLINE_EXPORT const char* sightline_native_compiled(void) {
  static char text[64];
  return join_names(text, false);
}

SIGHTLINE_EXPORT const char* sightline_native_supported(void) {
  static char text[64];
  return join_names(text, true);
}

SIGHTLINE_EXPORT int32_t sightline_native_select(const char* name) {
  for (const Kernel& kernel : KERNELS)
    if (!strcmp(kernel.name, name) && kernel.supported()) {
      selected = &kernel;
      return SIGHTLINE_OK;
    }
  return SIGHTLINE_BAD_INSTRUCTION_SET;
}

SIGHTLINE_EXPORT int64_t sightline_native_struct_size(void) { return sizeof(sightline_attention); }

SIGHTLINE_EXPORT const char* sightline_native_error(int32_t code) {
  switch (code) {
    case SIGHTLINE_OK:
      return "no error";
    case SIGHTLINE_BAD_SIZES:
      return "sizes are negative or too large, query heads are not a multiple of key/value heads, groups have "
             "more rows than there are, or a tensor is missing";
    case SIGHTLINE_BAD_INTERVALS:
      return "intervals are not canonical: out of range, unsorted, overlapping, or after an empty one";
    case SIGHTLINE_BAD_PLAN:
      return "the plan is not one of this mask";
    case SIGHTLINE_OUT_OF_MEMORY:
      return "out of memory";
    case SIGHTLINE_BAD_INSTRUCTION_SET:
      return "the instruction set is not compiled in, or the processor lacks it";
    default:
      return "unknown error";
  }
}

SIGHTLINE_EXPORT int32_t sightline_attention_forward(const sightline_attention* args) {
  const int32_t code = check(*args, false);
  return code == SIGHTLINE_OK ? selected->forward(*args) : code;
}

SIGHTLINE_EXPORT int32_t sightline_attention_backward(const sightline_attention* args) {
  const int32_t code = check(*args, true);
  return code == SIGHTLINE_OK ? selected->backward(*args) : code;
}

SIGHTLINE_EXPORT int32_t sightline_rms_norm_forward(
    const float* x, int64_t stride, const float* weight, int64_t rows, int64_t size, double eps, float* out,
    float* rstd) {
  if (!is_matrix(rows, size) || !weight || (rows && !(x && out && rstd))) return SIGHTLINE_BAD_SIZES;
  selected->rms_norm_forward(x, stride, weight, rows, size, eps, out, rstd);
  return SIGHTLINE_OK;
}

SIGHTLINE_EXPORT int32_t sightline_rms_norm_backward(
    const float* d_out, const float* x, int64_t stride, const float* weight, const float* rstd, int64_t rows,
    int64_t size, float* d_x, float* d_weight, float* partial) {
  if (!is_matrix(rows, size) || !weight || !d_weight || !partial || (rows && !(d_out && x && rstd && d_x)))
    return SIGHTLINE_BAD_SIZES;
  selected->rms_norm_backward(d_out, x, stride, weight, rstd, rows, size, d_x, d_weight, partial);
  return SIGHTLINE_OK;
}

SIGHTLINE_EXPORT int32_t sightline_linear(const sightline_linear_arguments* args) {
  const int64_t sizes[] = {args->rows, args->groups, args->features, args->channels};
  for (int64_t size : sizes)
    if (size < 0 || size > INT32_MAX) return SIGHTLINE_BAD_SIZES;
  if (args->channels < SIGHTLINE_MIN_CHANNELS || (!args->counts && args->groups > 1)) return SIGHTLINE_BAD_SIZES;
  int64_t left = args->rows;
  for (int64_t group = 0; args->counts && group < args->groups; group++) {
    if (args->counts[group] < 0 || args->counts[group] > left) return SIGHTLINE_BAD_SIZES;
    left -= args->counts[group];
  }
  if (args->rows == 0 || args->groups == 0 || args->features == 0) return SIGHTLINE_OK;
  if (!args->x || !args->weight || !args->out) return SIGHTLINE_BAD_SIZES;
  return selected->linear(*args);
}
