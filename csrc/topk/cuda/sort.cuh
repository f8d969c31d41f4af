// Merge sort of keys: a bitonic network in registers sorts chunks, then runs are merged in global
// memory.
#pragma once

#include "common/cuda/block.cuh"
#include "topk/cuda/key.cuh"
#include "topk/cuda/plan.h"

namespace tokred::cuda::selecting {

template <class Key>
__device__ __forceinline__ void order(Key& a, Key& b, bool ascending) {
  const Key x = a, y = b;
  const bool swap = (y < x) == ascending;
  a = swap ? y : x;
  b = swap ? x : y;
}

// Sorts kThreads * kItems keys by a bitonic network; at the end thread t has keys t * kItems on.
// Threads of several warps exchange keys through `exchange`, twice the keys; steps alternate
// between its halves, so that one barrier a step is enough.
template <int kThreads, int kItems>
__device__ __forceinline__ void sort_keys(uint64_t (&key)[kItems], int thread,
                                          [[maybe_unused]] uint64_t* exchange) {
  constexpr int kLength = kThreads * kItems;
  [[maybe_unused]] int half = 0;
#pragma unroll 1
  for (int run = 2; run <= kLength; run *= 2) {
#pragma unroll 1
    for (int stride = run / 2; stride >= kItems; stride /= 2) {
      const int number = thread * kItems, apart = stride / kItems;
      const bool keep_min = ((number & stride) == 0) == ((number & run) == 0);
      const auto keep = [&](int i, uint64_t other) {
        if ((other < key[i]) == keep_min) key[i] = other;
      };
      if (kThreads == kWarp || apart < kWarp) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) keep(i, __shfl_xor_sync(kAllLanes, key[i], apart));
      } else {
        uint64_t* buffer = exchange + half * kLength;
        half ^= 1;
#pragma unroll
        for (int i = 0; i < kItems; ++i) buffer[i * kThreads + thread] = key[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kItems; ++i) keep(i, buffer[i * kThreads + (thread ^ apart)]);
      }
    }
#pragma unroll
    for (int stride = kItems / 2; stride > 0; stride /= 2) {
      if (stride >= run) continue;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if ((i & stride) == 0) order(key[i], key[i | stride], ((thread * kItems + i) & run) == 0);
      }
    }
  }
}

// Sorts the first n of up to kThreads * kItems keys in shared memory; the rest become
// kNoKey. After a barrier; `exchange` may begin where the keys do.
template <int kThreads, int kItems>
__device__ void sort_shared(uint64_t* keys, int n, uint64_t* exchange) {
  if constexpr (kItems > 1) {
    if (n <= kThreads * kItems / 2) return sort_shared<kThreads, kItems / 2>(keys, n, exchange);
  }
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t key[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int number = i * kThreads + thread;
    key[i] = number < n ? keys[number] : kNoKey;
  }
  __syncthreads();
  sort_keys<kThreads>(key, thread, exchange);
  __syncthreads();  // the last exchange, which may lie there, has been read
#pragma unroll
  for (int i = 0; i < kItems; ++i) keys[thread * kItems + i] = key[i];
  __syncthreads();
}

// Sorts the chunks of every segment; source.fill(segment, begin, n, keys) writes n of its keys.
struct SortShared {
  uint64_t exchange[2 * kSortChunkKeys];
};

template <class Source>
__global__ void __launch_bounds__(kSortThreads, 2)
    sort_chunks_kernel(const __grid_constant__ Source source, int64_t segments, int64_t columns,
                       uint64_t* sorted) {
  auto& s = shared_memory<SortShared>();
  const int64_t chunks = (columns + kSortChunkKeys - 1) / kSortChunkKeys;
  for (int64_t block = blockIdx.x; block < segments * chunks; block += gridDim.x) {
    const int64_t segment = block / chunks, begin = block % chunks * kSortChunkKeys;
    const int n = static_cast<int>(min(columns - begin, kSortChunkKeys));
    source.fill(segment, begin, n, s.exchange);
    __syncthreads();
    sort_shared<kSortThreads, kSortItems>(s.exchange, n, s.exchange);
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kSortThreads) {
      sorted[segment * columns + begin + i] = s.exchange[i];
    }
    __syncthreads();
  }
}

// Merge path: of two sorted runs, how many of the first are among the first `count` of both.
__device__ __forceinline__ int64_t merge_split(const uint64_t* a, int64_t size_a, const uint64_t* b,
                                               int64_t size_b, int64_t count) {
  int64_t low = max(int64_t{0}, count - size_b), high = min(count, size_a);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a[middle] <= b[count - 1 - middle]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Merges pairs of runs of `run` keys, of which only the first `wanted` are kept.
static __global__ void __launch_bounds__(kMergeSortThreads)
    merge_runs_kernel(const uint64_t* from, uint64_t* to, int64_t segments, int64_t columns,
                      int64_t run, int64_t wanted) {
  const int64_t pairs = (columns + 2 * run - 1) / (2 * run);
  const int64_t tiles = merge_sort_tiles(run, wanted);
  for (int64_t block = blockIdx.x; block < segments * pairs * tiles; block += gridDim.x) {
    const int64_t tile = block % tiles, begin = block / tiles % pairs * 2 * run;
    const int64_t offset = block / tiles / pairs * columns + begin;
    const int64_t left = columns - begin;
    const uint64_t *a = from + offset, *b = a + run;
    const int64_t size_a = min(min(left, run), wanted);
    const int64_t size_b = max(int64_t{0}, min(min(left - run, run), wanted));
    const int64_t end = min(size_a + size_b, wanted);
    int64_t number = tile * kMergeSortKeys + int64_t{threadIdx.x} * kMergeSortItems;
    if (number >= end) continue;
    int64_t i = merge_split(a, size_a, b, size_b, number), j = number - i;
    const int64_t last = min(number + kMergeSortItems, end);
    for (; number < last; ++number) {
      const bool from_a = j >= size_b || (i < size_a && a[i] <= b[j]);
      to[offset + number] = from_a ? a[i++] : b[j++];
    }
  }
}

}  // namespace tokred::cuda::selecting
