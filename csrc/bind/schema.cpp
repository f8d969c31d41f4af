// Registers the schemas. TOKRED_NAMESPACE is `tokred`; the tests' emulated device has another.
#include <torch/csrc/stable/library.h>

#ifndef TOKRED_NAMESPACE
#define TOKRED_NAMESPACE tokred
#endif

STABLE_TORCH_LIBRARY(TOKRED_NAMESPACE, m) {
#define TOKRED_FRONT(op, schema) m.def(#op schema);
#define TOKRED_OP(op, Params, schema) TOKRED_FRONT(op, schema)
#include "ops.def"
}
