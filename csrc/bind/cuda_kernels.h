// The CUDA kernels as the backend sees them: torch-free, one function an op, asynchronous on a
// stream; workspaces are in bytes.
#pragma once

#include "bind/params.h"
#include "common/cuda/stream.h"

namespace tokred::cuda {

#define TOKRED_OP(op, Params, schema) void op(const Params&, Stream);
#define TOKRED_OP_SCRATCH(op, Params, schema) \
  TOKRED_OP(op, Params, schema)               \
  int64_t op##_workspace(const Params&);
#include "ops.def"

}  // namespace tokred::cuda
