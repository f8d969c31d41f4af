// The kernels of topk that give a list to a block, to several blocks, or to a sort.
#pragma once

#include "topk/cuda/search.cuh"
#include "topk/cuda/select.cuh"

namespace tokred::cuda::selecting {

// One block a list, in one launch.
template <class C, class T>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    block_kernel(const __grid_constant__ TopkParams p) {
  auto& s = shared_memory<SelectShared<C>>();
  const int64_t lists = p.rows * p.segments;
  for (int64_t l = blockIdx.x; l < lists; l += gridDim.x) {
    const List<T> list(p, l);
    int n = 0;
    if (list.wanted > 0) {
      const uint64_t guess = guess_key(list, s);
      n = collect(list, list.begin, list.end, guess, s);
      if (!suffices<C>(list, n, guess)) n = collect_exactly(list, guess, s);
    }
    finish(p, l, n, list.wanted, s);
  }
}

// Split lists ------------------------------------------------------------------------------------

// What the parts of a list hand on; sizes in topk_split_bytes.
struct Parts {
  uint64_t* key;    // [lists, parts, kSplitKeys]
  uint64_t* guess;  // [lists]
  int* count;       // [lists, parts]
  int64_t lists, parts, columns;

  __device__ uint64_t* keys(int64_t list, int64_t part) const {
    return key + (list * parts + part) * kSplitKeys;
  }
};

// Every block of a list draws the same sample, and collects from its part.
template <class T>
__global__ void __launch_bounds__(WideSelect::kThreads, 2)
    collect_parts_kernel(const __grid_constant__ TopkParams p,
                         const __grid_constant__ Parts parts) {
  auto& s = shared_memory<SelectShared<WideSelect>>();
  const int64_t l = blockIdx.x / parts.parts, part = blockIdx.x % parts.parts;
  const List<T> list(p, l);
  const uint64_t guess = list.wanted > 0 ? guess_key(list, s) : kLastKey;
  const int64_t last = list.end;
  const int64_t begin = min(list.begin + part * parts.columns, last);
  const int64_t end = list.wanted > 0 ? min(begin + parts.columns, last) : begin;
  const int n = collect(list, begin, end, guess, s);
  uint64_t* keys = parts.keys(l, part);
  for (int i = static_cast<int>(threadIdx.x); i < min(n, static_cast<int>(kSplitKeys));
       i += WideSelect::kThreads) {
    keys[i] = s.key[i];
  }
  if (threadIdx.x == 0) parts.count[blockIdx.x] = n;
  if (threadIdx.x == 0 && part == 0) parts.guess[l] = guess;
}

// Brings together what the parts collected; returns how many keys that are, more than there is room
// for where some are missing.
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
    finish_parts_kernel(const __grid_constant__ TopkParams p,
                        const __grid_constant__ Parts parts) {
  auto& s = shared_memory<SelectShared<WideSelect>>();
  const List<T> list(p, blockIdx.x);
  const uint64_t guess = parts.guess[blockIdx.x];
  int64_t n = gather_parts(parts, blockIdx.x, s);
  if (!suffices<WideSelect>(list, n, guess)) n = collect_exactly(list, guess, s);
  finish(p, blockIdx.x, static_cast<int>(n), list.wanted, s);
}

// Sorted lists -----------------------------------------------------------------------------------

// The keys of a list for sort_chunks_kernel.
template <class T>
struct TopkSource {
  TopkParams p;

  __device__ void fill(int64_t l, int64_t begin, int n, uint64_t* keys) const {
    const List<T> list(p, l);
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kSortThreads) {
      const int64_t j = list.begin + begin + i;
      keys[i] = j < list.end ? list.key(j) : kNoKey;
    }
  }
};

struct SortedShared {
  BlockScratch<uint64_t> partial_keys;
  BlockScratch<int> partial;
};

// Writes a list's row of the outputs from its sorted keys, `columns` to a list.
template <class T>
__global__ void __launch_bounds__(kSortedThreads)
    write_sorted_kernel(const __grid_constant__ TopkParams p, const uint64_t* sorted,
                        int64_t columns) {
  auto& s = shared_memory<SortedShared>();
  for (int64_t l = blockIdx.x; l < p.rows * p.segments; l += gridDim.x) {
    const List<T> list(p, l);
    const uint64_t* keys = sorted + l * columns;
    int64_t count = first_where(list.wanted, [&](int64_t i) { return keys[i] == kNoKey; });
    if (p.has_top_p && count > 0) {
      count = count_to_top_p<kSortedThreads>(p, keys, count, s.partial_keys, s.partial);
    }
    for (int64_t e = threadIdx.x; e < p.k; e += kSortedThreads) {
      if (p.order == RowOrder::position && e < count) continue;
      write_slot(p, l * p.k + e, e < count, e < count ? keys[e] : kNoKey);
    }
    if (p.order == RowOrder::position && count > 0) {
      enumerate<kSortedThreads>(
          list.begin, list.end, s.partial,
          [&](int64_t j) { return list.key(j) <= keys[count - 1]; },
          [&](int64_t place, int64_t j) { write_slot(p, l * p.k + place, true, list.key(j)); });
    }
    if (threadIdx.x == 0) p.counts[l] = static_cast<int32_t>(count);
    __syncthreads();
  }
}

}  // namespace tokred::cuda::selecting
