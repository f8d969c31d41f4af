// merge: segment reduction by a token map. Owner computes: a warp owns an output row and reads its
// members in ascending order.
#pragma once

#include "common/cuda/row_io.cuh"
#include "merge/cuda/members.cuh"

namespace tokred::cuda::merging {

enum class MergeKind { linear, extreme, maxnorm };

constexpr MergeKind kind_of(MergeMode mode) {
  switch (mode) {
    case MergeMode::amax:
    case MergeMode::amin:
    case MergeMode::prune:
    case MergeMode::halving: return MergeKind::extreme;
    case MergeMode::maxnorm: return MergeKind::maxnorm;
    default: return MergeKind::linear;
  }
}

// Rows that are computed keep less of themselves in registers than rows that are copied, so that
// more warps are at work.
template <class T, int kWidth>
struct MergeConfig {
  static constexpr int kPieces = 2;
  using RowPart = Part<T, kWidth, kPieces>;
  using RowValues = Values<kWidth, kPieces>;
};

// Sums of coefficient * x over the members, channels `first` on.
template <class T, int kWidth, int kPieces>
__device__ __forceinline__ void weighted_sum(Values<kWidth, kPieces>& sum, const Slot& slot,
                                             bool use_size, int64_t first) {
  using RowPart = Part<T, kWidth, kPieces>;
  const int64_t channels = slot.p.channels;
  sum.fill([](int, int) { return 0.0f; });
#pragma unroll 1  // most slots have few members, and registers are better spent on more warps
  for (int m = 0; m < slot.count; ++m) {
    const int64_t token = slot.members[m];
    RowPart x;
    x.load(slot.x<T>(token), first, channels);
    const float coefficient = slot.coefficient(token, use_size);
    RowPart::each(first, channels, [&](int n, int64_t) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sum.at[n][i] = fmaf(coefficient, x.piece[n].get(i), sum.at[n][i]);
      }
    });
  }
}

// y = sum of coefficient * x, times numerator, over denominator.
template <class T, int kWidth>
__device__ __forceinline__ void write_weighted(const Slot& slot, bool use_size, float numerator,
                                               float denominator, T* y) {
  using C = MergeConfig<T, kWidth>;
  for (int64_t c = 0; c < slot.p.channels; c += C::RowPart::kChannels) {
    typename C::RowValues sum;
    weighted_sum<T>(sum, slot, use_size, c);
    sum.fill([&](int n, int i) { return sum.at[n][i] * numerator / denominator; });
    sum.store(y, c, slot.p.channels);
  }
}

// Most rows have one member, and are copied: a sum of one member of weight 1 is that member, and so
// is a mean, unless its weight is no divisor. The member is read before its weight is known. False
// where the row has to be computed.
template <class T, int kWidth>
__device__ __forceinline__ bool copy_single(const Slot& slot, bool use_size, bool divided, T* y) {
  using RowPart = Part<T, kWidth, 4>;
  const int64_t channels = slot.p.channels, token = slot.members[0];
  for (int64_t c = 0; c < channels; c += RowPart::kChannels) {
    RowPart x;
    x.load(slot.x<T>(token), c, channels);
    const float weight = slot.coefficient(token, use_size);
    const bool copied = divided ? weight - weight == 0.0f && weight != 0.0f : weight == 1.0f;
    if (!copied) return false;
    x.store(y, c, channels);
  }
  return true;
}

template <class T, int kWidth>
__device__ __forceinline__ void merge_linear(const Slot& slot, T* y) {
  const MergeMode mode = slot.p.mode;
  const bool use_size = mode == MergeMode::mean, divided = mode != MergeMode::sum;
  if (slot.count == 1 && copy_single<T, kWidth>(slot, use_size, divided, y)) return;
  const float total = divided ? slot.total(use_size) : 1.0f;
  if (total == 0.0f) return zero_row<kWidth>(y, slot.p.channels);
  write_weighted<T, kWidth>(slot, use_size, 1.0f, total, y);
}

// Whether v replaces the maximum (or minimum) so far; NaN always does.
__device__ __forceinline__ bool is_more_extreme(float v, float best, bool is_max) {
  return (is_max ? v > best : v < best) || v != v;
}

