// Checks of a token map, for the front ends of the merge ops.
#pragma once

#include <limits>

#include "merge/params.h"
#include "tensor.h"

namespace tokred {

inline void check_map(const Tensor& map, const char* name, int64_t batch, int64_t tokens,
                      const Tensor& like, const char* like_name) {
  check_shape(map, name, {batch, tokens}, "[B, N]");
  check_dtype(map, name, ScalarType::Int);
  check_same_device(map, name, like, like_name);
  TOKRED_CHECK(tokens < std::numeric_limits<int32_t>::max(), name,
               " may cover at most 2^31 - 2 tokens, got ", tokens);
}

}  // namespace tokred
