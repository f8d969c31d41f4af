// linear_attention: a block walks through the chunks of a head with its part of the state in shared
// memory; products are f32 fused multiply-adds. A single row passes over the state once.
#pragma once

#include "common/cuda/block.cuh"
#include "linear_attn/cuda/plan.h"
#include "linear_attn/params.h"

namespace tokred::cuda::linear {

__device__ __forceinline__ int64_t parts_of_head(const LinearAttentionParams& p) {
  return (p.value_dim + kLinearValues - 1) / kLinearValues;
}

// 32 value dimensions of a head of an item.
struct Part {
  int64_t item, head, first;

  __device__ Part(const LinearAttentionParams& p, int64_t number) {
    const int64_t parts = parts_of_head(p), flat = number / parts;
    item = flat / p.heads;
    head = flat % p.heads;
    first = number % parts * kLinearValues;
  }
};

__device__ __forceinline__ float rate_of(const LinearAttentionParams& p, int64_t head) {
  return static_cast<const float*>(p.decay)[head * p.decay_stride];
}

__device__ __forceinline__ const float* state_row(const LinearAttentionParams& p, const Part& part,
                                                  int64_t d) {
  return static_cast<const float*>(p.state) + part.item * p.state_stride_batch +
         part.head * p.state_stride_head + d * p.state_stride_row +
         part.first * p.state_stride_column;
}
__device__ __forceinline__ float* state_out_row(const LinearAttentionParams& p, const Part& part,
                                                int64_t d) {
  return static_cast<float*>(p.state_out) +
         ((part.item * p.heads + part.head) * p.head_dim + d) * p.value_dim + part.first;
}

template <class T>
__device__ __forceinline__ const T* head_row(const HeadTensor& t, int64_t item, int64_t head,
                                             int64_t row) {
  return static_cast<const T*>(t.data) + item * t.stride_batch + head * t.stride_head +
         row * t.stride_token;
}
template <class T>
__device__ __forceinline__ T* out_row(const LinearAttentionParams& p, const Part& part,
                                      int64_t query, int64_t row) {
  return static_cast<T*>(p.out) + part.item * p.out_stride_batch +
         (part.head * p.query_group + query) * p.out_stride_head + row * p.out_stride_token +
         part.first;
}

// Thread (y, x) of 16 x 8 has the rows y * kOwn .. of a tile, and its columns x, x + 8, ..
template <class T, int kRows>
struct Chunks {
  static constexpr int kOwn = kRows / 16, kKeys = kRows / 8, kColumns = kLinearValues / 8;
  const LinearAttentionParams& p;
  const Part part;
  const int dim, pitch, y, x;
  float *q, *k, *state, *v, *pairs, *weight;
  int* clock;  // of the chunk's rows, then their total
  float sum[kOwn][kColumns];

  __device__ Chunks(const LinearAttentionParams& params, int64_t number, float* memory)
      : p(params), part(params, number), dim(static_cast<int>(params.head_dim)),
        pitch(static_cast<int>(linear_pitch(params.head_dim))),
        y(static_cast<int>(threadIdx.x) / 8), x(static_cast<int>(threadIdx.x) % 8) {
    q = memory;
    k = q + kRows * pitch;
    state = k + kRows * pitch;
    v = state + dim * kLinearValues;
    pairs = v + kRows * kLinearValues;
    weight = pairs + kRows * (kRows + 1);
    clock = reinterpret_cast<int*>(weight + kRows + 1);
  }

  __device__ __forceinline__ bool row_is_visible(int64_t row) const {
    return !p.mask || p.mask[part.item * p.mask_stride_batch + row * p.mask_stride_token];
  }
  __device__ __forceinline__ bool has_column(int column) const {
    return part.first + column < p.value_dim;
  }

  __device__ void run() {
    load_state();
    for (int64_t row = 0; row < p.tokens; row += kRows) {
      const int count = static_cast<int>(min(p.tokens - row, int64_t{kRows}));
      __syncthreads();
      set_clock(row, count);
      __syncthreads();
      for (int64_t share = 0; share < p.key_group; ++share) {
        load_keys(share, row, count);
        for (int64_t query = 0; query < p.query_group; ++query) {
          load_rows(p.q, part.head * p.query_group + query, row, count, false,
                    static_cast<float>(p.scale_q), q);
          __syncthreads();
          weigh();
          __syncthreads();
          add(share == 0);
          if (share + 1 == p.key_group) write(query, row, count);
          __syncthreads();
        }
        update_state(share == 0);
        __syncthreads();
      }
    }
    store_state();
  }

