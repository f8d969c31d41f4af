// sinkhorn_backward: the costs as sinkhorn makes them; then launches of one block an item, which
// makes the steps once more and keeps them, or goes back through them over the gradient of the
// scores in the L2 cache; and products by tiles, which make rows of the plan as they go.
//
// B = 32, M = 603, N = 126: costs and their gradient, 19 MB. A step back reads both and writes one,
// with three exponentials an entry: about 20 us.
#pragma once

#include "match/cuda/sinkhorn.cuh"

namespace tokred::cuda::matching {

// What lies in the workspace behind the scores of all pairs.
struct GradientMemory {
  float* grad;  // [B, M, N] of the scores, then of the cosines
  float* log_u;  // [B, steps, M] after every step
  float* log_v;  // [B, steps + 1, N] the same, and before the first
  float* grad_u;  // [B, M]
  float* grad_v;  // [B, N]
  float* scale[2];  // [B, M] and [B, N] the inverse norms of rows
  float* along[2];  // [B, M] and [B, N] sums of cosines times their gradients
  int32_t* made;  // [B] steps, 0 where all rows are masked
  int64_t floats;

  __host__ __device__ explicit GradientMemory(const SinkhornBackwardParams& p) {
    const SinkhornParams& f = p.forward;
    const int64_t rows = f.batch * f.a.count, columns = f.batch * f.b.count;
    float* next = sinkhorn_scores(f) + rows * f.b.count;
    const auto take = [&](int64_t count) {
      float* array = next;
      next += count;
      return array;
    };
    grad = take(rows * f.b.count);
    log_u = take(p.max_steps * rows);
    log_v = take((p.max_steps + 1) * columns);
    grad_u = take(rows);
    grad_v = take(columns);
    scale[0] = take(rows);
    scale[1] = take(columns);
    along[0] = take(rows);
    along[1] = take(columns);
    made = reinterpret_cast<int32_t*>(take(f.batch));
    floats = next - sinkhorn_scores(f);
  }
};

// Steps ------------------------------------------------------------------------------------------

// The steps of one item, of which `steps` were made.
struct GradientItem : SinkhornItem {
  const SinkhornBackwardParams& b_params;
  GradientMemory memory;
  float *grad, *grad_u, *grad_v;
  int64_t steps;
  float log_a, log_b;

  __device__ GradientItem(const SinkhornBackwardParams& q, SinkhornShared& s, int64_t item)
      : SinkhornItem(q.forward, s, item), b_params(q), memory(q),
        grad(memory.grad + item * p.a.count * p.b.count), grad_u(memory.grad_u + item * p.a.count),
        grad_v(memory.grad_v + item * p.b.count),
        steps(max(int64_t{0}, min(q.max_steps, int64_t{q.steps[item * q.steps_stride]}))) {
    const int sources = count(a), anchors = count(b);
    if (sources == 0 || anchors == 0) steps = 0;
    log_a = -logf(static_cast<float>(sources));
    log_b = -logf(static_cast<float>(anchors));
  }

  __device__ __forceinline__ float* log_u_after(int64_t step) const {
    return memory.log_u + (item * b_params.max_steps + step - 1) * p.a.count;
  }
  __device__ __forceinline__ float* log_v_after(int64_t step) const {
    return memory.log_v + (item * (b_params.max_steps + 1) + step) * p.b.count;
  }

  // combine(j, sum over the sources, in a fixed order, of f(i, j)) for every anchor.
  template <class F, class Combine>
  __device__ __forceinline__ void sum_columns(F f, Combine combine) {
    for (int64_t j0 = 0; j0 < p.b.count; j0 += kWarp) {
      const int64_t j = j0 + lane_id();
      float sum = 0.0f;
      if (j < p.b.count) each_source([&](int64_t i) { sum += f(i, j); });
      s.total[warp_id()][lane_id()] = sum;
      __syncthreads();
      if (warp_id() == 0 && j < p.b.count) {
        for (int w = 1; w < kSinkhornWarps; ++w) sum += s.total[w][lane_id()];
        combine(j, sum);
      }
      __syncthreads();
    }
  }

