// The loops that ceilings are measured with, as each instruction set's namespace offers them.
#pragma once

#include <cstdint>

namespace tokred::ceilings {

inline constexpr int64_t kLine = 64;  // bytes of a cache line; all sizes are multiples of it
inline constexpr int64_t kReadBlock = 4096;  // bytes that a stream is read in

// Takes the result of a loop, so that no compiler leaves the loop out.
struct alignas(kLine) Sink {
  float number;
  int32_t count;
};

struct Kernels {
  // Reads data[0, bytes), in 1, 2 or 4 streams side by side; prefetches `ahead` bytes before use.
  // bytes is a multiple of 4 * kReadBlock.
  void (*read)(const char* data, int64_t bytes, int streams, int64_t ahead, Sink* sink);
  // target[0, bytes) = source[0, bytes); non-temporal stores do not read the target's lines first.
  void (*copy)(const char* source, char* target, int64_t bytes, bool non_temporal, int64_t ahead);
  // Reads table[rows[i]] for i in [0, count), each of row_bytes, prefetching `ahead` rows before.
  void (*gather)(const char* table, const int32_t* rows, int64_t count, int64_t row_bytes,
                 int64_t ahead, Sink* sink);
  // Each does `steps` steps and returns how many operations those were, of f32 (a fused
  // multiply-add is two) or of integers (so is a product that is added); 0: not on this machine.
  int64_t (*multiply_add)(int64_t steps, Sink* sink);
  int64_t (*dot_int16)(int64_t steps, Sink* sink);
  int64_t (*dot_int8)(int64_t steps, Sink* sink);
};

}  // namespace tokred::ceilings

namespace tokred::generic {
extern const ceilings::Kernels kCeilings;
}
namespace tokred::avx2 {
extern const ceilings::Kernels kCeilings;
}
namespace tokred::avx512 {
extern const ceilings::Kernels kCeilings;
}
