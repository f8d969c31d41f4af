// Sorting chosen entries.
#pragma once

#include "topk/cpu/lanes.h"
#include "topk/cpu/rows.h"

namespace tokred::TOKRED_ISA {

// Entries of a row: their scores and positions. Both arrays have room for 16 more than they hold.
struct Entries {
  float* value;
  int32_t* index;
  int64_t count;
  float below;  // of candidates: all scores are above it
};

// A float's place in the order of all floats (-0 before +0), and the float at a place.
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

// Sorts words ascending by the `bits` bits from bit `shift` on, stable; `words` is where they end.
inline void radix_sort(uint64_t*& words, uint64_t*& spare, int64_t count, int shift, int bits) {
  for (const int end = shift + bits; shift < end; shift += 8) {
    int64_t start[257] = {};
    for (int64_t i = 0; i < count; ++i) ++start[(words[i] >> shift & 255) + 1];
    if (start[(words[0] >> shift & 255) + 1] == count) continue;
    for (int digit = 0; digit < 256; ++digit) start[digit + 1] += start[digit];
    for (int64_t i = 0; i < count; ++i) spare[start[words[i] >> shift & 255]++] = words[i];
    uint64_t* sorted = spare;
    spare = words;
    words = sorted;
  }
}

inline constexpr int64_t kRankSort = 128;  // entries from which a radix sort is quicker

// The rank of each entry is how many come before it: k^2 / 16 comparisons of sixteen.
inline void rank_sort(const Entries& from, int64_t limit, float* value, int32_t* index) {
  alignas(64) int32_t key[kRankSort + kLanes], rank[kRankSort + kLanes];
  const int64_t count = from.count;
  for (int64_t i = 0; i < count; ++i) key[i] = order_key(from.value[i]);
  for (int64_t i = count; i < round_up(count, kLanes); ++i) key[i] = 0;
  const i32x16 lane = load(kLaneNumbers);
  for (int64_t block = 0; block < count; block += kLanes) {
    const int64_t end = block + kLanes < count ? block + kLanes : count;
    const i32x16 mine = load(key + block), less = mine - splat(1);
    i32x16 before = splat(0);
    // Of equal entries the earlier one comes first.
    for (int64_t j = 0; j < block; ++j) before = count_greater(before, splat(key[j]), less);
    for (int64_t j = block; j < end; ++j) {
      const i32x16 number = splat(static_cast<int32_t>(j - block));
      before = count_greater(before, splat(key[j]), select_greater(lane, number, less, mine));
    }
    for (int64_t j = end; j < count; ++j) before = count_greater(before, splat(key[j]), mine);
    store(rank + block, before);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (rank[i] >= limit) continue;
    value[rank[i]] = from.value[i];
    index[rank[i]] = from.index[i];
  }
}

// Writes the first `limit` entries by score descending, equal ones in the order they had. `words`
// holds 2 * count of them.
inline void sort_by_score(const Entries& from, int64_t limit, uint64_t* words, float* value,
                          int32_t* index) {
  if (from.count <= kRankSort) return rank_sort(from, limit, value, index);
  uint64_t *sorted = words, *spare = words + from.count;
  uint32_t greatest = 0;
  for (int64_t i = 0; i < from.count; ++i) {
    const uint32_t key = static_cast<uint32_t>(order_key(from.value[i])) ^ 0x80000000u;
    greatest = key > greatest ? key : greatest;
  }
  uint32_t spread = 0;
  for (int64_t i = 0; i < from.count; ++i) {
    const uint32_t key = static_cast<uint32_t>(order_key(from.value[i])) ^ 0x80000000u;
    const uint32_t below = greatest - key;
    spread |= below;
    sorted[i] = static_cast<uint64_t>(below) << 32 | static_cast<uint32_t>(from.index[i]);
  }
  radix_sort(sorted, spare, from.count, 32, spread ? 32 - __builtin_clz(spread) : 0);
  for (int64_t i = 0; i < limit; ++i) {
    const uint32_t key = greatest - static_cast<uint32_t>(sorted[i] >> 32);
    value[i] = from_order_key(static_cast<int32_t>(key ^ 0x80000000u));
    index[i] = static_cast<int32_t>(sorted[i]);
  }
}

// Sorts entries by position, in place.
inline void sort_by_position(float* value, int32_t* index, int64_t count, uint64_t* words) {
  uint64_t *sorted = words, *spare = words + count;
  uint32_t greatest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, value + i, 4);
    greatest |= static_cast<uint32_t>(index[i]);
    sorted[i] = static_cast<uint64_t>(static_cast<uint32_t>(index[i])) << 32 | bits;
  }
  radix_sort(sorted, spare, count, 32, greatest ? 32 - __builtin_clz(greatest) : 0);
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = static_cast<uint32_t>(sorted[i]);
    std::memcpy(value + i, &bits, 4);
    index[i] = static_cast<int32_t>(sorted[i] >> 32);
  }
}

}  // namespace tokred::TOKRED_ISA
