// Registers the schemas. TOKRED_NAMESPACE is `tokred`; the tests' emulated device has another.
#include "schema.h"

#include <torch/csrc/stable/library.h>

#ifndef TOKRED_NAMESPACE
#define TOKRED_NAMESPACE tokred
#endif

STABLE_TORCH_LIBRARY(TOKRED_NAMESPACE, m) {
  for (const char* schema : tokred::kSchemas) m.def(schema);
}
