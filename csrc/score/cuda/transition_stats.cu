// transition_stats reads its two inputs once.
#include "common/cuda/launch.h"
#include "score/cuda/transition_stats.cuh"

namespace tokred::cuda {

using namespace scoring;

void transition_stats(const TransitionParams& p, Stream stream) {
  const LaunchPlan plan = plan_transition(p.batch * p.tokens);
  visit_dtype(p.dtype, [&]<class T>() {
    const bool aligned =
        is_aligned(p.before, p.before_stride_batch | p.before_stride_token, sizeof(T)) &&
        is_aligned(p.after, p.after_stride_batch | p.after_stride_token | p.channels, sizeof(T));
    if (aligned) {
      launch(transition_kernel<T, 16 / sizeof(T)>, plan, stream, p);
    } else {
      launch(transition_kernel<Loose<T>, 16 / sizeof(T)>, plan, stream, p);
    }
  });
}

}  // namespace tokred::cuda
