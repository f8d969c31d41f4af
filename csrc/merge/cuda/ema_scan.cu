// ema_scan: one launch, its gradient two. Floor: c read and z written once; the gradient reads
// grad_z, c and z and writes as much as it reads of one of them.
#include "common/cuda/launch.h"
#include "merge/cuda/ema_scan.cuh"

namespace tokred::cuda {

using namespace merging;

static_assert(sizeof(ScanShared) == plan_ema_scan(1, 1).shared_bytes);
static_assert(kEmaSliceChannels == kWarp);

void ema_scan(const EmaScanParams& p, Stream stream) {
  visit_dtype(p.dtype, [&]<class T>() {
    launch(ema_scan_kernel<T>, plan_ema_scan(p.batch, p.channels), stream, p);
  });
}

void ema_scan_backward(const EmaScanBackwardParams& p, Stream stream) {
  const EmaScanParams& f = p.forward;
  visit_dtype(f.dtype, [&]<class T>() {
    launch(ema_scan_backward_kernel<T>, plan_ema_scan(f.batch, f.channels), stream, p);
  });
  launch(ema_scan_share_kernel, plan_compose(f.batch * f.tokens), stream, p);
}

}  // namespace tokred::cuda
