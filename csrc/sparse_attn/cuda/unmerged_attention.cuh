// unmerged_attention: online softmax over tiles of keys whose rows are read through the map and
// rotated on the way to shared memory; then the mean over the queries of each token.
#pragma once

#include "common/cuda/block.cuh"
#include "sparse_attn/cuda/plan_unmerged.h"
#include "sparse_attn/params.h"

namespace tokred::cuda::unmerged {

struct UnmergedArgs {
  UnmergedParams p;
  float* attended;   // [B, Hq, L, Dv]
  int32_t* first;    // [B, Mq], of the queries of a token, -1 where there are none
  int32_t* next;     // [B, L], the following query of the same token, or -1
};

// The token of a position of an item; -1 where it has none.
__device__ __forceinline__ int key_token(const UnmergedParams& p, int64_t item, int64_t position) {
  const int token =
      p.token_map[item * p.token_map_stride_batch + position * p.token_map_stride_token];
  return token >= 0 && token < p.tokens ? token : -1;
}
__device__ __forceinline__ int query_token(const UnmergedParams& p, int64_t item, int64_t query) {
  const int token = p.query_map[item * p.query_map_stride_batch + query * p.query_map_stride_token];
  return token >= 0 && token < p.query_tokens ? token : -1;
}

// Thread (y, x) of 16 x 8 has the queries 2 y and 2 y + 1, and keys or value dimensions x, x + 8,
// ..
template <class T, int kDim>
struct Rows {
  static constexpr int kKeys = unmerged_keys(kDim), kPitch = kDim + 1, kOwn = kUnmergedRows / 16;
  static constexpr int kOwnKeys = kKeys / 8, kColumns = kDim / 8;
  const UnmergedArgs& a;
  const UnmergedParams& p;
  const int y = static_cast<int>(threadIdx.x) / 8, x = static_cast<int>(threadIdx.x) % 8;
  int64_t item, head, kv_head, query0;
  float *q, *k, *v, *weight;
  int *of_query, *of_key;
  float top[kOwn], total[kOwn], sum[kOwn][kColumns];

  __device__ Rows(const UnmergedArgs& args, float* memory) : a(args), p(args.p) {
    const int64_t parts = (p.queries + kUnmergedRows - 1) / kUnmergedRows;
    const int64_t flat = blockIdx.x / parts;
    item = flat / p.heads_q;
    head = flat % p.heads_q;
    kv_head = head / (p.heads_q / p.heads_kv);
    query0 = blockIdx.x % parts * kUnmergedRows;
    q = memory;
    k = q + kUnmergedRows * kPitch;
    v = k + kKeys * kPitch;
    weight = v + kKeys * kDim;
    of_query = reinterpret_cast<int*>(weight + kUnmergedRows * (kKeys + 1));
    of_key = of_query + kUnmergedRows;
  }

  __device__ __forceinline__ int64_t position(int64_t row) const {
    return p.positions - p.queries + query0 + row;
  }

  __device__ void run() {
    for (int r = static_cast<int>(threadIdx.x); r < kUnmergedRows; r += kUnmergedThreads) {
      of_query[r] = query0 + r < p.queries ? query_token(p, item, query0 + r) : -1;
    }
    __syncthreads();
    load_rotated<kUnmergedRows>(p.q, head, of_query, position(0), static_cast<float>(p.scale), q);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      top[i] = -kInfinity;
      total[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] = 0.0f;
    }
    const int64_t end = p.causal ? min(position(kUnmergedRows - 1) + 1, p.positions) : p.positions;
    for (int64_t key = 0; key < end; key += kKeys) {
      __syncthreads();
      for (int r = static_cast<int>(threadIdx.x); r < kKeys; r += kUnmergedThreads) {
        of_key[r] = key + r < p.positions ? key_token(p, item, key + r) : -1;
      }
      __syncthreads();
      load_rotated<kKeys>(p.k, kv_head, of_key, key, 1.0f, k);
      load_values();
      __syncthreads();
      weigh(key);
      __syncthreads();
      add();
    }
    write();
  }

  // Rows of tokens at positions first, first + 1, .., rotated; zeros for those without a token.
  template <int kRows>
  __device__ __forceinline__ void load_rotated(const HeadTensor& from, int64_t h, const int* token,
                                               int64_t first, float scale, float* to) {
    const auto rotated = static_cast<int>(p.rotated), dim = static_cast<int>(p.head_dim);
    for (int r = warp_id(); r < kRows; r += kUnmergedThreads / kWarp) {
      float* row = to + r * kPitch;
      if (token[r] < 0) {
        for (int d = lane_id(); d < dim; d += kWarp) row[d] = 0.0f;
        continue;
      }
      const T* source = static_cast<const T*>(from.data) + item * from.stride_batch +
                        h * from.stride_head + token[r] * from.stride_token;
      const float* cos = p.cos + item * p.cos_stride_batch + (first + r) * p.cos_stride_token;
      const float* sin = p.sin + item * p.sin_stride_batch + (first + r) * p.sin_stride_token;
      for (int d = lane_id(); d < rotated; d += kWarp) {
        const float left = to_float(source[d]), right = to_float(source[d + rotated]);
        row[d] = (left * cos[d] - right * sin[d]) * scale;
        row[d + rotated] = (right * cos[d] + left * sin[d]) * scale;
      }
      for (int d = 2 * rotated + lane_id(); d < dim; d += kWarp) {
        row[d] = to_float(source[d]) * scale;
      }
    }
  }
  __device__ __forceinline__ void load_values() {
    for (int r = warp_id(); r < kKeys; r += kUnmergedThreads / kWarp) {
      const T* source = of_key[r] < 0
                            ? nullptr
                            : static_cast<const T*>(p.v.data) + item * p.v.stride_batch +
                                  kv_head * p.v.stride_head + of_key[r] * p.v.stride_token;
      for (int d = lane_id(); d < kDim; d += kWarp) {
        v[r * kDim + d] = source && d < p.value_dim ? to_float(source[d]) : 0.0f;
      }
    }
  }

