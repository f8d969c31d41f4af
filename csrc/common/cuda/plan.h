// Launch plans: pure functions of shapes, checked on the CPU against the limits of the hardware.
#pragma once

#include <cstdint>

namespace tokred::cuda {

struct LaunchPlan {
  int64_t grid[3];  // blocks
  int block;        // threads
  int64_t shared_bytes;
  const char* kernel = "";  // named in errors, by plans of much shared memory
};

// What a block may ask for: 227 KB on compute capability 9.0 and 10.0, 163 on 8.0, 99 on 8.6, 8.9
// and 12.0. Tiles and stages are chosen by it.
inline constexpr int64_t kDefaultSharedLimit = 48 << 10;  // without asking

inline constexpr int64_t kMaxBlocks = 1 << 30;  // of a launch; blocks loop over what is left
constexpr int64_t capped(int64_t blocks) { return blocks < kMaxBlocks ? blocks : kMaxBlocks; }

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

// Tiles of 16-bit planes in shared memory: rows are 8 elements longer than they are wide, so that
// eight of them lie in different banks.
constexpr int tile_pitch(int dim) { return dim + 8; }
constexpr int64_t tile_bytes(int dim, int rows, int planes) {
  return int64_t{2} * planes * rows * tile_pitch(dim);
}
// Tiles of f32 as they are; four longer, so that columns of them lie in different banks.
constexpr int raw_pitch(int dim) { return dim + 4; }

}  // namespace tokred::cuda
