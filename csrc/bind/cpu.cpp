// The CPU implementations of torch.ops.tokred.*.
#include <torch/csrc/stable/ops.h>

#include "bind/cpu_kernels.h"
#include "bind/register.h"
#include "common/cpu/dispatch.h"

namespace tokred {
namespace {

Parallel torch_pool() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t count, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
            });
          }};
}

// A front end calls these on parameters that it has checked.
struct Cpu {
  static constexpr bool kDouble = true;  // float64 too
  static constexpr bool kHost = true;    // kernels run on the host, before the call returns
  Parallel parallel = torch_pool();

  explicit Cpu(const Tensor&) {}

#define TOKRED_OP(op, Params, schema) \
  void op(const Params& p) const { select(generic::op, avx2::op, avx512::op)(p, parallel); }
#define TOKRED_OP_SCRATCH(op, Params, schema)                                             \
  TOKRED_OP(op, Params, schema)                                                           \
  int64_t op##_workspace(const Params& p) const {                                         \
    return select(generic::op##_workspace, avx2::op##_workspace, avx512::op##_workspace)( \
        p, parallel);                                                                     \
  }
#include "ops.def"
};

}  // namespace
}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { tokred::register_ops<tokred::Cpu>(m); }
