// The implementations of all ops for one backend: what each library registers.
#pragma once

#define TOKRED_FRONT_ENDS
#include "ops.def"

namespace tokred {

template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
#define TOKRED_FRONT(op, schema) m.impl(#op, TORCH_BOX(&op<Backend>));
#define TOKRED_OP(op, Params, schema) TOKRED_FRONT(op, schema)
#include "ops.def"
}

}  // namespace tokred
