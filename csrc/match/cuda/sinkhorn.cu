// sinkhorn: the costs, the steps and the aggregation, one launch each.
#include "match/cuda/launch.h"
#include "match/cuda/sinkhorn.cuh"

namespace tokred::cuda {
namespace {

using namespace matching;

template <class Config>
void launch_costs(const SinkhornParams& p, Stream stream) {
  static_assert(sizeof(SimilarityShared<Config>) ==
                similarity_shared_bytes(Config::kTiles, Config::kPlanes == 3, Config::kAsync));
  const bool is_float = p.dtype == DType::f32;
  launch(sinkhorn_cost_kernel<Config>,
         plan_sinkhorn_costs(p.batch, p.a.count, is_float, Config::kAsync), stream, p);
}

template <class T>
void make_costs(const SinkhornParams& p, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    if (has_aligned_rows(p.a) && has_aligned_rows(p.b)) {
      return launch_costs<SimilarityConfig<T, true, kNarrowTiles>>(p, stream);
    }
  }
  launch_costs<SimilarityConfig<T, false, kNarrowTiles>>(p, stream);
}

}  // namespace

int64_t sinkhorn_workspace(const SinkhornParams& p) {
  return p.batch * p.a.count * p.b.count * static_cast<int64_t>(sizeof(float));
}

void sinkhorn(const SinkhornParams& p, Stream stream) {
  static_assert(sizeof(SinkhornShared) == kSinkhornShared);
  static_assert(sizeof(AggregationShared) == kAggregationShared);
  visit_dtype(p.dtype, [&]<class T>() {
    if (p.a.count > 0 && p.b.count > 0) make_costs<T>(p, stream);
    launch(sinkhorn_kernel, plan_sinkhorn(p.batch), stream, p);
    launch(sinkhorn_aggregation_kernel<T>,
           plan_sinkhorn_aggregation(p.batch, p.b.count, p.channels), stream, p);
  });
}

}  // namespace tokred::cuda
