// local_soft_kmeans: a warp a token for its weights on the centroids around it, then a warp a
// centroid for its sum over the tokens around it. Owner computes, in the order of the grid.
#pragma once

#include "cluster/cuda/nearest.cuh"

namespace tokred::cuda::clustering {

// The workspace.
struct LocalSoftMemory {
  float* weight;    // f32 [B, N, side, side], by place relative to the token's cell
  float* offset;    // f32 [B, K]
  int32_t* usable;  // i32 [B, N] whether a token is finite
};

// f(row) with a warp for each of `rows` rows.
template <class F>
__device__ __forceinline__ void each_row(int64_t rows, F f) {
  const int64_t step = int64_t{gridDim.x} * (kClusterThreads / kWarp);
  for (int64_t row = int64_t{blockIdx.x} * (kClusterThreads / kWarp) + warp_id(); row < rows;
       row += step) {
    f(row);
  }
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    soft_usable_kernel(const __grid_constant__ LocalSoftKmeansParams p,
                       const __grid_constant__ LocalSoftMemory memory) {
  each_row(p.batch * p.tokens, [&](int64_t row) {
    const T* x = token_row<T>(p, row / p.tokens, row % p.tokens);
    const float squared = squared_norm(x, p.channels);
    if (lane_id() == 0) memory.usable[row] = squared - squared == 0.0f;
  });
}

// centroid[c] = the sum over f's tokens of w * x[c], over `divisor`: each(add) calls
// add(token, w) for every one of them.
template <class T, class Each>
__device__ __forceinline__ void write_mean(const LocalSoftKmeansParams& p, int64_t item,
                                           float divisor, float* centroid, Each each) {
  constexpr int kEach = 4;  // channels of a lane at a time
  for (int64_t c0 = 0; c0 < p.channels; c0 += kEach * kWarp) {
    float sum[kEach] = {};
    each([&](int64_t token, float w) {
      const T* x = token_row<T>(p, item, token);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t c = c0 + i * kWarp + lane_id();
        if (c < p.channels) sum[i] = fmaf(to_float(x[c]), w, sum[i]);
      }
    });
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t c = c0 + i * kWarp + lane_id();
      if (c < p.channels) centroid[c] = sum[i] / divisor;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    soft_start_kernel(const __grid_constant__ LocalSoftKmeansParams p,
                      const __grid_constant__ LocalSoftMemory memory) {
  each_row(p.batch * p.clusters, [&](int64_t row) {
    const int64_t item = row / p.clusters, k = row % p.clusters;
    const GridRange rows = pooled_tokens(k / p.columns, p.rows, p.height);
    const GridRange columns = pooled_tokens(k % p.columns, p.columns, p.width);
    const auto each = [&](auto f) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        for (int64_t x = columns.begin; x < columns.end; ++x) {
          const int64_t i = y * p.width + x;
          if (memory.usable[item * p.tokens + i]) f(i, 1.0f);
        }
      }
    };
    int count = 0;
    each([&](int64_t, float) { ++count; });
    write_mean<T>(p, item, static_cast<float>(max(count, 1)), p.centroids + row * p.channels, each);
  });
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    soft_weights_kernel(const __grid_constant__ LocalSoftKmeansParams p,
                        const __grid_constant__ LocalSoftMemory memory) {
  const int64_t side = 2 * p.radius + 1, window = side * side;
  each_row(p.batch * p.tokens, [&](int64_t token) {
    const int64_t item = token / p.tokens, i = token % p.tokens;
    const int64_t row = i / p.width * p.rows / p.height, column = i % p.width * p.columns / p.width;
    const T* x = token_row<T>(p, item, i);
    float* weight = memory.weight + token * window;
    const bool usable = memory.usable[token];
    float smallest = kInfinity;
    for (int64_t j = 0; j < window; ++j) {
      const int64_t r = row + j / side - p.radius, s = column + j % side - p.radius;
      const bool there = usable && r >= 0 && r < p.rows && s >= 0 && s < p.columns;
      float distance = kInfinity;
      if (there) {
        const float* centroid = p.centroids + (item * p.clusters + r * p.columns + s) * p.channels;
        float squared = 0.0f;
        for (int64_t c = lane_id(); c < p.channels; c += kWarp) {
          const float difference = to_float(x[c]) - centroid[c];
          squared = fmaf(difference, difference, squared);
        }
        squared = warp_sum(squared);
        if (squared < kInfinity) distance = squared;
      }
      smallest = fminf(smallest, distance);
      if (lane_id() == 0) weight[j] = distance;
    }
    __syncwarp();
    float total = 0.0f;
    for (int64_t j = lane_id(); j < window; j += kWarp) {
      const float distance = weight[j];
      const float w = distance < kInfinity ? expf(-p.temperature * (distance - smallest)) : 0.0f;
      weight[j] = w;
      total += w;
    }
    total = warp_sum(total);
    for (int64_t j = lane_id(); total > 0.0f && j < window; j += kWarp) weight[j] /= total;
  });
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads)
    soft_move_kernel(const __grid_constant__ LocalSoftKmeansParams p,
                     const __grid_constant__ LocalSoftMemory memory) {
  const int64_t side = 2 * p.radius + 1, window = side * side;
  each_row(p.batch * p.clusters, [&](int64_t cluster) {
    const int64_t item = cluster / p.clusters, k = cluster % p.clusters;
    const int64_t r = k / p.columns, s = k % p.columns;
    const GridRange rows = tokens_around(r, p.radius, p.rows, p.height);
    const GridRange columns = tokens_around(s, p.radius, p.columns, p.width);
    const auto each = [&](auto f) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        const int64_t down = r - y * p.rows / p.height + p.radius;
        for (int64_t x = columns.begin; x < columns.end; ++x) {
          const int64_t right = s - x * p.columns / p.width + p.radius, i = y * p.width + x;
          const float w = memory.weight[(item * p.tokens + i) * window + down * side + right];
          if (w != 0.0f) f(i, w);
        }
      }
    };
    float total = 0.0f;
    each([&](int64_t, float w) { total += w; });
    if (total == 0.0f) return;
    write_mean<T>(p, item, fmaxf(total, 1e-16f), p.centroids + cluster * p.channels, each);
  });
}

__global__ void __launch_bounds__(kClusterThreads)
    soft_offset_kernel(const __grid_constant__ LocalSoftKmeansParams p,
                       const __grid_constant__ LocalSoftMemory memory) {
  each_row(p.batch * p.clusters, [&](int64_t row) {
    const float squared = squared_norm(p.centroids + row * p.channels, p.channels);
    if (lane_id() == 0) memory.offset[row] = -0.5f * squared;
  });
}

}  // namespace tokred::cuda::clustering
