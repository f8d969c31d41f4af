// segment_weights: two launches, three above 1024 tokens. gaussian reads x once, and its gradient
// reads it twice and writes as much.
#include "merge/cuda/launch.h"
#include "merge/cuda/segment_weights.cuh"

namespace tokred::cuda {

using namespace merging;

void segment_weights(const SegmentWeightsParams& p, Stream stream) {
  const MergeParams& s = p.segments;
  launch_list_members(s, stream);
  launch(skipped_weights_kernel, plan_compose(s.batch * s.tokens), stream, s,
         static_cast<float*>(p.out));
  const LaunchPlan plan = plan_merge(s.batch, s.num_out);
  if (p.mode != SegmentMode::gaussian) return launch(segment_weights_kernel, plan, stream, p);
  visit_dtype(s.dtype, [&]<class T>() {
    constexpr int kWidth = 16 / sizeof(T);
    if (rows_are_aligned<T>(s.x, s.x_stride_batch, s.x_stride_token, s.channels)) {
      launch(gaussian_weights_kernel<T, kWidth>, plan, stream, p);
    } else {
      launch(gaussian_weights_kernel<Loose<T>, kWidth>, plan, stream, p);
    }
  });
}

void segment_weights_backward(const SegmentWeightsBackwardParams& p, Stream stream) {
  const MergeParams& s = p.forward.segments;
  launch_list_members(s, stream);
  const LaunchPlan plan = plan_merge(s.batch, s.num_out);
  if (p.forward.mode == SegmentMode::softmax) {
    launch(skipped_weights_kernel, plan_compose(s.batch * s.tokens), stream, s,
           static_cast<float*>(p.grad_input));
    return launch(softmax_weights_backward_kernel, plan, stream, p);
  }
  const LaunchPlan rows = plan_merge_rows(s.batch * s.tokens);
  visit_dtype(s.dtype, [&]<class T>() {
    constexpr int kWidth = 16 / sizeof(T);
    if (rows_are_aligned<T>(s.x, s.x_stride_batch, s.x_stride_token, s.channels) &&
        rows_are_aligned<T>(p.grad_input, 0, 0, s.channels)) {
      launch(skipped_rows_kernel<T, kWidth>, rows, stream, s, p.grad_input);
      launch(gaussian_weights_backward_kernel<T, kWidth>, plan, stream, p);
    } else {
      launch(skipped_rows_kernel<T, 1>, rows, stream, s, p.grad_input);
      launch(gaussian_weights_backward_kernel<Loose<T>, kWidth>, plan, stream, p);
    }
  });
}

}  // namespace tokred::cuda