  __device__ void load_state() {
    const float rate = rate_of(p, part.head);
    for (int n = static_cast<int>(threadIdx.x); n <= kRows; n += kLinearThreads) {
      weight[n] = n == 0 ? 1.0f : expf(-rate * static_cast<float>(n));
    }
    const int column = lane_id();
    for (int d = warp_id(); d < dim; d += kLinearThreads / kWarp) {
      const bool given = p.state && has_column(column);
      state[d * kLinearValues + column] =
          given ? state_row(p, part, d)[column * p.state_stride_column] : 0.0f;
    }
  }
  __device__ void store_state() {
    __syncthreads();
    const int column = lane_id();
    if (!p.state_out || !has_column(column)) return;
    for (int d = warp_id(); d < dim; d += kLinearThreads / kWarp) {
      state_out_row(p, part, d)[column] = state[d * kLinearValues + column];
    }
  }

  __device__ void set_clock(int64_t row, int count) {
    if (warp_id() != 0) return;
    const int lane = lane_id();
    const bool visible = lane < count && row_is_visible(row + lane);
    const unsigned ballot = __ballot_sync(kAllLanes, visible);
    const int before = lanes_before(ballot);
    if (lane < kRows) clock[lane] = p.reverse ? before : before + visible;
    if (lane == 0) clock[kRows] = __popc(ballot);
  }

  // Rows of up to D numbers, times a factor; zeros for rows that are hidden or beyond the last.
  __device__ __forceinline__ void load_rows(const HeadTensor& from, int64_t head, int64_t row,
                                            int count, bool hide, float factor, float* to) {
    for (int i = warp_id(); i < kRows; i += kLinearThreads / kWarp) {
      const bool given = i < count && (!hide || row_is_visible(row + i));
      const T* source = given ? head_row<T>(from, part.item, head, row + i) : nullptr;
      for (int d = lane_id(); d < dim; d += kWarp) {
        to[i * pitch + d] = source ? to_float(source[d]) * factor : 0.0f;
      }
    }
  }
  __device__ void load_keys(int64_t share, int64_t row, int count) {
    const int64_t head = part.head * p.key_group + share;
    load_rows(p.k, head, row, count, !p.reverse, static_cast<float>(p.scale_k), k);
    const int column = lane_id();
    for (int i = warp_id(); i < kRows; i += kLinearThreads / kWarp) {
      const bool given = i < count && has_column(column) && (p.reverse || row_is_visible(row + i));
      v[i * kLinearValues + column] =
          given ? to_float(head_row<T>(p.v, part.item, head, row + i)[part.first + column]) : 0.0f;
    }
  }

  // pairs = w(t_r - t_c) q_r . k_c, of keys up to the row.
  __device__ void weigh() {
    float dot[kOwn][kKeys] = {};
    for (int d = 0; d < dim; ++d) {
      float key[kKeys];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) key[j] = k[(x + 8 * j) * pitch + d];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float query = q[(y * kOwn + i) * pitch + d];
#pragma unroll
        for (int j = 0; j < kKeys; ++j) dot[i][j] = fmaf(query, key[j], dot[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const int row = y * kOwn + i, key = x + 8 * j;
        pairs[row * (kRows + 1) + key] =
            key <= row ? weight[clock[row] - clock[key]] * dot[i][j] : 0.0f;
      }
    }
  }

