// Launches that merge, its backward and unmerge share: alignment of rows, lists of members.
#pragma once

#include "common/cuda/chunk.cuh"
#include "common/cuda/launch.h"
#include "merge/cuda/members.cuh"

namespace tokred::cuda::merging {

static_assert(sizeof(MergeShared) == plan_merge(1, 1).shared_bytes);
static_assert(sizeof(MemberCounts<kListThreads, kListSlots>) ==
              plan_list_members(1, 1).shared_bytes);

// Whether every row can be read and written 16 bytes at a time.
template <class T>
bool rows_are_aligned(const void* p, int64_t stride_batch, int64_t stride_token, int64_t channels) {
  return is_aligned(p, stride_batch | stride_token | channels, sizeof(T));
}

// Fills p.indptr and p.members, unless the blocks of the merge will list their members themselves.
inline void launch_list_members(const MergeParams& p, Stream stream) {
  if (lists_members_in_block(p.tokens)) return;
  launch(list_members_kernel<kListThreads, kListSlots>, plan_list_members(p.batch, p.num_out),
         stream, p);
}

}  // namespace tokred::cuda::merging
