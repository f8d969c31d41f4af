// Sorts the chosen entries of topk: a rank sort of few, a radix sort of many.
#pragma once

#include "common/cpu/sort.h"
#include "topk/cpu/lanes.h"
#include "topk/cpu/rows.h"

namespace tokred::TOKRED_ISA {

// Entries of a row: their scores and positions. Both arrays have room for 16 more than they hold.
struct Entries {
  float* value;
  int32_t* index;
  int64_t count;
  float below;  // a bound below the scores of candidates
};

// From so many entries on a radix sort is quicker: 128 take 1024 comparisons of sixteen lanes, four
// radix passes about 2000 steps.
inline constexpr int64_t kRankSort = 128;

// Rank sort: an entry's rank is the number of entries before it, k^2 / 16 comparisons of sixteen.
inline void rank_sort(const Entries& from, int64_t limit, float* value, int32_t* index) {
  alignas(64) int32_t key[kRankSort + kLanes], rank[kRankSort + kLanes];
  const int64_t count = from.count;
  for (int64_t i = 0; i < count; ++i) key[i] = order_key(from.value[i]);
  for (int64_t i = count; i < round_up(count, kLanes); ++i) key[i] = 0;
  const i32x16 lane = load(kLaneNumbers);
  for (int64_t block = 0; block < count; block += kLanes) {
    const int64_t end = block + kLanes < count ? block + kLanes : count;
    const i32x16 own = load(key + block), below_own = own - splat(1);
    i32x16 before = splat(0);
    // Of equal entries the earlier one comes first.
    for (int64_t j = 0; j < block; ++j) before = count_greater(before, splat(key[j]), below_own);
    for (int64_t j = block; j < end; ++j) {
      const i32x16 number = splat(static_cast<int32_t>(j - block));
      before = count_greater(before, splat(key[j]), select_greater(lane, number, below_own, own));
    }
    for (int64_t j = end; j < count; ++j) before = count_greater(before, splat(key[j]), own);
    store(rank + block, before);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (rank[i] >= limit) continue;
    value[rank[i]] = from.value[i];
    index[rank[i]] = from.index[i];
  }
}

// Writes the first `limit` entries by score descending, equal ones in the order they had. `keys`
// has room for 2 * count.
inline void sort_by_score(const Entries& from, int64_t limit, uint64_t* keys, float* value,
                          int32_t* index) {
  if (from.count <= kRankSort) return rank_sort(from, limit, value, index);
  uint64_t *sorted = keys, *spare = keys + from.count;
  uint32_t max_key = 0;
  for (int64_t i = 0; i < from.count; ++i) {
    const uint32_t key = ascending_key(from.value[i]);
    max_key = key > max_key ? key : max_key;
  }
  uint32_t spread = 0;
  for (int64_t i = 0; i < from.count; ++i) {
    const uint32_t key = ascending_key(from.value[i]);
    const uint32_t below = max_key - key;
    spread |= below;
    sorted[i] = static_cast<uint64_t>(below) << 32 | static_cast<uint32_t>(from.index[i]);
  }
  radix_sort(sorted, spare, from.count, 32, spread ? 32 - __builtin_clz(spread) : 0);
  for (int64_t i = 0; i < limit; ++i) {
    const uint32_t key = max_key - static_cast<uint32_t>(sorted[i] >> 32);
    value[i] = from_order_key(static_cast<int32_t>(key ^ 0x80000000u));
    index[i] = static_cast<int32_t>(sorted[i]);
  }
}

// Sorts entries by position, in place.
inline void sort_by_position(float* value, int32_t* index, int64_t count, uint64_t* keys) {
  uint64_t *sorted = keys, *spare = keys + count;
  uint32_t max_index = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, value + i, 4);
    max_index |= static_cast<uint32_t>(index[i]);
    sorted[i] = static_cast<uint64_t>(static_cast<uint32_t>(index[i])) << 32 | bits;
  }
  radix_sort(sorted, spare, count, 32, max_index ? 32 - __builtin_clz(max_index) : 0);
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = static_cast<uint32_t>(sorted[i]);
    std::memcpy(value + i, &bits, 4);
    index[i] = static_cast<int32_t>(sorted[i] >> 32);
  }
}

}  // namespace tokred::TOKRED_ISA
