// knn_reconstruct: one launch, its gradient two.
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

int64_t knn_reconstruct_backward_workspace(const KnnReconstructBackwardParams& p) {
  return 8 * p.forward.batch * p.forward.tokens * p.forward.k;  // a cluster and a weight each
}

void knn_reconstruct_backward(const KnnReconstructBackwardParams& p, Stream stream) {
  static_assert(sizeof(MembersShared) == plan_members(1, 1).shared_bytes);
  const KnnReconstructParams& f = p.forward;
  visit_dtype(f.dtype, [&]<class T>() {
    launch(knn_neighbours_kernel<T>, plan_cluster_rows(f.batch * f.tokens), stream, p);
  });
  visit_dtype(f.deep_dtype, [&]<class D>() {
    launch(knn_reconstruct_backward_kernel<D>, plan_members(f.batch * f.clusters, f.deep_channels),
           stream, p);
  });
}

}  // namespace tokred::cuda
