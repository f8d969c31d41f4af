// gather_tokens: copies of the tokens that lists of positions name.
#pragma once

#include "common/cuda/chunk.cuh"
#include "topk/cuda/plan.h"
#include "topk/params.h"

namespace tokred::cuda::selecting {

struct GatherLaunch {
  bool wide[kMaxGatherItems];  // whether an item's rows are copied 16 bytes at a time
};

template <class Unit>
__device__ __forceinline__ void gather_row(const GatherItem& item, const char* source, char* out,
                                           int lane, int lanes) {
  const int64_t units = item.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const auto* from = reinterpret_cast<const Unit*>(source);
  auto* to = reinterpret_cast<Unit*>(out);
#pragma unroll 4
  for (int64_t u = lane; u < units; u += lanes) to[u] = source ? from[u] : Unit{};
}

// Item blockIdx.y; groups of lanes own rows.
static __global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(const __grid_constant__ GatherParams p,
                  const __grid_constant__ GatherLaunch launch) {
  const GatherItem& item = p.item[blockIdx.y];
  const bool wide = launch.wide[blockIdx.y];
  const int lanes = gather_lanes(wide ? item.row_bytes / 16 : item.row_bytes);
  const int lane = static_cast<int>(threadIdx.x) % lanes, groups = kGatherThreads / lanes;
  const int64_t rows = p.batch * item.heads * p.count;
  for (int64_t r = int64_t{blockIdx.x} * groups + threadIdx.x / lanes; r < rows;
       r += int64_t{gridDim.x} * groups) {
    const int64_t list = r / p.count, b = list / item.heads, h = list - b * item.heads;
    const int64_t token =
        p.indices[b * p.index_stride_batch + h * p.index_stride_head + (r - list * p.count)];
    const char* source = nullptr;
    if (token >= 0 && token < item.tokens) {
      source = static_cast<const char*>(item.source) + b * item.stride_batch +
               h * item.stride_head + token * item.stride_token;
    }
    char* out = static_cast<char*>(item.out) + r * item.row_bytes;
    if (wide) {
      gather_row<Chunk>(item, source, out, lane, lanes);
    } else {
      gather_row<char>(item, source, out, lane, lanes);
    }
  }
}

}  // namespace tokred::cuda::selecting