  // Logits to weights exp(logit - top); what was summed so far moves to the new top.
  __device__ void weigh(int64_t key) {
    float logit[kOwn][kOwnKeys] = {};
    for (int d = 0; d < static_cast<int>(p.head_dim); ++d) {
      float right[kOwnKeys];
#pragma unroll
      for (int j = 0; j < kOwnKeys; ++j) right[j] = k[(x + 8 * j) * kPitch + d];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float left = q[(y * kOwn + i) * kPitch + d];
#pragma unroll
        for (int j = 0; j < kOwnKeys; ++j) logit[i][j] = fmaf(left, right[j], logit[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = y * kOwn + i;
      float highest = top[i];
#pragma unroll
      for (int j = 0; j < kOwnKeys; ++j) {
        const int column = x + 8 * j;
        const bool later = p.causal && key + column > position(row);
        if (of_key[column] < 0 || later) logit[i][j] = -kInfinity;
        highest = fmaxf(highest, logit[i][j]);
      }
      highest = warp_max<8>(highest);
      const float base = highest == -kInfinity ? 0.0f : highest;
      const float shrink = expf(top[i] - base);
      top[i] = highest;
      total[i] *= shrink;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] *= shrink;
#pragma unroll
      for (int j = 0; j < kOwnKeys; ++j) {
        const float w = logit[i][j] == -kInfinity ? 0.0f : expf(logit[i][j] - base);
        total[i] += w;
        weight[row * (kKeys + 1) + x + 8 * j] = w;
      }
    }
  }

  // A weight of 0 may be of a key that is hidden: its value is not looked at.
  __device__ void add() {
    for (int c = 0; c < kKeys; ++c) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float w = weight[(y * kOwn + i) * (kKeys + 1) + c];
        if (w == 0.0f) continue;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          sum[i][j] = fmaf(w, v[c * kDim + x + 8 * j], sum[i][j]);
        }
      }
    }
  }

  __device__ void write() {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float all = warp_sum<8>(total[i]), inverse = all == 0.0f ? 0.0f : 1.0f / all;
      const int64_t query = query0 + y * kOwn + i;
      if (query >= p.queries) continue;
      float* out = a.attended + ((item * p.heads_q + head) * p.queries + query) * p.value_dim;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (x + 8 * j < p.value_dim) out[x + 8 * j] = sum[i][j] * inverse;
      }
    }
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(kUnmergedThreads, kDim <= 128 ? 4 : 2)
    unmerged_attention_kernel(const __grid_constant__ UnmergedArgs args) {
  Rows<T, kDim>(args, &shared_memory<float>()).run();
}

// The queries of every token as linked lists in ascending order: a thread owns every 256th token.
__global__ void __launch_bounds__(kMemberThreads)
    list_queries_kernel(const __grid_constant__ UnmergedArgs args) {
  const UnmergedParams& p = args.p;
  const int64_t item = blockIdx.x;
  int32_t* first = args.first + item * p.query_tokens;
  int32_t* next = args.next + item * p.queries;
  for (int64_t u = threadIdx.x; u < p.query_tokens; u += kMemberThreads) first[u] = -1;
  for (int64_t l = p.queries - 1; l >= 0; --l) {
    const int token = query_token(p, item, l);
    if (token < 0 || token % kMemberThreads != static_cast<int>(threadIdx.x)) continue;
    next[l] = first[token];
    first[token] = static_cast<int32_t>(l);
  }
}

template <class T>
__global__ void __launch_bounds__(kMemberThreads)
    mean_of_queries_kernel(const __grid_constant__ UnmergedArgs args) {
  const UnmergedParams& p = args.p;
  const int64_t flat = int64_t{blockIdx.x} * (kMemberThreads / kWarp) + warp_id();
  if (flat >= p.batch * p.heads_q * p.query_tokens) return;
  const int64_t token = flat % p.query_tokens, head = flat / p.query_tokens;  // of all items
  const int64_t item = head / p.heads_q;
  const int32_t* next = args.next + item * p.queries;
  T* out = static_cast<T*>(p.out) + flat * p.value_dim;
  for (int64_t d = lane_id(); d < p.value_dim; d += kWarp) {
    float sum = 0.0f;
    int count = 0;
    for (int l = args.first[item * p.query_tokens + token]; l >= 0; l = next[l]) {
      sum += args.attended[(head * p.queries + l) * p.value_dim + d];
      ++count;
    }
    out[d] = from_float<T>(count == 0 ? 0.0f : sum / static_cast<float>(count));
  }
}

}  // namespace tokred::cuda::unmerged
