// topk: the choice of a kernel by the size of segments. Bytes: every path but `sorted` reads a
// segment once (`split` and the blocks a sample of it twice), and two or three times more where the
// sample misleads. Floors on an H200 at 4.3 TB/s: [256, 131072] in fp32 134 MB, 31 us, one launch;
// [8, 131072] 4.2 MB, 1 us, two launches, so latency decides; [18432, 289], k = 64: 30 MB, 7 us,
// one launch, where the instructions of the warps decide. `sorted` reads and writes all keys, 8
// bytes each, in 1 + log2(columns / 4096) passes.
#include "common/cuda/launch.h"
#include "topk/cuda/sort_launch.h"
#include "topk/cuda/topk.cuh"
#include "topk/cuda/warp.cuh"

namespace tokred::cuda {
namespace {

using namespace selecting;

TopkShape shape_of(const TopkParams& p) {
  const bool blocks = p.block_size > 0 && p.block_size < p.columns;
  return {p.rows * p.segments, blocks ? p.block_size : p.columns, p.k, p.has_top_p};
}

template <class T>
void select_in_warps(const TopkParams& p, const TopkShape& shape, Stream stream) {
  static_assert(sizeof(WarpSelectShared) == plan_topk_warps(1).shared_bytes);
  const LaunchPlan plan = plan_topk_warps(shape.segments);
  // Sizes of images of 224, 256, 336 and 384 pixels, with a class token, fit closely.
  const int64_t items = divide_up(shape.columns, kWarp);
  if (items <= 1) return launch(warp_kernel<T, 1>, plan, stream, p);
  if (items <= 4) return launch(warp_kernel<T, 4>, plan, stream, p);
  if (items <= 10) return launch(warp_kernel<T, 10>, plan, stream, p);
  if (items <= 19) return launch(warp_kernel<T, 19>, plan, stream, p);
  static_assert(kTopkWarpColumns == 33 * kWarp);
  launch(warp_kernel<T, 33>, plan, stream, p);
}

template <class C, class T>
void select_in_blocks(const TopkParams& p, const TopkShape& shape, Stream stream) {
  static_assert(sizeof(SelectShared<C>) == C::kTiles.shared_bytes());
  launch(block_kernel<C, T>, plan_topk_blocks(shape.segments, C::kTiles), stream, p);
}

template <class T>
void select_split(const TopkParams& p, const TopkShape& shape, Stream stream) {
  Parts parts;
  parts.segments = shape.segments;
  parts.parts = topk_parts(shape);
  parts.columns = topk_part_columns(shape);
  parts.key = static_cast<uint64_t*>(p.workspace);
  parts.guess = parts.key + parts.segments * parts.parts * kSplitKeys;
  parts.count = reinterpret_cast<int*>(parts.guess + parts.segments);
  launch(collect_parts_kernel<T>, plan_topk_parts(shape), stream, p, parts);
  launch(finish_parts_kernel<T>, plan_topk_blocks(shape.segments, kWideTopk), stream, p, parts);
}

template <class T>
void select_sorted(const TopkParams& p, const TopkShape& shape, Stream stream) {
  static_assert(sizeof(SortedShared) == plan_sorted(1).shared_bytes);
  uint64_t* spare;
  const uint64_t* sorted = sort_segments(TopkSource<T>{p}, shape.segments, shape.columns,
                                         shape.max_chosen(), p.workspace, &spare, stream);
  launch(write_sorted_kernel<T>, plan_sorted(shape.segments), stream, p, sorted, shape.columns);
}

}  // namespace

int64_t topk_workspace(const TopkParams& p) {
  const TopkShape shape = shape_of(p);
  switch (topk_path(shape)) {
    case TopkPath::split: return topk_split_bytes(shape);
    case TopkPath::sorted: return sort_bytes(shape.segments, shape.columns);
    default: return 0;
  }
}

void topk(const TopkParams& p, Stream stream) {
  const TopkShape shape = shape_of(p);
  visit_dtype(p.dtype, [&]<class T>() {
    switch (topk_path(shape)) {
      case TopkPath::warp: return select_in_warps<T>(p, shape, stream);
      case TopkPath::small: return select_in_blocks<SmallSelect, T>(p, shape, stream);
      case TopkPath::wide: return select_in_blocks<WideSelect, T>(p, shape, stream);
      case TopkPath::split: return select_split<T>(p, shape, stream);
      case TopkPath::sorted: return select_sorted<T>(p, shape, stream);
    }
  });
}

}  // namespace tokred::cuda
