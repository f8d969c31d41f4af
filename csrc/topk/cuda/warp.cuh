// A warp selects from a short list that it keeps in registers: bit by bit it finds the score below
// which nothing is chosen.
#pragma once

#include "topk/cuda/sort.cuh"

namespace tokred::cuda::selecting {

struct WarpSelectShared {
  uint64_t chosen[kTopkWarps][kTopkWarpChosen];
};

// Lane l has the entries l, 32 + l, ..
template <class T, int kItems>
struct WarpList {
  const List<T>& list;
  uint32_t rising[kItems];  // the greater the earlier; 0 where the entry cannot be chosen
  uint64_t forced = 0;      // bit i: entry i of this lane

  __device__ explicit WarpList(const List<T>& list) : list(list) {
    const T* own = list.scores + list.begin + lane_id();
    const int left = list.end - list.begin - lane_id();
    float score[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      score[i] = i * kWarp < left ? to_float(own[i * kWarp]) : -INFINITY;
    }
    if (list.must_keep || list.begin < list.sinks_end || list.end > list.locals_begin) {
      for (int i = 0; i < kItems; ++i) {
        const bool is_there = i * kWarp < left;
        if (is_there && list.forced(position(i))) forced |= uint64_t{1} << i;
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool ranked = (forced >> i & 1) || score[i] > list.floor;
      rising[i] = ranked ? ~falling(score[i]) : 0;
    }
  }
  __device__ __forceinline__ int64_t position(int i) const {
    return list.begin + i * kWarp + lane_id();
  }

  template <class F>
  __device__ __forceinline__ int count(F f) const {
    unsigned n = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) n += f(i);
    return static_cast<int>(__reduce_add_sync(kAllLanes, n));
  }

  // Forced entries rank first: where there are enough of them the others are out of the question,
  // else all of them are chosen, whatever their scores.
  __device__ void rank_forced(int wanted) {
    if (!__any_sync(kAllLanes, forced != 0)) return;
    const bool enough = count([&](int i) { return forced >> i & 1; }) >= wanted;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool is_forced = forced >> i & 1;
      if (enough && !is_forced) rising[i] = 0;
      if (!enough && is_forced) rising[i] = ~0u;
    }
  }

  // The greatest value that at least `wanted` entries reach, or one that exactly as many reach.
  __device__ uint32_t threshold(int wanted) const {
    uint32_t greatest = 0, least = ~0u;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      greatest = max(greatest, rising[i]);
      least = min(least, rising[i] - 1);
    }
    greatest = __reduce_max_sync(kAllLanes, greatest);
    least = __reduce_min_sync(kAllLanes, least) + 1;
    if (greatest == least) return greatest;
    const int bits = 32 - __clz(greatest ^ least);
    uint32_t value = bits == 32 ? 0 : greatest >> bits << bits;
    for (int bit = bits - 1; bit >= 0; --bit) {
      const uint32_t next = value | 1u << bit;
      const int n = count([&](int i) { return rising[i] >= next; });
      if (n >= wanted) value = next;
      if (n == wanted) break;
    }
    return value;
  }

  // Lists the keys of the chosen entries by position; returns how many there are.
  __device__ __forceinline__ int choose(uint64_t* keys) {
    rank_forced(list.wanted);
    const int there = count([&](int i) { return rising[i] > 0; });
    const int wanted = min(list.wanted, there);
    if (wanted == 0) return 0;
    const uint32_t least = wanted == there ? 1 : threshold(wanted);
    int ties = wanted - count([&](int i) { return rising[i] > least; });
    int place = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const unsigned tied = __ballot_sync(kAllLanes, rising[i] == least);
      const bool chosen = rising[i] > least || (rising[i] == least && lanes_before(tied) < ties);
      ties -= __popc(tied);
      const unsigned all = __ballot_sync(kAllLanes, chosen);
      if (chosen) keys[place + lanes_before(all)] = candidate_key(~rising[i], position(i));
      place += __popc(all);
    }
    __syncwarp();
    if (__any_sync(kAllLanes, forced != 0)) restore(keys, place);
    return place;
  }

  // Keys as they are, after a ranking of forced entries.
  __device__ void restore(uint64_t* keys, int count) const {
    for (int e = lane_id(); e < count; e += kWarp) keys[e] = list.key(position_of(keys[e]));
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
__global__ void __launch_bounds__(kTopkWarps * kWarp, kItems <= 10 ? 4 : 2)
    warp_kernel(const __grid_constant__ TopkParams p) {
  uint64_t* chosen = shared_memory<WarpSelectShared>().chosen[warp_id()];
  const int64_t lists = p.rows * p.segments;
  for (int64_t l = int64_t{blockIdx.x} * kTopkWarps + warp_id(); l < lists;
       l += int64_t{gridDim.x} * kTopkWarps) {
    const List<T> list(p, l);
    WarpList<T, kItems> entries(list);
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
