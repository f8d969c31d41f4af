// Sorting the keys of lists, for topk and for inverse_transform_sample.
#pragma once

#include "common/cuda/launch.h"
#include "topk/cuda/sort.cuh"

namespace tokred::cuda::selecting {

// Sorts source's keys, `columns` of each list, as far as the first `most` of a list; returns where
// they are in the workspace of sort_bytes, with the other half of it in `spare`.
template <class Source>
uint64_t* sort_lists(const Source& source, int64_t lists, int64_t columns, int64_t most,
                     void* workspace, uint64_t** spare, Stream stream) {
  static_assert(sizeof(SortShared) == plan_sort_chunks(1, 1).shared_bytes);
  auto* sorted = static_cast<uint64_t*>(workspace);
  *spare = sorted + lists * columns;
  launch(sort_chunks_kernel<Source>, plan_sort_chunks(lists, columns), stream, source, lists,
         columns, sorted);
  for (int64_t run = kSortChunkKeys; run < columns; run *= 2) {
    launch(merge_runs_kernel, plan_merge_runs(lists, columns, run, most), stream, sorted, *spare,
           lists, columns, run, most);
    uint64_t* merged = *spare;
    *spare = sorted;
    sorted = merged;
  }
  return sorted;
}

}  // namespace tokred::cuda::selecting
