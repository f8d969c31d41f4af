// Recomputes the rows of attention whose result is NaN. In the tiles of the other kernels a hidden
// key has weight 0, and 0 times infinity or NaN is NaN; here a warp takes only the visible pairs of
// a row, one at a time. A row lies across a warp, eight neighbours to a lane.
#pragma once

#include "attention/cuda/keys.cuh"
#include "common/cuda/row_io.cuh"

namespace tokred::cuda::attention {

using LaneRow = float[1][8];

template <class T>
__device__ __forceinline__ void load_row(LaneRow& x, const T* row, int64_t dim) {
  const T* rows[1] = {row};
  load_rows(x, rows, 8 * lane_id(), static_cast<int>(dim), false);
}
template <class T>
__device__ __forceinline__ const T* row_of(const HeadTensor& t, int64_t batch, int64_t head,
                                           int64_t token) {
  return static_cast<const T*>(t.data) + batch * t.stride_batch + head * t.stride_head +
         token * t.stride_token;
}
template <class T>
__device__ __forceinline__ void store_row(T* row, int64_t dim, const LaneRow& x, float factor) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (8 * lane_id() + i < dim) row[8 * lane_id() + i] = from_float<T>(x[0][i] * factor);
  }
}
template <class T>
__device__ __forceinline__ bool has_nan(const T* row, int64_t dim) {
  LaneRow x;
  load_row(x, row, dim);
  bool nan = false;
#pragma unroll
  for (int i = 0; i < 8; ++i) nan = nan || x[0][i] != x[0][i];
  return __any_sync(kAllLanes, nan);
}
__device__ __forceinline__ float dot(const LaneRow& x, const LaneRow& y) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(x[0][i], y[0][i], sum);
  return warp_sum(sum);
}
// x += weight y
__device__ __forceinline__ void add(LaneRow& x, float weight, const LaneRow& y) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[0][i] = fmaf(weight, y[0][i], x[0][i]);
}

// f(lane) for every lane that says `visible`, in order.
template <class F>
__device__ __forceinline__ void each_visible(bool visible, F f) {
  for (unsigned left = __ballot_sync(kAllLanes, visible); left; left &= left - 1) {
    f(__ffs(left) - 1);
  }
}

// Of numbers below 2^32; a division of 64 bits is a call, around which registers are spilled.
__device__ __forceinline__ int64_t divide(int64_t x, int64_t by) {
  return static_cast<uint32_t>(x) / static_cast<uint32_t>(by);
}

// Keys of memory, or of a list of them, as one query row sees them.
template <class T>
struct PlainKeys {
  struct Found {
    int key;  // -1 for none
    float bias;

    __device__ Found of(int lane) const {
      return {__shfl_sync(kAllLanes, key, lane), __shfl_sync(kAllLanes, bias, lane)};
    }
  };
  const AttentionParams& a;
  const KeyLists& lists;
  const Rotation rotation;
  const int64_t batch, head, query, kv_head;
  const int32_t* indices;

  __device__ PlainKeys(const AttentionParams& a, const KeyLists& lists, const Rotation& rotation,
                       int64_t batch, int64_t head, int64_t query)
      : a(a), lists(lists), rotation(rotation), batch(batch), head(head), query(query),
        kv_head(divide(head * a.heads_kv, a.heads_q)), indices(lists.indices) {
    if (!indices) return;
    indices += batch * lists.stride_batch +
               divide(head * lists.heads, a.heads_q) * lists.stride_head +
               divide(query, lists.block_q) * lists.stride_list;
  }
  __device__ PlainKeys(const SparseAttentionParams& p, int64_t batch, int64_t head, int64_t query)
      : PlainKeys(p.attention, p.lists, p.rotation, batch, head, query) {}

