// Attention forward on wgmma. Of a block's three warpgroups the first two own 64 rows each, and the
// third fetches, ahead of them and through a ring of tiles in shared memory, the tiles of keys and
// values that some row sees. The products with the next keys run beside the softmax of this tile
// (as in arXiv 2407.08608): queries times keys from shared memory, weights times values with the
// weights in the registers that held the logits.
#pragma once

#include "sparse_attn/cuda/wgmma_fetch.cuh"

namespace tokred::cuda::attention {

// Transposes 4 x 4 words: lane t of every four neighbours brings column t and gets row t.
__device__ __forceinline__ void transpose_four(uint32_t (&word)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane_id() & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t mine = upper ? word[i] : word[i | step];
      const uint32_t other = __shfl_xor_sync(kAllLanes, mine, step);
      (upper ? word[i] : word[i | step]) = other;
    }
  }
}

// A warpgroup's part: its rows against the tiles that they see.
template <class C>
class Consumer {
 public:
  __device__ Consumer(const ForwardRows<C>& rows, WgmmaShared<C>& shared, int thread)
      : rows_(rows), shared_(shared), warpgroup_(thread / 128),
        scale_(static_cast<float>(rows.p.scale) * kLog2E) {
    start(state_);
  }

  __device__ __forceinline__ void load_rows(int thread) {
    const RowSource<T> source(rows_.p.q, rows_.view.batch, 0, 0, rows_.p.head_dim);
    fill<C::kConsumers>(shared_.query, source.first, thread, [&](int r) {
      const uint32_t row = rows_.first_row + r;
      const HeadView& view = rows_.view;
      return row < view.rows ? source.first + view.query_head(row) * source.tensor.stride_head +
                                   view.query(row) * source.tensor.stride_token
                             : nullptr;
    });
    rows_.keep_limits(shared_, thread);
    barrier_arrive_after_copies(shared_.query_full);
    barrier_arrive(shared_.query_full);
    barrier_wait(shared_.query_full, 0);
  }

  // Through runs of tiles that these rows see, one after the other in the ring. The others go back
  // as they come: not before they have come, or the arrival would count for the tile before.
  __device__ __forceinline__ void run() {
    for (Visit visit = wait_for_keys(); !visit.is_end(); visit = wait_for_keys()) {
      if (!visit.visible(warpgroup_)) {
        release(shared_.key_empty[at_.stage]);
        wait_for_values(at_);
        release(shared_.value_empty[at_.stage]);
        at_.advance();
        continue;
      }
      wgmma_fence();
      multiply_keys();
      add_logits<0>(visit);
      rescale(state_, shrink_);
      RingSlot<C> values = next_weights();
      for (visit = wait_for_keys(); visit.visible(warpgroup_); visit = wait_for_keys()) {
        wait_for_values(values);
        wgmma_fence();
        multiply_keys();
        multiply_values(values.stage);
        add_logits<1>(visit);
        wgmma_wait<0>(state_.out[0]);
        release(shared_.value_empty[values.stage]);
        rescale(state_, shrink_);
        values = next_weights();
      }
      wait_for_values(values);
      wgmma_fence();
      multiply_values(values.stage);
      wgmma_wait<0>(state_.out[0]);
      release(shared_.value_empty[values.stage]);
    }
    store();
  }

 private:
  using T = typename C::T;

  __device__ __forceinline__ Visit wait_for_keys() {
    barrier_wait(shared_.key_full[at_.stage], at_.parity);
    fence_shared_for_wgmma();
    return {shared_.visit[at_.stage]};
  }
  __device__ __forceinline__ void wait_for_values(RingSlot<C> place) {
    barrier_wait(shared_.value_full[place.stage], place.parity);
    fence_shared_for_wgmma();
  }
  __device__ __forceinline__ void release(Barrier& empty) {
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(empty);
  }

  __device__ __forceinline__ void multiply_keys() {
    const uint64_t queries = first_of(shared_.query.panel[0][64 * warpgroup_]);
    const uint64_t keys = first_of(shared_.key[at_.stage].panel[0][0]);
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      const int column = k % 4 * 32;  // in bytes
      wgmma(T{}, logit_[0], advance(queries, k / 4 * sizeof shared_.query.panel[0] + column),
            advance(keys, k / 4 * sizeof shared_.key[0].panel[0] + column), k > 0);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void multiply_values(int stage) {
    const auto& panel = shared_.value[stage].panel;
    const uint64_t values = first_of(panel[0][0], sizeof panel[0]);
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k) {
      wgmma(T{}, state_.out[0], weights_[k], advance(values, 16 * k * sizeof panel[0][0]));
    }
    wgmma_commit();
  }
  // Descriptors take registers only while they are in use.
  __device__ __forceinline__ static uint64_t first_of(const T* row, int leading = 16) {
    return static_cast<uint64_t>(
        optimization_barrier(static_cast<int64_t>(matrix_descriptor(row, leading))));
  }

