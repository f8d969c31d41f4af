// forest_roots: pointer jumping. A block for each item; after round k every token points 2^k
// ancestors up, or to its root, so that ceil(log2 N) rounds are enough, and the depth's logarithm
// where all have arrived earlier.
#pragma once

#include "common/cuda/block.cuh"
#include "merge/cuda/plan.h"
#include "merge/params.h"

namespace tokred::cuda::merging {

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    forest_roots_kernel(const __grid_constant__ ForestRootsParams p) {
  const int64_t item = blockIdx.x;
  const int tokens = static_cast<int>(p.tokens), thread = static_cast<int>(threadIdx.x);
  int32_t* root = p.root + item * p.tokens;
  int32_t* children = p.children + item * p.tokens;
  const auto parent_of = [&](int i) {
    const int parent = p.parent[item * p.parent_stride_batch + int64_t{i} * p.parent_stride_token];
    return parent < tokens ? parent : -1;
  };
  int32_t* from = p.scratch + item * p.tokens;
  int32_t* to = root;
  for (int i = thread; i < tokens; i += kThreads) {
    const int parent = parent_of(i);
    from[i] = parent < 0 ? i : parent;
    children[i] = 0;
  }
  __syncthreads();
  for (int i = thread; i < tokens; i += kThreads) {
    if (const int parent = parent_of(i); parent >= 0) atomicAdd(&children[parent], 1);
  }
  int64_t reach = 1;
  bool moved = true;
  while (moved && reach < p.tokens) {
    bool changed = false;
    for (int i = thread; i < tokens; i += kThreads) {
      const int here = from[i], next = from[here];
      to[i] = next;
      changed |= next != here;
    }
    moved = __syncthreads_or(changed);
    reach *= 2;
    int32_t* swap = from;
    from = to;
    to = swap;
  }
  // A token that does not point to a root by now has met a cycle. Reads of `from` are of other
  // tokens' entries only in the loop above.
  for (int i = thread; i < tokens; i += kThreads) {
    const int found = from[i];
    root[i] = parent_of(found) < 0 ? found : -1;
  }
}

}  // namespace tokred::cuda::merging
