// RMSNorm, forward and backward. Compiled once per instruction set, see vectors.h.
#include <string.h>

#include "kernel.h"
#include "vectors.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

constexpr int64_t GRAIN = 16384;  // floats that are worth another thread

// The first `count` < LANES floats at p, then zeros.
inline Vector load_first(const float* p, int64_t count) {
  Vector x = {};
  for (int64_t i = 0; i < count; i++) x[i] = p[i];
  return x;
}
inline void store_first(float* p, Vector x, int64_t count) {
  for (int64_t i = 0; i < count; i++) p[i] = x[i];
}
inline float sum_lanes(Vector x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

struct Norm {
  const float *d_out, *x;
  int64_t stride;
  const float* weight;
  int64_t rows, size;
  float eps;
  float *out, *rstd, *d_x, *partial;
  int64_t block_rows;
};

void norm_rows(int64_t begin, int64_t end, void* context) {
  const Norm& n = *static_cast<const Norm*>(context);
  const int64_t whole = n.size / LANES * LANES, rest = n.size - whole;
  for (int64_t row = begin; row < end; row++) {
    const float* x = n.x + row * n.stride;
    float* out = n.out + row * n.size;
    Vector squares = {}, other = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= whole; i += 2 * LANES) {
      const Vector a = load(x + i), b = load(x + i + LANES);
      squares += a * a;
      other += b * b;
    }
    for (; i < whole; i += LANES) squares += load(x + i) * load(x + i);
    const Vector last = load_first(x + whole, rest);
    const float mean = sum_lanes(squares + other + last * last) / static_cast<float>(n.size);
    const float rstd = 1.0f / sqrtf(mean + n.eps);
    for (i = 0; i < whole; i += LANES) store(out + i, load(x + i) * rstd * load(n.weight + i));
    store_first(out + whole, last * rstd * load_first(n.weight + whole, rest), rest);
    n.rstd[row] = rstd;
  }
}

// With g = d_out * weight: d_x = rstd * (g - x * rstd^2 * mean(g x)), d_weight = sum of d_out * x * rstd over the rows.
void norm_gradient_blocks(int64_t begin, int64_t end, void* context) {
  const Norm& n = *static_cast<const Norm*>(context);
  const int64_t whole = n.size / LANES * LANES, rest = n.size - whole;
  for (int64_t block = begin; block < end; block++) {
    float* sums = n.partial + block * n.size;
    memset(sums, 0, bytes(n.size));
    for (int64_t row = block * n.block_rows; row < min((block + 1) * n.block_rows, n.rows); row++) {
      const float *x = n.x + row * n.stride, *d_out = n.d_out + row * n.size;
      float* d_x = n.d_x + row * n.size;
      Vector products = {};
      for (int64_t i = 0; i < whole; i += LANES) products += load(d_out + i) * load(n.weight + i) * load(x + i);
      const Vector last_x = load_first(x + whole, rest), last_weight = load_first(n.weight + whole, rest);
      const Vector last_d = load_first(d_out + whole, rest);
      products += last_d * last_weight * last_x;
      const float rstd = n.rstd[row];
      const float factor = sum_lanes(products) / static_cast<float>(n.size) * rstd * rstd * rstd;
      for (int64_t i = 0; i < whole; i += LANES) {
        const Vector value = load(x + i), scaled = load(d_out + i) * rstd;
        store(d_x + i, scaled * load(n.weight + i) - value * factor);
        store(sums + i, load(sums + i) + scaled * value);
      }
      store_first(d_x + whole, last_d * rstd * last_weight - last_x * factor, rest);
      store_first(sums + whole, load_first(sums + whole, rest) + last_d * rstd * last_x, rest);
    }
  }
}

}  // namespace

void rms_norm_forward(
    const float* x, int64_t stride, const float* weight, int64_t rows, int64_t size, double eps, float* out,
    float* rstd) {
  Norm n = {};
  n.x = x, n.stride = stride, n.weight = weight, n.rows = rows, n.size = size, n.eps = static_cast<float>(eps);
  n.out = out, n.rstd = rstd;
  parallel_for(rows, max(1, GRAIN / size), norm_rows, &n);
}

void rms_norm_backward(
    const float* d_out, const float* x, int64_t stride, const float* weight, const float* rstd, int64_t rows,
    int64_t size, float* d_x, float* d_weight, float* partial) {
  Norm n = {};
  n.d_out = d_out, n.x = x, n.stride = stride, n.weight = weight, n.rows = rows, n.size = size;
  n.rstd = const_cast<float*>(rstd), n.d_x = d_x, n.partial = partial;
  // Blocks and the order of their sums are the same for any number of threads.
  n.block_rows = max(16, (rows + SIGHTLINE_NORM_BLOCKS - 1) / SIGHTLINE_NORM_BLOCKS);
  const int64_t blocks = (rows + n.block_rows - 1) / n.block_rows;
  parallel_for(blocks, max(1, GRAIN / (size * n.block_rows)), norm_gradient_blocks, &n);
  memset(d_weight, 0, bytes(size));
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t i = 0; i < size; i++) d_weight[i] += partial[block * size + i];
}

}  // namespace SIGHTLINE_ISA
}  // namespace sightline
