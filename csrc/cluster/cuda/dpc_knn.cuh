// dpc_knn: tiles of distances on the tensor cores, passed over three times: a warp keeps the k
// nearest of each of its rows; then the nearest denser token; then, of the centres, the nearest.
// Centres are placed by counting the scores above theirs.
#pragma once

#include "cluster/cuda/plan.h"
#include "cluster/params.h"
#include "common/cuda/similarity_tile.cuh"

namespace tokred::cuda::density {

// Arrays of all items.
struct Scratch {
  float* near;    // f32 [B, N, k]: squared distances to the nearest tokens, ascending
  float* mean;    // f32 [B, N]: m, NaN where a token does not take part
  float* score;   // f32 [B, N]: log delta - m
  int32_t* place;  // i32 [B, N]: of a centre its place in centers, else -1
};

template <class T, bool kAsyncCopies>
using Config = SimilarityConfig<T, kAsyncCopies, kNarrowTiles>;
constexpr int kTileRows = kNarrowTiles.rows();

// A tile of squared distances; every warp has its own rows.
struct DistanceTile {
  float at[kTileRows][kSimilarityColumns + 1];
};
template <class Config>
struct Shared {
  SimilarityShared<Config> tiles;
  DistanceTile distances;
};

// Rows [row0, row0 + 64) of an item.
template <class Config>
struct Rows : SimilarityRows<Config> {
  using Base = SimilarityRows<Config>;
  using Base::a, Base::s, Base::row0, Base::row_of, Base::warp_row;
  using typename Base::Dots;
  static_assert(Base::kRowTiles == 1);
  static constexpr int kOwn = 16;  // rows of a warp
  const DpcKnnParams& p;
  const Scratch& out;

  __device__ Rows(const DpcKnnParams& p, const TokenPairs& pairs, const Scratch& out,
                  SimilarityShared<Config>& s, int64_t item, int64_t row0)
      : Base(pairs, s, item, row0), p(p), out(out) {}

