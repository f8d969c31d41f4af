// compact and gather_tokens. A row is read once where a block packs it all: [256, 131072] of bool,
// an eighth marked: 34 MB read, 150 MB written (the rest of the rows is filled), 43 us on an H200.
// Where a row is split, the last part reads all of it: with 32 parts 16 times the row, from the L2
// cache. A gather reads and writes each row once: keys and values of [1, 8, 131072, 128] in bf16 at
// 2048 tokens 17 MB, 4 us, one launch.
#include "common/cuda/launch.h"
#include "topk/cuda/compact.cuh"

namespace tokred::cuda {
namespace {

using namespace selecting;

bool rows_are_chunks(const GatherItem& item) {
  const auto steps = static_cast<uintptr_t>(item.stride_batch | item.stride_head |
                                            item.stride_token | item.row_bytes);
  return (reinterpret_cast<uintptr_t>(item.source) | reinterpret_cast<uintptr_t>(item.out) |
          steps) % 16 == 0;
}

}  // namespace

void compact(const CompactParams& p, Stream stream) {
  const LaunchPlan plan = plan_compact(p.rows, p.columns);
  static_assert(sizeof(BlockScratch<int>) == plan_compact(1, 1).shared_bytes);
  const int64_t parts = compact_parts(p.rows, p.columns);
  if (p.is_bool) return launch(compact_kernel<BoolTest>, plan, stream, p, parts);
  visit_dtype(p.dtype, [&]<class T>() {
    launch(compact_kernel<FloatTest<T>>, plan, stream, p, parts);
  });
}

void gather_tokens(const GatherParams& p, Stream stream) {
  GatherLaunch how{};
  int64_t blocks = 0;
  for (int64_t i = 0; i < p.items; ++i) {
    const GatherItem& item = p.item[i];
    how.wide[i] = rows_are_chunks(item);
    const int64_t rows = item.row_bytes > 0 ? p.batch * item.heads * p.count : 0;
    const int64_t wanted = gather_blocks(rows, how.wide[i] ? item.row_bytes / 16 : item.row_bytes);
    if (wanted > blocks) blocks = wanted;
  }
  launch(gather_kernel, plan_gather(blocks, p.items), stream, p, how);
}

}  // namespace tokred::cuda
