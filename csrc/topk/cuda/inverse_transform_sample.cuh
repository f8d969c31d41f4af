// inverse_transform_sample from sorted rows: cumulative sums as integers, then a binary search for
// every sample. No product is added to anything, so there is nothing to contract.
#pragma once

#include "topk/cuda/narrow.cuh"
#include "topk/cuda/search.cuh"
#include "topk/cuda/sort.cuh"

namespace tokred::cuda::selecting {

// Keys that ascend by score and then position; a key's top bit marks a pick.
inline constexpr uint64_t kPickedBit = uint64_t{1} << 63;

template <class T>
struct SampleSource {
  InverseTransformParams p;

  __device__ void fill(int64_t row, int64_t begin, int n, uint64_t* keys) const {
    constexpr float kMaxFinite = 3.402823466e+38f;
    const T* scores = row_start<T>(p.scores, row);
    const bool* mask = row_start<bool>(p.mask, row);
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kSortThreads) {
      const int64_t j = begin + i;
      const float x = to_float(scores[j]);
      const float score = x > 0 ? min(x, kMaxFinite) : 0.0f;
      const bool is_there = !mask || mask[j];
      keys[i] =
          is_there ? uint64_t{__float_as_uint(score)} << 32 | static_cast<uint64_t>(j) : kNoKey;
    }
  }
};

struct SampleShared {
  BlockScratch<uint64_t> partial_sums;
  BlockScratch<int> partial;
};

// One row after its sort.
struct Sampler {
  const InverseTransformParams& p;
  uint64_t* keys;
  double* curve;  // normalised cumulative sums; before that, the sums
  int64_t count;  // of unmasked entries
  SampleShared& s;

  __device__ static double score_of(uint64_t key) {
    return __uint_as_float(static_cast<uint32_t>(key >> 32));
  }
  // The entry of the minimum is where the curve starts.
  __device__ uint64_t share(int64_t j, double divisor) const {
    constexpr double kOne = static_cast<double>(int64_t{1} << kProbabilityBits);
    return j > 0 ? static_cast<uint64_t>(score_of(keys[j]) / divisor * kOne) : 0;
  }

  __device__ void make_curve() {
    const double max_score = score_of(keys[count - 1]);
    const double divisor = max_score > 0 ? max_score : 1.0;
    const int64_t own = (count + kSampleThreads - 1) / kSampleThreads;
    const int64_t begin = min(count, threadIdx.x * own), end = min(count, begin + own);
    auto* sums = reinterpret_cast<uint64_t*>(curve);
    uint64_t sum = 0;
    for (int64_t j = begin; j < end; ++j) sum += share(j, divisor);
    const auto add = [](uint64_t x, uint64_t y) { return x + y; };
    sum = block_exclusive_scan<kSampleThreads>(sum, s.partial_sums, add);
    for (int64_t j = begin; j < end; ++j) sums[j] = sum += share(j, divisor);
    __syncthreads();
    const uint64_t total = sums[count - 1];
    __syncthreads();
    const double span = total > 0 ? static_cast<double>(total) : 1.0;
    for (int64_t j = begin; j < end; ++j) curve[j] = static_cast<double>(sums[j]) / span;
    __syncthreads();
  }

  // The first entry of the curve at the minimum distance from `where`.
  __device__ int64_t nearest(double where) const {
    const int64_t above = first_where(count, [&](int64_t j) { return curve[j] >= where; });
    if (above == 0) return 0;
    const double distance = where - curve[above - 1];
    if (above < count && curve[above] - where < distance) return above;
    // Distances fall up to here, and may be equal where they are rounded.
    return first_where(above - 1, [&](int64_t j) { return where - curve[j] <= distance; });
  }

  // Marks the picks; several samples may pick the same entry.
  __device__ void pick() {
    const int64_t first = first_where(count, [&](int64_t j) { return curve[j] > 0; });
    const double start = first < count ? curve[first] : 0.0;
    const double steps = p.num_samples > 1 ? static_cast<double>(p.num_samples - 1) : 1.0;
    const int64_t samples = start > 0 ? p.num_samples : 1;
    for (int64_t i = threadIdx.x; i < samples; i += kSampleThreads) {
      const double where = start + static_cast<double>(i) * (1.0 - start) / steps;
      atomicOr(reinterpret_cast<unsigned long long*>(&keys[nearest(where)]), kPickedBit);
    }
    __syncthreads();
  }

  __device__ int64_t write(int32_t* indices) {
    return enumerate<kSampleThreads>(
        0, count, s.partial, [&](int64_t j) { return (keys[j] & kPickedBit) != 0; },
        [&](int64_t rank, int64_t j) {
          indices[rank] = static_cast<int32_t>(static_cast<uint32_t>(keys[j]));
        });
  }
};

static __global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(const __grid_constant__ InverseTransformParams p, uint64_t* sorted,
                  uint64_t* spare) {
  auto& s = shared_memory<SampleShared>();
  for (int64_t r = blockIdx.x; r < p.rows; r += gridDim.x) {
    uint64_t* keys = sorted + r * p.columns;
    const int64_t count = first_where(p.columns, [&](int64_t j) { return keys[j] == kNoKey; });
    int32_t* indices = p.indices + r * p.num_samples;
    int64_t written = 0;
    if (count > 0 && p.num_samples > 0) {
      Sampler sampler{p, keys, reinterpret_cast<double*>(spare + r * p.columns), count, s};
      sampler.make_curve();
      sampler.pick();
      written = sampler.write(indices);
    }
    if (threadIdx.x == 0) p.counts[r] = static_cast<int32_t>(written);
    for (int64_t e = written + threadIdx.x; e < p.num_samples; e += kSampleThreads) {
      indices[e] = -1;
    }
    __syncthreads();
  }
}

}  // namespace tokred::cuda::selecting
