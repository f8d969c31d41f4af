// The implementations of all ops for one backend: what each library registers.
#pragma once

#define TOKRED_FRONT_ENDS
#include "ops.def"

#include "bind/box.h"

namespace tokred {

template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
#define TOKRED_FRONT(op, schema) m.impl(#op, boxed<&op<Backend>>(&op<Backend>));
#define TOKRED_OP(op, Params, schema) TOKRED_FRONT(op, schema)
#include "ops.def"
}

}  // namespace tokred
