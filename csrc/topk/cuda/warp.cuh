// topk of short segments by a warp each, in registers: radix select by digits of eight bits, then a
// bitonic sort of 32-bit keys: the scores less the best one chosen, and the place in the list of
// the chosen. Where they do not fit, keys have 64 bits.
#pragma once

#include <type_traits>

#include "topk/cuda/sort.cuh"

namespace tokred::cuda::selecting {

struct ChosenEntry {
  uint32_t rank_key;
  int position;
};
// The bins of a histogram, eight a lane, which alone reads and clears them, and one of what lies
// outside.
inline constexpr int kWarpBins = 8 * kWarp;

struct WarpSelectShared {
  ChosenEntry chosen[kTopkWarps][kTopkWarpChosen];
  int histogram[kTopkWarps][kTopkWarpBins];
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
    for (int i = 0; i < kItems; ++i) rank_key[i] = score[i] > segment.floor ? rank_of(score[i]) : 0;
  }
  // ~score_key() of what is not NaN.
  __device__ static __forceinline__ uint32_t rank_of(float score) {
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits ^ (static_cast<uint32_t>(static_cast<int>(bits) >> 31) | 0x80000000u);
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
    const bool enough = count([&](int i) { return forced >> i & 1; }) >= wanted;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool is_forced = forced >> i & 1;
      if (enough) rank_key[i] = is_forced ? ~score_key(to_float(segment.scores[position(i)])) : 0;
      if (!enough && is_forced) rank_key[i] = ~0u;
    }
  }

  // Entries above `above` are chosen, and the first `ties` of those that equal it.
  struct Limit {
    uint32_t above;
    int ties;
  };

  // The limit that chooses `wanted` of more candidates; by histograms of what lies within a range
  // that shrinks to one of its bins each time.
  __device__ Limit limit(int wanted, int* histogram) const {
    uint32_t high = 0, low = ~0u;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      high = max(high, rank_key[i]);
      low = min(low, rank_key[i] - 1);
    }
    high = __reduce_max_sync(kAllLanes, high);
    low = __reduce_min_sync(kAllLanes, low) + 1;
    int before = 0;  // entries above the range
    while (low < high) {
      const uint32_t range = high - low;
      const int shift = max(0, 24 - __clz(static_cast<int>(range)));
      int* own = histogram + 8 * lane_id();
      store_chunk(own, {});
      store_chunk(own + 4, {});
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const uint32_t below = high - rank_key[i];
        atomicAdd(&histogram[below <= range ? below >> shift : kWarpBins], 1);
      }
      __syncwarp();
      const Chunk bins[2] = {load_chunk(own), load_chunk(own + 4)};
      const auto count = [&](int i) { return static_cast<int>(bins[i / 4].word[i % 4]); };
      int sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += count(i);
      int upto = before + warp_inclusive_sum(sum);
      const bool is_here = upto - sum < wanted && wanted <= upto;
      upto -= sum;
      int bin = 8 * lane_id() - 1;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (upto >= wanted) continue;
        before = upto;
        upto += count(i);
        ++bin;
      }
      const int lane = __ffs(static_cast<int>(__ballot_sync(kAllLanes, is_here))) - 1;
      bin = __shfl_sync(kAllLanes, bin, lane);
      before = __shfl_sync(kAllLanes, before, lane);
      upto = __shfl_sync(kAllLanes, upto, lane);
      high -= static_cast<uint32_t>(bin) << shift;
      low = high - min(high - low, (1u << shift) - 1);
      if (upto == wanted) return {low - 1, 0};
    }
    return {high, wanted - before};
  }

  // Lists the chosen entries by position; returns their number.
  __device__ __forceinline__ int choose(ChosenEntry* chosen, int* histogram) {
    const int there = count([&](int i) { return rank_key[i] > 0; });
    const int wanted = min(segment.wanted, there);
    if (wanted == 0) return 0;
    Limit last{0, 0};
    if (wanted < there) last = limit(wanted, histogram);
    int chosen_before = 0;
    const auto list = [&](int i, bool is_chosen) {
      const unsigned all = __ballot_sync(kAllLanes, is_chosen);
      if (is_chosen) {
        chosen[chosen_before + lanes_before(all)] = {rank_key[i], static_cast<int>(position(i))};
      }
      chosen_before += __popc(all);
    };
    if (last.ties == 0) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) list(i, rank_key[i] > last.above);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const unsigned tied = __ballot_sync(kAllLanes, rank_key[i] == last.above);
        const bool takes_part = rank_key[i] == last.above && lanes_before(tied) < last.ties;
        last.ties -= __popc(tied);
        list(i, rank_key[i] > last.above || takes_part);
      }
    }
    __syncwarp();
    return chosen_before;
  }
};