  // sum = w(t_r) q . state, of the first key head, + pairs . v. A key after the row is left out:
  // 0 times an infinity would be NaN.
  __device__ void add(bool first) {
    if (first) {
#pragma unroll
      for (int i = 0; i < kOwn * kColumns; ++i) sum[i / kColumns][i % kColumns] = 0.0f;
      for (int d = 0; d < dim; ++d) add_step(d, state, [&](int row) { return q[row * pitch + d]; });
#pragma unroll
      for (int i = 0; i < kOwn * kColumns; ++i) {
        sum[i / kColumns][i % kColumns] *= weight[clock[y * kOwn + i / kColumns]];
      }
    }
    for (int c = 0; c < (y + 1) * kOwn; ++c) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int row = y * kOwn + i;
        const float pair = pairs[row * (kRows + 1) + c];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (c <= row) sum[i][j] = fmaf(pair, v[c * kLinearValues + x + 8 * j], sum[i][j]);
        }
      }
    }
  }
  template <class Left>
  __device__ __forceinline__ void add_step(int step, const float* right, Left left) {
    float value[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) value[j] = right[step * kLinearValues + x + 8 * j];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float factor = left(y * kOwn + i);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] = fmaf(factor, value[j], sum[i][j]);
    }
  }

  __device__ void write(int64_t query, int64_t row, int count) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int local = y * kOwn + i;
      if (local >= count) continue;
      T* out = out_row<T>(p, part, query, row + local);
      const bool hidden = p.reverse && !row_is_visible(row + local);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int column = x + 8 * j;
        if (has_column(column)) out[column] = from_float<T>(hidden ? 0.0f : sum[i][j]);
      }
    }
  }

  // A warp has eight rows of the state at a time, a lane one of their columns.
  __device__ void update_state(bool first) {
    constexpr int kStateRows = 8;
    const int column = lane_id(), total = clock[kRows];
    const float factor = first ? weight[total] : 1.0f;
    for (int d = warp_id() * kStateRows; d < dim; d += kLinearThreads / kWarp * kStateRows) {
      float x_new[kStateRows] = {};
      int at[kStateRows];  // the last row again beyond the last
#pragma unroll
      for (int i = 0; i < kStateRows; ++i) at[i] = min(d + i, dim - 1);
      for (int c = 0; c < kRows; ++c) {
        // Rows beyond the last have the clock of the total; theirs are zeros.
        const float value = v[c * kLinearValues + column] * weight[total - clock[c]];
#pragma unroll
        for (int i = 0; i < kStateRows; ++i) {
          x_new[i] = fmaf(k[c * pitch + at[i]], value, x_new[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kStateRows; ++i) {
        if (d + i >= dim) break;
        float& x_old = state[(d + i) * kLinearValues + column];
        x_old = fmaf(x_old, factor, x_new[i]);
      }
    }
  }
};

template <class T, int kRows>
__global__ void __launch_bounds__(kLinearThreads, 4)  // four fill the shared memory of an H200
    linear_attention_kernel(const __grid_constant__ LinearAttentionParams p) {
  const int64_t parts = p.batch * p.heads * parts_of_head(p);
  for (int64_t number = blockIdx.x; number < parts; number += gridDim.x) {
    Chunks<T, kRows>(p, number, &shared_memory<float>()).run();
    __syncthreads();  // the next part takes the shared memory
  }
}

// One visible row: state_out = w(1) state + k v^T and its products with up to four queries at a
// time; the next four read what was written. Lanes are value dimensions, warps share the rows.
template <class T>
__device__ __forceinline__ void step(const LinearAttentionParams& p, const Part& part,
                                     float* partial) {
  constexpr int kWarps = kLinearStepThreads / kWarp;
  const int column = lane_id();
  const bool mine = part.first + column < p.value_dim;
  const float decay = expf(-rate_of(p, part.head));
  const T* key = head_row<T>(p.k, part.item, part.head, 0);
  const T* value = head_row<T>(p.v, part.item, part.head, 0) + part.first;
  const float v = mine ? to_float(value[column]) * static_cast<float>(p.scale_k) : 0.0f;
  for (int64_t first = 0; first < p.query_group; first += kLinearStepQueries) {
    float sum[kLinearStepQueries] = {};
    for (int64_t d = warp_id(); mine && d < p.head_dim; d += kWarps) {
      float x;
      if (first == 0) {
        x = to_float(key[d]) * v;
        if (p.state) x = fmaf(state_row(p, part, d)[column], decay, x);
        state_out_row(p, part, d)[column] = x;
      } else {
        x = state_out_row(p, part, d)[column];
      }
#pragma unroll
      for (int i = 0; i < kLinearStepQueries; ++i) {
        if (first + i >= p.query_group) break;
        const int64_t head = part.head * p.query_group + first + i;
        sum[i] = fmaf(to_float(head_row<T>(p.q, part.item, head, 0)[d]), x, sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kLinearStepQueries; ++i) {
      partial[(warp_id() * kLinearStepQueries + i) * kWarp + column] = sum[i];
    }
    __syncthreads();
    const int query = warp_id();
    if (query < kLinearStepQueries && first + query < p.query_group && mine) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        total += partial[(w * kLinearStepQueries + query) * kWarp + column];
      }
      out_row<T>(p, part, first + query, 0)[column] =
          from_float<T>(total * static_cast<float>(p.scale_q));
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kLinearStepThreads)
    linear_step_kernel(const __grid_constant__ LinearAttentionParams p) {
  float* partial = &shared_memory<float>();  // [warp][query][32]
  const int64_t parts = p.batch * p.heads * parts_of_head(p);
  for (int64_t number = blockIdx.x; number < parts; number += gridDim.x) {
    step<T>(p, Part(p, number), partial);
  }
}

}  // namespace tokred::cuda::linear
