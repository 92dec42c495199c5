// RMSNorm in float32: the C interface between Python (sightline/native/norm.py) and the kernels.
//
// Results do not depend on the number of threads. The functions return SIGHTLINE_OK or SIGHTLINE_BAD_SIZES: a size is
// negative or too large, or a pointer is missing.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SIGHTLINE_NORM_BLOCKS = 64 };  // most partial sums of the gradient of a weight

// out [rows, size] = x * rstd * weight, with rstd [rows] = 1 / sqrt(mean(x^2) + eps).
//
// stride  of the rows of x, in elements; all else is contiguous
int32_t sightline_rms_norm_forward(
    const float* x, int64_t stride, const float* weight, int64_t rows, int64_t size, double eps, float* out,
    float* rstd);

// d_x [rows, size] and d_weight [size] from d_out [rows, size]. partial  memory for SIGHTLINE_NORM_BLOCKS x size floats
int32_t sightline_rms_norm_backward(
    const float* d_out, const float* x, int64_t stride, const float* weight, const float* rstd, int64_t rows,
    int64_t size, float* d_x, float* d_weight, float* partial);

#ifdef __cplusplus
}
#endif
