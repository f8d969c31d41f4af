// packed_attention of up to eight query rows on codes as they are: a warp's tiles of 32 tokens go
// from memory to the tensor cores without numbers in between. Keys are columns of the first
// product, values rows of the second, so that its weights stay in the lanes that have found them.
#pragma once

#include "packed_attn/cuda/code_products.cuh"
#include "packed_attn/cuda/packed_attention.cuh"

namespace tokred::cuda::attention {

struct CodeDecodeParams : PackedDecodeParams {
  CodeCopy copy_of_codes;
};

struct CodePlaces : KeySlots<kCodeKeys> {
  int k[kCodeKeys], v[kCodeKeys];
};

// Copies of packed rows follow in memory; then what the warps have summed.
template <class C>
struct CodeShared : CodeQueries<C> {
  CodeScales scales[C::kWarps];
  CodePlaces places[C::kWarps][C::kStages];
  RowVisibility visibility[C::kRows];
  float top[C::kWarps][C::kRows], sum[C::kWarps][C::kRows];
  float offset[C::kWarps][C::kRows][C::kSteps];  // of the groups of values

  using Sums = float[C::kWarps][C::kRows][C::kValueDim];

  __device__ uint8_t* stage(const CodeCopy& copy, int warp, int number) {
    return reinterpret_cast<uint8_t*>(this + 1) + (warp * C::kStages + number) * copy.bytes;
  }
  __device__ Sums& out() { return *reinterpret_cast<Sums*>(this + 1); }
};

// A warp's sums. A lane holds, for query lane / 4, the largest logit and its part of the sum of
// weights, and the weighted values in channels 16 i + 2 (lane / 4) and the next for queries 2 (lane
// % 4) and the next.
template <class C>
struct CodeState {
  float out[C::kSteps][4], offset[C::kSteps];
  float top, sum;

  __device__ CodeState() : out(), offset(), top(-kInfinity), sum(0.0f) {}

  // Logits to weights, and the sums so far to the new top.
  __device__ __forceinline__ void to_weights(float (&logit)[1][C::kParts][4]) {
    float max = top;
#pragma unroll
    for (int n = 0; n < C::kParts; ++n) max = fmaxf(max, fmaxf(logit[0][n][0], logit[0][n][1]));
    max = warp_max<4>(max);
    // A row that has seen nothing yet keeps weights of 0: -inf minus 0 instead of minus -inf.
    const float base = max == -kInfinity ? 0.0f : max;
    const float shrink = exp2_approx(top - base);
    if (__any_sync(kAllLanes, max != top)) rescale(shrink);
    top = max;
#pragma unroll
    for (int n = 0; n < C::kParts; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        logit[0][n][e] = exp2_approx(logit[0][n][e] - base);
        sum += logit[0][n][e];
      }
    }
  }

 private:
  __device__ __forceinline__ void rescale(float shrink) {
    const int first = lane_id() % 4 * 8;  // a lane of query 2 (lane % 4)
    const float of[2] = {__shfl_sync(kAllLanes, shrink, first),
                         __shfl_sync(kAllLanes, shrink, first + 4)};
    sum *= shrink;
#pragma unroll
    for (int i = 0; i < C::kSteps; ++i) {
      offset[i] *= shrink;
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] *= of[e % 2];
    }
  }
};

// state.out += values of a tile . weights.
template <class C>
__device__ __forceinline__ void accumulate_codes(CodeState<C>& state,
                                                 const float (&weights)[1][C::kParts][4],
                                                 const CodeRows& rows, const CodeShared<C>& shared,
                                                 const uint8_t* stage, const int* places,
                                                 bool windows) {
  const PackFormat& f = rows.format();
  const CodeScales& scales = shared.scales[warp_id()];
  const int dim = static_cast<int>(f.head_dim), size = static_cast<int>(f.group_size);
  const float less = -code_base(f) - code_middle(f);
  const uint32_t minus = pack_pair<bf16>(less, less), all_minus[4] = {minus, minus, minus, minus};
  // Which halves of a word are tokens that are packed.
  uint32_t packed[C::kParts];
#pragma unroll
  for (int n = 0; n < C::kParts; ++n) {
    packed[n] = 0xffffffffu;
    if (!windows) continue;
    const int token = 8 * n + lane_id() % 4 * 2;
    packed[n] = (in_window(places[token]) ? 0u : 0xffffu) |
                (in_window(places[token + 1]) ? 0u : 0xffff0000u);
  }
  uint32_t b[C::kParts / 2][2], of_packed[C::kParts / 2][2];
  CodeStep step(f.bits);
  int group = 0, first = 0;
#pragma unroll
  for (int i = 0; i < C::kSteps; ++i) {
    if (16 * i >= dim) break;
    if (16 * i == first) {
#pragma unroll
      for (int n = 0; n < C::kParts; ++n) {
        const float4 s = scales.pair(group, n);
        const float* w = weights[0][n];
        b[n / 2][n % 2] = pack_pair<bf16>(w[0] * s.x, w[1] * s.z);
        of_packed[n / 2][n % 2] = b[n / 2][n % 2] & packed[n];
        state.offset[i] = fmaf(w[1], s.w, fmaf(w[0], s.y, state.offset[i]));
      }
      ++group;
      first += size;
    }
    uint32_t word[C::kParts];
    load_words<true>(word, stage, rows.layout.codes.pitch, step);
    uint32_t pair[C::kParts][2];
#pragma unroll
    for (int n = 0; n < C::kParts; ++n) step.pairs(pair[n], word[n]);
    step.advance();
    if (windows) rows.replace_values(pair, places, 16 * i);
#pragma unroll
    for (int half = 0; half < C::kParts / 2; ++half) {
      const uint32_t a[4] = {pair[2 * half][0], pair[2 * half][1], pair[2 * half + 1][0],
                             pair[2 * half + 1][1]};
      mma(bf16{}, state.out[i], a, b[half]);
      mma(bf16{}, state.out[i], all_minus, of_packed[half]);
    }
  }
}

