// kv_pack, kv_append and kv_unpack of rows of more than 256 channels: a warp has a row, in shared
// memory, and works on it eight neighbouring channels a lane at a time.
#pragma once

#include "kv_pack/cuda/kv_pack.cuh"

namespace tokred::cuda::packing {

// rotate_row() of a row in shared memory; all lanes of a warp call it.
__device__ __forceinline__ void rotate_shared_row(float* row, int dim) {
  const int size = static_cast<int>(hadamard_size(dim));
#pragma unroll 1
  for (int step = 1; step < size; step *= 2) {
    __syncwarp();
    for (int pair = lane_id(); pair < dim / 2; pair += kWarp) {
      float *low = row + pair / step * 2 * step + pair % step, *high = low + step;
      const float a = *low, b = *high;
      *low = a + b;
      *high = a - b;
    }
  }
  __syncwarp();
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(size)));
  for (int c = lane_id(); c < dim; c += kWarp) row[c] = __fmul_rn(row[c], factor);
  __syncwarp();
}

struct WideRows {
  static constexpr int kRows = kPackThreads / kWarp;
  float row[kRows][kMaxWideDim];
  alignas(16) uint8_t code[kRows][kMaxWideDim];
};

// Fills a row from memory, with zeros where there is none.
template <class T>
__device__ __forceinline__ void load_wide_row(float* row, const T* from, int dim, bool rotate) {
  for (int c = lane_id(); c < dim; c += kWarp) row[c] = from ? to_float(from[c]) : 0.0f;
  __syncwarp();
  if (rotate) rotate_shared_row(row, dim);
}

template <class T>
struct WidePackHead : PackedHead<T> {
  using PackedHead<T>::p, PackedHead<T>::tokens;
  WideRows& shared;
  const int dim;

  __device__ WidePackHead(const KvAppendParams& p, uint32_t index, WideRows& shared)
      : PackedHead<T>(p, index), shared(shared), dim(static_cast<int>(p.packed.format.head_dim)) {}

  __device__ float* row() const { return shared.row[warp_id()]; }
  __device__ uint8_t* code() const { return shared.code[warp_id()]; }

  // This warp's row becomes that of a token as it is packed.
  __device__ __forceinline__ void load(int64_t token) const {
    load_wide_row(row(), this->source(token), dim, p.packed.format.rotated && token >= tokens.held);
  }
  // Writes the codes of this warp's row.
  __device__ __forceinline__ void store_codes(int64_t slot) const {
    __syncwarp();
    if (slot >= 0) {
      uint8_t* to = this->codes() + slot * p.packed.codes_stride_token;
      const int bits = p.packed.format.bits;
      store_code_row<kWarp>(to, code(), lane_id(), dim, bits == 3 ? 2 : bits, 0);
      if (bits == 3) store_code_row<kWarp>(to + high_bit_row(dim), code(), lane_id(), dim, 1, 2);
    }
    __syncwarp();
  }
};

// codes_of(x[8]) of the channels [first, end) of this warp's row.
template <class T, class CodesOf>
__device__ __forceinline__ void code_channels(const WidePackHead<T>& head, int first, int end,
                                              CodesOf codes_of) {
  for (int c = first + 8 * lane_id(); c < end; c += 8 * kWarp) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = head.row()[c + i];
    const uint2 codes = codes_of(x);
    reinterpret_cast<Word*>(head.code() + c)[0] = codes.x;
    reinterpret_cast<Word*>(head.code() + c)[1] = codes.y;
  }
}

// The scale of a codebook's group, in the order of PackScheme.
__device__ __forceinline__ float root_mean_square(const float* x, int size) {
  float total = 0.0f;
  for (int c = lane_id() % 16; c < size; c += 16) {
    const float magnitude = fabsf(x[c]);
    const float number = magnitude < kInfinity ? fminf(magnitude, kMaxInMean) : 0.0f;
    total = __fadd_rn(total, __fmul_rn(number, number));
  }
  for (int step = 8; step > 0; step /= 2) {
    total = __fadd_rn(total, __shfl_xor_sync(kAllLanes, total, step));
  }
  return __fsqrt_rn(__fdiv_rn(total, static_cast<float>(size)));
}

template <class T>
__device__ __forceinline__ void pack_wide_along_channels(const WidePackHead<T>& head,
                                                         int64_t unit) {
  const PackFormat& f = head.p.packed.format;
  const int64_t token = head.tokens.first + unit * WideRows::kRows + warp_id();
  const int64_t slot = head.slot(token);
  const int size = static_cast<int>(f.group_size), groups = head.dim / size;
  head.load(token);
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    const int first = group * size, end = first + size;
    if (f.scheme == PackScheme::codebook) {
      const float scale = __fmul_rn(root_mean_square(head.row() + first, size), kLevelStep);
      const LevelTable levels(head.p.packed, head.head);
      code_channels(head, first, end,
                    [&](const float (&x)[8]) { return levels.nearest(x, scale, f.bits); });
      if (slot >= 0 && lane_id() == 0) head.params_row(slot)[group] = storable(scale);
      continue;
    }
    Extremes extremes;
    for (int c = first + lane_id(); c < end; c += kWarp) extremes.add(head.row()[c]);
    __syncwarp();
    extremes.reduce(kWarp, 0);
    const Quantizer quantizer(f, extremes);
    code_channels(head, first, end, [&](const float (&x)[8]) {
      uint2 codes{0, 0};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        (i < 4 ? codes.x : codes.y) |= quantizer.code(x[i]) << 8 * (i % 4);
      }
      return codes;
    });
    if (slot >= 0 && lane_id() == 0) quantizer.store(head.params_row(slot), group, groups);
  }
  head.store_codes(slot);
}

