// local_soft_kmeans: the workspace and the launches of the iterations.
#include "cluster/cuda/local_soft_kmeans.cuh"

#include "common/cuda/launch.h"

namespace tokred::cuda {
namespace {

using namespace clustering;

int64_t weights(const LocalSoftKmeansParams& p) {
  const int64_t side = 2 * p.radius + 1;
  return p.batch * p.tokens * side * side;
}

template <class T>
void run(const LocalSoftKmeansParams& p, const LocalSoftMemory& memory, Stream stream) {
  const LaunchPlan clusters = plan_cluster_rows(p.batch * p.clusters);
  const LaunchPlan tokens = plan_cluster_rows(p.batch * p.tokens);
  launch(soft_usable_kernel<T>, tokens, stream, p, memory);
  launch(soft_start_kernel<T>, clusters, stream, p, memory);
  for (int64_t round = 0; p.clusters > 0 && round < p.iterations; ++round) {
    launch(soft_weights_kernel<T>, tokens, stream, p, memory);
    launch(soft_move_kernel<T>, clusters, stream, p, memory);
  }
  launch(soft_offset_kernel, clusters, stream, p, memory);
  NearestParams nearest{p};
  nearest.centroids = p.centroids;
  nearest.offset = memory.offset;
  nearest.assignment = p.assignment;
  launch(nearest_kernel<T>, plan_nearest(p.batch, p.tokens), stream, nearest);
}

}  // namespace

int64_t local_soft_kmeans_workspace(const LocalSoftKmeansParams& p) {
  const int64_t numbers = weights(p) + p.batch * (p.clusters + p.tokens);
  return numbers * static_cast<int64_t>(sizeof(float));
}

void local_soft_kmeans(const LocalSoftKmeansParams& p, Stream stream) {
  LocalSoftMemory memory;
  memory.weight = static_cast<float*>(p.workspace);
  memory.offset = memory.weight + weights(p);
  memory.usable = reinterpret_cast<int32_t*>(memory.offset + p.batch * p.clusters);
  visit_dtype(p.dtype, [&]<class T>() { run<T>(p, memory, stream); });
}

}  // namespace tokred::cuda