// Writes this warp's sums to shared memory, for the whole block to add up.
template <class C>
__device__ __forceinline__ void keep_code_state(const CodeState<C>& state, CodeShared<C>& shared,
                                                const PackFormat& f) {
  const int warp = warp_id(), row = lane_id() / 4, size = static_cast<int>(f.group_size);
  const float sum = warp_sum<4>(state.sum);
  shared.top[warp][row] = state.top;
  shared.sum[warp][row] = sum;
  float offset = 0.0f;
  int first = 0;
#pragma unroll
  for (int i = 0; i < C::kSteps; ++i) {
    if (16 * i == first) {
      offset = warp_sum<4>(state.offset[i]);
      first += size;
    }
    shared.offset[warp][row][i] = offset;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < C::kSteps; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int query = lane_id() % 4 * 2 + e % 2;
      shared.out()[warp][query][16 * i + lane_id() / 4 * 2 + e / 2] =
          state.out[i][e] + shared.offset[warp][query][i];
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 3)
    code_decode_kernel(const __grid_constant__ CodeDecodeParams p) {
  auto& shared = shared_memory<CodeShared<C>>();
  const AttentionParams& a = p.decode.sparse.attention;
  const PackedSplit<C::kKeys> split(p, C::kWarps);
  if (split.row_tile.rows == 0) return;
  const ListView& list = split.list();
  TokenStream stream = split.stream(p);
  const CodeCopy& copy = p.copy_of_codes;
  const CodeRows keys(p.k, copy.k, a.k, p.slots, list.view.batch, list.key_head);
  const CodeRows values(p.v, copy.v, a.v, p.slots, list.view.batch, list.key_head);
  const int v_first = copy.v_first;

  load_packed_queries<C>(shared, p, split.row_tile, split.tokens);
  __syncthreads();
  sum_queries<C>(shared, p.k.packed.format);
  __syncthreads();
  order_queries(shared);
  __syncthreads();
  CodeState<C> state;
  const float scale = logit_scale(a);
  const bool per_row_mask = rows_differ(a);
  const auto load = [&](int, int number) {
    CodePlaces& places = shared.places[warp_id()][number];
    uint8_t* stage = shared.stage(copy, warp_id(), number);
    keep_token(places, stream.next());
    __syncwarp();
    keys.copy(stage, places.k);
    values.copy(stage + v_first, places.v);
  };
  const auto add = [&](int, int number) {
    const CodePlaces& places = shared.places[warp_id()][number];
    const uint8_t* stage = shared.stage(copy, warp_id(), number);
    CodeScales& scales = shared.scales[warp_id()];
    const int k_place = places.k[lane_id()], v_place = places.v[lane_id()];

    scales.fill(keys.format(), k_place, keys.param_row(stage), -code_base(keys.format()));
    __syncwarp();
    float weights[1][C::kParts][4];
    multiply_codes<C>(weights, keys, shared, scales, stage, places.k,
                      __any_sync(kAllLanes, in_window(k_place)));
    list_logits<bf16>(weights, places, shared.visibility, a, list.view.batch, scale, per_row_mask,
                      [](int, int) { return lane_id() / 4; });
    state.to_weights(weights);
    __syncwarp();  // all lanes are done with the scales of keys
    scales.fill(values.format(), v_place, values.param_row(stage + v_first),
                code_middle(values.format()));
    __syncwarp();
    accumulate_codes<C>(state, weights, values, shared, stage + v_first, places.v,
                        __any_sync(kAllLanes, in_window(v_place)));
  };
  for_each_tile_of_warp<C::kStages>(split.tiles, C::kStages, load, add);
  cp_async_wait<0>();
  __syncthreads();
  keep_code_state(state, shared, p.v.packed.format);
  __syncthreads();
  finish_rows<C>(shared, p, split.row_tile, false);
}

}  // namespace tokred::cuda::attention
