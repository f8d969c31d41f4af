// Scores of queries and keys: a tile of four keys and up to four query rows in the registers of a
// part of a warp. The keys are read once; query rows come from L1.
#pragma once

#include "attention/cuda/head_scores.cuh"

namespace tokred::cuda::scoring {

// The params, and a launch's own. The heads of k come in groups of `summed`, whose
// scores are summed; each group gives `rows` scores a key, each of them the sum over `terms` query
// rows: query row ((kv head) * rows + r) * terms + t.
struct QkScoreArgs {
  QkScoreParams p;
  HeadTensor query;    // [B, query rows, D], of query_dtype
  DType query_dtype;
  int64_t rows, terms, summed, chunk;
  float scale;
  float* out;          // f32 [B, groups * rows, N]; [B, groups, N] for group_max
};

// The mean over the L queries, and over `heads` neighbouring heads: f32 [B, Hq / heads, D]. A
// thread for each result.
template <class T>
__global__ void __launch_bounds__(kScoreThreads)
    mean_query_kernel(const __grid_constant__ QkScoreParams p, int64_t heads, float* out) {
  const int64_t at = int64_t{blockIdx.x} * kScoreThreads + threadIdx.x;
  const int64_t rows = p.heads_q / heads;
  if (at >= p.batch * rows * p.head_dim) return;
  const int64_t column = at % p.head_dim, row = at / p.head_dim % rows;
  const T* first = static_cast<const T*>(p.q.data) + at / p.head_dim / rows * p.q.stride_batch +
                   row * heads * p.q.stride_head + column;
  float sum = 0.0f;
  for (int64_t head = 0; head < heads; ++head) {
#pragma unroll 4
    for (int64_t i = 0; i < p.queries; ++i) {
      sum += to_float(first[head * p.q.stride_head + i * p.q.stride_token]);
    }
  }
  out[at] = sum / static_cast<float>(heads * p.queries);
}

// Where key t is stored, -1 where it has no score.
__device__ __forceinline__ int64_t stored_key(const QkScoreParams& p, int64_t batch, int64_t t) {
  if (t >= p.keys) return -1;
  if (p.lengths && t >= p.lengths[batch * p.lengths_stride]) return -1;
  if (p.mask && !p.mask[batch * p.mask_stride_batch + t * p.mask_stride_token]) return -1;
  if (!p.slots) return t;
  const int64_t slot = p.slots[batch * p.slots_stride_batch + t];
  return slot >= 0 && slot < p.stored_keys ? slot : -1;
}

// Four keys of a batch item, and where their rows start in head 0.
struct KeyTile {
  int64_t offset[kScoreRows];
  unsigned visible;  // a bit each

  KeyTile() = default;
  __device__ __forceinline__ KeyTile(const QkScoreParams& p, int64_t batch, int64_t first)
      : visible(0) {
    const int64_t start = p.slots ? 0 : batch * p.k.stride_batch;
#pragma unroll
    for (int i = 0; i < kScoreRows; ++i) {
      const int64_t key = stored_key(p, batch, first + i);
      offset[i] = key < 0 ? -1 : start + key * p.k.stride_token;
      visible |= key < 0 ? 0u : 1u << i;
    }
  }
};

// The work of a part of a warp on kRows query rows of a group of heads at a time.
template <class T, int kLanes, int kRows>
struct QkScorer {
  static constexpr int kSums = kRows * kScoreRows;
  static constexpr int kResults = kSums > kLanes ? kSums / kLanes : 1;
  const QkScoreArgs& a;
  const QkScoreParams& p;
  const int64_t batch, group;
  const int lane;
  const bool keys_aligned, query_aligned;

  __device__ QkScorer(const QkScoreArgs& a, int64_t batch, int64_t group)
      : a(a), p(a.p), batch(batch), group(group), lane(lane_id() % kLanes),
        keys_aligned(is_aligned(a.p.k, a.p.dtype)),
        query_aligned(is_aligned(a.query, a.query_dtype)) {}

  __device__ __forceinline__ KeyTile tile(int64_t first_key) const {
    return KeyTile(p, batch, first_key);
  }

  __device__ __forceinline__ void load_keys(float (&k)[kScoreRows][8], const KeyTile& keys,
                                            int64_t head) const {
    const T* base = static_cast<const T*>(p.k.data) + head * p.k.stride_head;
    const T* row[kScoreRows];
#pragma unroll
    for (int i = 0; i < kScoreRows; ++i) {
      row[i] = keys.offset[i] < 0 ? nullptr : base + keys.offset[i];
    }
    load_rows(k, row, 8 * lane, static_cast<int>(p.head_dim), keys_aligned);
  }

