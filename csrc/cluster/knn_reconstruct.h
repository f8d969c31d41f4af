// Front end of knn_reconstruct: checks, allocation, parameters.
#pragma once

#include <algorithm>
#include <cmath>

#include "cluster/params.h"
#include "tensor.h"

namespace tokred {

// y [B, N, D] of the dtype of deep; see KnnReconstructParams.
template <class Backend>
Tensor knn_reconstruct(const Tensor& deep, const Tensor& x, const Tensor& centroids, int64_t k,
                       double temperature, const Text& norm) {
  KnnReconstructParams p{};
  p.l2 = parse_choice<bool>(norm, "norm", {{"l1", false}, {"l2", true}});
  p.deep_dtype = float_dtype(deep, "deep", false);
  p.dtype = float_dtype(x, "x", false);
  check_dim(deep, "deep", 3, "[B, M, D]");
  check_dim(x, "x", 3, "[B, N, C]");
  check_shape(deep, "deep", {x.size(0), -1, -1}, "[B, M, D]");
  check_shape(centroids, "centroids", {x.size(0), deep.size(1), x.size(2)}, "[B, M, C]");
  check_dtype(centroids, "centroids", ScalarType::Float);
  check_last_contiguous(deep, "deep");
  check_last_contiguous(x, "x");
  check_last_contiguous(centroids, "centroids");
  check_same_device(x, "x", deep, "deep");
  check_same_device(centroids, "centroids", deep, "deep");
  TOKRED_CHECK(deep.size(1) <= std::numeric_limits<int32_t>::max(),
               "deep may have at most 2^31 - 1 rows, got ", deep.size(1));
  TOKRED_CHECK(k >= 1 && k <= kMostNeighbours, "k must be between 1 and ", kMostNeighbours,
               ", got ", k);
  TOKRED_CHECK(std::isfinite(temperature) && temperature >= 0,
               "temperature must be finite and at least 0, got ", temperature);
  p.deep = deep.const_data_ptr();
  p.deep_stride_batch = deep.stride(0);
  p.deep_stride_cluster = deep.stride(1);
  p.x = x.const_data_ptr();
  p.stride_batch = x.stride(0);
  p.stride_token = x.stride(1);
  p.centroids = static_cast<const float*>(centroids.const_data_ptr());
  p.centroid_stride_batch = centroids.stride(0);
  p.centroid_stride_cluster = centroids.stride(1);
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.clusters = deep.size(1);
  p.channels = x.size(2);
  p.deep_channels = deep.size(2);
  p.k = std::min(k, p.clusters);
  p.temperature = static_cast<float>(temperature);

  Backend backend(deep);
  Tensor y = allocate(deep, {p.batch, p.tokens, p.deep_channels}, deep.scalar_type());
  Scratch workspace(deep, backend.knn_reconstruct_workspace(p), Backend::kHost);
  p.y = y.mutable_data_ptr();
  p.workspace = workspace.data();
  if (p.batch > 0) backend.knn_reconstruct(p);
  return y;
}

}  // namespace tokred
