// Tensors of float32 or bfloat16, read and written as float32.
#pragma once
#include <string.h>

#include "vectors.h"

namespace sightline {
namespace SIGHTLINE_ISA {
namespace {

struct Float32 {
  typedef float Element;
  static Vector load_vector(const float* p) { return load(p); }
  static void store_vector(float* p, Vector x) { store(p, x); }
  static float get(float x) { return x; }
  static float put(float x) { return x; }
};

struct Bfloat16 {
  typedef uint16_t Element;
  typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
  static constexpr uint16_t NAN_BITS = 0x7FC0;

  static Vector load_vector(const uint16_t* p) {
    return reinterpret_cast<Vector>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
  }
  static void store_vector(uint16_t* p, Vector x) {  // rounds to nearest even
    const Words bits = reinterpret_cast<Words>(x), nan = reinterpret_cast<Words>(x != x);
    const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector((nan & NAN_BITS) | (~nan & rounded), Halves);
  }
  static float get(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
  }
  static uint16_t put(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? NAN_BITS : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
};

template <class T>
inline typename T::Element* at(const sightline_tensor& x, int64_t row, int64_t head, int64_t token) {
  return static_cast<typename T::Element*>(const_cast<void*>(x.data)) + row * x.stride[0] + head * x.stride[1] +
         token * x.stride[2];
}

// Rows of floats with a fixed distance: where they lie in a tensor, or a packed copy. A masked key or query has weight
// 0, but 0 * NaN is NaN: rows that are not finite are multiplied by the weights of visible pairs only.
struct Rows {
  const float* data;
  int64_t stride;
  bool finite;
};

// Copy `count` tokens of `size` elements to rows of `padded` floats at `to`; the padding is 0.
template <class T>
Rows pack(const typename T::Element* from, int64_t stride, int64_t count, int64_t size, int64_t padded, float* to) {
  const float* data = to;
  Vector zeros = {};  // becomes NaN if an element is NaN or infinite
  for (int64_t i = 0; i < count; i++, from += stride, to += padded) {
    int64_t c = 0;
    for (; c + LANES <= size; c += LANES) {
      const Vector x = T::load_vector(from + c);
      zeros += x * 0.0f;
      store(to + c, x);
    }
    for (; c < size; c++) {
      to[c] = T::get(from[c]);
      zeros[0] += to[c] * 0.0f;
    }
    for (; c < padded; c++) to[c] = 0;
  }
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += zeros[i];
  return {data, padded, sum == 0};
}

// to [size] = factor * from
template <class T>
void unpack_row(const float* from, float factor, int64_t size, typename T::Element* to) {
  int64_t c = 0;
  for (; c + LANES <= size; c += LANES) T::store_vector(to + c, load(from + c) * factor);
  for (; c < size; c++) to[c] = T::put(from[c] * factor);
}

constexpr int64_t MAX_GROUP = 8;  // most query heads of a task: they share the packed keys and values of a chunk

struct Sizes {
  int64_t group;  // query heads of a key head
  int64_t heads;  // query heads of a task, at most
  int64_t d, dv;  // channels of keys and of values, padded to whole vectors

  explicit Sizes(const sightline_attention& args)
      : group(args.kv_heads ? args.heads / args.kv_heads : 0),
        heads(min(group, MAX_GROUP)),
        d(round_up(args.head_dim, LANES)),
        dv(round_up(args.value_dim, LANES)) {}
};

// What queries are multiplied by: scores are then the argument of tanh if there is a soft cap, else times log2(e).
inline float query_factor(const sightline_attention& args) {
  return static_cast<float>(args.softcap != 0 ? args.scale / args.softcap : args.scale * LOG2E);
}

}  // namespace
}  // namespace SIGHTLINE_ISA
}  // namespace sightline
