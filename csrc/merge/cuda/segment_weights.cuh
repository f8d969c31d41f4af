// segment_weights and its gradient: what every token weighs among the members of its segment. A
// warp owns a segment, its lanes share the members; in gaussian they share the channels.
#pragma once

#include "common/cuda/row_io.cuh"
#include "merge/cuda/members.cuh"

namespace tokred::cuda::merging {

// Calls f(token) for every member of the slot, one lane each.
template <class F>
__device__ __forceinline__ void each_member(const Slot& slot, F f) {
  for (int m = lane_id(); m < slot.count; m += kWarp) f(slot.members[m]);
}

// weight_i = exp(logit(i)) / sum; no logit is above `highest`.
template <class F>
__device__ __forceinline__ void write_softmax(const Slot& slot, float highest, float* out,
                                              F logit) {
  const float base = highest == -kInfinity ? 0.0f : highest;
  float total = 0.0f;
  each_member(slot, [&](int64_t token) {
    const float share = expf(logit(token) - base);
    out[token] = share;
    total += share;
  });
  total = warp_sum(total);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  each_member(slot, [&](int64_t token) { out[token] *= inverse; });
}

__device__ __forceinline__ int64_t pivot_of(const Slot& slot) {
  return slot.p.weight.data ? slot.heaviest() : slot.members[slot.count / 2];
}

// |a - b|^2, summed lane by lane in ascending channels and then over the lanes.
template <int kWidth, class T>
__device__ __forceinline__ float squared_distance(const T* a, const T* b, int64_t channels) {
  using RowPart = Part<T, kWidth, 2>;
  float sum = 0.0f;
  for (int64_t c = 0; c < channels; c += RowPart::kChannels) {
    RowPart left, right;
    left.load(a, c, channels);
    right.load(b, c, channels);
    RowPart::each(c, channels, [&](int n, int64_t) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float difference = left.piece[n].get(i) - right.piece[n].get(i);
        sum = fmaf(difference, difference, sum);
      }
    });
  }
  return warp_sum(sum);
}

