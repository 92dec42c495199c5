// Interface between the entry points (dispatch.cpp) and the kernels (forward, backward, linear and norm.cpp,
// compiled once per instruction set).
//
// No inline function or template may be defined here: the kernels are compiled with several instruction sets, and the
// linker would keep one copy for all of them, possibly one that this processor cannot run.
#pragma once
#include "attention.h"
#include "linear.h"
#include "norm.h"

namespace sightline {

constexpr int64_t MAX_QUERIES = 64;  // of a block
constexpr int64_t MAX_KEYS = 192;    // of a chunk

// Call task(begin, end, context) on disjoint parts of [0, count), each of at least `grain` items, on torch's threads.
void parallel_for(int64_t count, int64_t grain, sightline_task task, void* context);
int64_t num_threads();

// Whether an array of these sizes, each from 0 to INT32_MAX, has more elements than an address space; below this, and
// with the copies that threads make of parts of it, numbers of elements fit int64.
bool too_large(int64_t a, int64_t b, int64_t c, int64_t d);
// SIGHTLINE_BAD_INTERVALS if the intervals [num_queries, intervals] are not canonical.
int32_t check_intervals(
    const int32_t* start, const int32_t* stop, int64_t num_queries, int64_t keys, int64_t intervals);

// The arguments are checked before these are called: sizes, intervals and plan are valid.
#define SIGHTLINE_DECLARE_KERNEL(isa)                                                                            \
  namespace isa {                                                                                                \
  int32_t forward(const sightline_attention& args);                                                              \
  int32_t backward(const sightline_attention& args);                                                             \
  int32_t linear(const sightline_linear_arguments& args);                                                        \
  void rms_norm_forward(                                                                                         \
      const float* x, int64_t stride, const float* weight, int64_t rows, int64_t size, double eps, float* out,   \
      float* rstd);                                                                                              \
  void rms_norm_backward(                                                                                        \
      const float* d_out, const float* x, int64_t stride, const float* weight, const float* rstd, int64_t rows,  \
      int64_t size, float* d_x, float* d_weight, float* partial);                                                \
  }
SIGHTLINE_DECLARE_KERNEL(baseline)
SIGHTLINE_DECLARE_KERNEL(avx2)
SIGHTLINE_DECLARE_KERNEL(avx512)
#undef SIGHTLINE_DECLARE_KERNEL

}  // namespace sightline
