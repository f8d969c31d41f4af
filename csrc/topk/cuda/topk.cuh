// topk kernels that give a segment to a block, to several blocks, or to a merge sort.
#pragma once

#include "topk/cuda/search.cuh"
#include "topk/cuda/select.cuh"

namespace tokred::cuda::selecting {

// One block a segment, in one launch.
template <class C, class T>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    block_kernel(const __grid_constant__ TopkParams p) {
  auto& s = shared_memory<SelectShared<C>>();
  const int64_t segments = p.rows * p.segments;
  for (int64_t l = blockIdx.x; l < segments; l += gridDim.x) {
    const Segment<T> segment(p, l);
    int n = 0;
    if (segment.wanted > 0) {
      const uint64_t guess = guess_key(segment, s);
      n = collect(segment, segment.begin, segment.end, guess, s);
      if (!suffices<C>(segment, n, guess)) n = collect_exactly(segment, guess, s);
    }
    finish(p, l, n, segment.wanted, s);
  }
}

// Split segments ---------------------------------------------------------------------------------

// The keys that the parts of a segment hand on; sizes in topk_split_bytes.
struct Parts {
  uint64_t* key;    // [segments, parts, kSplitKeys]
  uint64_t* guess;  // [segments]
  int* count;       // [segments, parts]
  int64_t segments, parts, columns;

  __device__ uint64_t* keys(int64_t segment, int64_t part) const {
    return key + (segment * parts + part) * kSplitKeys;
  }
};

// Every block of a segment draws the same sample, and collects from its part.
template <class T>
__global__ void __launch_bounds__(WideSelect::kThreads, 2)
    collect_parts_kernel(const __grid_constant__ TopkParams p,
                         const __grid_constant__ Parts parts) {
  auto& s = shared_memory<SelectShared<WideSelect>>();
  const int64_t l = blockIdx.x / parts.parts, part = blockIdx.x % parts.parts;
  const Segment<T> segment(p, l);
  const uint64_t guess = segment.wanted > 0 ? guess_key(segment, s) : kLastKey;
  const int64_t last = segment.end;
  const int64_t begin = min(segment.begin + part * parts.columns, last);
  const int64_t end = segment.wanted > 0 ? min(begin + parts.columns, last) : begin;
  const int n = collect(segment, begin, end, guess, s);
  uint64_t* keys = parts.keys(l, part);
  for (int i = static_cast<int>(threadIdx.x); i < min(n, static_cast<int>(kSplitKeys));
       i += WideSelect::kThreads) {
    keys[i] = s.key[i];
  }
  if (threadIdx.x == 0) parts.count[blockIdx.x] = n;
  if (threadIdx.x == 0 && part == 0) parts.guess[l] = guess;
}

// Gathers the keys of all parts; returns their number, or one more than fit where some are missing.
__device__ inline int64_t gather_parts(const Parts& parts, int64_t l, SelectShared<WideSelect>& s) {
  const int part = static_cast<int>(threadIdx.x);
  const int count = part < parts.parts ? parts.count[l * parts.parts + part] : 0;
  int total;
  const int before = block_exclusive_sum<WideSelect::kThreads>(count, s.narrow.partial, total);
  s.narrow.histogram[part] = before;
  s.narrow.histogram[WideSelect::kThreads + part] = count;
  const bool complete = !__syncthreads_or(count > kSplitKeys) && total <= WideSelect::kKeys;
  if (!complete) return int64_t{WideSelect::kKeys} + 1;
  for (int from = warp_id(); from < parts.parts; from += WideSelect::kThreads / kWarp) {
    const uint64_t* keys = parts.keys(l, from);
    const int first = s.narrow.histogram[from], n = s.narrow.histogram[WideSelect::kThreads + from];
    for (int i = lane_id(); i < n; i += kWarp) s.key[first + i] = keys[i];
  }
  __syncthreads();
  return total;
}

template <class T>
__global__ void __launch_bounds__(WideSelect::kThreads, 2)
    finish_parts_kernel(const __grid_constant__ TopkParams p, const __grid_constant__ Parts parts) {
  auto& s = shared_memory<SelectShared<WideSelect>>();
  const Segment<T> segment(p, blockIdx.x);
  const uint64_t guess = parts.guess[blockIdx.x];
  int64_t n = gather_parts(parts, blockIdx.x, s);
  if (!suffices<WideSelect>(segment, n, guess)) n = collect_exactly(segment, guess, s);
  finish(p, blockIdx.x, static_cast<int>(n), segment.wanted, s);
}

// Sorted segments --------------------------------------------------------------------------------

// The keys of a segment for sort_chunks_kernel.
template <class T>
struct TopkSource {
  TopkParams p;

  __device__ void fill(int64_t l, int64_t begin, int n, uint64_t* keys) const {
    const Segment<T> segment(p, l);
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kSortThreads) {
      const int64_t j = segment.begin + begin + i;
      keys[i] = j < segment.end ? segment.key(j) : kNoKey;
    }
  }
};

struct SortedShared {
  BlockScratch<uint64_t> partial_keys;
  BlockScratch<int> partial;
};

// Writes a segment's row of the outputs from its sorted keys, `columns` to a segment.
template <class T>
__global__ void __launch_bounds__(kSortedThreads)
    write_sorted_kernel(const __grid_constant__ TopkParams p, const uint64_t* sorted,
                        int64_t columns) {
  auto& s = shared_memory<SortedShared>();
  for (int64_t l = blockIdx.x; l < p.rows * p.segments; l += gridDim.x) {
    const Segment<T> segment(p, l);
    const uint64_t* keys = sorted + l * columns;
    int64_t count = first_where(segment.wanted, [&](int64_t i) { return keys[i] == kNoKey; });
    if (p.has_top_p && count > 0) {
      count = count_to_top_p<kSortedThreads>(p, keys, count, s.partial_keys, s.partial);
    }
    for (int64_t e = threadIdx.x; e < p.k; e += kSortedThreads) {
      if (p.order == RowOrder::position && e < count) continue;
      write_slot(p, l * p.k + e, e < count, e < count ? keys[e] : kNoKey);
    }
    if (p.order == RowOrder::position && count > 0) {
      enumerate<kSortedThreads>(
          segment.begin, segment.end, s.partial,
          [&](int64_t j) { return segment.key(j) <= keys[count - 1]; },
          [&](int64_t rank, int64_t j) { write_slot(p, l * p.k + rank, true, segment.key(j)); });
    }
    if (threadIdx.x == 0) p.counts[l] = static_cast<int32_t>(count);
    __syncthreads();
  }
}

}  // namespace tokred::cuda::selecting
