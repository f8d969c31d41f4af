// 16 bytes as one load or store of an aligned address, whatever they hold.
#pragma once

#include "common/cuda/numbers.cuh"

namespace tokred::cuda {

struct __attribute__((may_alias, aligned(16))) Chunk {
  uint32_t word[4];
};

__device__ __forceinline__ Chunk load_chunk(const void* p) { return *static_cast<const Chunk*>(p); }
__device__ __forceinline__ void store_chunk(void* p, const Chunk& chunk) {
  *static_cast<Chunk*>(p) = chunk;
}

}  // namespace tokred::cuda
