// What the current device offers, asked once; and errors of the CUDA runtime in words.
#pragma once

#include <cstdint>

#ifndef TOKRED_SIMT
#include <cuda_runtime_api.h>
#endif

namespace tokred::cuda {

struct Device {
  int capability;        // 10 * major + minor; 90 of the emulated device
  int64_t shared_limit;  // bytes of shared memory that a block may ask for
};
Device current_device();

#ifndef TOKRED_SIMT
// Throws where the runtime refuses.
void check(cudaError_t status);

// Before a launch: lets a kernel have `bytes` of shared memory on the current device, unless it has
// had as many before.
void allow_shared_bytes(const void* kernel, int64_t bytes);
#endif

}  // namespace tokred::cuda