  __device__ void make_steps() {
    for (int64_t j = threadIdx.x; j < p.b.count; j += kSinkhornThreads) {
      for (int64_t step = 0; step <= steps; ++step) {
        log_v_after(step)[j] = b.masked(j) ? -kInfinity : 0.0f;
      }
    }
    __syncthreads();
    for (int64_t step = 1; step <= steps; ++step) {
      log_v = log_v_after(step - 1);
      log_u = log_u_after(step);
      scale_rows(log_a, true);
      __syncthreads();
      float* next = log_v_after(step);
      each_anchor(
          [&](int64_t j, const LogSum& sum) { next[j] = log_b - sum.top - logf(sum.total); });
    }
  }

  // Through log_v = log b - logsumexp(scores + log_u) and then log_u = log a - logsumexp(scores +
  // log_v of the step before). Only the last log_u enters the plan itself.
  __device__ void step_back(int64_t step) {
    const float *column = log_u_after(step), *after = log_v_after(step),
                *before = log_v_after(step - 1);
    each_source([&](int64_t i) {
      const float* score = scores + i * p.b.count;
      float *row = grad + i * p.b.count, total = 0.0f;
      for (int64_t j = lane_id(); j < p.b.count; j += kWarp) {
        const float here = row[j], part = grad_v[j] * expf(score[j] + after[j] + column[i] - log_b);
        total += step == steps ? here - part : -part;
        row[j] = here - part;
      }
      total = warp_sum(total);
      for (int64_t j = lane_id(); j < p.b.count; j += kWarp) {
        row[j] -= total * expf(score[j] + before[j] + column[i] - log_a);
      }
      if (lane_id() == 0) grad_u[i] = total;
    });
    __syncthreads();
    sum_columns(
        [&](int64_t i, int64_t j) {
          return grad_u[i] * expf(scores[i * p.b.count + j] + before[j] + column[i] - log_a);
        },
        [&](int64_t j, float sum) { grad_v[j] = -sum; });
  }

  // The products of cosines with their gradients, summed over rows and columns; then those
  // gradients take the place of the gradient of the scores. A cosine comes out of its cost.
  __device__ void reach_cosines() {
    const auto time = [&](int64_t i, int64_t j) {
      return p.time_a ? apart_in_time(p, item, i, j) : 1.0f;
    };
    const auto product = [&](int64_t i, int64_t j) {
      const float score = scores[i * p.b.count + j];
      if (score == -kInfinity) return 0.0f;
      float rest = p.offset ? 1.0f - p.offset[item * p.offset_stride] : 1.0f;
      if (p.position_a) rest = fmaf(p.position_weight, apart_in_space(p, item, i, j), rest);
      const float cosine = fmaf(time(i, j), rest, score * p.eps);  // times that of the times
      return grad[i * p.b.count + j] / p.eps * cosine;
    };
    each_source([&](int64_t i) {
      float sum = 0.0f;
      for (int64_t j = lane_id(); j < p.b.count; j += kWarp) sum += product(i, j);
      sum = warp_sum(sum);
      if (lane_id() == 0) memory.along[0][item * p.a.count + i] = sum;
    });
    sum_columns(product,
                [&](int64_t j, float sum) { memory.along[1][item * p.b.count + j] = sum; });
    each_source([&](int64_t i) {
      float* row = grad + i * p.b.count;
      for (int64_t j = lane_id(); j < p.b.count; j += kWarp) {
        row[j] = b.masked(j) ? 0.0f : row[j] / p.eps * time(i, j);
      }
    });
  }

