// kmeans: the workspace and the launches of the rounds.
#include "cluster/cuda/kmeans.cuh"

#include "common/cuda/launch.h"

namespace tokred::cuda {
namespace {

using namespace clustering;

// The numbers that every array of KmeansMemory takes, in its order; all of them of four bytes.
KmeansMemory carve(const KmeansParams& p, float* next, int64_t& numbers) {
  const float* first = next;
  const auto take = [&](int64_t count) {
    float* array = next;
    next += count;
    return array;
  };
  KmeansMemory memory;
  memory.sums = take(p.batch * p.clusters * p.channels);
  memory.scale = take(p.metric == Metric::cosine ? p.batch * p.tokens : 0);
  memory.offset = take(p.batch * p.clusters);
  memory.members = reinterpret_cast<int32_t*>(take(p.batch * p.tokens));
  memory.shift = take(p.batch);
  memory.round = reinterpret_cast<int32_t*>(take(p.batch));
  numbers = next - first;
  return memory;
}

template <class T>
void run_rounds(const KmeansParams& p, const KmeansMemory& memory, Stream stream) {
  const LaunchPlan clusters = plan_cluster_rows(p.batch * p.clusters);
  launch(kmeans_start_kernel<T>, clusters, stream, p, memory);
  if (p.metric == Metric::cosine) {
    launch(token_scale_kernel<T>, plan_cluster_rows(p.batch * p.tokens), stream, p, memory);
  }
  NearestParams nearest{p};
  nearest.centroids = p.centroids;
  nearest.offset = memory.offset;
  nearest.round = memory.round;
  nearest.assignment = p.assignment;
  nearest.counts = p.counts;
  for (int64_t round = 0; round <= p.iterations; ++round) {
    launch(kmeans_round_kernel, plan_cluster_items(p.batch), stream, p, memory, round);
    launch(nearest_kernel<T>, plan_nearest(p.batch, p.tokens), stream, nearest);
    if (round < p.iterations) launch(kmeans_move_kernel<T>, clusters, stream, p, memory);
  }
}

}  // namespace

int64_t kmeans_workspace(const KmeansParams& p) {
  int64_t numbers;
  carve(p, nullptr, numbers);
  return numbers * static_cast<int64_t>(sizeof(float));
}

void kmeans(const KmeansParams& p, Stream stream) {
  int64_t numbers;
  const KmeansMemory memory = carve(p, static_cast<float*>(p.workspace), numbers);
  visit_dtype(p.dtype, [&]<class T>() { run_rounds<T>(p, memory, stream); });
}

}  // namespace tokred::cuda
