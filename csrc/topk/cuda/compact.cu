// compact: a row is read once where a block packs it all: [256, 131072] of bool, an eighth marked:
// 34 MB read, 150 MB written (the rest of the rows is filled), 43 us on an H200. Where a row is
// split, the last part reads all of it: with 32 parts 16 times the row, from the L2 cache.
#include "common/cuda/launch.h"
#include "topk/cuda/compact.cuh"

namespace tokred::cuda {

using namespace selecting;

void compact(const CompactParams& p, Stream stream) {
  const LaunchPlan plan = plan_compact(p.rows, p.columns);
  static_assert(sizeof(BlockScratch<int>) == plan_compact(1, 1).shared_bytes);
  const int64_t parts = compact_parts(p.rows, p.columns);
  if (p.is_bool) return launch(compact_kernel<BoolTest>, plan, stream, p, parts);
  if (p.is_list) return launch(compact_kernel<ListTest>, plan, stream, p, parts);
  visit_dtype(p.dtype,
              [&]<class T>() { launch(compact_kernel<FloatTest<T>>, plan, stream, p, parts); });
}

}  // namespace tokred::cuda
