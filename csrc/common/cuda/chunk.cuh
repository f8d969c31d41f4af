// 16 bytes as one load or store of an aligned address, whatever they hold; and which addresses are.
#pragma once

#include "common/cuda/numbers.cuh"

namespace tokred::cuda {

struct __attribute__((may_alias, aligned(16))) Chunk {
  uint32_t word[4];
};

// Whether `data` and every address that lies multiples of strides of so many elements further are
// multiples of 16 bytes; several strides are or-ed together.
__host__ __device__ __forceinline__ bool is_aligned(const void* data, int64_t strides,
                                                    int64_t element_bytes) {
  const auto bytes = static_cast<uint64_t>(strides) * static_cast<uint64_t>(element_bytes);
  return ((reinterpret_cast<uintptr_t>(data) | bytes) & 15) == 0;
}

__device__ __forceinline__ Chunk load_chunk(const void* p) { return *static_cast<const Chunk*>(p); }
__device__ __forceinline__ void store_chunk(void* p, const Chunk& chunk) {
  *static_cast<Chunk*>(p) = chunk;
}

}  // namespace tokred::cuda