  __device__ void go_back() {
    sum_columns([&](int64_t i, int64_t j) { return grad[i * p.b.count + j]; },
                [&](int64_t j, float sum) { grad_v[j] = sum; });
    for (int64_t step = steps; step > 0; --step) step_back(step);
    reach_cosines();
  }
};

__global__ void __launch_bounds__(kSinkhornThreads, 4)
    sinkhorn_again_kernel(const __grid_constant__ SinkhornBackwardParams p) {
  auto& s = shared_memory<SinkhornShared>();
  for (int64_t item = blockIdx.x; item < p.forward.batch; item += gridDim.x) {
    GradientItem again(p, s, item);
    again.make_steps();
    if (threadIdx.x == 0) again.memory.made[item] = static_cast<int32_t>(again.steps);
  }
}

__global__ void __launch_bounds__(kSinkhornThreads, 2)
    sinkhorn_back_kernel(const __grid_constant__ SinkhornBackwardParams p) {
  auto& s = shared_memory<SinkhornShared>();
  for (int64_t item = blockIdx.x; item < p.forward.batch; item += gridDim.x) {
    GradientItem(p, s, item).go_back();
    __syncthreads();
  }
}

// Products ---------------------------------------------------------------------------------------

// The plan of one item.
struct FinalPlan {
  const SinkhornParams& p;
  const float *scores, *log_u, *log_v;
  bool none;

