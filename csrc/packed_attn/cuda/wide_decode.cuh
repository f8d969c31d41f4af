// packed_attention of heads above 256 dimensions: sixteen query rows share tiles of unpacked
// tokens in shared memory, keys and then values. Products are in f32, two rows a warp; a lane has
// every 32nd channel. A hidden token is skipped, whatever it holds.
#pragma once

#include "attention/cuda/recompute.cuh"
#include "kv_pack/cuda/wide_rows.cuh"
#include "packed_attn/cuda/packed_attention.cuh"

namespace tokred::cuda::attention {

struct WideShared {
  static constexpr int kChunks = kMaxWideDim / 8;
  float row[kDecodeKeys][kMaxWideDim];
  uint2 k_codes[kChunks], v_codes[kChunks];  // CodeReader::positions() of eight channels
  TilePlaces places;
};

inline constexpr int kWideColumns = kMaxWideDim / kWarp;  // of a lane
inline constexpr int kWideRows = kDecodeRows / (kWideThreads / kWarp);  // of a warp

// Unpacks a tile's tokens on one side; zeros beyond their ends, and for tokens nowhere.
template <class T>
__device__ __forceinline__ void unpack_wide_tile(WideShared& shared, const PackedSide& side,
                                                 const HeadTensor& window, bool pooled,
                                                 const ListView& list, const uint2* codes,
                                                 const int* places) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kDecodeKeys * WideShared::kChunks;
       i += kWideThreads) {
    const int r = i / WideShared::kChunks, chunk = i % WideShared::kChunks;
    SideRows<T> rows(side, window, pooled, list.view.batch, list.key_head, 8 * chunk,
                     {side.packed.format, codes[chunk]});
    float x[8];
    rows.numbers(x, places[r]);
#pragma unroll
    for (int e = 0; e < 8; ++e) shared.row[r][8 * chunk + e] = x[e];
  }
}

// A query row, and what this warp has summed for it.
struct WideRow {
  RowVisibility visibility;
  float query[kWideColumns], out[kWideColumns];
  float top, sum, weight;

  template <class F>
  static __device__ __forceinline__ void each(F f) {
#pragma unroll
    for (int j = 0; j < kWideColumns; ++j) f(j, j * kWarp + lane_id());
  }

  // `row` of shared memory is this warp's.
  template <class T>
  __device__ __forceinline__ void load(const PackedDecodeParams& p, const RowTile& row_tile,
                                       int number, int64_t tokens, float* row) {
    const AttentionParams& a = p.decode.sparse.attention;
    const HeadView& view = row_tile.list.view;
    const uint32_t index = min(row_tile.first_row + static_cast<uint32_t>(number), view.rows - 1);
    visibility = row_visibility(a, view, index);
    visibility.last_key =
        static_cast<int>(a.causal ? view.query(index) + tokens - a.queries : tokens - 1);
    const T* from = row_of<T>(a.q, view.batch, view.query_head(index), view.query(index));
    each([&](int, int c) { row[c] = c < a.head_dim ? to_float(from[c]) : 0.0f; });
    if (p.k.packed.format.rotated) {
      packing::rotate_shared_row(row, static_cast<int>(a.head_dim));
    }
    each([&](int j, int c) {
      query[j] = row[c];
      out[j] = 0.0f;
    });
    top = -kInfinity;
    sum = weight = 0.0f;
  }

  __device__ __forceinline__ float dot(const float* key) const {
    float product = 0.0f;
    each([&](int j, int c) { product = fmaf(query[j], key[c], product); });
    return warp_sum(product);
  }
  // The product of this lane's token becomes its weight.
  template <class T>
  __device__ __forceinline__ void weigh(float product, const TilePlaces& places,
                                        const AttentionParams& a, int64_t batch) {
    float logit = -kInfinity;
    const int key = lane_id() < kDecodeKeys ? places.key[lane_id()] : -1;
    if (key >= 0 && sees(a, batch, visibility, key)) {
      cap_product(product, a);
      logit = fmaf(product, logit_scale(a), places.bias[lane_id()]);
      logit = with_pair_bias<T>(logit, a.pair_bias, visibility.mask_offset, key);
    }
    const float next = fmaxf(top, warp_max(logit)), base = next == -kInfinity ? 0.0f : next;
    const float shrink = exp2_approx(top - base);
    weight = exp2_approx(logit - base);
    top = next;
    sum = fmaf(sum, shrink, warp_sum(weight));
    each([&](int j, int) { out[j] *= shrink; });
  }
  __device__ __forceinline__ void add(int token, const float* value) {
    const float of_token = __shfl_sync(kAllLanes, weight, token);
    if (of_token == 0.0f) return;
    each([&](int j, int c) { out[j] = fmaf(of_token, value[c], out[j]); });
  }
};

