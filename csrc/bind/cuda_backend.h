// The kernels of a device, real or emulated, as front ends call them.
#pragma once

#include "bind/cuda_kernels.h"

namespace tokred::cuda {

struct Kernels {
  static constexpr bool kDouble = false;
  static constexpr bool kHost = false;
  Stream stream = nullptr;

#define TOKRED_OP(op, Params, schema) \
  void op(const Params& p) const { cuda::op(p, stream); }
#define TOKRED_OP_SCRATCH(op, Params, schema) \
  TOKRED_OP(op, Params, schema)               \
  int64_t op##_workspace(const Params& p) const { return cuda::op##_workspace(p); }
#include "ops.def"
};

}  // namespace tokred::cuda
