// adjacent_runs: two launches. The cosines read every row twice, once from memory; the runs read
// four bytes a token.
#include "common/cuda/launch.h"
#include "merge/cuda/adjacent_runs.cuh"

namespace tokred::cuda {

using namespace merging;

static_assert(sizeof(RunShared) == plan_item_scan(1).shared_bytes);

void adjacent_runs(const AdjacentRunsParams& p, Stream stream) {
  const LaunchPlan rows = plan_merge_rows(p.batch * p.tokens);
  visit_dtype(p.dtype, [&]<class T>() {
    constexpr int kWidth = 16 / sizeof(T);
    const int64_t strides =
        p.x_stride_batch | p.x_stride_token | p.y_stride_batch | p.y_stride_token | p.channels;
    if (is_aligned(p.x, strides, sizeof(T)) && is_aligned(p.y, strides, sizeof(T))) {
      launch(adjacent_cosine_kernel<T, kWidth>, rows, stream, p);
    } else {
      launch(adjacent_cosine_kernel<Loose<T>, kWidth>, rows, stream, p);
    }
  });
  launch(adjacent_runs_kernel<kItemThreads>, plan_item_scan(p.batch), stream, p);
}

}  // namespace tokred::cuda