  __device__ FinalPlan(const SinkhornBackwardParams& q, const GradientMemory& memory, int64_t item)
      : p(q.forward), scores(sinkhorn_scores(p) + item * p.a.count * p.b.count) {
    const int64_t steps = memory.made[item];
    none = steps == 0;
    log_u = memory.log_u + (item * q.max_steps + (none ? 0 : steps - 1)) * p.a.count;
    log_v = memory.log_v + (item * (q.max_steps + 1) + steps) * p.b.count;
  }
  // Of a source that takes part.
  __device__ __forceinline__ float at(int64_t i, int64_t j) const {
    return none ? 0.0f : expf(scores[i * p.b.count + j] + log_v[j] + log_u[i]);
  }
};

// The inverse norms of all rows, a warp a row.
template <class T>
__global__ void __launch_bounds__(kSinkhornThreads)
    sinkhorn_norm_kernel(const __grid_constant__ SinkhornBackwardParams p) {
  const SinkhornParams& f = p.forward;
  const GradientMemory memory(p);
  const int64_t sources = f.batch * f.a.count, rows = sources + f.batch * f.b.count;
  for (int64_t at = int64_t{blockIdx.x} * kSinkhornWarps + warp_id(); at < rows;
       at += int64_t{gridDim.x} * kSinkhornWarps) {
    const bool is_anchor = at >= sources;
    const TokenSet& set = is_anchor ? f.b : f.a;
    const int64_t row = is_anchor ? at - sources : at;
    const T* x = TokenRows{set, row / set.count}.row<T>(row % set.count);
    float squared = 0.0f;
    for (int64_t c = lane_id(); c < f.channels; c += kWarp) {
      squared = fmaf(to_float(x[c]), to_float(x[c]), squared);
    }
    squared = warp_sum(squared);
    float* scale = is_anchor ? memory.scale[1] : memory.scale[0];
    if (lane_id() == 0) scale[row] = 1.0f / fmaxf(sqrtf(squared), kNormEps);
  }
}

struct WeightShared {
  float x[kWeightChannels][kWeightSources + 4];
  float aggregation[kWeightChannels][kWeightAnchors + 1];
};

// The gradient of the scores through the plan alone, a tile of sources by anchors a block; a thread
// has eight sources of one anchor.
template <class T>
__global__ void __launch_bounds__(kSinkhornThreads, 2)
    sinkhorn_weight_kernel(const __grid_constant__ SinkhornBackwardParams p) {
  auto& s = shared_memory<WeightShared>();
  const SinkhornParams& f = p.forward;
  const GradientMemory memory(p);
  constexpr int kEach = kWeightSources * kWeightAnchors / kSinkhornThreads;
  static_assert(kWeightAnchors == kWarp && kEach == 8);
  const int64_t source_tiles = (f.a.count + kWeightSources - 1) / kWeightSources;
  const int64_t anchor_tiles = (f.b.count + kWeightAnchors - 1) / kWeightAnchors;
  for (int64_t block = blockIdx.x; block < f.batch * source_tiles * anchor_tiles;
       block += gridDim.x) {
    const int64_t j0 = block % anchor_tiles * kWeightAnchors;
    const int64_t i0 = block / anchor_tiles % source_tiles * kWeightSources;
    const int64_t item = block / anchor_tiles / source_tiles;
    const TokenRows a{f.a, item}, b{f.b, item};
    const float* aggregation = p.grad_aggregation + item * p.aggregation_stride[0];
    float dot[kEach] = {};
    for (int64_t c0 = 0; c0 < f.channels; c0 += kWeightChannels) {
      const int64_t c = c0 + lane_id();
      for (int at = warp_id(); at < kWeightSources; at += kSinkhornWarps) {
        const int64_t i = i0 + at;
        const bool there = i < f.a.count && c < f.channels && !a.masked(i);
        s.x[lane_id()][at] = there ? to_float(a.row<T>(i)[c]) : 0.0f;
      }
      for (int at = warp_id(); at < kWeightAnchors; at += kSinkhornWarps) {
        const int64_t j = j0 + at;
        const bool there = j < f.b.count && c < f.channels && !b.masked(j);
        s.aggregation[lane_id()][at] = there ? aggregation[j * p.aggregation_stride[1] + c] : 0.0f;
      }
      __syncthreads();
#pragma unroll 8
      for (int k = 0; k < kWeightChannels; ++k) {
        const float g = s.aggregation[k][lane_id()];
#pragma unroll
        for (int n = 0; n < kEach; ++n) {
          dot[n] = fmaf(s.x[k][warp_id() * kEach + n], g, dot[n]);
        }
      }
      __syncthreads();
    }
    const int64_t j = j0 + lane_id();
    if (j >= f.b.count) continue;
    const FinalPlan plan(p, memory, item);
    const bool anchor_out = b.masked(j);
    const float load =
        anchor_out ? 0.0f : p.grad_load[item * p.load_stride[0] + j * p.load_stride[1]];
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int64_t i = i0 + warp_id() * kEach + n;
      if (i >= f.a.count) continue;
      memory.grad[(item * f.a.count + i) * f.b.count + j] =
          anchor_out || a.masked(i) ? 0.0f : plan.at(i, j) * (dot[n] + load);
    }
  }
}

template <bool kOfSources>
struct RowGradientShared {
  float cosine[kAggregationSources][kAggregationAnchors + 1];
  float unit[kAggregationSources][kAggregationChannels];
};
template <>
struct RowGradientShared<true> : RowGradientShared<false> {
  float plan[kAggregationSources][kAggregationAnchors + 1];
  float aggregation[kAggregationSources][kAggregationChannels];
};

