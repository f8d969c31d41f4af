// Front end of kmeans: checks, allocation, parameters.
#pragma once

#include <cmath>

#include "cluster/params.h"
#include "tensor.h"

namespace tokred {

// The tokens x [B, N, C] with their mask, and the number of clusters, as `params` holds them.
inline void cluster_tokens(ClusterTokens& params, const Tensor& x, int64_t num_clusters,
                           const OptionalTensor& mask, const Text& metric) {
  params.metric =
      parse_choice<Metric>(metric, "metric", {{"l2", Metric::l2}, {"cosine", Metric::cosine}});
  params.dtype = float_dtype(x, "x", false);
  check_dim(x, "x", 3, "[B, N, C]");
  check_last_contiguous(x, "x");
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  TOKRED_CHECK(x.size(1) <= kMax, "x may have at most 2^31 - 1 tokens, got ", x.size(1));
  TOKRED_CHECK(num_clusters >= 0 && num_clusters <= kMax,
               "num_clusters must be between 0 and 2^31 - 1, got ", num_clusters);
  params.x = x.const_data_ptr();
  params.stride_batch = x.stride(0);
  params.stride_token = x.stride(1);
  params.mask = token_mask(mask, "mask", x.size(0), x.size(1), false, x, "x",
                           params.mask_stride_batch, params.mask_stride_token);
  params.batch = x.size(0);
  params.tokens = x.size(1);
  params.channels = x.size(2);
  params.clusters = num_clusters;
}

// Every iteration is launches on a device, whether or not anything still moves.
inline void check_iterations(int64_t iterations) {
  constexpr int64_t kMax = 100000;
  TOKRED_CHECK(iterations >= 0 && iterations <= kMax, "iterations must be between 0 and ", kMax,
               ", got ", iterations);
}

// start: int32 token numbers [B, K], or float32 centroids [B, K, C].
inline void kmeans_start(KmeansParams& p, const Tensor& start, const Tensor& x) {
  const bool tokens = start.scalar_type() == ScalarType::Int;
  TOKRED_CHECK(tokens || start.scalar_type() == ScalarType::Float,
               "start must be int32 token numbers [B, K] or float32 centroids [B, K, C], got ",
               dtype_name(start.scalar_type()));
  check_same_device(start, "start", x, "x");
  if (tokens) {
    check_shape(start, "start", {p.batch, p.clusters}, "[B, num_clusters]");
    p.start_token = static_cast<const int32_t*>(start.const_data_ptr());
  } else {
    check_shape(start, "start", {p.batch, p.clusters, p.channels}, "[B, num_clusters, C]");
    check_last_contiguous(start, "start");
    p.start = static_cast<const float*>(start.const_data_ptr());
  }
  p.start_stride_batch = start.stride(0);
  p.start_stride_cluster = start.stride(1);
}

// centroids f32 [B, K, C], assignment i32 [B, N], counts i32 [B, K]; see KmeansParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> kmeans(const Tensor& x, int64_t num_clusters, int64_t iterations,
                                          const OptionalTensor& start, const OptionalTensor& mask,
                                          const Text& metric, double tolerance) {
  KmeansParams p{};
  cluster_tokens(p, x, num_clusters, mask, metric);
  check_iterations(iterations);
  TOKRED_CHECK(std::isfinite(tolerance) && tolerance >= 0,
               "tolerance must be finite and at least 0, got ", tolerance);
  p.iterations = iterations;
  p.tolerance = static_cast<float>(tolerance);
  if (start) kmeans_start(p, *start, x);

  Backend backend(x);
  Tensor centroids = allocate(x, {p.batch, p.clusters, p.channels}, ScalarType::Float);
  Tensor assignment = allocate(x, {p.batch, p.tokens}, ScalarType::Int);
  Tensor counts = allocate(x, {p.batch, p.clusters}, ScalarType::Int);
  Scratch workspace(x, backend.kmeans_workspace(p), Backend::kHost);
  p.centroids = static_cast<float*>(centroids.mutable_data_ptr());
  p.assignment = static_cast<int32_t*>(assignment.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  p.workspace = workspace.data();
  if (p.batch > 0) backend.kmeans(p);
  return moved(centroids, assignment, counts);
}

}  // namespace tokred
