// A warp's tiles in a ring of stages in shared memory: the copy of a tile starts while the warp
// still works on the ones before it, up to stages - 1 tiles early.
#pragma once

#include "common/cuda/ptx.cuh"

namespace tokred::cuda {

// Stages 0 .. stages - 1 in turn.
struct Ring {
  int stages, at = 0;

  __device__ __forceinline__ void advance() { at = at + 1 == stages ? 0 : at + 1; }
  __device__ __forceinline__ int before() const { return (at == 0 ? stages : at) - 1; }
};

// Waits until of a ring of 2 to kMax stages all copies have arrived but those of the `stages` - 2
// that were started last.
template <int kMax>
__device__ __forceinline__ void wait_for_stage(int stages) {
  if constexpr (kMax > 2) {
    if (stages == kMax) return cp_async_wait<kMax - 2>();
    return wait_for_stage<kMax - 1>(stages);
  } else {
    cp_async_wait<0>();
  }
}

// load(tile, stage) starts the copies of a tile to a stage, add(tile, stage) works on it.
template <int kMaxStages, class Load, class Add>
__device__ __forceinline__ void for_each_tile_of_warp(int tiles, int stages, Load load, Add add) {
  Ring ring{stages};
#pragma unroll 1
  for (int tile = 1 - stages; tile < tiles; ++tile) {
    wait_for_stage<kMaxStages>(stages);
    __syncwarp();  // all lanes have their copies, and are done with the tile before
    const int next = tile + stages - 1;
    // The first tiles go to the stages in order, others where the one before has been.
    if (next < tiles) load(next, tile < 0 ? next : ring.before());
    cp_async_commit();
    if (tile < 0) continue;
    add(tile, ring.at);
    ring.advance();
  }
}

}  // namespace tokred::cuda