  // This lane's part of the products of the rows `first` on of a key head.
  __device__ __forceinline__ void add_products(float (&sum)[kSums], const float (&k)[kScoreRows][8],
                                               int64_t head, int64_t first) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = head * a.rows + min(first + r, a.rows - 1);
      const int64_t offset[1] = {batch * a.query.stride_batch + row * a.query.stride_head};
      float q[1][8];
      load_rows(q, a.query.data, a.query_dtype, offset, 8 * lane, static_cast<int>(p.head_dim),
                query_aligned);
#pragma unroll
      for (int i = 0; i < kScoreRows; ++i) {
        float& x = sum[r * kScoreRows + i];
#pragma unroll
        for (int c = 0; c < 8; ++c) x = fmaf(q[0][c], k[i][c], x);
      }
    }
  }

  // The same over the listed dimensions only, every lane with its own.
  __device__ __forceinline__ void add_listed(float (&sum)[kSums], const KeyTile& keys, int64_t head,
                                             int64_t first) const {
    const T* base = static_cast<const T*>(p.k.data) + head * p.k.stride_head;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for (int64_t term = 0; term < a.terms; ++term) {
        const int64_t row = (head * a.rows + min(first + r, a.rows - 1)) * a.terms + term;
        const int64_t query = batch * a.query.stride_batch + row * a.query.stride_head;
        for (int64_t f = lane; f < p.num_dims; f += kLanes) {
          const int64_t dim = p.dims[row * p.num_dims + f];
          if (dim < 0 || dim >= p.head_dim) continue;
          const float q = a.query_dtype == DType::f32
                              ? static_cast<const float*>(a.query.data)[query + dim]
                              : to_float(static_cast<const T*>(a.query.data)[query + dim]);
#pragma unroll
          for (int i = 0; i < kScoreRows; ++i) {
            const float k = keys.offset[i] < 0 ? 0.0f : to_float(base[keys.offset[i] + dim]);
            sum[r * kScoreRows + i] = fmaf(q, k, sum[r * kScoreRows + i]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ float score(float sum, const KeyTile& keys, int key) const {
    return keys.visible >> key & 1 ? sum * a.scale : -kInfinity;
  }

  // Writes this lane's share of the sums; number r * 4 + i belongs to row r and key i.
  __device__ __forceinline__ void store(const float (&sum)[kSums], const KeyTile& keys,
                                        int64_t first_key, int64_t first_row) const {
    if (kLanes > kSums && lane % (kLanes / kSums) != 0) return;
#pragma unroll
    for (int j = 0; j < kResults; ++j) {
      const int number = lane * kSums / kLanes + j, key = number % kScoreRows;
      const int64_t row = first_row + number / kScoreRows;
      if (row >= a.rows || first_key + key >= p.keys) continue;
      const int64_t head = (batch * (p.heads_kv / a.summed) + group) * a.rows + row;
      a.out[head * p.keys + first_key + key] = score(sum[j], keys, key);
    }
  }

  __device__ __forceinline__ void keep_max(float (&best)[kResults], const float (&sum)[kSums],
                                           int64_t first_row) const {
#pragma unroll
    for (int j = 0; j < kResults; ++j) {
      const int64_t row = first_row + (lane * kSums / kLanes + j) / kScoreRows;
      if (row < a.rows) best[j] = max_or_nan(best[j], sum[j] * a.scale);
    }
  }

  // Rows are in the upper bits of a lane's number, keys in the lower.
  __device__ __forceinline__ void store_max(float (&best)[kResults], const KeyTile& keys,
                                            int64_t first_key) const {
#pragma unroll
    for (int j = 0; j < kResults; ++j) {
      float x = best[j];
#pragma unroll
      for (int step = kLanes / 2; step > kLanes / 2 / kRows; step /= 2) {
        x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, step));
      }
      const int number = lane * kSums / kLanes + j;
      if (number >= kScoreRows || (kLanes > kSums && lane % (kLanes / kSums) != 0)) continue;
      if (first_key + number >= p.keys) continue;
      const float result = keys.visible >> number & 1 ? x : -kInfinity;
      a.out[(batch * p.heads_kv + group) * p.keys + first_key + number] = result;
    }
  }
};

// The chunk of keys and the group of heads of a block.
struct ScoreChunk {
  int64_t first, end, batch, group;

  __device__ __forceinline__ explicit ScoreChunk(const QkScoreArgs& a) {
    const int64_t chunks = (a.p.keys + a.chunk - 1) / a.chunk, groups = a.p.heads_kv / a.summed;
    first = blockIdx.x % chunks * a.chunk;
    end = min(first + a.chunk, a.p.keys);
    batch = blockIdx.x / chunks / groups;
    group = blockIdx.x / chunks % groups;
  }
};

// Scores of a chunk of keys, as a Scorer reads them.
template <bool kListed, int kLanes, int kRows, class Scorer>
__device__ __forceinline__ void score_chunk(const QkScoreArgs& a, const Scorer& scorer,
                                            const ScoreChunk& chunk) {
  const bool is_max = a.p.reduction == HeadReduction::group_max;
  constexpr int kStep = kScoreThreads / kLanes * kScoreRows;
  for (int64_t base = chunk.first; base < chunk.end; base += kStep) {
    const int64_t first_key = base + static_cast<int>(threadIdx.x) / kLanes * kScoreRows;
    const auto keys = scorer.tile(first_key);
    float k[kScoreRows][8], best[Scorer::kResults];
#pragma unroll
    for (float& x : best) x = -kInfinity;
    for (int64_t row = 0; row < a.rows; row += kRows) {
      float sum[Scorer::kSums];
#pragma unroll
      for (float& x : sum) x = 0.0f;
      for (int64_t i = 0; i < a.summed; ++i) {
        const int64_t head = scorer.group * a.summed + i;
        if constexpr (kListed) {
          scorer.add_listed(sum, keys, head, row);
        } else {
          if (row == 0 || a.summed > 1) scorer.load_keys(k, keys, head);
          scorer.add_products(sum, k, head, row);
        }
      }
      sum_and_share<kLanes, Scorer::kSums>(sum);
      if (is_max) {
        scorer.keep_max(best, sum, row);
      } else {
        scorer.store(sum, keys, first_key, row);
      }
    }
    if (is_max) scorer.store_max(best, keys, first_key);
  }
}

}  // namespace tokred::cuda::scoring