// The keeper, halved with every other member in turn: the last of them has weight 1/2.
template <class T, int kWidth>
__device__ __forceinline__ void merge_halves(const Slot& slot, T* y) {
  using C = MergeConfig<T, kWidth>;
  const int64_t channels = slot.p.channels, keeper = slot.heaviest();
  for (int64_t c = 0; c < channels; c += C::RowPart::kChannels) {
    typename C::RowPart first;
    first.load(slot.x<T>(keeper), c, channels);
    typename C::RowValues value;
    value.fill([&](int n, int i) { return first.piece[n].get(i); });
    for (int m = 0; m < slot.count; ++m) {
      if (slot.members[m] == keeper) continue;
      typename C::RowPart x;
      x.load(slot.x<T>(slot.members[m]), c, channels);
      value.fill(
          [&](int n, int i) { return fmaf(0.5f, x.piece[n].get(i), 0.5f * value.at[n][i]); });
    }
    value.store(y, c, channels);
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void merge_extreme(const Slot& slot, T* y) {
  using C = MergeConfig<T, kWidth>;
  const int64_t channels = slot.p.channels;
  if (slot.p.mode == MergeMode::prune) {
    return copy_row<kWidth>(y, slot.x<T>(slot.heaviest()), channels);
  }
  if (slot.p.mode == MergeMode::halving) return merge_halves<T, kWidth>(slot, y);
  const bool is_max = slot.p.mode == MergeMode::amax;
  for (int64_t c = 0; c < channels; c += C::RowPart::kChannels) {
    typename C::RowPart best;
    best.load(slot.x<T>(slot.members[0]), c, channels);
    typename C::RowValues value;
    value.fill([&](int n, int i) { return best.piece[n].get(i); });
    for (int m = 1; m < slot.count; ++m) {
      typename C::RowPart x;
      x.load(slot.x<T>(slot.members[m]), c, channels);
      value.fill([&](int n, int i) {
        const float v = x.piece[n].get(i);
        return is_more_extreme(v, value.at[n][i], is_max) ? v : value.at[n][i];
      });
    }
    value.store(y, c, channels);
  }
}

// The squared norm of the longest member, the first of equals; NaN is longest.
template <class T, int kWidth>
__device__ __forceinline__ float longest_squared(const Slot& slot, int64_t& longest) {
  float best = 0.0f;
  longest = slot.members[0];
  for (int m = 0; m < slot.count; ++m) {
    const T* x = slot.x<T>(slot.members[m]);
    const float squared = dot_rows<kWidth>(x, x, slot.p.channels);
    if (m == 0 || squared > best || squared != squared) {
      best = squared;
      longest = slot.members[m];
    }
  }
  return best;
}

template <class T, int kWidth>
__device__ __forceinline__ void merge_maxnorm(const Slot& slot, T* y) {
  using C = MergeConfig<T, kWidth>;
  const int64_t channels = slot.p.channels;
  float squared = 0.0f;
  for (int64_t c = 0; c < channels; c += C::RowPart::kChannels) {
    typename C::RowValues sum;
    weighted_sum<T>(sum, slot, true, c);
    C::RowPart::each(c, channels, [&](int n, int64_t) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) squared = fmaf(sum.at[n][i], sum.at[n][i], squared);
    });
  }
  const float norm = sqrtf(warp_sum(squared));
  if (norm == 0.0f) return zero_row<kWidth>(y, channels);
  int64_t longest;
  const float radius = sqrtf(longest_squared<T, kWidth>(slot, longest));
  write_weighted<T, kWidth>(slot, true, radius, norm, y);
}

template <class T, int kWidth, MergeKind kKind>
__global__ void __launch_bounds__(kMergeThreads, kKind == MergeKind::linear && kWidth > 1 ? 3 : 2)
    merge_kernel(const __grid_constant__ MergeParams p) {
  const SlotBlock block(p, shared_memory<MergeShared>());
  for (int i = warp_id(); i < block.slots; i += kMergeThreads / kWarp) {
    const Slot slot(p, block, i);
    T* y = static_cast<T*>(p.y) + slot.item * p.y_stride_batch + slot.index * p.y_stride_token;
    if (slot.count == 0) {
      zero_row<kWidth>(y, p.channels);
    } else if constexpr (kKind == MergeKind::linear) {
      merge_linear<T, kWidth>(slot, y);
    } else if constexpr (kKind == MergeKind::extreme) {
      merge_extreme<T, kWidth>(slot, y);
    } else {
      merge_maxnorm<T, kWidth>(slot, y);
    }
    const float size = slot.total_size();
    if (lane_id() == 0) {
      static_cast<float*>(
          p.size_out)[slot.item * p.size_out_stride_batch + slot.index * p.size_out_stride_token] =
          size;
    }
  }
}

}  // namespace tokred::cuda::merging
