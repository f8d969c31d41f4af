// Parameters of the cluster kernels. Every pointer carries its shape.
#pragma once

#include "common/types.h"

namespace tokred {

// A token of a grid is joined to its right and to its lower neighbour where their distance is less
// than `threshold` and neither is masked; l2: |a - b|, cosine: 1 - cos(a, b). Labels number the
// connected components by the position of their first member, row by row; a masked token has -1.
// NaN joins nothing.
struct ConnectedComponentsParams {
  const void* x;     // dtype [B, H, W, C], channels contiguous
  int64_t stride_batch, stride_row, stride_column;
  const bool* mask;  // bool [B, H * W] or null
  int64_t mask_stride_batch, mask_stride_token;
  int64_t batch, height, width, channels;
  DType dtype;
  Metric metric;     // l2 or cosine
  float threshold;
  int32_t* labels;   // i32 [B, H * W]
  int32_t* counts;   // i32 [B], components
  void* workspace;   // connected_components_workspace(params) bytes
};

// The tokens that k-means, k-medoids and local soft k-means group.
struct ClusterTokens {
  const void* x;     // dtype [B, N, C], channels contiguous
  int64_t stride_batch, stride_token;
  const bool* mask;  // bool [B, N] or null; false: assignment -1, and never a start
  int64_t mask_stride_batch, mask_stride_token;
  int64_t batch, tokens, channels;
  int64_t clusters;  // K
  DType dtype;
  Metric metric;     // l2 or cosine
};

// Lloyd's algorithm, each item by itself. A round gives every token to its nearest centroid,
//   argmax_k x . c_k - |c_k|^2 / 2 (l2),  argmax_k x . c_k (cosine, whose c_k have length 1),
// the lowest k of equals, and makes every centroid the mean of its tokens (cosine: the sum of its
// tokens, each of length 1, stretched to length 1). A centroid without tokens stays where it was.
// An item ends after `iterations` rounds, or when no centroid has moved by more than `tolerance`;
// its tokens are then given to the centroids that are returned.
// A token with a number that is not finite belongs to no cluster (-1).
//
// The sums of a centroid: tokens ascend within a block of kmeans_block(K), then the blocks ascend.
struct KmeansParams : ClusterTokens {
  int64_t iterations;
  float tolerance;
  // Start: of these two one, or none: token floor((2 k + 1) n / (2 K)) of the n without a mask.
  const int32_t* start_token;  // i32 [B, K]; out of range or masked: centroid 0, never assigned to
  const float* start;  // f32 [B, K, C]
  int64_t start_stride_batch, start_stride_cluster;
  float* centroids;  // f32 [B, K, C]
  int32_t* assignment;  // i32 [B, N]
  int32_t* counts;  // i32 [B, K], tokens of every cluster
  void* workspace;  // kmeans_workspace(params) bytes
};

// The sums of all blocks take at most an eighth of what fp32 tokens take, or are one.
inline constexpr int64_t kmeans_block(int64_t clusters) {
  return clusters > 32 ? 8 * clusters : 256;
}

enum class GreedyRule : int32_t { kcenter, maxsum, mmr, facility };
enum class FirstPick : int32_t { rule, norm, isolated };

// Picks k tokens of every item one after another, each the best one for those picked before (ties:
// the lowest index), among the tokens that are neither masked nor picked and whose squared norm is
// finite (in f32). With S the picked ones, w the weights (1 where absent), d the distance (cosine:
// 1 - cos, l2: |a - b|, dot: -a . b) and s the similarity (cos, -|a - b|, a . b):
//   kcenter   argmax_j w_j * min_S d(i, j)
//   maxsum    argmax_j w_j * sum_S d(i, j)
//   mmr       argmax_j trade_off * w_j - (1 - trade_off) * max_S s(i, j)
//   facility  argmax_j w_j * sum_i max(0, s(i, j) - max(0, max_S s(i, .))); cosine and dot only
// The first one is start[b], where that may be picked, or else by `first`:
//   rule      the largest w_j; facility: as above
//   norm      the largest norm
//   isolated  argmax_j w_j * min_{i != j} d(i, j)
// A token whose score is -inf or NaN is not picked; -1 fills what is left of k.
struct GreedySelectParams {
  TokenSet x;  // [B, N, C], its mask and its weights
  const int32_t* start;  // i32 [B] or null
  int64_t start_stride;
  int64_t batch, channels, k;
  DType dtype;
  Metric metric;  // cosine, l2 or dot
  GreedyRule rule;
  FirstPick first;
  float trade_off;
  int32_t* indices;  // i32 [B, k]
  void* workspace;  // greedy_select_workspace(params) bytes
};

// k-medoids (CenterCLIP's, arXiv:2205.00823): a round gives every token to its nearest medoid, as
// kmeans does with the medoids for centroids, but a medoid to itself, and makes the member of the
// smallest sum of distances to all members, the lowest of equals, the medoid. Distances are
// |a - b| (l2) or |a / |a| - b / |b||^2 / 2 = 1 - cosine. An item ends after `iterations` rounds,
// or when its medoids stay.
//
// The sum of a member: distances to the members whose rank in the cluster is lane + 16 i, by
// ascending i, then the sixteen sums as in common/cpu/simd.h.
struct KmedoidsParams : ClusterTokens {
  int64_t iterations;
  // i32 [B, K] token numbers; out of range, masked, not finite or a second time: no cluster.
  const int32_t* start;
  int64_t start_stride_batch, start_stride_cluster;
  int32_t* medoids;  // i32 [B, K] ascending, then -1 for those that are no cluster
  int32_t* assignment;  // i32 [B, N] places in medoids
  void* workspace;  // kmedoids_workspace(params) bytes
};

// Soft clusters of a grid of tokens, h by w of them over H by W tokens (Expediting ViT,
// arXiv:2210.01035, after superpixel sampling). Centroid (r, s) starts at the mean of the rows
// [floor(r H / h), ceil((r + 1) H / h)) and of such columns. Token (y, x) stands in cell
// (floor(y h / H), floor(x w / W)), and belongs to the centroids at most `radius` cells away:
//   q_k = softmax over them of -temperature |x - c_k|^2, c_k = sum q_k x / max(sum q_k, 1e-16).
// The assignment is the nearest of all centroids at the end, the lowest of equals. A token with a
// number that is not finite belongs to none, and a centroid that no token belongs to stays.
struct LocalSoftKmeansParams : ClusterTokens {
  int64_t height, width;  // of the grid; N = H * W, row by row
  int64_t rows, columns;  // of the centroids; K = rows * columns
  int64_t iterations, radius;
  float temperature;
  float* centroids;  // f32 [B, K, C]
  int32_t* assignment;  // i32 [B, N]
  void* workspace;  // local_soft_kmeans_workspace(params) bytes
};

// A range of rows or columns.
struct GridRange {
  int64_t begin, end;
};
// The tokens whose mean centroid `at` of `clusters` starts at, of `tokens`.
constexpr GridRange pooled_tokens(int64_t at, int64_t clusters, int64_t tokens) {
  return {at * tokens / clusters, ((at + 1) * tokens + clusters - 1) / clusters};
}
// The tokens in the cells at most `radius` from `at`.
constexpr GridRange tokens_around(int64_t at, int64_t radius, int64_t clusters, int64_t tokens) {
  const int64_t first = at > radius ? at - radius : 0;
  const int64_t end = at + radius + 1 < clusters ? at + radius + 1 : clusters;
  return {(first * tokens + clusters - 1) / clusters, (end * tokens + clusters - 1) / clusters};
}

// y_i = sum of w_ij * deep_j over the k nearest centroids of token i (by |x_i - c_j|^2, the lowest
// j of equals), where w_ij is exp(-temperature |x_i - c_j|^2) over the sum of the k (l1) or over
// the root of the sum of their squares (l2). A centroid whose distance is not finite is no
// neighbour; without one, y_i is 0.
struct KnnReconstructParams {
  const void* deep;  // deep_dtype [B, M, D], channels contiguous
  const void* x;  // dtype [B, N, C], channels contiguous
  const float* centroids;  // f32 [B, M, C], channels contiguous
  int64_t deep_stride_batch, deep_stride_cluster;
  int64_t stride_batch, stride_token;
  int64_t centroid_stride_batch, centroid_stride_cluster;
  int64_t batch, tokens, clusters, channels, deep_channels;
  int64_t k;  // at most M and kMaxNeighbours
  DType deep_dtype, dtype;
  float temperature;
  bool l2;
  void* y;  // deep_dtype [B, N, D]
  void* workspace;  // knn_reconstruct_workspace(params) bytes
};

// grad_deep_j = sum over the tokens i, ascending, that have j as a neighbour of w_ij * grad_y_i.
// The weights are constants, made again as the op makes them.
struct KnnReconstructBackwardParams {
  KnnReconstructParams forward;  // its deep, y and workspace are null, its strides of deep 0
  const void* grad_y;  // deep_dtype [B, N, D], channels contiguous
  int64_t grad_stride_batch, grad_stride_token;
  void* grad_deep;  // deep_dtype [B, M, D]
  void* workspace;  // knn_reconstruct_backward_workspace(params) bytes
};
inline constexpr int64_t kMaxNeighbours = 64;

// Clustering by density peaks among the k nearest neighbours (DPC-KNN), of the tokens that are not
// masked and whose squared norm is finite (in f32). With D(i, j) = |x_i - x_j|^2 / C:
//   m_i      the mean of the min(k, tokens) smallest D(i, .), that of i itself included
//   denser   the density of i is exp(-m_i): j is denser where m_j < m_i, or equal and j < i
//   delta_i  the square root of the minimum D(i, j) of a denser j; infinite for the densest
// centers[b] are the M tokens of the largest log delta_i - m_i, which orders like density * delta,
// the largest first (ties: the lower index), and -1 behind the last token. assignment[b][i] is the
// index in centers of the nearest centre, the first of equals; of a centre its own; -1 for tokens
// that do not take part.
struct DpcKnnParams : TokenPairs {  // a and b are both x [B, N, C] and its mask; the metric is l2
  int64_t clusters, k;  // M, and k >= 1
  int32_t* centers;  // i32 [B, M]
  int32_t* assignment;  // i32 [B, N]
  void* workspace;  // dpc_knn_workspace(params) bytes
};

}  // namespace tokred
