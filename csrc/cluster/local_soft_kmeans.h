// Front end of local_soft_kmeans: checks, allocation, parameters.
#pragma once

#include "cluster/kmeans.h"

namespace tokred {

// centroids f32 [B, rows * columns, C], assignment i32 [B, N]; see LocalSoftKmeansParams.
template <class Backend>
std::tuple<Tensor, Tensor> local_soft_kmeans(const Tensor& x, const std::vector<int64_t>& grid,
                                             const std::vector<int64_t>& clusters,
                                             int64_t iterations, double temperature,
                                             int64_t window) {
  LocalSoftKmeansParams p{};
  TOKRED_CHECK(grid.size() == 2, "grid must be two numbers, H and W, got ", grid.size());
  TOKRED_CHECK(clusters.size() == 2, "clusters must be two numbers, h and w, got ",
               clusters.size());
  const int64_t height = grid[0], width = grid[1], rows = clusters[0], columns = clusters[1];
  check_dim(x, "x", 3, "[B, H * W, C]");
  int64_t tokens = 0;
  const bool overflows = __builtin_mul_overflow(height, width, &tokens);
  TOKRED_CHECK(height >= 0 && width >= 0 && !overflows && tokens == x.size(1),
               "grid must have as many tokens as x (", x.size(1), "), got ", height, " x ", width);
  TOKRED_CHECK(rows >= 0 && rows <= height && columns >= 0 && columns <= width,
               "clusters must be between 0 and the grid (", height, " x ", width, "), got ", rows,
               " x ", columns);
  check_iterations(iterations);
  TOKRED_CHECK(std::isfinite(temperature) && temperature >= 0,
               "temperature must be finite and at least 0, got ", temperature);
  TOKRED_CHECK(window > 0 && window < 256 && window % 2 == 1,
               "window must be odd and between 1 and 255, got ", window);
  cluster_tokens(p, x, rows * columns, std::nullopt, Text{"l2"});
  p.height = height;
  p.width = width;
  p.rows = rows;
  p.columns = columns;
  p.iterations = iterations;
  p.radius = std::min(window / 2, std::max(rows, columns));
  p.temperature = static_cast<float>(temperature);

  Backend backend(x);
  Tensor centroids = allocate(x, {p.batch, p.clusters, p.channels}, ScalarType::Float);
  Tensor assignment = allocate(x, {p.batch, p.tokens}, ScalarType::Int);
  Scratch workspace(x, backend.local_soft_kmeans_workspace(p), Backend::kHost);
  p.centroids = static_cast<float*>(centroids.mutable_data_ptr());
  p.assignment = static_cast<int32_t*>(assignment.mutable_data_ptr());
  p.workspace = workspace.data();
  if (p.batch > 0) backend.local_soft_kmeans(p);
  return moved(centroids, assignment);
}

}  // namespace tokred
