// Vectors of SIGHTLINE_LANES floats: loads, 2^x, tanh, and the transpose.
//
// This header and those that include it are compiled once per instruction set, into the namespace SIGHTLINE_ISA. All
// that they define is in an unnamed namespace, and nothing uses templates or inline functions of the standard library:
// the linker would keep one copy for all instruction sets, possibly one that this processor cannot run.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "kernel.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

constexpr int LANES = SIGHTLINE_LANES;
constexpr int BLOCK = MAX_QUERIES;  // most queries of a block: the bits of a word
constexpr int CHUNK = MAX_KEYS;     // most keys of a chunk
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
inline int64_t round_up(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }
inline size_t bytes(int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); }

inline Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
inline void store(float* p, Vector x) { *reinterpret_cast<UnalignedVector*>(p) = x; }
inline Vector splat(float x) { return x - Vector{}; }
inline Vector select(Ints condition, Vector a, Vector b) {
  return reinterpret_cast<Vector>((condition & reinterpret_cast<Ints>(a)) | (~condition & reinterpret_cast<Ints>(b)));
}

// 2^x for x <= 0, with a relative error of 1e-7; 0 below 2^-126, NaN for NaN. Polynomial of Cephes' exp2f.
inline Vector exp2(Vector x) {
  const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vector shifted = x + magic;
  const Vector f = x - (shifted - magic);
  Vector y = splat(1.535336188319500e-4f);
  y = y * f + 1.339887440266574e-3f;
  y = y * f + 9.618437357674640e-3f;
  y = y * f + 5.550332471162809e-2f;
  y = y * f + 2.402264791363012e-1f;
  y = y * f + 6.931472028550421e-1f;
  y = y * f + 1.0f;
  const Words exponent = (reinterpret_cast<Words>(shifted) + (127u - 0x4B400000u)) << 23;
  y = y * reinterpret_cast<Vector>(exponent);
  return select(x < -126.0f, Vector{}, y);
}

// tanh(x), with a relative error of 2e-7: a large soft cap multiplies small tanh by a large number. 1 - 2 / (e^(2|x|) +
// 1) cancels for small x, where Cephes' tanhf has a polynomial.
inline Vector tanh(Vector x) {
  const Vector size = select(x < 0.0f, -x, x);
  const Vector e = exp2(size * (-2.0f * LOG2E));  // e^(-2|x|)
  const Vector large = (1.0f - e) / (1.0f + e);
  const Vector square = x * x;
  Vector y = splat(-5.70498872745e-3f);
  y = y * square + 2.06390887954e-2f;
  y = y * square - 5.37397155531e-2f;
  y = y * square + 1.33314422036e-1f;
  y = y * square - 3.33332819422e-1f;
  const Vector small = y * square * x + x;
  return select(size < 0.625f, small, select(x < 0.0f, -large, large));
}

// Lanes of the bits of a word: all ones where the bit is set.
struct LaneBits {
  Ints bit;
  LaneBits() {
    for (int i = 0; i < LANES; i++) bit[i] = 1 << i;
  }
  Ints of(uint32_t word) const { return ((static_cast<int32_t>(word) - Ints{}) & bit) != 0; }
};
constexpr uint32_t ALL_LANES = (1u << LANES) - 1;

// One step of the transpose of LANES x LANES: exchange the lanes with bit STEP of `a` for those without it of `b`.
template <int STEP>
inline void exchange(Vector& a, Vector& b) {
#if defined(__clang__)
  Vector x, y;
  for (int i = 0; i < LANES; i++) {
    x[i] = i & STEP ? b[i - STEP] : a[i];
    y[i] = i & STEP ? b[i] : a[i + STEP];
  }
#else
  Ints low, high;
  for (int i = 0; i < LANES; i++) {
    low[i] = i & STEP ? LANES + i - STEP : i;
    high[i] = i & STEP ? LANES + i : i + STEP;
  }
  const Vector x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
#endif
  a = x;
  b = y;
}

// Transpose LANES x LANES, in steps of 1, 2, 4, ...
template <int STEP>
inline void transpose_lanes(Vector* x) {
  if constexpr (STEP < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & STEP)) exchange<STEP>(x[i], x[i + STEP]);
    transpose_lanes<2 * STEP>(x);
  }
}

// to [size, BLOCK] = factor * from' for from [rows, size]; `size` is a multiple of LANES, and so are the rows that are
// read.
inline void transpose(const float* from, int64_t size, int64_t rows, float factor, float* to) {
  for (int64_t row = 0; row < rows; row += LANES)
    for (int64_t column = 0; column < size; column += LANES) {
      Vector x[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) x[i] = load(from + (row + i) * size + column) * factor;
      transpose_lanes<1>(x);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) store(to + (column + i) * BLOCK + row, x[i]);
    }
}

}  // namespace
}  // namespace SIGHTLINE_ISA
}  // namespace sightline
