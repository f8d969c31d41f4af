// The CUDA implementations of torch.ops.tokred.*.
#include <torch/csrc/stable/accelerator.h>

#include "bind/cuda_backend.h"
#include "bind/register.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace tokred {
namespace {

struct Cuda : cuda::Kernels {
  torch::stable::accelerator::DeviceGuard guard;

  explicit Cuda(const Tensor& like) : guard(like.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  }
};

}  // namespace
}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) { tokred::register_ops<tokred::Cuda>(m); }
