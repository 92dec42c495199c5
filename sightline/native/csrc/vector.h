// Vectors of SIGHTLINE_LANES floats for the sources that are compiled once per instruction set.
//
// Nothing here may use templates or inline functions of the standard library, and all of it is in an anonymous namespace:
// the linker keeps one copy of an external function for all instruction sets, possibly one that this processor cannot
// run.
#pragma once
#include <math.h>
#include <stdint.h>

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

constexpr int LANES = SIGHTLINE_LANES;
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
inline void store(float* p, Vector x) { *reinterpret_cast<UnalignedVector*>(p) = x; }
inline Vector splat(float x) { return x - Vector{}; }
inline Vector select(Ints condition, Vector a, Vector b) {
  return reinterpret_cast<Vector>((condition & reinterpret_cast<Ints>(a)) | (~condition & reinterpret_cast<Ints>(b)));
}

// 2^x for x <= 0, with a relative error of 1e-7; 0 below 2^-126, NaN for NaN. Polynomial of Cephes' exp2f.
inline Vector exp2(Vector x) {
  const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Vector shifted = x + magic;
  Vector f = x - (shifted - magic);
  Vector y = splat(1.535336188319500e-4f);
  y = y * f + 1.339887440266574e-3f;
  y = y * f + 9.618437357674640e-3f;
  y = y * f + 5.550332471162809e-2f;
  y = y * f + 2.402264791363012e-1f;
  y = y * f + 6.931472028550421e-1f;
  y = y * f + 1.0f;
  Ints exponent = (reinterpret_cast<Ints>(shifted) + (127 - 0x4B400000)) << 23;
  y = y * reinterpret_cast<Vector>(exponent);
  return select(x < -126.0f, Vector{}, y);
}

}  // namespace
}  // namespace SIGHTLINE_ISA
}  // namespace sightline
