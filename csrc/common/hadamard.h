// The rotation of rows: by H / sqrt(n), H the Hadamard matrix of the largest power of two n that
// divides D, n channels at a time. For step = 1, 2, 4 .. n / 2 the pairs (a, b) that are `step`
// apart become (a + b, a - b), in f32, and the result is multiplied by 1 / sqrt(n) in f32. The
// rotation is its own inverse, and rotating both q and k leaves q . k as it is.
#pragma once

#include <cstdint>

namespace tokred {

// n: 128 of D = 128, 16 of D = 80.
constexpr int64_t hadamard_size(int64_t head_dim) { return head_dim & -head_dim; }
static_assert(hadamard_size(128) == 128 && hadamard_size(80) == 16);

}  // namespace tokred
