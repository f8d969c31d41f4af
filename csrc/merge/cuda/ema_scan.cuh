// ema_scan and its gradient: a block for 32 channels of an item, a lane for each. A warp has kSteps
// tokens of a round in registers: it scans them from zero, gets the state before them from the
// results of the earlier warps, and scans them again from it. Rounds are of fixed length, so that
// results depend on nothing but the row.
#pragma once

#include "common/cuda/block.cuh"
#include "common/cuda/warp.cuh"
#include "merge/cuda/plan.h"
#include "merge/params.h"

namespace tokred::cuda::merging {

inline constexpr int kSteps = kWarp;  // a lane holds one token's p
inline constexpr int kScanWarps = kScanThreads / kWarp;

struct ScanShared {
  float end[kScanWarps][kWarp];  // the state after a warp's tokens, from zero
  float keep[kScanWarps];  // what the warp's tokens keep of the state before them
};

// Where a thread works.
struct ScanLane {
  int64_t item, channel;
  bool active;  // the channel exists
  int length;  // tokens of the item

  __device__ explicit ScanLane(const EmaScanParams& p) {
    const int64_t slices = (p.channels + kWarp - 1) / kWarp;
    item = blockIdx.x / slices;
    channel = blockIdx.x % slices * kWarp + lane_id();
    active = channel < p.channels;
    const int64_t length_here = p.lengths ? p.lengths[item * p.lengths_stride] : p.tokens;
    length = static_cast<int>(min(max(length_here, int64_t{0}), p.tokens));
  }
  __device__ float share(const EmaScanParams& p, int token) const {
    if (token >= length) return 0.0f;
    return static_cast<const float*>(p.p.data)[item * p.p.stride_batch + token * p.p.stride_token];
  }
  __device__ float state(const TokenTable& table) const {
    if (!active || !table.data) return 0.0f;
    return static_cast<const float*>(
        table.data)[item * table.stride_batch + channel * table.stride_token];
  }
  template <class T>
  __device__ float at(const void* data, int64_t stride_batch, int64_t stride_token,
                      int token) const {
    if (!active || token >= length) return 0.0f;
    return to_float(
        static_cast<const T*>(data)[item * stride_batch + token * stride_token + channel]);
  }
};

// Returns the state before this warp's tokens, forwards or backwards; `state`, that before the
// round, becomes that after it.
__device__ __forceinline__ float pass_state(float end, float keep, float& state, bool backwards,
                                            ScanShared& shared) {
  shared.end[warp_id()][lane_id()] = end;
  if (lane_id() == 0) shared.keep[warp_id()] = keep;
  __syncthreads();
  float reaches = 0.0f;
#pragma unroll 4
  for (int i = 0; i < kScanWarps; ++i) {
    const int w = backwards ? kScanWarps - 1 - i : i;
    if (w == warp_id()) reaches = state;
    state = fmaf(shared.keep[w], state, shared.end[w][lane_id()]);
  }
  __syncthreads();
  return reaches;
}

template <class T>
__global__ void __launch_bounds__(kScanThreads)
    ema_scan_kernel(const __grid_constant__ EmaScanParams p) {
  auto& shared = shared_memory<ScanShared>();
  const ScanLane lane(p);
  const int tokens = static_cast<int>(p.tokens);
  float state = lane.state(p.state);
  T* z_row = static_cast<T*>(p.z) + lane.item * p.tokens * p.channels + lane.channel;
  for (int round = 0; round < tokens; round += kScanWarps * kSteps) {
    const int first = round + warp_id() * kSteps;
    const float share = lane.share(p, first + lane_id());
    float c[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      c[s] = lane.at<T>(p.c, p.c_stride_batch, p.c_stride_token, first + s);
    }
    float end = 0.0f, keep = 1.0f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const float take = __shfl_sync(kAllLanes, share, s);
      end = fmaf(1.0f - take, end, take * c[s]);
      keep *= 1.0f - take;
    }
    float z = pass_state(end, keep, state, false, shared);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const float take = __shfl_sync(kAllLanes, share, s);
      z = fmaf(1.0f - take, z, take * c[s]);
      if (lane.active && first + s < tokens) {
        z_row[int64_t{first + s} * p.channels] = from_float<T>(first + s < lane.length ? z : 0.0f);
      }
    }
  }
  if (warp_id() == 0 && lane.active) {
    static_cast<float*>(p.state_out)[lane.item * p.channels + lane.channel] = state;
  }
}

