// sinkhorn: the costs, the steps and the aggregation, one launch each; its gradient: the costs, the
// steps, the norms, the way back in two launches, and a product for the rows of either side.
#include "match/cuda/launch.h"
#include "match/cuda/sinkhorn_backward.cuh"

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

int64_t sinkhorn_backward_workspace(const SinkhornBackwardParams& p) {
  return GradientMemory(p).floats * static_cast<int64_t>(sizeof(float));
}

void sinkhorn_backward(const SinkhornBackwardParams& params, Stream stream) {
  SinkhornBackwardParams p = params;
  SinkhornParams& f = p.forward;
  f.workspace = p.workspace;
  f.log_u = f.log_v = static_cast<float*>(p.workspace);  // of one step after the other
  static_assert(sizeof(WeightShared) == plan_sinkhorn_weights(1, 1, 1).shared_bytes);
  static_assert(sizeof(RowGradientShared<true>) ==
                plan_sinkhorn_gradient(1, 1, 1, true).shared_bytes);
  static_assert(sizeof(RowGradientShared<false>) ==
                plan_sinkhorn_gradient(1, 1, 1, false).shared_bytes);
  visit_dtype(f.dtype, [&]<class T>() {
    if (f.a.count > 0 && f.b.count > 0) make_costs<T>(f, stream);
    launch(sinkhorn_again_kernel, plan_sinkhorn(f.batch), stream, p);
    launch(sinkhorn_norm_kernel<T>, plan_sinkhorn_norms(f.batch * (f.a.count + f.b.count)), stream,
           p);
    launch(sinkhorn_weight_kernel<T>, plan_sinkhorn_weights(f.batch, f.a.count, f.b.count), stream,
           p);
    launch(sinkhorn_back_kernel, plan_sinkhorn(f.batch), stream, p);
    launch(sinkhorn_row_gradient_kernel<T, true>,
           plan_sinkhorn_gradient(f.batch, f.a.count, f.channels, true), stream, p);
    launch(sinkhorn_row_gradient_kernel<T, false>,
           plan_sinkhorn_gradient(f.batch, f.b.count, f.channels, false), stream, p);
  });
}

}  // namespace tokred::cuda
