// kv_pack and kv_append, one kernel: group quantization. A part of a warp has a row, eight
// neighbouring channels a lane.
#pragma once

#include "common/cuda/block.cuh"
#include "common/cuda/row_io.cuh"
#include "kv_pack/cuda/codes.cuh"
#include "kv_pack/cuda/groups.cuh"
#include "kv_pack/cuda/plan.h"

namespace tokred::cuda::packing {

template <int kLanes>
struct PackShared {
  static constexpr int kRows = kPackThreads / kLanes, kWarps = kPackThreads / kWarp;
  alignas(16) uint8_t code[kRows][8 * kLanes];
  float low[kWarps][8 * kLanes], high[kWarps][8 * kLanes];
};

// How one batch item grows: the tokens [first, last) become packed, or none where it does not fit.
struct ItemTokens {
  int64_t held, first, last;

  __device__ ItemTokens(const KvAppendParams& p, int64_t batch)
      : held(p.lengths ? p.lengths[batch * p.lengths_stride] : p.length) {
    const GroupAxis axis = p.packed.format.axis;
    first = packed_tokens(axis, p.window_rows, held);
    last = packed_tokens(axis, p.window_rows, held + p.tokens);
    if (held < 0 || last > p.slots.capacity) held = -1;
  }
  __device__ bool valid() const { return held >= 0; }
};

// The tokens of one head of an item, and where they go.
template <class T>
struct PackedHead {
  const KvAppendParams& p;
  const int64_t batch, head;
  const ItemTokens tokens;

  __device__ PackedHead(const KvAppendParams& p, uint32_t index)
      : p(p), batch(index / static_cast<uint32_t>(p.heads)),
        head(index % static_cast<uint32_t>(p.heads)), tokens(p, batch) {}

  __device__ const T* row_of(const HeadTensor& t, int64_t row) const {
    return static_cast<const T*>(t.data) + batch * t.stride_batch + head * t.stride_head +
           row * t.stride_token;
  }
  __device__ __forceinline__ const T* x_row(int64_t row) const { return row_of(p.x, row); }
  // Of a token that the window holds.
  __device__ __forceinline__ const T* window_row(int64_t token) const {
    return row_of(p.window, static_cast<uint32_t>(token) % static_cast<uint32_t>(p.window_rows));
  }
  // Where a token lies before it is packed; null if it does not exist.
  __device__ __forceinline__ const T* source(int64_t token) const {
    if (token >= tokens.last) return nullptr;
    return token < tokens.held ? window_row(token) : x_row(token - tokens.held);
  }
  // The row of a token's codes, or -1 where it has none; of one that exists.
  __device__ __forceinline__ int64_t slot_of(int64_t token) const {
    if (!p.slots.data) return token;
    const int64_t row = p.slots.data[batch * p.slots.stride_batch + token];
    return row < p.packed.rows ? row : -1;
  }
  __device__ __forceinline__ int64_t slot(int64_t token) const {
    return token < tokens.last ? slot_of(token) : -1;
  }
  __device__ uint8_t* codes() const {
    return p.packed.codes + pool() * p.packed.codes_stride_batch +
           head * p.packed.codes_stride_head;
  }
  __device__ uint16_t* params() const {
    return p.packed.params + pool() * p.packed.params_stride_batch +
           head * p.packed.params_stride_head;
  }
  __device__ uint16_t* params_row(int64_t row) const {
    return params() + row * p.packed.params_stride_row;
  }

 private:
  __device__ int64_t pool() const { return p.slots.data ? 0 : batch; }
};

// The same by lanes of eight neighbouring channels.
template <class T, int kLanes>
struct PackHead : PackedHead<T> {
  using Base = PackedHead<T>;
  using Base::p, Base::tokens;
  const int channel, dim;
  const bool aligned;  // rows of x and of the window
  static constexpr int kRows = kPackThreads / kLanes;