template <class T>
__global__ void __launch_bounds__(kScanThreads)
    ema_scan_backward_kernel(const __grid_constant__ EmaScanBackwardParams p) {
  auto& shared = shared_memory<ScanShared>();
  const EmaScanParams& f = p.forward;
  const ScanLane lane(f);
  const int tokens = static_cast<int>(f.tokens);
  float state = lane.state(p.grad_state_out);  // the gradient that reaches z from behind
  T* grad_row = static_cast<T*>(p.grad_c) + lane.item * f.tokens * f.channels + lane.channel;
  float* partial = static_cast<float*>(p.partial) + int64_t{blockIdx.x} * f.tokens;
  constexpr int kRound = kScanWarps * kSteps;
  for (int round = (tokens - 1) / kRound * kRound; round >= 0; round -= kRound) {
    const int first = round + warp_id() * kSteps;
    const float share = lane.share(f, first + lane_id());
    float grad[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      grad[s] = lane.at<T>(p.grad_z, p.grad_z_stride_batch, p.grad_z_stride_token, first + s);
    }
    float end = 0.0f, keep = 1.0f;
#pragma unroll
    for (int s = kSteps - 1; s >= 0; --s) {
      const float kept = 1.0f - __shfl_sync(kAllLanes, share, s);
      end = kept * (grad[s] + end);
      keep *= kept;
    }
    float reaches = pass_state(end, keep, state, true, shared);
    float grad_p = 0.0f;
#pragma unroll
    for (int s = kSteps - 1; s >= 0; --s) {
      const int token = first + s;
      const float take = __shfl_sync(kAllLanes, share, s);
      const float g = grad[s] + reaches;
      reaches = (1.0f - take) * g;
      const float c = lane.at<T>(f.c, f.c_stride_batch, f.c_stride_token, token);
      const float before = token > 0
                               ? lane.at<T>(p.z, p.z_stride_batch, p.z_stride_token, token - 1)
                               : lane.state(f.state);
      const bool counts = lane.active && token < lane.length;
      const float total = warp_sum(counts ? g * (c - before) : 0.0f);
      if (lane_id() == s) grad_p = total;
      if (lane.active && token < tokens) {
        grad_row[int64_t{token} * f.channels] = from_float<T>(counts ? take * g : 0.0f);
      }
    }
    if (first + lane_id() < tokens) partial[first + lane_id()] = grad_p;
  }
  if (warp_id() == 0 && lane.active) {
    static_cast<float*>(p.grad_state)[lane.item * f.channels + lane.channel] = state;
  }
}

// The gradient of p over all slices of channels.
static __global__ void __launch_bounds__(kMergeThreads)
    ema_scan_share_kernel(const __grid_constant__ EmaScanBackwardParams p) {
  const EmaScanParams& f = p.forward;
  const int64_t entry = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (entry >= f.batch * f.tokens) return;
  const int64_t slices = (f.channels + kWarp - 1) / kWarp;
  const int64_t item = entry / f.tokens, token = entry % f.tokens;
  const float* partial = static_cast<const float*>(p.partial) + item * slices * f.tokens + token;
  float total = 0.0f;
  for (int64_t s = 0; s < slices; ++s) total += partial[s * f.tokens];
  static_cast<float*>(p.grad_p)[entry] = total;
}

}  // namespace tokred::cuda::merging
