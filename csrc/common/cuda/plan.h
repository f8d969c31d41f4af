// Launch plans: pure functions of shapes, checked on the CPU against the limits of the hardware.
#pragma once

#include <cstdint>

namespace tokred::cuda {

struct LaunchPlan {
  int64_t grid[3];  // blocks
  int block;        // threads
  int64_t shared_bytes;
};

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

}  // namespace tokred::cuda
