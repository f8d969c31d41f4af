// Parameters of the merge kernels. Acc is float, or double where the dtype is f64.
#pragma once

#include "common/types.h"

namespace tokred {

enum class MergeMode : int32_t { sum, mean, plain_mean, amax, amin, prune, maxnorm, halving };

// Slot o of item b holds the tokens i with token_map[b][i] == o, in ascending i. With w = weight
// and s = size (1 where absent):
//   sum         y = sum w x                          mean     y = sum w s x / sum w s
//   plain_mean  y = sum w x / sum w                  amax, amin: elementwise over members, NaN wins
//   prune       y = x of the member of maximum w (lowest i on a tie; NaN below all)
//   maxnorm     y = m / |m| * max |x_i| with m = sum w s x
//   halving     y starts as the x that prune takes; (y + x_i) / 2 then replaces it, for every other
//               member in ascending i
// size_out = sum s. An empty slot, or one whose divisor is 0, has y = 0.
// Entries of token_map outside [0, num_out) are skipped. Sums run in fp32 in ascending i.
struct MergeParams {
  const void* x;                       // [B, N, C], channels contiguous
  int64_t x_stride_batch, x_stride_token;
  const int32_t* token_map;            // i32 [B, N]
  int64_t map_stride_batch, map_stride_token;
  TokenTable size, weight;             // Acc [B, N] or null
  void* y;                             // [B, M, C], channels contiguous
  int64_t y_stride_batch, y_stride_token;
  void* size_out;                      // Acc [B, M]
  int64_t size_out_stride_batch, size_out_stride_token;
  int64_t batch, tokens, num_out, channels;
  DType dtype;
  MergeMode mode;
  int32_t* indptr;                     // scratch i32 [B, M + 1]: members of slot o are
  int32_t* members;                    // scratch i32 [B, N]: members[indptr[o] .. indptr[o + 1])
};

// Gradients of MergeParams' function. grad_x of skipped tokens is 0.
// amax and amin share a gradient evenly between tied members. With only_x grad_size and grad_weight
// are 0, and x is not read where it is not for grad_x.
struct MergeBackwardParams {
  MergeParams forward;                 // y and size_out unused
  bool only_x;
  const void* grad_y;                  // [B, M, C], channels contiguous
  int64_t grad_y_stride_batch, grad_y_stride_token;
  TokenTable grad_size_out;            // Acc [B, M]
  void* grad_x;                        // [B, N, C] contiguous
  void* grad_size;                     // Acc [B, N] contiguous
  void* grad_weight;                   // Acc [B, N] contiguous
};

enum class SegmentMode : int32_t { sqrt, last, softmax, gaussian };

// out[b][i] is what token i weighs in its segment, and 0 in none. Segment o is slot o of
// MergeParams, with ids as its token_map, and has n members:
//   sqrt      1 / sqrt(n)
//   last      1 for the member of highest position, 0 for the others
//   softmax   exp(weight_i) over the sum of them; 0 where all are -inf
//   gaussian  exp(-d_i / 2v) over the sum of them, with d_i = |x_i - x_pivot|^2 and v = sigma^2, or
//             v = 1e-8 + the mean of d where sigma is 0; the pivot is the member of maximum weight
//             (as in prune), or the middle one, number floor(n / 2), where weight is absent
struct SegmentWeightsParams {
  MergeParams segments;                // token_map, weight, members; x of gaussian; dtype of x
  void* out;                           // Acc [B, N] contiguous
  double sigma;
  SegmentMode mode;
};

// Gradient of SegmentWeightsParams' function, in weight for softmax and in x for gaussian. The
// pivot is a choice.
struct SegmentWeightsBackwardParams {
  SegmentWeightsParams forward;        // out is not used
  TokenTable weights, grad;  // Acc [B, N]: the result, and the gradient with respect to it
  void* grad_input;  // Acc [B, N] for softmax, [B, N, C] for gaussian
};

// x[b][i] = y[b][token_map[b][i]], 0 where the entry is outside [0, M).
struct UnmergeParams {
  const void* y;  // [B, M, C], channels contiguous
  int64_t y_stride_batch, y_stride_token;
  const int32_t* token_map;  // i32 [B, N]
  int64_t map_stride_batch, map_stride_token;
  void* x;  // [B, N, C] contiguous
  int64_t batch, tokens, num_out, channels;
  DType dtype;
};

// out[b][i] = second[b][first[b][i]], -1 where first[b][i] is outside [0, M).
struct ComposeParams {
  const int32_t* second;  // i32 [B, M]
  int64_t second_stride_batch, second_stride_token;
  const int32_t* first;  // i32 [B, N]
  int64_t first_stride_batch, first_stride_token;
  int32_t* out;  // i32 [B, N] contiguous
  int64_t batch, tokens, num_out;  // num_out = M
};

// cosine[b][t] = cos(x[b][t-1], y[b][t]), norms clamped to kNormEps from below; 0 at t = 0 and
// where t or t - 1 is masked. A token joins the run of the one before it where the cosine is at
// least `threshold`, neither of both is masked or protected, and the run has fewer than max_length
// tokens. Protected are the first num_sinks and the last num_locals of the tokens that mask leaves.
struct AdjacentRunsParams {
  const void* x;  // [B, N, C], channels contiguous
  int64_t x_stride_batch, x_stride_token;
  const void* y;  // [B, N, C], channels contiguous
  int64_t y_stride_batch, y_stride_token;
  const bool* mask;  // bool [B, N] or null
  int64_t mask_stride_batch, mask_stride_token;
  int32_t* ids;  // i32 [B, N] contiguous: the run of each token, masked -1
  int32_t* start;  // i32 [B, N] contiguous: first tokens of runs, then -1
  int32_t* length;  // i32 [B, N] contiguous: tokens of runs, then -1
  int32_t* count;  // i32 [B]: runs
  float* cosine;  // f32 [B, N] contiguous
  int64_t batch, tokens, channels;
  int64_t max_length, num_sinks, num_locals;  // at most N
  float threshold;
  DType dtype;
};

// The root of every token's tree, parents outside [0, N) being those of roots, and the number of
// tokens whose parent it is. Tokens that a cycle holds, or that lead into one, have root -1.
struct ForestRootsParams {
  const int32_t* parent;  // i32 [B, N]
  int64_t parent_stride_batch, parent_stride_token;
  int32_t* root;  // i32 [B, N] contiguous
  int32_t* children;  // i32 [B, N] contiguous
  int32_t* scratch;  // i32 [B, N], of devices
  int64_t batch, tokens;
};

// z_i = (1 - p_i) z_{i-1} + p_i c_i in Acc, from the initial state, or from 0 where that is null.
// Rows from lengths[b] on are 0 and do not move the state.
struct EmaScanParams {
  const void* c;  // [B, M, C], channels contiguous
  int64_t c_stride_batch, c_stride_token;
  TokenTable p;  // Acc [B, M]
  TokenTable state;  // Acc [B, C] or null
  const int32_t* lengths;  // i32 [B] or null
  int64_t lengths_stride;
  void* z;  // [B, M, C] contiguous
  void* state_out;  // Acc [B, C] contiguous: the last z of each row
  int64_t batch, tokens, channels;  // M tokens
  DType dtype;
};

// Gradients of EmaScanParams' function. With g_i the gradient that reaches z_i from all that
// follows, that of c_i is p_i g_i and that of p_i is g_i . (c_i - z_{i-1}), z as it was rounded.
struct EmaScanBackwardParams {
  EmaScanParams forward;  // its results are not used
  const void* z;  // [B, M, C], channels contiguous
  int64_t z_stride_batch, z_stride_token;
  const void* grad_z;  // [B, M, C], channels contiguous
  int64_t grad_z_stride_batch, grad_z_stride_token;
  TokenTable grad_state_out;  // Acc [B, C]
  void* grad_c;  // [B, M, C] contiguous
  void* grad_p;  // Acc [B, M] contiguous
  void* grad_state;  // Acc [B, C] contiguous
  void* partial;  // scratch Acc [B, slices, M]: grad_p by slices of channels,
};  // of kEmaSliceChannels or more
inline constexpr int64_t kEmaSliceChannels = 32;

}  // namespace tokred