  __device__ int64_t length() const { return lists.length; }
  __device__ float bias_of(int64_t key) const {
    if (!a.key_bias) return 0.0f;
    return kLog2E * static_cast<const float*>(
                        a.key_bias)[batch * a.bias_stride_batch + kv_head * a.bias_stride_head +
                                    key * a.bias_stride_key];
  }
  __device__ bool sees_key(int64_t key) const {
    if (key < 0 || key >= a.keys) return false;
    if (a.causal && key > query + a.keys - a.queries) return false;
    const MaskView& mask = a.mask;
    if (mask.data && !mask.data[batch * mask.stride[0] + head * mask.stride[1] +
                                query * mask.stride[2] + key * mask.stride[3]]) {
      return false;
    }
    if (a.positions.columns > 0 &&
        !sees(query_position(a.positions, batch, query), key_position(a.positions, batch, key))) {
      return false;
    }
    if (a.blocks.mask.data && !block_row(a, batch, head, query)[block_column(a, key)]) return false;
    return bias_of(key) != -kInfinity;
  }
  __device__ Found find(int64_t position) const {
    if (position >= length()) return {-1, 0.0f};
    const int64_t key = indices ? indices[position] : position;
    if (!sees_key(key)) return {-1, 0.0f};
    return {static_cast<int>(key), bias_of(key)};
  }

  __device__ void rotate_query(LaneRow&) const {}
  __device__ void rotate_out(LaneRow&) const {}
  __device__ void load_key(LaneRow& x, const Found& found, int64_t position) const {
    const T* row = row_of<T>(a.k, batch, kv_head, found.key);
    load_row(x, row, a.head_dim);
    if (!rotation.cos) return;
    const int64_t half = a.head_dim / 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t d = 8 * lane_id() + i, angle = d < half ? d : d - half;
      if (d >= a.head_dim) continue;
      const float other = to_float(row[d < half ? d + half : angle]) *
                          rotation.sin[position * rotation.sin_stride + angle];
      x[0][i] = fmaf(x[0][i], rotation.cos[position * rotation.cos_stride + angle],
                     d < half ? -other : other);
    }
  }
  __device__ void load_value(LaneRow& x, const Found& found) const {
    load_row(x, row_of<T>(a.v, batch, kv_head, found.key), a.value_dim);
  }
};

// Whether a warp's number is one of [B, Hq, L], and which.
struct QueryRow {
  int64_t flat, batch, head, query;

  __device__ explicit QueryRow(const AttentionParams& a)
      : flat(int64_t{blockIdx.x} * 8 + warp_id()), batch(flat / a.queries / a.heads_q),
        head(flat / a.queries % a.heads_q), query(flat % a.queries) {}
  __device__ bool exists(const AttentionParams& a) const { return batch < a.batch; }
};

// Keys is PlainKeys or PackedKeys, Params what they are made of. `marked`: the kernel before
// has set lse to NaN wherever out has a NaN.
template <class T, class Keys, class Params>
__global__ void __launch_bounds__(256, 1)
    recompute_rows_kernel(const __grid_constant__ Params p,
                          const __grid_constant__ AttentionParams a, bool marked) {
  const QueryRow at(a);
  if (!at.exists(a)) return;
  T* out = static_cast<T*>(a.out) + at.batch * a.out_stride_batch + at.head * a.out_stride_head +
           at.query * a.out_stride_token;
  float* lse = static_cast<float*>(a.lse) + at.flat;
  if (*lse == *lse && (marked || !has_nan(out, a.value_dim))) return;
  const Keys keys(p, at.batch, at.head, at.query);
  LaneRow q, sum = {};
  load_row(q, row_of<T>(a.q, at.batch, at.head, at.query), a.head_dim);
  keys.rotate_query(q);
  float top = -kInfinity, total = 0.0f;
  for (int64_t first = 0; first < keys.length(); first += kWarp) {
    const auto mine = keys.find(first + lane_id());
    each_visible(mine.key >= 0, [&](int lane) {
      const auto found = mine.of(lane);
      LaneRow x;
      keys.load_key(x, found, first + lane);
      float product = dot(q, x);
      cap_product(product, a);
      const float logit = fmaf(product, logit_scale(a), found.bias);
      const float next = fmaxf(top, logit), base = next == -kInfinity ? 0.0f : next;
      const float shrink = exp2_approx(top - base), weight = exp2_approx(logit - base);
      top = next;
      total = fmaf(total, shrink, weight);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[0][i] *= shrink;
      if (weight == 0.0f) return;
      keys.load_value(x, found);
      add(sum, weight, x);
    });
  }
  keys.rotate_out(sum);
  store_row(out, a.value_dim, sum, total == 0.0f ? 0.0f : 1.0f / total);
  __syncwarp();
  if (lane_id() == 0) *lse = total == 0.0f ? -kInfinity : (top + log2f(total)) * kLn2;
}

}  // namespace tokred::cuda::attention