// A thread has every kPackThreads-th channel of a group of tokens.
template <class T>
__device__ __forceinline__ void pack_wide_along_tokens(const WidePackHead<T>& head, int64_t unit) {
  constexpr int kChannels = (kMaxWideDim + kPackThreads - 1) / kPackThreads;
  const PackFormat& f = head.p.packed.format;
  const int64_t first = head.tokens.first + unit * f.group_size, end = first + f.group_size;
  // f(which of this thread's channels, row, channel) for the tokens in shared memory.
  const auto each_channel = [&](int64_t base, auto visit) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int channel = i * kPackThreads + static_cast<int>(threadIdx.x);
      if (channel >= head.dim) continue;
      for (int r = 0; r < WideRows::kRows && base + r < end; ++r) visit(i, r, channel);
    }
  };
  Extremes extremes[kChannels];
  for (int64_t base = first; base < end; base += WideRows::kRows) {
    head.load(base + warp_id());
    __syncthreads();
    each_channel(base,
                 [&](int i, int r, int channel) { extremes[i].add(head.shared.row[r][channel]); });
    __syncthreads();
  }
  const int64_t slot = head.slot(first);
  // Below 2^31; a division of 64 bits is a call, around which registers are spilled.
  const uint32_t params = static_cast<uint32_t>(slot) / static_cast<uint32_t>(f.group_size);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int channel = i * kPackThreads + static_cast<int>(threadIdx.x);
    if (slot < 0 || channel >= head.dim) continue;
    Quantizer(f, extremes[i]).store(head.params_row(params), channel, head.dim);
  }
  for (int64_t base = first; base < end; base += WideRows::kRows) {
    const int64_t token = base + warp_id();
    head.load(token);
    __syncthreads();
    each_channel(base, [&](int i, int r, int channel) {
      const uint32_t code = Quantizer(f, extremes[i]).code(head.shared.row[r][channel]);
      head.shared.code[r][channel] = static_cast<uint8_t>(code);
    });
    __syncthreads();
    head.store_codes(token < end ? head.slot(token) : -1);
  }
}

// Units as in plan_kv_pack, `units` to a head.
template <class T, GroupAxis kAxis>
__global__ void __launch_bounds__(kPackThreads)
    pack_wide_kernel(const __grid_constant__ KvAppendParams p, int64_t units) {
  const auto of_head = static_cast<uint32_t>(units);
  const WidePackHead<T> head(p, blockIdx.x / of_head, shared_memory<WideRows>());
  const uint32_t unit = blockIdx.x % of_head;
  if (!head.tokens.valid()) return;
  if constexpr (kAxis == GroupAxis::channel) {
    pack_wide_along_channels(head, unit);
  } else if (head.tokens.first + unit * p.packed.format.group_size < head.tokens.last) {
    pack_wide_along_tokens(head, unit);
  }
}

// write_window_kernel() of wide rows.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    write_wide_window_kernel(const __grid_constant__ KvAppendParams p, int64_t newest) {
  const int64_t row = int64_t{blockIdx.x} * WideRows::kRows + warp_id();
  if (row >= p.batch * p.heads * newest) return;
  const WidePackHead<T> head(p, static_cast<uint32_t>(row / newest), shared_memory<WideRows>());
  const int64_t token = p.tokens - newest + row % newest;
  const int64_t position = head.tokens.held + token;
  if (!head.tokens.valid() || position < head.tokens.last) return;
  load_wide_row(head.row(), head.x_row(token), head.dim, p.packed.format.rotated);
  auto* to = const_cast<T*>(head.window_row(position));
  for (int c = lane_id(); c < head.dim; c += kWarp) to[c] = from_float<T>(head.row()[c]);
}

// unpack_kernel() of wide rows.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    unpack_wide_kernel(const __grid_constant__ KvUnpackParams p) {
  float* row = shared_memory<WideRows>().row[warp_id()];
  const PackedRows& packed = p.packed;
  const PackFormat& f = packed.format;
  const int dim = static_cast<int>(f.head_dim);
  const int64_t index = int64_t{blockIdx.x} * WideRows::kRows + warp_id();
  if (index >= p.batch * p.heads * packed.rows) return;
  const int64_t token = index % packed.rows, head = index / packed.rows % p.heads;
  const int64_t batch = index / packed.rows / p.heads;
  for (int c = 8 * lane_id(); c < dim; c += 8 * kWarp) {
    float x[8];
    RowReader(packed, batch, head, c, CodeReader(f, c)).numbers(x, token);
#pragma unroll
    for (int i = 0; i < 8; ++i) row[c + i] = x[i];
  }
  __syncwarp();
  if (f.rotated) rotate_shared_row(row, dim);
  auto* to = static_cast<T*>(const_cast<void*>(p.out.data)) + batch * p.out.stride_batch +
             head * p.out.stride_head + token * dim;
  for (int c = lane_id(); c < dim; c += kWarp) to[c] = from_float<T>(row[c]);
}

}  // namespace tokred::cuda::packing
