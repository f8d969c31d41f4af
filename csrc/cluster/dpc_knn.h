// Front end of dpc_knn: checks, allocation, parameters.
#pragma once

#include <algorithm>

#include "cluster/params.h"
#include "tensor.h"

namespace tokred {

// centers i32 [B, M], assignment i32 [B, N]; see DpcKnnParams.
template <class Backend>
std::tuple<Tensor, Tensor> dpc_knn(const Tensor& x, int64_t num_clusters, int64_t k,
                                   const OptionalTensor& mask) {
  DpcKnnParams p{};
  p.dtype = float_dtype(x, "x", false);
  p.a = p.b = token_set(x, "x", mask, "mask", std::nullopt, "weight");
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  TOKRED_CHECK(num_clusters >= 0 && num_clusters <= kMax,
               "num_clusters must be between 0 and 2^31 - 1, got ", num_clusters);
  TOKRED_CHECK(k >= 1, "k must be at least 1, got ", k);
  p.metric = Metric::l2;
  p.batch = x.size(0);
  p.channels = x.size(2);
  p.clusters = num_clusters;
  p.k = std::min(k, std::max<int64_t>(p.a.tokens, 1));
  Backend backend(x);
  Tensor centers = allocate(x, {p.batch, num_clusters}, ScalarType::Int);
  Tensor assignment = allocate(x, {p.batch, p.a.tokens}, ScalarType::Int);
  Scratch workspace(x, backend.dpc_knn_workspace(p), Backend::kHost);
  p.centers = static_cast<int32_t*>(centers.mutable_data_ptr());
  p.assignment = static_cast<int32_t*>(assignment.mutable_data_ptr());
  p.workspace = workspace.data();
  if (p.batch > 0) backend.dpc_knn(p);
  return moved(centers, assignment);
}

}  // namespace tokred
