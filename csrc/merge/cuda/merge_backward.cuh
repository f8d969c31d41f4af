// merge_backward: gradients of merge. Owner computes: a token belongs to one slot, so the warp that
// owns the slot writes all of the token's gradients; tokens without a slot are zeroed by a kernel
// of their own.
#pragma once

#include "merge/cuda/merge.cuh"

namespace tokred::cuda::merging {

// The gradients of one slot's members.
struct Gradients {
  const MergeBackwardParams& p;
  int64_t item, slot;

  template <class T>
  __device__ const T* y() const {
    return static_cast<const T*>(p.grad_y) + item * p.grad_y_stride_batch +
           slot * p.grad_y_stride_token;
  }
  // 0 where the gradients of sizes are not wanted.
  __device__ float size_out() const {
    if (p.only_x) return 0.0f;
    const TokenTable& table = p.grad_size_out;
    return static_cast<const float*>(
        table.data)[item * table.stride_batch + slot * table.stride_token];
  }
  template <class T>
  __device__ T* x(int64_t token) const {
    return static_cast<T*>(p.grad_x) + (item * p.forward.tokens + token) * p.forward.channels;
  }
  __device__ float& size(int64_t token) const {
    return static_cast<float*>(p.grad_size)[item * p.forward.tokens + token];
  }
  __device__ float& weight(int64_t token) const {
    return static_cast<float*>(p.grad_weight)[item * p.forward.tokens + token];
  }
};

// Where y does not depend on sizes and weights.
__device__ __forceinline__ void write_constant_factors(const Slot& slot, const Gradients& grad) {
  const float size_out = grad.size_out();
  for (int m = lane_id(); m < slot.count; m += kWarp) {
    grad.size(slot.members[m]) = size_out;
    grad.weight(slot.members[m]) = 0.0f;
  }
}

// Where a member enters y as coefficient * x: grad.weight holds the gradient of each coefficient,
// and is divided between weight and size.
__device__ __forceinline__ void share_coefficients(const Slot& slot, const Gradients& grad,
                                                   bool use_size, float factor, float offset) {
  __syncwarp();  // lane 0 wrote grad.weight
  if (grad.p.only_x) return write_constant_factors(slot, grad);
  const float size_out = grad.size_out();
  for (int m = lane_id(); m < slot.count; m += kWarp) {
    const int64_t token = slot.members[m];
    const float dot = (grad.weight(token) - offset) * factor;
    grad.size(token) = use_size ? fmaf(slot.weight(token), dot, size_out) : size_out;
    grad.weight(token) = use_size ? slot.size(token) * dot : dot;
  }
}

// sum, mean and plain_mean: y = sum of coefficient * x, over the total of the coefficients.
template <class T, int kWidth>
__device__ __forceinline__ void linear_backward(const Slot& slot, const Gradients& grad) {
  using C = MergeConfig<T, kWidth>;
  const MergeMode mode = slot.p.mode;
  const int64_t channels = slot.p.channels;
  const bool use_size = mode == MergeMode::mean, divided = mode != MergeMode::sum;
  const float total = divided ? slot.total(use_size) : 1.0f;
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  float along_y = 0.0f;  // grad_y . y
  for (int m = 0; m < slot.count; ++m) {
    const int64_t token = slot.members[m];
    const float share = slot.coefficient(token, use_size) * inverse;
    if (!grad.p.only_x) {
      const float dot = dot_rows<kWidth>(grad.y<T>(), slot.x<T>(token), channels);
      if (lane_id() == 0) grad.weight(token) = dot;
      along_y = fmaf(share, dot, along_y);
    }
    for (int64_t c = 0; c < channels; c += C::RowPart::kChannels) {
      typename C::RowPart g;
      g.load(grad.y<T>(), c, channels);
      typename C::RowValues value;
      value.fill([&](int n, int i) { return g.piece[n].get(i) * share; });
      value.store(grad.x<T>(token), c, channels);
    }
  }
  share_coefficients(slot, grad, use_size, inverse, divided ? along_y : 0.0f);
}

// amax and amin: tied members share the gradient evenly; NaN ties with nothing.
template <class T, int kWidth>
__device__ __forceinline__ void extreme_backward(const Slot& slot, const Gradients& grad) {
  using C = MergeConfig<T, kWidth>;
  const int64_t channels = slot.p.channels;
  const bool is_max = slot.p.mode == MergeMode::amax;
  for (int64_t c = 0; c < channels; c += C::RowPart::kChannels) {
    typename C::RowValues best, ties;
    for (int m = 0; m < slot.count; ++m) {
      typename C::RowPart x;
      x.load(slot.x<T>(slot.members[m]), c, channels);
      ties.fill([&](int n, int i) {
        const float v = x.piece[n].get(i);
        if (m == 0 || is_more_extreme(v, best.at[n][i], is_max)) {
          best.at[n][i] = v;
          return 1.0f;
        }
        return ties.at[n][i] + (v == best.at[n][i] ? 1.0f : 0.0f);
      });
    }
    typename C::RowPart g;
    g.load(grad.y<T>(), c, channels);
    for (int m = 0; m < slot.count; ++m) {
      typename C::RowPart x;
      x.load(slot.x<T>(slot.members[m]), c, channels);
      typename C::RowValues value;
      value.fill([&](int n, int i) {
        const bool wins = x.piece[n].get(i) == best.at[n][i];
        return wins ? g.piece[n].get(i) / ties.at[n][i] : 0.0f;
      });
      value.store(grad.x<T>(slot.members[m]), c, channels);
    }
  }
  write_constant_factors(slot, grad);
}

template <class T, int kWidth>
__device__ __forceinline__ void prune_backward(const Slot& slot, const Gradients& grad) {
  const int64_t keeper = slot.heaviest();
  for (int m = 0; m < slot.count; ++m) {
    const int64_t token = slot.members[m];
    T* x = grad.x<T>(token);
    if (token == keeper) {
      copy_row<kWidth>(x, grad.y<T>(), slot.p.channels);
    } else {
      zero_row<kWidth>(x, slot.p.channels);
    }
  }
  write_constant_factors(slot, grad);
}

// halving: the last member of all but the keeper has weight 1/2, the one before it 1/4, and the
// keeper what the first of them has.
template <class T, int kWidth>
__device__ __forceinline__ void halving_backward(const Slot& slot, const Gradients& grad) {
  using C = MergeConfig<T, kWidth>;
  const int64_t channels = slot.p.channels, keeper = slot.heaviest();
  for (int64_t c = 0; c < channels; c += C::RowPart::kChannels) {
    typename C::RowPart g;
    g.load(grad.y<T>(), c, channels);
    const auto write = [&](int64_t token, float share) {
      typename C::RowValues value;
      value.fill([&](int n, int i) { return g.piece[n].get(i) * share; });
      value.store(grad.x<T>(token), c, channels);
    };
    float share = 1.0f;
#pragma unroll 1
    for (int m = slot.count - 1; m >= 0; --m) {
      if (slot.members[m] == keeper) continue;
      share *= 0.5f;
      write(slot.members[m], share);
    }
    write(keeper, share);
  }
  write_constant_factors(slot, grad);
}

// The gradients of one part of the members' rows; see maxnorm_backward.
template <class T, int kWidth>
__device__ __forceinline__ void maxnorm_part(const Slot& slot, const Gradients& grad, int64_t first,
                                             float gain, float back, float own, int64_t longest) {
  using C = MergeConfig<T, kWidth>;
  const int64_t channels = slot.p.channels;
  typename C::RowValues s;
  weighted_sum<T>(s, slot, true, first);
  typename C::RowPart g;
  g.load(grad.y<T>(), first, channels);
  s.fill([&](int n, int i) { return gain * fmaf(-s.at[n][i], back, g.piece[n].get(i)); });
  for (int m = 0; m < slot.count; ++m) {
    const int64_t token = slot.members[m];
    const float coefficient = slot.coefficient(token, true);
    const float own_part = token == longest ? own : 0.0f;
    typename C::RowPart x;
    x.load(slot.x<T>(token), first, channels);
    float dot = 0.0f;
    C::RowPart::each(first, channels, [&](int n, int64_t) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) dot = fmaf(s.at[n][i], x.piece[n].get(i), dot);
    });
    dot = warp_sum(dot);
    if (lane_id() == 0) grad.weight(token) = first == 0 ? dot : grad.weight(token) + dot;
    typename C::RowValues value;
    value.fill([&](int n, int i) {
      const float shared = coefficient * s.at[n][i];
      return own_part == 0.0f ? shared : fmaf(own_part, x.piece[n].get(i), shared);
    });
    value.store(grad.x<T>(token), first, channels);
  }
}

