// Copies of rows, with non-temporal stores where a result is too large for a cache, and zeroed
// rows.
#pragma once

#include <cstring>

#include "common/cpu/simd.h"

namespace tokred::TOKRED_ISA {

// Results from this size on are written with non-temporal stores: the last-level cache of most
// machines does not keep 24 MB of a result beside its sources.
inline constexpr int64_t kStreamBytes = int64_t{24} << 20;

// memset and memcpy that allow null where there is nothing to do.
TOKRED_INLINE void fill_zero(void* to, int64_t bytes) {
  if (bytes > 0) std::memset(to, 0, static_cast<size_t>(bytes));
}
TOKRED_INLINE void copy_bytes(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Copies a row, with non-temporal stores if `stream` and where the target is aligned; then
// stream_fence() has to follow the last row.
template <class T>
TOKRED_INLINE void copy_row(T* to, const T* from, int64_t channels, [[maybe_unused]] bool stream) {
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
#ifdef __AVX2__
  if (stream && reinterpret_cast<uintptr_t>(to) % 32 == 0) {
    auto* target = reinterpret_cast<char*>(to);
    const auto* source = reinterpret_cast<const char*>(from);
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i + 32));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i), low);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i + 32), high);
    }
    copy_bytes(target + i, source + i, bytes - i);
    return;
  }
#endif
  copy_bytes(to, from, bytes);
}
TOKRED_INLINE void stream_fence() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

}  // namespace tokred::TOKRED_ISA
