// dpc_knn: the launches. [32, 729, 1152] in bf16: 39 GFLOP a pass over all pairs, 0.1 ms at the 400
// TFLOP/s of mma.sync, two passes and the one over the centres; fp32 takes six products.
#include "cluster/cuda/dpc_knn.cuh"
#include "common/cuda/launch.h"

namespace tokred::cuda {
namespace {

using namespace density;

template <class Config>
void run(const DpcKnnParams& p, const Scratch& s, Stream stream) {
  static_assert(sizeof(Shared<Config>) ==
                distance_shared_bytes(Config::kPlanes == 3, Config::kAsync));
  const LaunchPlan plan =
      plan_distance_rows(p.batch, p.a.tokens, Config::kPlanes == 3, Config::kAsync);
  launch(clear_centers_kernel, plan_places(p.batch * p.clusters), stream, p);
  launch(knn_density_kernel<Config>, plan, stream, p, s);
  launch(density_peaks_kernel<Config>, plan, stream, p, s);
  const int64_t blocks = p.batch * divide_up(p.a.tokens, kPlaceThreads);
  launch(place_centers_kernel, plan_places(blocks * kPlaceThreads), stream, p, s);
  TokenPairs pairs = p;
  pairs.b.rows = p.centers;
  pairs.b.rows_stride_batch = p.clusters;
  pairs.b.count = p.clusters;
  launch(assign_centers_kernel<Config>, plan, stream, p, pairs, s);
}

}  // namespace

int64_t dpc_knn_workspace(const DpcKnnParams& p) { return p.batch * p.a.tokens * 4 * (p.k + 3); }

void dpc_knn(const DpcKnnParams& p, Stream stream) {
  const int64_t tokens = p.batch * p.a.tokens;
  Scratch s{};
  s.near = static_cast<float*>(p.workspace);
  s.mean = s.near + tokens * p.k;
  s.score = s.mean + tokens;
  s.place = reinterpret_cast<int32_t*>(s.score + tokens);
  const bool aligned = is_aligned(p.a.data, p.a.stride_batch | p.a.stride_token, 2);
  visit_dtype(p.dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 2) {
      if (aligned) return run<Config<T, true>>(p, s, stream);
    }
    run<Config<T, false>>(p, s, stream);
  });
}

}  // namespace tokred::cuda