// The gradient of sources or of anchors, a tile of 32 rows by 64 channels a block, over 32 partners
// at a time; a thread has two rows by four channels.
template <class T, bool kOfSources>
__global__ void __launch_bounds__(kSinkhornThreads, 2)
    sinkhorn_row_gradient_kernel(const __grid_constant__ SinkhornBackwardParams p) {
  auto& s = shared_memory<RowGradientShared<kOfSources>>();
  const SinkhornParams& f = p.forward;
  const GradientMemory memory(p);
  constexpr int kRows = kAggregationAnchors, kPartners = kAggregationSources;
  constexpr int kWide = kAggregationChannels / 4;
  static_assert(kSinkhornThreads == kWide * kRows / 2);
  const TokenSet &own = kOfSources ? f.a : f.b, &other = kOfSources ? f.b : f.a;
  const int64_t row_tiles = (own.count + kRows - 1) / kRows;
  const int64_t channel_tiles = (f.channels + kAggregationChannels - 1) / kAggregationChannels;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t block = blockIdx.x; block < f.batch * row_tiles * channel_tiles;
       block += gridDim.x) {
    const int64_t c0 = block % channel_tiles * kAggregationChannels;
    const int64_t row0 = block / channel_tiles % row_tiles * kRows;
    const int64_t item = block / channel_tiles / row_tiles;
    const TokenRows rows{own, item}, partners{other, item};
    const FinalPlan plan(p, memory, item);
    const float* grad = memory.grad + item * f.a.count * f.b.count;
    const float* scale = memory.scale[kOfSources] + item * other.count;
    float cosine[2][4] = {}, direct[2][4] = {};
    for (int64_t k0 = 0; k0 < other.count && !plan.none; k0 += kPartners) {
      for (int at = thread; at < kPartners * kRows; at += kSinkhornThreads) {
        // Neighbouring threads have neighbouring anchors.
        const int row = kOfSources ? at / kPartners : at % kRows;
        const int partner = kOfSources ? at % kPartners : at / kRows;
        const int64_t i = kOfSources ? row0 + row : k0 + partner;
        const int64_t j = kOfSources ? k0 + partner : row0 + row;
        const bool there = i < f.a.count && j < f.b.count && !rows.masked(row0 + row) &&
                           !partners.masked(k0 + partner);
        s.cosine[partner][row] = there ? grad[i * f.b.count + j] : 0.0f;
        if constexpr (kOfSources) s.plan[partner][row] = there ? plan.at(i, j) : 0.0f;
      }
      for (int at = thread; at < kPartners * kAggregationChannels; at += kSinkhornThreads) {
        const int partner = at / kAggregationChannels, channel = at % kAggregationChannels;
        const int64_t k = k0 + partner, c = c0 + channel;
        const bool there = k < other.count && c < f.channels && !partners.masked(k);
        s.unit[partner][channel] = there ? to_float(partners.row<T>(k)[c]) * scale[k] : 0.0f;
        if constexpr (kOfSources) {
          s.aggregation[partner][channel] =
              there ? p.grad_aggregation[item * p.aggregation_stride[0] +
                                         k * p.aggregation_stride[1] + c]
                    : 0.0f;
        }
      }
      __syncthreads();
#pragma unroll 8
      for (int k = 0; k < kPartners; ++k) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const int row = thread / kWide * 2 + n / 4, channel = thread % kWide + n % 4 * kWide;
          cosine[n / 4][n % 4] = fmaf(s.cosine[k][row], s.unit[k][channel], cosine[n / 4][n % 4]);
          if constexpr (kOfSources) {
            direct[n / 4][n % 4] =
                fmaf(s.plan[k][row], s.aggregation[k][channel], direct[n / 4][n % 4]);
          }
        }
      }
      __syncthreads();
    }
    T* out = static_cast<T*>(kOfSources ? p.grad_x : p.grad_anchors);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int64_t row = row0 + thread / kWide * 2 + n / 4;
      const int64_t c = c0 + thread % kWide + n % 4 * kWide;
      if (row >= own.count || c >= f.channels) continue;
      const int64_t at = item * own.count + row;
      float total = 0.0f;
      if (!plan.none && !rows.masked(row)) {
        // A row of no length has no direction, and no gradient through it.
        const float inverse = memory.scale[!kOfSources][at], along = memory.along[!kOfSources][at];
        const float unit = to_float(rows.row<T>(row)[c]) * inverse;
        const float across = cosine[n / 4][n % 4] - unit * along;
        total = direct[n / 4][n % 4] + (inverse < 1.0f / kNormEps ? across * inverse : 0.0f);
      }
      out[at * f.channels + c] = from_float<T>(total);
    }
  }
}

}  // namespace tokred::cuda::matching