  // From the products with the keys at at_, which kPending other groups may follow, to weights.
  template <int kPending>
  __device__ __forceinline__ void add_logits(Visit visit) {
    const auto hidden = find_hidden_pairs(visit);
    wgmma_wait<kPending>(logit_[0]);
    to_logits(hidden, visit);
    release(shared_.key_empty[at_.stage]);
    to_weights(logit_, state_, shrink_);
  }

  // By what differs from pair to pair.
  __device__ __forceinline__ HiddenPairs<1, C::kKeys> find_hidden_pairs(Visit visit) const {
    HiddenPairs<1, C::kKeys> hidden;
    const AttentionParams& p = rows_.p;
    if constexpr (C::kSparse) {
      hidden = find_hidden(rows_, {visit.number(), true, visit.hides(warpgroup_)});
    }
    if (p.mask.data && !masks_keys_only(p)) {
      hidden.template add<8>(
          [&](int i, int h) { return p.mask.data + shared_.mask_offset[lane_row<C>(i, h)]; },
          [&](int column) {
            const int64_t key = int64_t{visit.number()} * C::kKeys + column;
            return min(key, p.keys - 1) * p.mask.stride[3];
          },
          [](const bool* row, int64_t column) { return row[column]; });
    }
    return hidden;
  }

  __device__ __forceinline__ void to_logits(const HiddenPairs<1, C::kKeys>& hidden, Visit visit) {
    const float* bias = &shared_.bias[at_.stage][lane_id() % 4 * 2];
#pragma unroll
    for (int j = 0; j < C::kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        logit_[0][j][e] = fmaf(logit_[0][j][e], scale_, bias[8 * j + e % 2]);
      }
    }
    if (visit.number() < rows_.whole_tiles && !visit.hides(warpgroup_)) return;
    const int first_key = static_cast<int>(visit.number()) * C::kKeys + lane_id() % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int last = shared_.last_key[lane_row<C>(0, h)] - first_key;
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool visible =
              8 * j + e <= last && bias[8 * j + e] != -kInfinity && !hidden.at(0, h, j, e);
          if (!visible) logit_[0][j][2 * h + e] = -kInfinity;
        }
      }
    }
  }

  // The weights as left operands, once those before are used up. Returns where their values are.
  __device__ __forceinline__ RingSlot<C> next_weights() {
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const float* pair = &logit_[0][2 * k + quarter / 2][quarter % 2 * 2];
        weights_[k][quarter] = pack_pair<T>(pair[0], pair[1]);
      }
    }
    const RingSlot<C> place = at_;
    at_.advance();
    return place;
  }

  // As finish, but 16 bytes at a time.
  __device__ __forceinline__ void store() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = warp_sum<4>(state_.sum[0][h]);
      const bool nan = is_nan(state_, 0, h);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      const uint32_t row = rows_.first_row + lane_row<C>(0, h);
      const bool exists = row < rows_.view.rows;
      if (exists && lane_id() % 4 == 0) {
        store_lse(state_, rows_.p, rows_.view, row, 0, h, nan ? kNaN : sum);
      }
      T* out = out_row<T>(rows_.p, rows_.view, row) + lane_id() % 4 * 8;
#pragma unroll
      for (int j = 0; j < C::kDim / 8; j += 4) {
        Chunk chunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &state_.out[0][j + i][2 * h];
          chunk.word[i] = pack_pair<T>(pair[0] * inverse, pair[1] * inverse);
        }
        transpose_four(chunk.word);
        if (exists) store_chunk(out + 8 * j, chunk);
      }
    }
  }

  const ForwardRows<C>& rows_;
  WgmmaShared<C>& shared_;
  const int warpgroup_;
  const float scale_;
  RingSlot<C> at_;
  ForwardState<C> state_;
  float logit_[C::kRowTiles][C::kKeys / 8][4], shrink_[C::kRowTiles][2];
  uint32_t weights_[C::kKeys / 16][4];
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    wgmma_attention_kernel(const __grid_constant__ AttentionParams p) {
#if defined(TOKRED_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& shared = wgmma_shared_memory<C>();
  const ForwardRows<C> rows(p);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) shared.init();
  __syncthreads();
  if (thread >= C::kConsumers) {
    decrease_registers<56>();
    return produce(rows, shared, thread - C::kConsumers);
  }
  increase_registers<224>();
  Consumer<C> consumer(rows, shared, thread);
  consumer.load_rows(thread);
  consumer.run();
#else
  __trap();  // never chosen on other devices
#endif
}

}  // namespace tokred::cuda::attention
