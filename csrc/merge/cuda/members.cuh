// Members of the slots of a token map: a stable counting sort, with integer atomics only, whose
// result does not depend on their order.
#pragma once

#include "common/cuda/block.cuh"
#include "merge/cuda/plan.h"
#include "merge/params.h"

namespace tokred::cuda::merging {

template <int kThreads, int kSlots>
struct MemberCounts {
  int count[kThreads / kWarp][kSlots];  // by warp and slot; then where the warp's next member goes
  BlockScratch<int> scratch;
};

// The slot of a token relative to `first_slot`; -1 - num_out where it has none.
__device__ __forceinline__ int64_t relative_slot(const MergeParams& p, int64_t item, int64_t token,
                                                 int64_t first_slot) {
  const int64_t slot = p.token_map[item * p.map_stride_batch + token * p.map_stride_token];
  return slot >= 0 && slot < p.num_out ? slot - first_slot : -1 - p.num_out;
}

// Lists the members of kSlots slots of one item. Each warp has a run of tokens of its own; the
// members of slot first_slot + s are members[start(s)] up to start(s + 1), in ascending order.
// write_start(s, position) is called for s = 0 .. kSlots by one thread each. Positions count from
// the members of lower slots where `whole_item`, else from 0.
template <int kThreads, int kSlots, class WriteStart>
__device__ __forceinline__ void list_members(const MergeParams& p, int64_t item, int64_t first_slot,
                                             bool whole_item,
                                             MemberCounts<kThreads, kSlots>& shared,
                                             int32_t* members, WriteStart write_start) {
  constexpr int kWarps = kThreads / kWarp;
  const int thread = static_cast<int>(threadIdx.x), warp = warp_id();
  const int64_t run = (p.tokens + kThreads - 1) / kThreads * kWarp;
  const int64_t begin = warp * run, end = min(begin + run, p.tokens);

  for (int i = thread; i < kWarps * kSlots; i += kThreads) shared.count[i / kSlots][i % kSlots] = 0;
  __syncthreads();
  int below = 0;
  for (int64_t token = begin + lane_id(); token < end; token += kWarp) {
    const int64_t slot = relative_slot(p, item, token, first_slot);
    if (slot >= 0 && slot < kSlots) atomicAdd(&shared.count[warp][slot], 1);
    below += slot < 0 && slot >= -first_slot;
  }
  int base = 0;
  block_exclusive_sum<kThreads>(below, shared.scratch, base);
  if (!whole_item) base = 0;

  // Counts become positions, in order of slots and then of warps.
  constexpr int kEach = (kSlots + kThreads - 1) / kThreads;
  const int first = thread * kEach, last = min(first + kEach, kSlots);
  int count = 0, total = 0;
  for (int slot = first; slot < last; ++slot) {
    for (int w = 0; w < kWarps; ++w) count += shared.count[w][slot];
  }
  int position = base + block_exclusive_sum<kThreads>(count, shared.scratch, total);
  for (int slot = first; slot < last; ++slot) {
    write_start(slot, position);
    for (int w = 0; w < kWarps; ++w) {
      const int here = shared.count[w][slot];
      shared.count[w][slot] = position;
      position += here;
    }
  }
  if (thread == 0) write_start(kSlots, base + total);
  __syncthreads();

  for (int64_t token = begin + lane_id(); token - lane_id() < end; token += kWarp) {
    const int64_t slot = token < end ? relative_slot(p, item, token, first_slot) : int64_t{-1};
    const bool mine = slot >= 0 && slot < kSlots;
    if (!__any_sync(kAllLanes, mine)) continue;
    const unsigned peers = __match_any_sync(kAllLanes, mine ? static_cast<int>(slot) : -1);
    const int before = lanes_before(peers);
    if (mine) members[shared.count[warp][slot] + before] = static_cast<int32_t>(token);
    __syncwarp();
    if (mine && before == 0) shared.count[warp][slot] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();
}

// Fills p.indptr and p.members.
template <int kThreads, int kSlots>
__global__ void __launch_bounds__(kThreads)
    list_members_kernel(const __grid_constant__ MergeParams p) {
  const int64_t blocks = (p.num_out + kSlots - 1) / kSlots;
  const int64_t item = blockIdx.x / blocks, first_slot = blockIdx.x % blocks * kSlots;
  int32_t* indptr = p.indptr + item * (p.num_out + 1) + first_slot;
  list_members(p, item, first_slot, true, shared_memory<MemberCounts<kThreads, kSlots>>(),
               p.members + item * p.tokens, [&](int slot, int position) {
                 // The end of the last slot is written by the next block.
                 const bool mine = slot < kSlots || first_slot + slot == p.num_out;
                 if (mine && first_slot + slot <= p.num_out) indptr[slot] = position;
               });
}

struct MergeShared {
  MemberCounts<kMergeThreads, kMergeSlots> counts;
  int32_t start[kMergeSlots + 1];
  int32_t members[kFusedTokens];
};

// A block's share of a merge, and the members of its slots.
struct SlotBlock {
  int64_t item, first_slot;
  int slots;
  const int32_t* start;
  const int32_t* members;

  // Lists the members here where the token count allows it.
  __device__ SlotBlock(const MergeParams& p, MergeShared& shared) {
    const int64_t blocks = (p.num_out + kMergeSlots - 1) / kMergeSlots;
    item = blockIdx.x / blocks;
    first_slot = blockIdx.x % blocks * kMergeSlots;
    slots = static_cast<int>(min(p.num_out - first_slot, int64_t{kMergeSlots}));
    start = p.indptr + item * (p.num_out + 1) + first_slot;
    members = p.members + item * p.tokens;
    if (p.tokens > kFusedTokens) return;
    list_members(p, item, first_slot, false, shared.counts, shared.members,
                 [&](int slot, int position) { shared.start[slot] = position; });
    start = shared.start;
    members = shared.members;
  }
};

// One slot as the warp that owns it sees it.
struct Slot {
  const MergeParams& p;
  int64_t item, index;
  const int32_t* members;  // ascending positions
  int count;

  __device__ Slot(const MergeParams& p, const SlotBlock& block, int slot)
      : p(p), item(block.item), index(block.first_slot + slot),
        members(block.members + block.start[slot]),
        count(block.start[slot + 1] - block.start[slot]) {}

  template <class T>
  __device__ const T* x(int64_t token) const {
    return static_cast<const T*>(p.x) + item * p.x_stride_batch + token * p.x_stride_token;
  }
  __device__ float entry(const TokenTable& table, int64_t token) const {
    if (!table.data) return 1.0f;
    return static_cast<const float*>(
        table.data)[item * table.stride_batch + token * table.stride_token];
  }
  __device__ float size(int64_t token) const { return entry(p.size, token); }
  __device__ float weight(int64_t token) const { return entry(p.weight, token); }
  __device__ float coefficient(int64_t token, bool use_size) const {
    return use_size ? weight(token) * size(token) : weight(token);
  }
  __device__ float total(bool use_size) const {
    float sum = 0.0f;
    for (int m = 0; m < count; ++m) sum += coefficient(members[m], use_size);
    return sum;
  }
  __device__ float total_size() const {
    if (!p.size.data) return static_cast<float>(count);
    float sum = 0.0f;
    for (int m = 0; m < count; ++m) sum += size(members[m]);
    return sum;
  }
  // The member of maximum weight, the first of equals; NaN only where all are.
  __device__ int64_t heaviest() const {
    int64_t best = members[0];
    float champion = weight(best);
    for (int m = 1; m < count; ++m) {
      const float challenger = weight(members[m]);
      if (challenger > champion || (champion != champion && challenger == challenger)) {
        best = members[m];
        champion = challenger;
      }
    }
    return best;
  }
};

}  // namespace tokred::cuda::merging
