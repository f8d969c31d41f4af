// torch.ops.tokred_simt.*: the CUDA kernels on the emulated device, for CPU tensors.
#include "bind/cuda_backend.h"
#include "bind/register.h"

namespace tokred {
namespace {

struct Simt : cuda::Kernels {
  explicit Simt(const Tensor&) {}
};

}  // namespace
}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred_simt, CPU, m) { tokred::register_ops<tokred::Simt>(m); }
