// torch.ops.tokred_simt.*: the CUDA kernels on the emulated device, for CPU tensors.
#include "bind/cuda_backend.h"
#include "bind/register.h"
#include "simt.h"
#include "tensor_core.h"

namespace tokred {
namespace {

struct Simt : cuda::Kernels {
  explicit Simt(const Tensor&) {}
};

}  // namespace
}  // namespace tokred

// Chooses a device by what its blocks may have of shared memory; tests call it.
extern "C" __attribute__((visibility("default"))) void tokred_simt_set_shared_limit(int64_t bytes) {
  simt::set_shared_limit(static_cast<size_t>(bytes));
}

// Whether the tensor cores cut off what does not fit, as hardware does, or round.
extern "C" __attribute__((visibility("default"))) void tokred_simt_set_truncation(bool truncate) {
  simt::tensor_cores_truncate = truncate;
}

STABLE_TORCH_LIBRARY_IMPL(tokred_simt, CPU, m) { tokred::register_ops<tokred::Simt>(m); }