// maxnorm: y = s / |s| * R with s the sum of coefficient * x and R the norm of the longest member,
// so grad_s = R / |s| (g - s (g . s) / |s|^2), and the longest member also receives (g . s) / |s|
// of its own direction.
template <class T, int kWidth>
__device__ __forceinline__ void maxnorm_backward(const Slot& slot, const Gradients& grad) {
  using C = MergeConfig<T, kWidth>;
  const int64_t channels = slot.p.channels;
  float squared = 0.0f, aligned = 0.0f;
  for (int64_t c = 0; c < channels; c += C::RowPart::kChannels) {
    typename C::RowValues s;
    weighted_sum<T>(s, slot, true, c);
    typename C::RowPart g;
    g.load(grad.y<T>(), c, channels);
    C::RowPart::each(c, channels, [&](int n, int64_t) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        squared = fmaf(s.at[n][i], s.at[n][i], squared);
        aligned = fmaf(s.at[n][i], g.piece[n].get(i), aligned);
      }
    });
  }
  squared = warp_sum(squared);
  aligned = warp_sum(aligned);
  if (squared == 0.0f) {
    for (int m = 0; m < slot.count; ++m) zero_row<kWidth>(grad.x<T>(slot.members[m]), channels);
    return write_constant_factors(slot, grad);
  }
  int64_t longest;
  const float radius = sqrtf(longest_squared<T, kWidth>(slot, longest)), norm = sqrtf(squared);
  for (int64_t c = 0; c < channels; c += C::RowPart::kChannels) {
    maxnorm_part<T, kWidth>(slot, grad, c, radius / norm, aligned / squared,
                            aligned / (norm * radius), longest);
  }
  share_coefficients(slot, grad, true, 1.0f, 0.0f);
}

