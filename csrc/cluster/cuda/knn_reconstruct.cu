// knn_reconstruct: the launch.
#include "cluster/cuda/knn_reconstruct.cuh"

#include "common/cuda/launch.h"

namespace tokred::cuda {

using namespace clustering;

int64_t knn_reconstruct_workspace(const KnnReconstructParams&) { return 0; }

void knn_reconstruct(const KnnReconstructParams& p, Stream stream) {
  visit_dtype(p.dtype, [&]<class T>() {
    visit_dtype(p.deep_dtype, [&]<class D>() {
      launch(knn_reconstruct_kernel<T, D>, plan_cluster_rows(p.batch * p.tokens), stream, p);
    });
  });
}

}  // namespace tokred::cuda