  __device__ __forceinline__ int64_t at(int64_t token) const { return a.item * p.a.tokens + token; }
  // f(half, column of the tile, squared distance of row row_of(0, half) to it) for the pairs of
  // this thread; infinite or NaN where a token does not take part.
  template <class F>
  __device__ __forceinline__ void each(const Dots& dots, int64_t column0, F f) const {
#pragma unroll
    for (int i = 0; i < kSimilarityColumns / 2; ++i) {
      const int half = i % 2, e = i / 2 % 2, column = 8 * (i / 4) + lane_id() % 4 * 2 + e;
      const int row = row_of(0, half);
      const float dot = this->repaired(dots[0][i / 4][2 * half + e], row, column, column0);
      const float likeness =
          fmaf(dot * s.rows.scale[row], s.columns.scale[column], s.rows.add[row]) +
          s.columns.add[column];
      const float apart = -likeness;
      f(half, column, apart < 0 ? 0.0f : apart);
    }
  }
};

// Inserts x into an ascending list, whose last number is dropped. All lanes of a warp call it.
__device__ __forceinline__ void insert(float* list, int64_t length, float x) {
  for (int64_t first = 0; first < length; first += kWarp) {
    const int64_t i = first + lane_id();
    const float held = i < length ? list[i] : kInfinity;
    const int place = __popc(__ballot_sync(kAllLanes, held <= x));
    const float before = __shfl_up_sync(kAllLanes, held, 1);
    const float last = __shfl_sync(kAllLanes, held, kWarp - 1);
    if (i < length && lane_id() >= place) list[i] = lane_id() == place ? x : before;
    if (place < kWarp) x = last;
    __syncwarp();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2)
    knn_density_kernel(const __grid_constant__ DpcKnnParams p,
                       const __grid_constant__ Scratch out) {
  auto& shared = shared_memory<Shared<Config>>();
  const int64_t tiles = (p.a.tokens + kTileRows - 1) / kTileRows;
  for (int64_t block = blockIdx.x; block < p.batch * tiles; block += gridDim.x) {
    Rows<Config> rows(p, p, out, shared.tiles, block / tiles, block % tiles * kTileRows);
    const int64_t first = rows.row0 + rows.warp_row;
    const int own = static_cast<int>(max(int64_t{0}, min(int64_t{16}, p.a.tokens - first)));
    for (int64_t i = lane_id(); i < own * p.k; i += kWarp) {
      out.near[rows.at(first) * p.k + i] = kInfinity;
    }
    __syncwarp();
    rows.sweep(0, p.b.count, [&](const auto& dots, int64_t column0) {
      rows.each(dots, column0, [&](int half, int column, float apart) {
        const int row = rows.row_of(0, half);
        const bool itself = column0 + column == rows.row0 + row && apart < kInfinity;
        shared.distances.at[row][column] = itself ? 0.0f : apart;
      });
      __syncwarp();
      for (int row = 0; row < own; ++row) {
        float* list = out.near + rows.at(first + row) * p.k;
#pragma unroll
        for (int half = 0; half < kSimilarityColumns; half += kWarp) {
          const float apart = shared.distances.at[rows.warp_row + row][half + lane_id()];
          unsigned nearer = __ballot_sync(kAllLanes, apart < list[p.k - 1]);
          while (nearer) {
            insert(list, p.k, __shfl_sync(kAllLanes, apart, __ffs(nearer) - 1));
            nearer &= nearer - 1;
            nearer &= __ballot_sync(kAllLanes, apart < list[p.k - 1]);
          }
        }
      }
      __syncwarp();
    });
    if (lane_id() >= own) continue;
    const int64_t token = first + lane_id();
    const float* list = out.near + rows.at(token) * p.k;
    float sum = 0.0f;
    int64_t found = 0;
    for (; found < p.k && list[found] < kInfinity; ++found) sum += list[found];
    const float mean = p.channels > 0 ? sum / static_cast<float>(found * p.channels) : 0.0f;
    out.mean[rows.at(token)] = found == 0 || rows.a.masked(token) ? kNaN : mean;
  }
}

// Scores: the nearest denser token, and what the density adds.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2)
    density_peaks_kernel(const __grid_constant__ DpcKnnParams p,
                         const __grid_constant__ Scratch out) {
  auto& shared = shared_memory<Shared<Config>>();
  const int64_t tiles = (p.a.tokens + kTileRows - 1) / kTileRows;
  for (int64_t block = blockIdx.x; block < p.batch * tiles; block += gridDim.x) {
    Rows<Config> rows(p, p, out, shared.tiles, block / tiles, block % tiles * kTileRows);
    float nearest[2] = {kInfinity, kInfinity}, mean[2];
    int64_t token[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      token[half] = rows.row0 + rows.row_of(0, half);
      mean[half] = token[half] < p.a.tokens ? out.mean[rows.at(token[half])] : kNaN;
    }
    bool is_densest[2] = {true, true};
    rows.sweep(0, p.b.count, [&](const auto& dots, int64_t column0) {
      rows.each(dots, column0, [&](int half, int column, float apart) {
        const int64_t other = column0 + column;
        const float density = other < p.a.tokens ? out.mean[rows.at(other)] : kNaN;
        if (!(density < mean[half] || (density == mean[half] && other < token[half]))) return;
        is_densest[half] = false;
        if (apart < nearest[half]) nearest[half] = apart;
      });
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int dense = is_densest[half];
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        nearest[half] = fminf(nearest[half], __shfl_xor_sync(kAllLanes, nearest[half], step));
        dense &= __shfl_xor_sync(kAllLanes, dense, step);
      }
      if (lane_id() % 4 != 0 || token[half] >= p.a.tokens) continue;
      const float score = 0.5f * logf(nearest[half]) - mean[half];
      const bool here = mean[half] == mean[half];
      out.score[rows.at(token[half])] = !here            ? kNaN
                                        : dense          ? kInfinity
                                        : score == score ? score
                                                         : -kInfinity;
    }
  }
}

// Places: how many scores are above a token's, or equal and before it.
__global__ void __launch_bounds__(kPlaceThreads)
    place_centers_kernel(const __grid_constant__ DpcKnnParams p,
                         const __grid_constant__ Scratch out) {
  const int64_t blocks = (p.a.tokens + kPlaceThreads - 1) / kPlaceThreads;
  for (int64_t block = blockIdx.x; block < p.batch * blocks; block += gridDim.x) {
    const int64_t item = block / blocks;
    const int64_t token = block % blocks * kPlaceThreads + threadIdx.x;
    if (token >= p.a.tokens) continue;
    const float* scores = out.score + item * p.a.tokens;
    const float score = scores[token];
    int64_t place = 0;
    for (int64_t other = 0; other < p.a.tokens; ++other) {
      place += scores[other] > score || (scores[other] == score && other < token);
    }
    const bool is_center = score == score && place < p.clusters;
    out.place[item * p.a.tokens + token] = is_center ? static_cast<int32_t>(place) : -1;
    if (is_center) p.centers[item * p.clusters + place] = static_cast<int32_t>(token);
  }
}

__global__ void __launch_bounds__(kPlaceThreads)
    clear_centers_kernel(const __grid_constant__ DpcKnnParams p) {
  const int64_t stride = int64_t{gridDim.x} * kPlaceThreads;
  for (int64_t i = int64_t{blockIdx.x} * kPlaceThreads + threadIdx.x; i < p.batch * p.clusters;
       i += stride) {
    p.centers[i] = -1;
  }
}

// The nearest centre, the first of equals. `pairs.b` is the list of centres.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 2)
    assign_centers_kernel(const __grid_constant__ DpcKnnParams p,
                          const __grid_constant__ TokenPairs pairs,
                          const __grid_constant__ Scratch out) {
  auto& shared = shared_memory<Shared<Config>>();
  const int64_t tiles = (p.a.tokens + kTileRows - 1) / kTileRows;
  for (int64_t block = blockIdx.x; block < p.batch * tiles; block += gridDim.x) {
    Rows<Config> rows(p, pairs, out, shared.tiles, block / tiles, block % tiles * kTileRows);
    float nearest[2] = {kInfinity, kInfinity};
    int best[2] = {-1, -1};
    rows.sweep(0, pairs.b.count, [&](const auto& dots, int64_t column0) {
      rows.each(dots, column0, [&](int half, int column, float apart) {
        if (apart < nearest[half]) {
          nearest[half] = apart;
          best[half] = static_cast<int>(column0) + column;
        }
      });
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, nearest[half], step);
        const int other_best = __shfl_xor_sync(kAllLanes, best[half], step);
        // As an unsigned number, -1 is the largest place.
        if (other < nearest[half] ||
            (other == nearest[half] &&
             static_cast<unsigned>(other_best) < static_cast<unsigned>(best[half]))) {
          nearest[half] = other;
          best[half] = other_best;
        }
      }
      const int64_t token = rows.row0 + rows.row_of(0, half);
      if (lane_id() % 4 != 0 || token >= p.a.tokens) continue;
      const bool here = out.mean[rows.at(token)] == out.mean[rows.at(token)];
      const int own = out.place[rows.at(token)];
      // A token that is infinitely far from all centres, by overflow, goes to the first of them.
      const bool far = best[half] < 0 && p.clusters > 0;
      p.assignment[rows.at(token)] = !here ? -1 : own >= 0 ? own : far ? 0 : best[half];
    }
  }
}

}  // namespace tokred::cuda::density
