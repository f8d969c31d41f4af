// Radix sort of 64-bit keys, and floats as integers of the same order.
#pragma once

#include "common/cpu/simd.h"

namespace tokred::TOKRED_ISA {

// An integer that ascends with x over all floats, -0 before +0, and the float of such an integer.
TOKRED_INLINE int32_t order_key(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
TOKRED_INLINE float from_order_key(int32_t key) {
  const int32_t bits = key ^ (key >> 31 & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// Unsigned numbers that ascend with x, and that descend.
TOKRED_INLINE uint32_t ascending_key(float x) {
  return static_cast<uint32_t>(order_key(x)) ^ 0x80000000u;
}
TOKRED_INLINE uint32_t descending_key(float x) { return ~ascending_key(x); }

// Sorts keys ascending by the `bits` bits from bit `shift` on, stable, a byte a pass, the lowest
// byte first. Every pass swaps the two arrays; at the end `keys` is the sorted one. A byte that is
// the same in all keys takes no pass.
inline void radix_sort(uint64_t*& keys, uint64_t*& spare, int64_t count, int shift, int bits) {
  for (const int end = shift + bits; shift < end; shift += 8) {
    int64_t start[257] = {};
    for (int64_t i = 0; i < count; ++i) ++start[(keys[i] >> shift & 255) + 1];
    if (start[(keys[0] >> shift & 255) + 1] == count) continue;
    for (int digit = 0; digit < 256; ++digit) start[digit + 1] += start[digit];
    for (int64_t i = 0; i < count; ++i) spare[start[keys[i] >> shift & 255]++] = keys[i];
    uint64_t* sorted = spare;
    spare = keys;
    keys = sorted;
  }
}

}  // namespace tokred::TOKRED_ISA