template <class T, int kWidth, MergeKind kKind>
__global__ void __launch_bounds__(kMergeThreads, kKind == MergeKind::linear ? 2 : 1)
    merge_backward_kernel(const __grid_constant__ MergeBackwardParams p) {
  const SlotBlock block(p.forward, shared_memory<MergeShared>());
  for (int i = warp_id(); i < block.slots; i += kMergeThreads / kWarp) {
    const Slot slot(p.forward, block, i);
    const Gradients grad{p, slot.item, slot.index};
    if (slot.count == 0) continue;
    if constexpr (kKind == MergeKind::linear) {
      linear_backward<T, kWidth>(slot, grad);
    } else if constexpr (kKind == MergeKind::maxnorm) {
      maxnorm_backward<T, kWidth>(slot, grad);
    } else if (p.forward.mode == MergeMode::prune) {
      prune_backward<T, kWidth>(slot, grad);
    } else if (p.forward.mode == MergeMode::halving) {
      halving_backward<T, kWidth>(slot, grad);
    } else {
      extreme_backward<T, kWidth>(slot, grad);
    }
  }
}

// Gradients of the tokens that no slot holds.
template <class T, int kWidth>
__global__ void __launch_bounds__(kMergeThreads)
    zero_skipped_kernel(const __grid_constant__ MergeBackwardParams p) {
  const MergeParams& f = p.forward;
  const int64_t row = int64_t{blockIdx.x} * (kMergeThreads / kWarp) + warp_id();
  if (row >= f.batch * f.tokens) return;
  const int64_t item = row / f.tokens, token = row % f.tokens;
  if (relative_slot(f, item, token, 0) >= 0) return;
  const Gradients grad{p, item, 0};
  zero_row<kWidth>(grad.x<T>(token), f.channels);
  if (lane_id() == 0) grad.size(token) = grad.weight(token) = 0.0f;
}

}  // namespace tokred::cuda::merging
