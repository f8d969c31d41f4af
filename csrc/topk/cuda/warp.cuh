// topk of short segments by a warp each, in registers: radix select bit by bit, then a bitonic
// sort.
#pragma once

#include "topk/cuda/sort.cuh"

namespace tokred::cuda::selecting {

struct WarpSelectShared {
  uint64_t chosen[kTopkWarps][kTopkWarpChosen];
};

// Lane l has the entries l, 32 + l, ..
template <class T, int kItems>
struct WarpSegment {
  const Segment<T>& segment;
  uint32_t rank_key[kItems];  // descends in the order of choice; 0 where the entry is no candidate
  uint64_t forced = 0;  // bit i: entry i of this lane

  __device__ explicit WarpSegment(const Segment<T>& segment) : segment(segment) {
    const T* own = segment.scores + segment.begin + lane_id();
    const int left = segment.end - segment.begin - lane_id();
    float score[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      score[i] = i * kWarp < left ? to_float(own[i * kWarp]) : -kInfinity;
    }
    if (segment.must_keep || segment.begin < segment.sinks_end ||
        segment.end > segment.locals_begin) {
      for (int i = 0; i < kItems; ++i) {
        const bool is_there = i * kWarp < left;
        if (is_there && segment.forced(position(i))) forced |= uint64_t{1} << i;
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool ranked = (forced >> i & 1) || score[i] > segment.floor;
      rank_key[i] = ranked ? ~score_key(score[i]) : 0;
    }
  }
  __device__ __forceinline__ int64_t position(int i) const {
    return segment.begin + i * kWarp + lane_id();
  }

  template <class F>
  __device__ __forceinline__ int count(F f) const {
    unsigned n = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) n += f(i);
    return static_cast<int>(__reduce_add_sync(kAllLanes, n));
  }

  // Forced entries rank first: where there are enough of them no other is a candidate, else all of
  // them are chosen, whatever their scores.
  __device__ void rank_forced(int wanted) {
    if (!__any_sync(kAllLanes, forced != 0)) return;
    const bool enough = count([&](int i) { return forced >> i & 1; }) >= wanted;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool is_forced = forced >> i & 1;
      if (enough && !is_forced) rank_key[i] = 0;
      if (!enough && is_forced) rank_key[i] = ~0u;
    }
  }

  // The maximum value that at least `wanted` entries reach, or one that exactly as many reach.
  __device__ uint32_t threshold(int wanted) const {
    uint32_t high = 0, low = ~0u;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      high = max(high, rank_key[i]);
      low = min(low, rank_key[i] - 1);
    }
    high = __reduce_max_sync(kAllLanes, high);
    low = __reduce_min_sync(kAllLanes, low) + 1;
    if (high == low) return high;
    const int bits = 32 - __clz(high ^ low);
    uint32_t value = bits == 32 ? 0 : high >> bits << bits;
    for (int bit = bits - 1; bit >= 0; --bit) {
      const uint32_t next = value | 1u << bit;
      const int n = count([&](int i) { return rank_key[i] >= next; });
      if (n >= wanted) value = next;
      if (n == wanted) break;
    }
    return value;
  }

  // Lists the keys of the chosen entries by position; returns their number.
  __device__ __forceinline__ int choose(uint64_t* keys) {
    rank_forced(segment.wanted);
    const int there = count([&](int i) { return rank_key[i] > 0; });
    const int wanted = min(segment.wanted, there);
    if (wanted == 0) return 0;
    const uint32_t limit = wanted == there ? 1 : threshold(wanted);
    int ties = wanted - count([&](int i) { return rank_key[i] > limit; });
    int chosen_before = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const unsigned tied = __ballot_sync(kAllLanes, rank_key[i] == limit);
      const bool chosen =
          rank_key[i] > limit || (rank_key[i] == limit && lanes_before(tied) < ties);
      ties -= __popc(tied);
      const unsigned all = __ballot_sync(kAllLanes, chosen);
      if (chosen)
        keys[chosen_before + lanes_before(all)] = candidate_key(~rank_key[i], position(i));
      chosen_before += __popc(all);
    }
    __syncwarp();
    if (__any_sync(kAllLanes, forced != 0)) restore(keys, chosen_before);
    return chosen_before;
  }

  // Rewrites the keys with the true scores, which a ranking of forced entries overrides.
  __device__ void restore(uint64_t* keys, int count) const {
    for (int e = lane_id(); e < count; e += kWarp) keys[e] = segment.key(position_of(keys[e]));
    __syncwarp();
  }
};

// Sorts the first n of up to kWarp * kItems keys of the warp.
template <int kItems>
__device__ void sort_warp(uint64_t* keys, int n) {
  if constexpr (kItems > 1) {
    if (n <= kWarp * kItems / 2) return sort_warp<kItems / 2>(keys, n);
  }
  uint64_t key[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int number = i * kWarp + lane_id();
    key[i] = number < n ? keys[number] : kNoKey;
  }
  __syncwarp();
  sort_keys<kWarp>(key, lane_id(), nullptr);
#pragma unroll
  for (int i = 0; i < kItems; ++i) keys[lane_id() * kItems + i] = key[i];
  __syncwarp();
}

template <class T, int kItems>
__global__ void __launch_bounds__(kTopkWarps* kWarp, kItems <= 10 ? 4 : 2)
    warp_kernel(const __grid_constant__ TopkParams p) {
  uint64_t* chosen = shared_memory<WarpSelectShared>().chosen[warp_id()];
  const int64_t segments = p.rows * p.segments;
  for (int64_t l = int64_t{blockIdx.x} * kTopkWarps + warp_id(); l < segments;
       l += int64_t{gridDim.x} * kTopkWarps) {
    const Segment<T> segment(p, l);
    WarpSegment<T, kItems> entries(segment);
    const int count = entries.choose(chosen);
    if (p.order == RowOrder::score) sort_warp<kTopkWarpChosen / kWarp>(chosen, count);
    for (int64_t e = lane_id(); e < p.k; e += kWarp) {
      write_slot(p, l * p.k + e, e < count, e < count ? chosen[e] : kNoKey);
    }
    if (lane_id() == 0) p.counts[l] = count;
    __syncwarp();
  }
}

}  // namespace tokred::cuda::selecting
