// inverse_transform_sample: keys are sorted (8 bytes an entry; rows of up to 4096 by one block, in
// one launch, longer ones in a launch more a doubling), then a block walks each sorted row.
// [64, 577]: 0.15 MB read, 0.6 MB of keys and sums; two launches, whose latency decides.
#include "common/cuda/launch.h"
#include "topk/cuda/inverse_transform_sample.cuh"
#include "topk/cuda/sort_launch.h"

namespace tokred::cuda {

using namespace selecting;

int64_t inverse_transform_sample_workspace(const InverseTransformParams& p) {
  return sort_bytes(p.rows, p.columns);
}

void inverse_transform_sample(const InverseTransformParams& p, Stream stream) {
  static_assert(sizeof(SampleShared) == plan_sample(1).shared_bytes);
  visit_dtype(p.dtype, [&]<class T>() {
    uint64_t* spare;
    uint64_t* sorted = sort_segments(SampleSource<T>{p}, p.rows, p.columns, p.columns, p.workspace,
                                     &spare, stream);
    launch(sample_kernel, plan_sample(p.rows), stream, p, sorted, spare);
  });
}

}  // namespace tokred::cuda
