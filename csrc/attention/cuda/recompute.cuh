// Recomputes the rows of attention whose result is NaN. In the tiles of the other kernels a hidden
// key has weight 0, and 0 times infinity or NaN is NaN; here a warp takes only the visible pairs of
// a row, one at a time. A row lies across a warp, eight neighbours to a lane, of every 256.
#pragma once

#include "attention/cuda/keys.cuh"
#include "common/cuda/row_io.cuh"

namespace tokred::cuda::attention {

// kParts of 256 numbers of a row, as a lane has them.
template <int kParts>
using LaneRows = float[kParts][8];
using LaneRow = LaneRows<1>;

__device__ __forceinline__ int lane_channel(int part, int i) {
  return 256 * part + 8 * lane_id() + i;
}
template <class T, int kParts>
__device__ __forceinline__ void load_row(LaneRows<kParts>& x, const T* row, int64_t dim) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const T* rows[1] = {row};
    LaneRow some;
    load_rows(some, rows, lane_channel(part, 0), static_cast<int>(dim), false);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[part][i] = some[0][i];
  }
}
template <class T>
__device__ __forceinline__ const T* row_of(const HeadTensor& t, int64_t batch, int64_t head,
                                           int64_t token) {
  return static_cast<const T*>(t.data) + batch * t.stride_batch + head * t.stride_head +
         token * t.stride_token;
}
template <class T, int kParts>
__device__ __forceinline__ void store_row(T* row, int64_t dim, const LaneRows<kParts>& x,
                                          float factor) {
#pragma unroll
  for (int i = 0; i < 8 * kParts; ++i) {
    const int channel = lane_channel(i / 8, i % 8);
    if (channel < dim) row[channel] = from_float<T>(x[i / 8][i % 8] * factor);
  }
}
template <int kParts = 1, class T>
__device__ __forceinline__ bool has_nan(const T* row, int64_t dim) {
  LaneRows<kParts> x;
  load_row(x, row, dim);
  bool nan = false;
#pragma unroll
  for (int i = 0; i < 8 * kParts; ++i) nan = nan || x[i / 8][i % 8] != x[i / 8][i % 8];
  return __any_sync(kAllLanes, nan);
}
template <int kParts>
__device__ __forceinline__ float dot(const LaneRows<kParts>& x, const LaneRows<kParts>& y) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8 * kParts; ++i) sum = fmaf(x[i / 8][i % 8], y[i / 8][i % 8], sum);
  return warp_sum(sum);
}
// x += weight y
template <int kParts>
__device__ __forceinline__ void add(LaneRows<kParts>& x, float weight, const LaneRows<kParts>& y) {
#pragma unroll
  for (int i = 0; i < 8 * kParts; ++i) {
    x[i / 8][i % 8] = fmaf(weight, y[i / 8][i % 8], x[i / 8][i % 8]);
  }
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
template <class T, int kRowParts = 1>
struct PlainKeys {
  static constexpr int kParts = kRowParts;
  using Row = LaneRows<kParts>;
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
  // Of the key, and of the pair.
  __device__ float bias_of(int64_t key) const {
    float bias = 0.0f;
    if (a.key_bias) {
      bias = kLog2E * static_cast<const float*>(
                          a.key_bias)[batch * a.bias_stride_batch + kv_head * a.bias_stride_head +
                                      key * a.bias_stride_key];
    }
    const int64_t (&stride)[4] = a.pair_bias.stride;
    return with_pair_bias<T>(bias, a.pair_bias,
                             batch * stride[0] + head * stride[1] + query * stride[2], key);
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

  __device__ void rotate_query(Row&) const {}
  __device__ void rotate_out(Row&) const {}
  __device__ void load_key(Row& x, const Found& found, int64_t position) const {
    const T* row = row_of<T>(a.k, batch, kv_head, found.key);
    load_row(x, row, a.head_dim);
    if (kParts > 1 || !rotation.cos) return;  // wide heads are never rotated
    const int64_t half = a.head_dim / 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t d = lane_channel(0, i), angle = d < half ? d : d - half;
      if (d >= a.head_dim) continue;
      const float other = to_float(row[d < half ? d + half : angle]) *
                          rotation.sin[position * rotation.sin_stride + angle];
      x[0][i] = fmaf(x[0][i], rotation.cos[position * rotation.cos_stride + angle],
                     d < half ? -other : other);
    }
  }
  __device__ void load_value(Row& x, const Found& found) const {
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
  constexpr int kParts = Keys::kParts;
  if (*lse == *lse && (marked || !has_nan<kParts>(out, a.value_dim))) return;
  const Keys keys(p, at.batch, at.head, at.query);
  LaneRows<kParts> q, sum = {};
  load_row(q, row_of<T>(a.q, at.batch, at.head, at.query), a.head_dim);
  keys.rotate_query(q);
  float top = -kInfinity, total = 0.0f;
  for (int64_t first = 0; first < keys.length(); first += kWarp) {
    const auto mine = keys.find(first + lane_id());
    each_visible(mine.key >= 0, [&](int lane) {
      const auto found = mine.of(lane);
      LaneRows<kParts> x;
      keys.load_key(x, found, first + lane);
      float product = dot(q, x);
      cap_product(product, a);
      const float logit = fmaf(product, logit_scale(a), found.bias);
      const float next = fmaxf(top, logit), base = next == -kInfinity ? 0.0f : next;
      const float shrink = exp2_approx(top - base), weight = exp2_approx(logit - base);
      top = next;
      total = fmaf(total, shrink, weight);
#pragma unroll
      for (int i = 0; i < 8 * kParts; ++i) sum[i / 8][i % 8] *= shrink;
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
