// Tiles of similarities of two sets of tokens, see common/cuda/similarity_tile.cuh.
#pragma once

#include "common/cuda/plan.h"

namespace tokred::cuda {

inline constexpr int kSimilarityColumns = 64;   // rows of b in a tile
inline constexpr int kSimilarityChannels = 64;  // channels in a tile

// A block of `warps` warps owns 16 * row_tiles rows of a per warp.
struct SimilarityTiles {
  int warps, row_tiles;

  constexpr int threads() const { return 32 * warps; }
  constexpr int rows() const { return 16 * row_tiles * warps; }
  friend constexpr bool operator==(const SimilarityTiles&, const SimilarityTiles&) = default;
};
inline constexpr SimilarityTiles kNarrowTiles{4, 1};  // 64 rows

// Shared memory of a tile pair: `stages` times a's rows and b's in `planes` planes, and 16 bytes of
// score terms a row.
constexpr int64_t similarity_shared_bytes(SimilarityTiles tiles, bool is_float, bool async) {
  const int rows = tiles.rows() + kSimilarityColumns;
  return (async ? 2 : 1) * tile_bytes(kSimilarityChannels, rows, is_float ? 3 : 1) + 16 * rows;
}

}  // namespace tokred::cuda