// sqrt, last and softmax.
static __global__ void __launch_bounds__(kMergeThreads)
    segment_weights_kernel(const __grid_constant__ SegmentWeightsParams p) {
  const SlotBlock block(p.segments, shared_memory<MergeShared>());
  float* out = static_cast<float*>(p.out) + block.item * p.segments.tokens;
  for (int i = warp_id(); i < block.slots; i += kMergeThreads / kWarp) {
    const Slot slot(p.segments, block, i);
    if (p.mode == SegmentMode::softmax) {
      float highest = -kInfinity;
      each_member(slot, [&](int64_t token) {
        const float logit = slot.weight(token);
        if (logit > highest) highest = logit;
      });
      write_softmax(slot, warp_max(highest), out,
                    [&](int64_t token) { return slot.weight(token); });
    } else if (p.mode == SegmentMode::sqrt) {
      const float share = 1.0f / sqrtf(static_cast<float>(slot.count));
      each_member(slot, [&](int64_t token) { out[token] = share; });
    } else {
      const int last = slot.count - 1;
      each_member(slot,
                  [&](int64_t token) { out[token] = token == slot.members[last] ? 1.0f : 0.0f; });
    }
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMergeThreads, 2)
    gaussian_weights_kernel(const __grid_constant__ SegmentWeightsParams p) {
  const SlotBlock block(p.segments, shared_memory<MergeShared>());
  float* out = static_cast<float*>(p.out) + block.item * p.segments.tokens;
  for (int i = warp_id(); i < block.slots; i += kMergeThreads / kWarp) {
    const Slot slot(p.segments, block, i);
    if (slot.count == 0) continue;
    const T* pivot = slot.x<T>(pivot_of(slot));
    float total = 0.0f;
    for (int m = 0; m < slot.count; ++m) {
      const int64_t token = slot.members[m];
      const float distance = squared_distance<kWidth>(slot.x<T>(token), pivot, p.segments.channels);
      if (lane_id() == 0) out[token] = distance;
      total += distance;
    }
    __syncwarp();  // lane 0 wrote the distances
    const float sigma = static_cast<float>(p.sigma);
    const float variance =
        sigma > 0.0f ? sigma * sigma : total / static_cast<float>(slot.count) + 1e-8f;
    const float scale = -0.5f / variance;
    write_softmax(slot, 0.0f, out, [&](int64_t token) { return out[token] * scale; });
  }
}

// 0 for the tokens of no segment.
static __global__ void __launch_bounds__(kMergeThreads)
    skipped_weights_kernel(const __grid_constant__ MergeParams p, float* out) {
  const int64_t entry = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (entry >= p.batch * p.tokens) return;
  if (relative_slot(p, entry / p.tokens, entry % p.tokens, 0) < 0) out[entry] = 0.0f;
}

// The same for rows of the gradient of x.
template <class T, int kWidth>
__global__ void __launch_bounds__(kMergeThreads)
    skipped_rows_kernel(const __grid_constant__ MergeParams p, void* rows) {
  const int64_t row = int64_t{blockIdx.x} * (kMergeThreads / kWarp) + warp_id();
  if (row >= p.batch * p.tokens) return;
  if (relative_slot(p, row / p.tokens, row % p.tokens, 0) >= 0) return;
  zero_row<kWidth>(static_cast<T*>(rows) + row * p.channels, p.channels);
}

// The gradient of the logits of a segment whose weights are a softmax: w (g - sum w g).
struct LogitGradient {
  const SegmentWeightsBackwardParams& p;
  int64_t item;
  float mean;  // sum w g

  static __device__ float read(const TokenTable& table, int64_t item, int64_t token) {
    return static_cast<const float*>(
        table.data)[item * table.stride_batch + token * table.stride_token];
  }
  __device__ LogitGradient(const SegmentWeightsBackwardParams& p, const Slot& slot)
      : p(p), item(slot.item), mean(0.0f) {
    each_member(slot, [&](int64_t token) {
      mean = fmaf(read(p.weights, item, token), read(p.grad, item, token), mean);
    });
    mean = warp_sum(mean);
  }
  __device__ float operator()(int64_t token) const {
    return read(p.weights, item, token) * (read(p.grad, item, token) - mean);
  }
};

static __global__ void __launch_bounds__(kMergeThreads)
    softmax_weights_backward_kernel(const __grid_constant__ SegmentWeightsBackwardParams p) {
  const MergeParams& s = p.forward.segments;
  const SlotBlock block(s, shared_memory<MergeShared>());
  float* out = static_cast<float*>(p.grad_input) + block.item * s.tokens;
  for (int i = warp_id(); i < block.slots; i += kMergeThreads / kWarp) {
    const Slot slot(s, block, i);
    const LogitGradient grad(p, slot);
    each_member(slot, [&](int64_t token) { out[token] = grad(token); });
  }
}

// With logits -d / 2v, the gradient of d_i is -h_i / 2v for the gradient h of the logits; where v
// is the mean of d, every d_i receives (sum h d) / 2v^2 n besides. d_i gives 2 (x_i - x_pivot) of
// its own to x_i, and takes it from x_pivot.
template <class T, int kWidth>
__global__ void __launch_bounds__(kMergeThreads, 2)
    gaussian_weights_backward_kernel(const __grid_constant__ SegmentWeightsBackwardParams p) {
  using RowPart = Part<T, kWidth, 2>;
  const MergeParams& s = p.forward.segments;
  const SlotBlock block(s, shared_memory<MergeShared>());
  T* grad_x = static_cast<T*>(p.grad_input) + block.item * s.tokens * s.channels;
  for (int i = warp_id(); i < block.slots; i += kMergeThreads / kWarp) {
    const Slot slot(s, block, i);
    if (slot.count == 0) continue;
    const int64_t center = pivot_of(slot);
    const T* pivot = slot.x<T>(center);
    const LogitGradient grad(p, slot);
    const float sigma = static_cast<float>(p.forward.sigma);
    float variance = sigma * sigma, through_variance = 0.0f;
    if (!(sigma > 0.0f)) {
      float total = 0.0f, aligned = 0.0f;
      for (int m = 0; m < slot.count; ++m) {
        const int64_t token = slot.members[m];
        const float distance = squared_distance<kWidth>(slot.x<T>(token), pivot, s.channels);
        total += distance;
        aligned = fmaf(grad(token), distance, aligned);
      }
      const float count = static_cast<float>(slot.count);
      variance = total / count + 1e-8f;
      through_variance = aligned / (2.0f * variance * variance * count);
    }
    for (int64_t c = 0; c < s.channels; c += RowPart::kChannels) {
      RowPart at_pivot;
      at_pivot.load(pivot, c, s.channels);
      Values<kWidth, 2> total;
      total.fill([](int, int) { return 0.0f; });
#pragma unroll 1
      for (int m = 0; m < slot.count; ++m) {
        const int64_t token = slot.members[m];
        const float factor = 2.0f * through_variance - grad(token) / variance;
        RowPart x;
        x.load(slot.x<T>(token), c, s.channels);
        Values<kWidth, 2> moved;
        moved.fill(
            [&](int n, int k) { return (x.piece[n].get(k) - at_pivot.piece[n].get(k)) * factor; });
        total.fill([&](int n, int k) { return total.at[n][k] + moved.at[n][k]; });
        if (token != center) moved.store(grad_x + token * s.channels, c, s.channels);
      }
      total.fill([&](int n, int k) { return -total.at[n][k]; });
      total.store(grad_x + center * s.channels, c, s.channels);
    }
  }
}

}  // namespace tokred::cuda::merging
