// Launches the merge sort of keys, for topk and for inverse_transform_sample.
#pragma once

#include "common/cuda/launch.h"
#include "topk/cuda/sort.cuh"

namespace tokred::cuda::selecting {

// Sorts source's keys, `columns` of each segment, as far as the first `wanted` of a segment;
// returns them in the workspace of sort_bytes, with its other half in `spare`.
template <class Source>
uint64_t* sort_segments(const Source& source, int64_t segments, int64_t columns, int64_t wanted,
                        void* workspace, uint64_t** spare, Stream stream) {
  static_assert(sizeof(SortShared) == plan_sort_chunks(1, 1).shared_bytes);
  auto* sorted = static_cast<uint64_t*>(workspace);
  *spare = sorted + segments * columns;
  launch(sort_chunks_kernel<Source>, plan_sort_chunks(segments, columns), stream, source, segments,
         columns, sorted);
  for (int64_t run = kSortChunkKeys; run < columns; run *= 2) {
    launch(merge_runs_kernel, plan_merge_runs(segments, columns, run, wanted), stream, sorted,
           *spare, segments, columns, run, wanted);
    uint64_t* merged = *spare;
    *spare = sorted;
    sorted = merged;
  }
  return sorted;
}

}  // namespace tokred::cuda::selecting