template <class T>
__global__ void __launch_bounds__(kWideThreads, 1)
    wide_decode_kernel(const __grid_constant__ PackedDecodeParams p) {
  auto& shared = shared_memory<WideShared>();
  const AttentionParams& a = p.decode.sparse.attention;
  const RowTile row_tile(p.decode, p.decode.first_tile_of_launch + blockIdx.x);
  if (row_tile.rows == 0) return;
  const ListView& list = row_tile.list;
  const int64_t tokens = item_tokens(p.lengths, p.lengths_stride, list.view.batch, a.keys);
  const int64_t first = blockIdx.y * p.decode.split_length;
  const int64_t end = min(first + p.decode.split_length, list.indices ? list.length : tokens);
  const TokenLookUp look_up(p, list.view, tokens);
  const bool pooled = p.slots.data != nullptr;

  if (threadIdx.x < WideShared::kChunks) {
    const int channel = 8 * static_cast<int>(threadIdx.x);
    const auto positions = [&](const PackFormat& f) {
      return packing::CodeReader(f, channel < f.head_dim ? channel : 0).positions();
    };
    shared.k_codes[threadIdx.x] = positions(p.k.packed.format);
    shared.v_codes[threadIdx.x] = positions(p.v.packed.format);
  }
  WideRow rows[kWideRows];
#pragma unroll
  for (int i = 0; i < kWideRows; ++i) {
    const int number = warp_id() * kWideRows + i;
    rows[i].template load<T>(p, row_tile, number, tokens, shared.row[number]);
  }

#pragma unroll 1
  for (int64_t position = first; position < end; position += kDecodeKeys) {
    if (threadIdx.x < kDecodeKeys) {
      const int64_t mine = position + lane_id();
      keep_token(shared.places, look_up(mine < end ? list.entry(mine) : -1));
    }
    __syncthreads();
    unpack_wide_tile<T>(shared, p.k, a.k, pooled, list, shared.k_codes, shared.places.k);
    __syncthreads();
    float product[kWideRows] = {};
#pragma unroll 1
    for (int token = 0; token < kDecodeKeys; ++token) {
#pragma unroll
      for (int i = 0; i < kWideRows; ++i) {
        const float of_token = rows[i].dot(shared.row[token]);
        if (lane_id() == token) product[i] = of_token;
      }
    }
#pragma unroll
    for (int i = 0; i < kWideRows; ++i) {
      rows[i].template weigh<T>(product[i], shared.places, a, list.view.batch);
    }
    __syncthreads();
    unpack_wide_tile<T>(shared, p.v, a.v, pooled, list, shared.v_codes, shared.places.v);
    __syncthreads();
#pragma unroll 1
    for (int token = 0; token < kDecodeKeys; ++token) {
#pragma unroll
      for (int i = 0; i < kWideRows; ++i) rows[i].add(token, shared.row[token]);
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kWideRows; ++i) {
    const int number = warp_id() * kWideRows + i;
    WideRow& mine = rows[i];
    if (p.v.packed.format.rotated) {
      float* row = shared.row[number];
      WideRow::each([&](int j, int c) { row[c] = mine.out[j]; });
      packing::rotate_shared_row(row, static_cast<int>(a.value_dim));
      WideRow::each([&](int j, int c) { mine.out[j] = row[c]; });
    }
    if (number >= row_tile.rows) continue;
    WideRow::each([&](int j, int c) {
      if (c >= a.value_dim) return;
      store_split<T>(p.decode, row_tile, number, c, mine.top, mine.sum, mine.out[j]);
    });
  }
}

}  // namespace tokred::cuda::attention
