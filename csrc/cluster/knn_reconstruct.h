// Front ends of knn_reconstruct and its gradient: checks, allocation, parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cluster/params.h"
#include "tensor.h"

namespace tokred {

// The inputs, whose dimensions are checked already. `features` is deep, or the gradient of y.
inline KnnReconstructParams knn_reconstruct_inputs(const Tensor& features, const char* name,
                                                   const Tensor& x, const Tensor& centroids,
                                                   int64_t k, double temperature,
                                                   const Text& norm) {
  KnnReconstructParams p{};
  p.l2 = parse_choice<bool>(norm, "norm", {{"l1", false}, {"l2", true}});
  p.deep_dtype = float_dtype(features, name, false);
  p.dtype = float_dtype(x, "x", false);
  check_dtype(centroids, "centroids", ScalarType::Float);
  check_last_contiguous(features, name);
  check_last_contiguous(x, "x");
  check_last_contiguous(centroids, "centroids");
  check_same_device(x, "x", features, name);
  check_same_device(centroids, "centroids", features, name);
  TOKRED_CHECK(centroids.size(1) <= std::numeric_limits<int32_t>::max(),
               "centroids may have at most 2^31 - 1 rows, got ", centroids.size(1));
  TOKRED_CHECK(k >= 1 && k <= kMaxNeighbours, "k must be between 1 and ", kMaxNeighbours, ", got ",
               k);
  TOKRED_CHECK(std::isfinite(temperature) && temperature >= 0,
               "temperature must be finite and at least 0, got ", temperature);
  p.x = x.const_data_ptr();
  p.stride_batch = x.stride(0);
  p.stride_token = x.stride(1);
  p.centroids = static_cast<const float*>(centroids.const_data_ptr());
  p.centroid_stride_batch = centroids.stride(0);
  p.centroid_stride_cluster = centroids.stride(1);
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.clusters = centroids.size(1);
  p.channels = x.size(2);
  p.deep_channels = features.size(2);
  p.k = std::min(k, p.clusters);
  p.temperature = static_cast<float>(temperature);
  return p;
}

// y [B, N, D] of the dtype of deep; see KnnReconstructParams.
template <class Backend>
Tensor knn_reconstruct(const Tensor& deep, const Tensor& x, const Tensor& centroids, int64_t k,
                       double temperature, const Text& norm) {
  check_dim(deep, "deep", 3, "[B, M, D]");
  check_dim(x, "x", 3, "[B, N, C]");
  check_shape(deep, "deep", {x.size(0), -1, -1}, "[B, M, D]");
  check_shape(centroids, "centroids", {x.size(0), deep.size(1), x.size(2)}, "[B, M, C]");
  KnnReconstructParams p = knn_reconstruct_inputs(deep, "deep", x, centroids, k, temperature, norm);
  p.deep = deep.const_data_ptr();
  p.deep_stride_batch = deep.stride(0);
  p.deep_stride_cluster = deep.stride(1);

  Backend backend(deep);
  Tensor y = allocate(deep, {p.batch, p.tokens, p.deep_channels}, deep.scalar_type());
  Scratch workspace(deep, backend.knn_reconstruct_workspace(p), Backend::kHost);
  p.y = y.mutable_data_ptr();
  p.workspace = workspace.data();
  if (p.batch > 0) backend.knn_reconstruct(p);
  return y;
}

// grad_deep [B, M, D] of the dtype of grad_y; see KnnReconstructBackwardParams.
template <class Backend>
Tensor knn_reconstruct_backward(const Tensor& grad_y, const Tensor& x, const Tensor& centroids,
                                int64_t k, double temperature, const Text& norm) {
  check_dim(grad_y, "grad_y", 3, "[B, N, D]");
  check_dim(x, "x", 3, "[B, N, C]");
  check_shape(grad_y, "grad_y", {x.size(0), x.size(1), -1}, "[B, N, D]");
  check_shape(centroids, "centroids", {x.size(0), -1, x.size(2)}, "[B, M, C]");
  TOKRED_CHECK(x.size(1) <= std::numeric_limits<int32_t>::max(),
               "x may have at most 2^31 - 1 tokens, got ", x.size(1));
  KnnReconstructBackwardParams p{};
  p.forward = knn_reconstruct_inputs(grad_y, "grad_y", x, centroids, k, temperature, norm);
  const KnnReconstructParams& f = p.forward;
  p.grad_y = grad_y.const_data_ptr();
  p.grad_stride_batch = grad_y.stride(0);
  p.grad_stride_token = grad_y.stride(1);

  Backend backend(grad_y);
  Tensor grad_deep = allocate(grad_y, {f.batch, f.clusters, f.deep_channels}, grad_y.scalar_type());
  Scratch workspace(grad_y, backend.knn_reconstruct_backward_workspace(p), Backend::kHost);
  p.grad_deep = grad_deep.mutable_data_ptr();
  p.workspace = workspace.data();
  if (f.batch > 0) backend.knn_reconstruct_backward(p);
  return grad_deep;
}

}  // namespace tokred
