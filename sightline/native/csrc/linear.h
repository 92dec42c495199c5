// Products of few tokens with large weights in float32, as in generation: the C interface between Python
// (sightline/native/linear.py) and the kernel.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SIGHTLINE_MIN_CHANNELS = 16 };  // the widest vector

// out[i] = weight[g] x[i] + bias[g], where g is the group of row i: the rows of group 0 come first, then those of group 1.
// Strides are in elements; the last dimensions are contiguous.
typedef struct {
  const float* x;        // [rows, channels]; rows after the last group are ignored
  int64_t x_stride, rows;
  const float* weight;   // [groups, features, channels]
  int64_t group_stride, weight_stride;
  const float* bias;     // [groups, features], or NULL
  int64_t bias_stride;
  const int64_t* counts;  // [groups], rows of each group; NULL for one group with all rows
  int64_t groups, features;
  int64_t channels;      // at least SIGHTLINE_MIN_CHANNELS
  float* out;            // [rows, features], contiguous; rows after the last group are not written
} sightline_linear_arguments;

// The sum of an output has an order that depends on `channels` only, not on the other rows or the number of threads.
// Returns SIGHTLINE_BAD_SIZES if a size is out of range or a pointer is missing, or SIGHTLINE_OUT_OF_MEMORY.
int32_t sightline_linear(const sightline_linear_arguments* args);

#ifdef __cplusplus
}
#endif
