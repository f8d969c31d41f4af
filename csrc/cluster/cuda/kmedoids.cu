// kmedoids: the workspace and the launches of the rounds.
#include "cluster/cuda/kmedoids.cuh"

#include "common/cuda/launch.h"

namespace tokred::cuda {
namespace {

using namespace clustering;

// The arrays of KmedoidsMemory in its order; all of them of four bytes.
KmedoidsMemory carve(const KmedoidsParams& p, float* next, int64_t& numbers) {
  const float* first = next;
  const auto floats = [&](int64_t count) {
    float* array = next;
    next += count;
    return array;
  };
  const auto ints = [&](int64_t count) { return reinterpret_cast<int32_t*>(floats(count)); };
  const int64_t rows = p.batch * p.clusters, tokens = p.batch * p.tokens;
  KmedoidsMemory memory;
  memory.centroids = floats(rows * p.channels);
  memory.offset = floats(rows);
  memory.scale = floats(p.metric == Metric::cosine ? tokens : 0);
  memory.cost = floats(tokens);
  memory.medoid = ints(rows);
  memory.begin = ints(rows);
  memory.number = ints(rows);
  memory.counts = ints(rows);
  memory.owner = ints(tokens);
  memory.order = ints(tokens);
  memory.moved = ints(p.batch);
  memory.round = ints(p.batch);
  numbers = next - first;
  return memory;
}

template <class T>
void run_rounds(const KmedoidsParams& p, const KmedoidsMemory& memory, Stream stream) {
  const LaunchPlan clusters = plan_cluster_rows(p.batch * p.clusters);
  const LaunchPlan tokens = plan_cluster_rows(p.batch * p.tokens);
  launch(kmedoids_start_kernel<T>, clusters, stream, p, memory);
  launch(kmedoids_tokens_kernel<T>, tokens, stream, p, memory);
  NearestParams nearest{p};
  nearest.centroids = memory.centroids;
  nearest.offset = memory.offset;
  nearest.round = memory.round;
  nearest.owner = memory.owner;
  nearest.assignment = p.assignment;
  nearest.counts = memory.counts;
  for (int64_t round = 0; round <= p.iterations; ++round) {
    launch(kmedoids_round_kernel, plan_cluster_items(p.batch), stream, p, memory, round);
    launch(kmedoids_pack_kernel<T>, clusters, stream, p, memory);
    launch(nearest_kernel<T>, plan_nearest(p.batch, p.tokens), stream, nearest);
    if (round == p.iterations) break;
    launch(kmedoids_members_kernel, clusters, stream, p, memory);
    launch(distance_sums_kernel<T>, plan_distance_sums(p.batch, p.tokens), stream, p, memory);
    launch(kmedoids_choose_kernel, clusters, stream, p, memory);
  }
  launch(kmedoids_number_kernel, clusters, stream, p, memory);
  launch(kmedoids_renumber_kernel, tokens, stream, p, memory);
}

}  // namespace

int64_t kmedoids_workspace(const KmedoidsParams& p) {
  int64_t numbers;
  carve(p, nullptr, numbers);
  return numbers * static_cast<int64_t>(sizeof(float));
}

void kmedoids(const KmedoidsParams& p, Stream stream) {
  int64_t numbers;
  const KmedoidsMemory memory = carve(p, static_cast<float*>(p.workspace), numbers);
  visit_dtype(p.dtype, [&]<class T>() { run_rounds<T>(p, memory, stream); });
}

}  // namespace tokred::cuda
