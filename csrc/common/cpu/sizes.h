// Sizes, rounded, compared and aligned to cache lines.
#pragma once

#include <concepts>
#include <cstdint>

namespace tokred::TOKRED_ISA {

inline constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline constexpr int64_t round_up(int64_t a, int64_t step) { return divide_up(a, step) * step; }
inline constexpr int64_t min(std::integral auto a, std::integral auto b) {
  return int64_t{a} < int64_t{b} ? a : b;
}
inline constexpr int64_t max(std::integral auto a, std::integral auto b) {
  return int64_t{a} > int64_t{b} ? a : b;
}

inline constexpr int64_t kAlign = 64;
inline constexpr int64_t aligned(int64_t bytes) { return round_up(bytes, kAlign); }
inline char* aligned(void* memory) {
  return reinterpret_cast<char*>(aligned(reinterpret_cast<int64_t>(memory)));
}

}  // namespace tokred::TOKRED_ISA
