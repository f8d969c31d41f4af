// Front end of kmedoids: checks, allocation, parameters.
#pragma once

#include "cluster/greedy_select.h"
#include "cluster/kmeans.h"

namespace tokred {

// medoids i32 [B, K], assignment i32 [B, N]; see KmedoidsParams.
template <class Backend>
std::tuple<Tensor, Tensor> kmedoids(const Tensor& x, int64_t num_clusters, int64_t iterations,
                                    const OptionalTensor& given_start, const OptionalTensor& mask,
                                    const Text& metric) {
  KmedoidsParams p{};
  cluster_tokens(p, x, num_clusters, mask, metric);
  check_iterations(iterations);
  if (given_start) {
    check_shape(*given_start, "start", {p.batch, p.clusters}, "[B, num_clusters]");
    check_dtype(*given_start, "start", ScalarType::Int);
    check_same_device(*given_start, "start", x, "x");
  }
  // KKZ: the longest token first, then always the furthest.
  OptionalTensor chosen;
  if (!given_start)
    chosen = greedy_select<Backend>(x, num_clusters, Text{"kcenter"}, {}, {}, mask, metric,
                                    Text{"norm"}, 0.5);
  const Tensor& start = given_start ? *given_start : *chosen;
  p.iterations = iterations;
  p.start = static_cast<const int32_t*>(start.const_data_ptr());
  p.start_stride_batch = start.stride(0);
  p.start_stride_cluster = start.stride(1);

  Backend backend(x);
  Tensor medoids = allocate(x, {p.batch, p.clusters}, ScalarType::Int);
  Tensor assignment = allocate(x, {p.batch, p.tokens}, ScalarType::Int);
  Scratch workspace(x, backend.kmedoids_workspace(p), Backend::kHost);
  p.medoids = static_cast<int32_t*>(medoids.mutable_data_ptr());
  p.assignment = static_cast<int32_t*>(assignment.mutable_data_ptr());
  p.workspace = workspace.data();
  if (p.batch > 0) backend.kmedoids(p);
  return moved(medoids, assignment);
}

}  // namespace tokred