  __device__ PackHead(const KvAppendParams& p, uint32_t index)
      : Base(p, index), channel(static_cast<int>(threadIdx.x) % kLanes * 8),
        dim(static_cast<int>(p.packed.format.head_dim)),
        aligned(is_aligned(p.x, p.dtype) && is_aligned(p.window, p.dtype)) {}

  static __device__ int row() { return static_cast<int>(threadIdx.x) / kLanes; }

  // This lane's channels of a token as it is packed; zeros for a token outside [first, last).
  __device__ __forceinline__ void load(float (&x)[8], int64_t token) const {
    const T* source[1] = {this->source(token)};
    float rows[1][8];
    load_rows(rows, source, channel, dim, aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = rows[0][i];
    if (!p.packed.format.rotated) return;
    float rotated[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) rotated[i] = x[i];
    rotate_row(rotated, dim);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = token < tokens.held ? x[i] : rotated[i];
  }

  // Writes the codes of this warp's rows, `mine` being those of this lane's channels.
  __device__ __forceinline__ void store_codes(PackShared<kLanes>& shared, uint2 mine,
                                              int64_t slot) const {
    uint8_t* codes = shared.code[row()];
    reinterpret_cast<Word*>(&codes[channel])[0] = mine.x;
    reinterpret_cast<Word*>(&codes[channel])[1] = mine.y;
    __syncwarp();
    if (slot >= 0) {
      uint8_t* to = this->codes() + slot * p.packed.codes_stride_token;
      const int bits = p.packed.format.bits, lane = channel / 8;
      store_code_row<kLanes>(to, codes, lane, dim, bits == 3 ? 2 : bits, 0);
      if (bits == 3) store_code_row<kLanes>(to + high_bit_row(dim), codes, lane, dim, 1, 2);
    }
    __syncwarp();
  }
};

template <class T, int kLanes>
__device__ __forceinline__ void pack_along_channels(const PackHead<T, kLanes>& head,
                                                    PackShared<kLanes>& shared, int64_t unit) {
  const PackFormat& f = head.p.packed.format;
  const int64_t token = head.tokens.first + unit * head.kRows + head.row();
  float x[8];
  head.load(x, token);
  const int lanes = static_cast<int>(f.group_size) / 8, lane = head.channel / 8;
  Extremes extremes[1];
#pragma unroll
  for (int i = 0; i < 8; ++i) extremes[0].add(x[i]);
  extremes[0].reduce(lanes, lane / lanes * lanes + lane_id() / kLanes * kLanes);
  const Quantizer quantizer(f, extremes[0]);
  uint2 codes{0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    (i < 4 ? codes.x : codes.y) |= quantizer.code(x[i]) << 8 * (i % 4);
  }
  const int64_t slot = head.slot(token);
  head.store_codes(shared, codes, slot);
  if (slot < 0 || head.channel >= head.dim || lane % lanes != 0) return;
  quantizer.store(head.params_row(slot), lane / lanes, head.dim / static_cast<int>(f.group_size));
}

template <class T, int kLanes>
__device__ __forceinline__ void pack_levels(const PackHead<T, kLanes>& head,
                                            PackShared<kLanes>& shared, int64_t unit) {
  const PackFormat& f = head.p.packed.format;
  const int64_t token = head.tokens.first + unit * head.kRows + head.row();
  const int lanes = static_cast<int>(f.group_size) / 8, lane = head.channel / 8;
  float x[8];
  head.load(x, token);
  const float sum = sum_squares(x, lanes, lane / lanes * lanes + lane_id() / kLanes * kLanes);
  const float mean = __fdiv_rn(sum, static_cast<float>(f.group_size));
  const float scale = __fmul_rn(__fsqrt_rn(mean), kLevelStep);
  const uint2 codes = LevelTable(head.p.packed, head.head).nearest(x, scale, f.bits);
  const int64_t slot = head.slot(token);
  head.store_codes(shared, codes, slot);
  if (slot < 0 || head.channel >= head.dim || lane % lanes != 0) return;
  head.params_row(slot)[lane / lanes] = storable(scale);
}

template <class T, int kLanes>
__device__ __forceinline__ void pack_along_tokens(const PackHead<T, kLanes>& head,
                                                  PackShared<kLanes>& shared, int64_t unit) {
  const PackFormat& f = head.p.packed.format;
  const int64_t first = head.tokens.first + unit * f.group_size, end = first + f.group_size;
  float x[8];
  Extremes extremes[8];
  for (int64_t base = first; base < end; base += head.kRows) {
    const int64_t token = base + head.row();
    head.load(x, token);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (token < end) extremes[i].add(x[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int step = kLanes; step < kWarp; step *= 2) extremes[i].join_lane(lane_id() ^ step);
    if (lane_id() >= kLanes) continue;
    shared.low[warp_id()][head.channel + i] = extremes[i].low;
    shared.high[warp_id()][head.channel + i] = extremes[i].high;
  }
  __syncthreads();
  const int64_t slot = head.slot(first);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    for (int w = 0; w < shared.kWarps; ++w) {
      extremes[i].join({shared.low[w][head.channel + i], shared.high[w][head.channel + i]});
    }
    if (head.row() > 0 || slot < 0 || head.channel >= head.dim) continue;
    Quantizer(f, extremes[i])
        .store(head.params_row(slot / f.group_size), head.channel + i, head.dim);
  }
  for (int64_t base = first; base < end; base += head.kRows) {
    const int64_t token = base + head.row();
    head.load(x, token);
    uint2 codes{0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      (i < 4 ? codes.x : codes.y) |= Quantizer(f, extremes[i]).code(x[i]) << 8 * (i % 4);
    }
    head.store_codes(shared, codes, token < end ? head.slot(token) : -1);
  }
}

// Units as in plan_kv_pack, `units` to a head.
template <class T, int kLanes>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const __grid_constant__ KvAppendParams p, int64_t units) {
  auto& shared = shared_memory<PackShared<kLanes>>();
  const auto of_head = static_cast<uint32_t>(units);
  const PackHead<T, kLanes> head(p, blockIdx.x / of_head);
  const uint32_t unit = blockIdx.x % of_head;
  if (!head.tokens.valid()) return;
  if (p.packed.format.scheme == PackScheme::codebook) {
    pack_levels(head, shared, unit);
  } else if (p.packed.format.axis == GroupAxis::channel) {
    pack_along_channels(head, shared, unit);
  } else if (head.tokens.first + unit * p.packed.format.group_size < head.tokens.last) {
    pack_along_tokens(head, shared, unit);
  }
}

// The last `newest` new tokens of every head, where they stay in the window.
template <class T, int kLanes>
__global__ void __launch_bounds__(kPackThreads)
    write_window_kernel(const __grid_constant__ KvAppendParams p, int64_t newest) {
  using Head = PackHead<T, kLanes>;
  const int64_t row = int64_t{blockIdx.x} * Head::kRows + Head::row();
  const bool exists = row < p.batch * p.heads * newest;
  const Head head(p, static_cast<uint32_t>(exists ? row / newest : 0));
  const int64_t token = p.tokens - newest + (exists ? row % newest : 0);
  const T* source[1] = {exists ? head.row_of(p.x, token) : nullptr};
  float x[1][8];
  load_rows(x, source, head.channel, head.dim, head.aligned);
  if (p.packed.format.rotated) rotate_row(x[0], head.dim);
  const int64_t position = head.tokens.held + token;
  if (!exists || !head.tokens.valid() || position < head.tokens.last) return;
  auto* to = const_cast<T*>(head.row_of(p.window, position % p.window_rows));
  store_eight(to, head.channel, head.dim, head.aligned, x[0]);
}

}  // namespace tokred::cuda::packing
