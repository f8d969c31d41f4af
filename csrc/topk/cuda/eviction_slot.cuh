// eviction_slot: a block sums and ranks the keys of a head, each thread those of its own stride;
// the minimum rank, with the lowest slot, is the maximum of 64-bit keys.
#pragma once

#include "attention/cuda/softcap.cuh"
#include "common/cuda/block.cuh"
#include "common/cuda/sort_key.cuh"
#include "topk/cuda/plan.h"
#include "topk/params.h"

namespace tokred::cuda::selecting {

// The query heads [first, end) whose weights a key of this head receives; `group` to a key head.
struct Receiving {
  int64_t batch, first, end, group;
};

__device__ __forceinline__ const float* bias_of(const EvictionSlotParams& p, int64_t batch,
                                                int64_t head) {
  return p.bias ? p.bias + batch * p.bias_stride_batch + head * p.bias_stride_head : nullptr;
}

// Whether the query's own token is hidden.
__device__ __forceinline__ bool is_own_hidden(const EvictionSlotParams& p, int64_t batch,
                                              int64_t head) {
  if (!p.bias) return false;
  int64_t own = p.slots - 1;
  if (p.newest) own = p.newest[batch * p.newest_stride_batch + head * p.newest_stride_head];
  return own >= 0 && own < p.slots && !(bias_of(p, batch, head)[own] > -kInfinity);
}

// The mean weight of key n.
__device__ __forceinline__ float received(const EvictionSlotParams& p, const Receiving& from,
                                          int64_t n) {
  float total = 0;
  for (int64_t q = from.first; q < from.end; ++q) {
    const float lse = p.lse[from.batch * p.lse_stride_batch + q * p.lse_stride_head];
    const int64_t head = q / from.group;
    if (lse == -kInfinity || is_own_hidden(p, from.batch, head)) continue;
    float x = p.logits[from.batch * p.logits_stride_batch + q * p.logits_stride_head + n];
    if (p.softcap > 0) x = attention::compact_tanh(x / p.softcap) * p.softcap;
    x -= lse;
    if (const float* bias = bias_of(p, from.batch, head)) {
      if (!(bias[n] > -kInfinity)) continue;
      x += bias[n];
    }
    total += expf(x > 88.0f ? 88.0f : x);
  }
  return total / static_cast<float>(from.end - from.first);
}

// Ranks as unsigned numbers of the opposite order: the largest goes.
__device__ __forceinline__ uint32_t reversed(float x, bool largest) {
  return x != x ? descending_key(-kInfinity) : descending_key((largest ? -x : x) + 0.0f);
}
__device__ __forceinline__ uint32_t reversed(int32_t x, bool largest) {
  // The ends of the range are for keys that stay and keys that go.
  x = min(max(x, -0x7fffffff), 0x7ffffffe);
  return ~(static_cast<uint32_t>(largest ? ~x : x) ^ 0x80000000u);
}

// Block (batch, head), in a grid of rows.
static __global__ void __launch_bounds__(kEvictionThreads)
    eviction_slot_kernel(const __grid_constant__ EvictionSlotParams p) {
  auto& scratch = shared_memory<BlockScratch<unsigned long long>>();
  for (int64_t row = blockIdx.x; row < p.batch * p.heads; row += gridDim.x) {
    const int64_t batch = row / p.heads, head = row % p.heads;
    Receiving from{batch, 0, 0, 1};
    if (p.logits) {
      from.group = p.heads_q / p.heads;
      from.first = p.shared ? 0 : head * from.group;
      from.end = p.shared ? p.heads_q : from.first + from.group;
    }
    const int32_t* position =
        p.position + batch * p.position_stride_batch + head * p.position_stride_head;
    const float* scores =
        p.scores ? p.scores + batch * p.scores_stride_batch + head * p.scores_stride_head : nullptr;
    const float* bias = bias_of(p, batch, head);
    const int32_t start = p.start ? p.start[batch * p.start_stride] : 0;
    const int64_t end = int64_t{start} + p.first;
    unsigned long long best = 0;
    for (int64_t n = threadIdx.x; n < p.slots; n += kEvictionThreads) {
      uint32_t rank;
      const int32_t key_position = position[n];
      if (p.logits || scores) {
        float x = scores ? scores[n] : 0.0f;
        if (p.logits) {
          const float own = received(p, from, n);
          x = scores ? x + own : own;
          p.total[row * p.slots + n] = x;
        }
        rank = reversed(x, p.largest);
      } else {
        rank = reversed(key_position, p.largest);
      }
      if (key_position > p.recent_after || (key_position >= start && key_position < end)) rank = 0;
      if (bias && !(bias[n] > -kInfinity)) rank = 0xffffffffu;
      const unsigned long long key =
          static_cast<unsigned long long>(rank) << 32 | (0xffffffffu - static_cast<uint32_t>(n));
      best = key > best ? key : best;
    }
    best = warp_max(best);
    if (lane_id() == 0) scratch.partial[warp_id()] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kEvictionThreads / kWarp; ++warp) {
        best = scratch.partial[warp] > best ? scratch.partial[warp] : best;
      }
      const uint32_t slot = 0xffffffffu - static_cast<uint32_t>(best);
      p.slot[row] = p.slots > 0 ? static_cast<int32_t>(slot) : -1;
      if (p.total && p.slots > 0) p.total[row * p.slots + slot] = 0.0f;
    }
    __syncthreads();
  }
}

}  // namespace tokred::cuda::selecting
