// merge backward: two launches, three above 1024 tokens. Floor: x and grad_y read, grad_x written;
// 40 us for [64, 577, 768] -> 561 in bf16 at the 4.3 TB/s copy rate of an H200.
#include "merge/cuda/launch.h"
#include "merge/cuda/merge_backward.cuh"

namespace tokred::cuda {
namespace {

using namespace merging;

// Row is T, or Loose<T> for rows that are not aligned. kWidth is that of rows without sums over
// channels.
template <class Row, class T, int kWidth>
void launch_backward(const MergeBackwardParams& p, Stream stream) {
  constexpr int kAll = 16 / sizeof(T);
  const MergeParams& f = p.forward;
  launch(zero_skipped_kernel<T, kWidth>, plan_merge_rows(f.batch * f.tokens), stream, p);
  const LaunchPlan plan = plan_merge(f.batch, f.num_out);
  switch (kind_of(f.mode)) {
    case MergeKind::linear:
      return launch(merge_backward_kernel<Row, kAll, MergeKind::linear>, plan, stream, p);
    case MergeKind::extreme:
      return launch(merge_backward_kernel<T, kWidth, MergeKind::extreme>, plan, stream, p);
    case MergeKind::maxnorm:
      return launch(merge_backward_kernel<Row, kAll, MergeKind::maxnorm>, plan, stream, p);
  }
}

}  // namespace

void merge_backward(const MergeBackwardParams& p, Stream stream) {
  const MergeParams& f = p.forward;
  launch_list_members(f, stream);
  visit_dtype(f.dtype, [&]<class T>() {
    if (rows_are_aligned<T>(f.x, f.x_stride_batch, f.x_stride_token, f.channels) &&
        rows_are_aligned<T>(p.grad_y, p.grad_y_stride_batch, p.grad_y_stride_token, f.channels) &&
        rows_are_aligned<T>(p.grad_x, 0, 0, f.channels)) {
      launch_backward<T, T, 16 / sizeof(T)>(p, stream);
    } else {
      launch_backward<Loose<T>, T, 1>(p, stream);
    }
  });
}

}  // namespace tokred::cuda
