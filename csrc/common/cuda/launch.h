// The one way a kernel is launched.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/cuda/device.h"
#include "common/cuda/numbers.cuh"
#include "common/cuda/plan.h"
#include "common/cuda/stream.h"
#include "common/types.h"

namespace tokred::cuda {

// Throws where a block asks for more shared memory than the device has.
inline void check_shared_bytes(const LaunchPlan& plan, int64_t limit) {
  if (plan.shared_bytes <= limit) return;
  const auto kilobytes = [](int64_t bytes) { return std::to_string((bytes + 1023) >> 10) + " KB"; };
  throw std::runtime_error(
      std::string("tokred: ") + plan.kernel + " needs " + kilobytes(plan.shared_bytes) +
      " of shared memory a block for these dimensions and dtype, this GPU has " + kilobytes(limit) +
      ": 16-bit inputs or fewer dimensions need less");
}

// launch(kernel, plan, stream, params): a plan with an empty grid launches nothing. Throws where
// the device refuses.
template <class... P>
void launch(void (*kernel)(P...), const LaunchPlan& plan, [[maybe_unused]] Stream stream,
            const std::type_identity_t<P>&... params) {
  if (plan.grid[0] == 0 || plan.grid[1] == 0 || plan.grid[2] == 0) return;
  const dim3 grid(static_cast<unsigned>(plan.grid[0]), static_cast<unsigned>(plan.grid[1]),
                  static_cast<unsigned>(plan.grid[2]));
  const bool much = plan.shared_bytes > kDefaultSharedLimit;
  if (much) check_shared_bytes(plan, current_device().shared_limit);
#ifdef TOKRED_SIMT
  simt::launch(kernel, grid, dim3(plan.block), plan.shared_bytes, params...);
#else
  if (much) allow_shared_bytes(reinterpret_cast<const void*>(kernel), plan.shared_bytes);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  // clang-format off: it takes a launch in a header for templates
  kernel<<<grid, plan.block, plan.shared_bytes, cuda_stream>>>(params...);
  // clang-format on
  check(cudaGetLastError());
#endif
}

// Calls f.template operator()<T>() with the storage type of a 16- or 32-bit dtype.
template <class F>
void visit_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::f16: return f.template operator()<f16>();
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f64: break;
  }
  throw std::runtime_error("tokred: float64 has no CUDA kernels");
}

}  // namespace tokred::cuda
