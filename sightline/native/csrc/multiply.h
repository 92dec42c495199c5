// The one product that all others are made of: a tile of rows by vectors that stays in registers.
#pragma once
#include "vectors.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

// Size of a tile: ROWS * VECTORS accumulators, VECTORS operands and a broadcast element fit in the registers.
#if SIGHTLINE_LANES == 16 || defined(__aarch64__)
constexpr int ROWS = 6, VECTORS = 4;  // of 32 registers
#elif SIGHTLINE_LANES == 8
constexpr int ROWS = 6, VECTORS = 2;  // of 16
#else
constexpr int ROWS = 4, VECTORS = 2;  // of 16, without fused multiply-add
#endif

// c [M, N vectors] = or += a b, with b [depth, N vectors]. a is [M, depth], or [depth, M] if TRANSPOSED. Each sum adds
// one product after the other, so that splitting `depth` into several calls does not change the result.
template <int M, int N, bool TRANSPOSED, bool ADD>
void multiply_tile(
    const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc) {
  Vector sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sum[m][n] = ADD ? load(c + m * ldc + n * LANES) : Vector{};
  for (int64_t k = 0; k < depth; k++) {
    Vector x[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) x[n] = load(b + k * ldb + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vector y = splat(TRANSPOSED ? a[k * lda + m] : a[m * lda + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sum[m][n] += y * x[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(c + m * ldc + n * LANES, sum[m][n]);
}

// As multiply_tile, for any number of vectors.
template <int M, bool TRANSPOSED, bool ADD>
inline void multiply_vectors(
    const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, int64_t vectors) {
  for (; vectors >= VECTORS; vectors -= VECTORS, b += VECTORS * LANES, c += VECTORS * LANES)
    multiply_tile<M, VECTORS, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc);
  if (vectors == 1) multiply_tile<M, 1, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc);
  if constexpr (VECTORS > 2) {
    if (vectors == 2) multiply_tile<M, 2, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc);
    if (vectors == 3) multiply_tile<M, 3, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc);
  }
}

// As multiply_tile, for 1 <= rows <= ROWS and any number of vectors.
template <bool TRANSPOSED, bool ADD>
inline void multiply(
    int64_t rows, int64_t vectors, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
    int64_t ldc) {
  if constexpr (ROWS > 4) {
    if (rows == 6) return multiply_vectors<6, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
    if (rows == 5) return multiply_vectors<5, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
  }
  switch (rows) {
    case 4: return multiply_vectors<4, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
    case 3: return multiply_vectors<3, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
    case 2: return multiply_vectors<2, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
    case 1: return multiply_vectors<1, TRANSPOSED, ADD>(a, lda, b, ldb, depth, c, ldc, vectors);
  }
}

}  // namespace
}  // namespace SIGHTLINE_ISA
}  // namespace sightline