// Sorts 32 kItems keys of a warp; at the end lane l has keys l * kItems on.
template <int kItems>
__device__ __forceinline__ void sort_narrow(uint32_t (&key)[kItems]) {
#pragma unroll
  for (int run = 2; run <= kWarp * kItems; run *= 2) {
    const bool ascending = (lane_id() * kItems & run) == 0;
#pragma unroll
    for (int stride = run / 2; stride >= kItems; stride /= 2) {
      const bool keep_min = ((lane_id() * kItems & stride) == 0) == ascending;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, key[i], stride / kItems);
        if ((other < key[i]) == keep_min) key[i] = other;
      }
    }
#pragma unroll
    for (int stride = min(run, kItems) / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (i & stride) continue;
        const bool upwards = run < kItems ? (i & run) == 0 : ascending;
        order(key[i], key[i | stride], upwards);
      }
    }
  }
}

// Writes row l of the outputs: `count` of up to kWarp * kItems entries that were listed by
// position, ranked by their scores unless some are forced.
template <class T, int kItems>
__device__ void write_chosen(const TopkParams& p, int64_t l, const ChosenEntry* chosen, int count,
                             bool some_forced) {
  if constexpr (kItems > 1) {
    if (count <= kWarp * kItems / 2) {
      return write_chosen<T, kItems / 2>(p, l, chosen, count, some_forced);
    }
  }
  constexpr uint32_t kNumbers = kWarp * kItems;
  // The last bits of 16-bit scores, in fp32, are all equal.
  constexpr int kEqual = std::is_same_v<T, bf16> ? 16 : std::is_same_v<T, f16> ? 13 : 0;
  uint32_t rank[kItems], best = 0, worst = ~0u;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int number = i * kWarp + lane_id();
    rank[i] = number < count ? chosen[number].rank_key >> kEqual : 0;
    best = max(best, rank[i]);
    worst = min(worst, rank[i] - 1);  // not of those that are none
  }
  best = __reduce_max_sync(kAllLanes, best);
  worst = __reduce_min_sync(kAllLanes, worst) + 1;
  const bool by_score = p.order == RowOrder::score;
  if (by_score && !some_forced && best - worst < ~0u / kNumbers) {
    uint32_t key[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int number = i * kWarp + lane_id();
      key[i] = number < count ? (best - rank[i]) * kNumbers + static_cast<uint32_t>(number) : ~0u;
    }
    sort_narrow(key);
    const int own = lane_id() * kItems;
    float* values = p.values + l * p.k + own;
    int32_t* indices = p.indices + l * p.k + own;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (own + i >= p.k) continue;
      const ChosenEntry entry = chosen[key[i] % kNumbers];
      const bool is_there = own + i < count;
      values[i] = is_there ? from_descending_key(~entry.rank_key) : -kInfinity;
      indices[i] = is_there ? entry.position : -1;
    }
  } else {
    const Segment<T> segment(p, l);  // once more, not held in registers for this
    uint64_t key[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int number = i * kWarp + lane_id();
      key[i] = number < count ? segment.key(chosen[number].position) : kNoKey;
    }
    if (by_score) sort_keys<kWarp>(key, lane_id(), nullptr);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int slot = by_score ? lane_id() * kItems + i : i * kWarp + lane_id();
      if (slot < p.k) write_slot(p, l * p.k + slot, slot < count, key[i]);
    }
  }
#pragma unroll 1
  for (int64_t slot = kNumbers + lane_id(); slot < p.k; slot += kWarp) {
    write_slot(p, l * p.k + slot, false, kNoKey);
  }
}

template <class T, int kItems>
__global__ void __launch_bounds__(kTopkWarps* kWarp, kItems <= 10 ? 4 : 2)
    warp_kernel(const __grid_constant__ TopkParams p) {
  auto& s = shared_memory<WarpSelectShared>();
  ChosenEntry* chosen = s.chosen[warp_id()];
  const int64_t segments = p.rows * p.segments;
  for (int64_t l = int64_t{blockIdx.x} * kTopkWarps + warp_id(); l < segments;
       l += int64_t{gridDim.x} * kTopkWarps) {
    const Segment<T> segment(p, l);
    WarpSegment<T, kItems> entries(segment);
    const bool some_forced = __any_sync(kAllLanes, entries.forced != 0);
    if (some_forced) entries.rank_forced(segment.wanted);
    const int count = entries.choose(chosen, s.histogram[warp_id()]);
    write_chosen<T, kTopkWarpChosen / kWarp>(p, l, chosen, count, some_forced);
    if (lane_id() == 0) p.counts[l] = count;
    __syncwarp();
  }
}

}  // namespace tokred::cuda::selecting
