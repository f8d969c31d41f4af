// Small kernels, right and wrong on purpose, that show what the emulated device catches. Prints
// `name right`, `name wrong` (a wrong answer) or `name error: ...` a line; see test_simt.py.
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <vector>

#include "../../csrc/cuda/block.cuh"
#include "../../csrc/cuda/ptx.cuh"

namespace {

using namespace tokred::cuda;

// A launch of one block with an output of one int a thread, compared with what it should be.
template <class Kernel, class Expected>
bool run(Kernel kernel, dim3 block, Expected expected) {
  const unsigned threads = block.x * block.y * block.z;
  std::vector<int> out(threads, -12345);
  simt::launch(kernel, 1, block, 16 << 10, out.data());
  for (unsigned i = 0; i < threads; ++i) {
    if (out[i] != expected(static_cast<int>(i))) return false;
  }
  return true;
}

// Missing barriers -------------------------------------------------------------------------------

template <bool kBarrier>
void reverse_block(int* out) {
  int* s = &shared_memory<int>();
  s[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = s[255 - threadIdx.x];
}

// The second barrier keeps a warp from overwriting what another still reads.
template <bool kBarrier>
void rotate_twice(int* out) {
  int* s = &shared_memory<int>();
  int x = static_cast<int>(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    s[threadIdx.x] = x;
    __syncthreads();
    x = s[(threadIdx.x + 32) % 256];
    if (kBarrier) __syncthreads();
  }
  out[threadIdx.x] = x;
}

template <bool kBarrier>
void reverse_warp(int* out) {
  int* s = &shared_memory<int>();
  s[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = s[31 - threadIdx.x];
}

template <bool kWait>
void copy_through(int* out) {
  static int source[128];
  for (int i = 0; i < 128; ++i) source[i] = i;
  int* s = &shared_memory<int>();
  cp_async_16(s + 4 * threadIdx.x, source + 4 * threadIdx.x);
  cp_async_commit();
  if (kWait) cp_async_wait<0>();
  __syncwarp();
  out[threadIdx.x] = s[threadIdx.x];
}

template <bool kClear>
void sum_cleared(int* out) {
  int* s = &shared_memory<int>();
  if (kClear && threadIdx.x == 0) *s = 0;
  __syncthreads();
  atomicAdd(s, 1);
  __syncthreads();
  out[threadIdx.x] = *s;
}

// Broken rules -----------------------------------------------------------------------------------

void divergent_barrier(int*) {
  if (threadIdx.x < 32) __syncthreads();
}
void divergent_shuffle(int* out) {
  if (threadIdx.x < 16) out[0] = __shfl_sync(~0u, 1, 0);
  else __syncwarp();
}
void shuffle_from_nobody(int* out) {
  if (threadIdx.x < 16) out[0] = __shfl_sync(0xffffu, 1, 20);
}
void misaligned_ldmatrix(int*) {
  uint32_t r[4];
  ldmatrix_x4(r, &shared_memory<char>() + 8);
}
void ldmatrix_outside(int*) {
  uint32_t r[4];
  ldmatrix_x4(r, &shared_memory<char>() + (16 << 10));
}

// Twins ------------------------------------------------------------------------------------------

struct Operands {
  uint16_t a[16][24], b[8][24], b_by_rows[16][8];
};

template <class T>
float small(int i) { return static_cast<float>(i * 37 % 23 - 11) / 8; }

// D = A B by fragments, with B read as rows of B^T and, transposed, as rows of B.
template <class T>
void multiply(float* out) {
  auto& s = shared_memory<Operands>();
  const int lane = lane_id();
  for (int i = lane; i < 256; i += 32) s.a[i / 16][i % 16] = from_float<T>(small<T>(i)).bits;
  for (int i = lane; i < 128; i += 32) {
    s.b[i / 16][i % 16] = from_float<T>(small<T>(i + 7)).bits;
    s.b_by_rows[i % 16][i / 16] = s.b[i / 16][i % 16];
  }
  __syncwarp();
  uint32_t a[4], b[2], b_trans[2];
  ldmatrix_x4(a, &s.a[lane % 16][lane / 16 * 8]);
  ldmatrix_x2(b, &s.b[lane % 8][lane / 8 % 2 * 8]);
  ldmatrix_x2_trans(b_trans, &s.b_by_rows[lane % 16][0]);
  float d[4] = {1, 1, 1, 1};
  mma(T{}, d, a, b);
  mma(T{}, d, a, b_trans);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <class T>
bool multiplies() {
  std::vector<float> out(128);
  simt::launch(multiply<T>, 1, 32, sizeof(Operands), out.data());
  for (int i = 0; i < 128; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += small<T>(i / 8 * 16 + k) * small<T>(i % 8 * 16 + k + 7);
    if (out[i] != 1 + 2 * sum) return false;  // all of it is exact in fp32
  }
  return true;
}

void partial_copy(int* out) {
  static const int source[4] = {1, 2, 3, 4};
  int* s = &shared_memory<int>();
  cp_async_16(s, source, 8);
  cp_async_16(s + 4, nullptr, 0);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 8; ++i) out[i] = s[i];
}

void scans(int* out) {
  auto& s = shared_memory<BlockScratch<int>>();
  int total;
  const int before = block_exclusive_sum<96>(static_cast<int>(threadIdx.x), s, total);
  const unsigned odd = __ballot_sync(kAllLanes, threadIdx.x % 2);
  const int low = static_cast<int>(threadIdx.x);
  const bool good = total == 96 * 95 / 2 && before == low * (low - 1) / 2 && odd == 0xaaaaaaaau &&
                    lanes_before(odd) == lane_id() / 2 && warp_max(low) == low / 32 * 32 + 31 &&
                    __popc(__match_any_sync(kAllLanes, low % 4)) == 8;
  out[threadIdx.x] = good;
}

void indices(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(out, block * 1000 + thread);
}

bool covers_grid() {
  int sum = 0;
  simt::launch(indices, dim3(2, 3, 4), dim3(5, 2, 3), 0, &sum);
  return sum == 23 * 24 / 2 * 1000 * 30 + 29 * 30 / 2 * 24;
}

void report(const char* name, const std::function<bool()>& test) {
  try {
    std::printf("%s %s\n", name, test() ? "right" : "wrong");
  } catch (const std::runtime_error& error) {
    std::printf("%s error: %s\n", name, error.what());
  }
}

}  // namespace

int main() {
  const auto reversed = [](int i) { return 255 - i; };
  const auto reversed_lanes = [](int i) { return 31 - i; };
  const auto same = [](int i) { return i; };
  const auto rotated = [](int i) { return (i + 64) % 256; };
  report("block_barrier", [&] { return run(reverse_block<true>, 256, reversed); });
  report("no_block_barrier", [&] { return run(reverse_block<false>, 256, reversed); });
  report("second_barrier", [&] { return run(rotate_twice<true>, 256, rotated); });
  report("no_second_barrier", [&] { return run(rotate_twice<false>, 256, rotated); });
  report("warp_barrier", [&] { return run(reverse_warp<true>, 32, reversed_lanes); });
  report("no_warp_barrier", [&] { return run(reverse_warp<false>, 32, reversed_lanes); });
  report("copy_wait", [&] { return run(copy_through<true>, 32, same); });
  report("no_copy_wait", [&] { return run(copy_through<false>, 32, same); });
  report("cleared", [&] { return run(sum_cleared<true>, 64, [](int) { return 64; }); });
  report("not_cleared", [&] { return run(sum_cleared<false>, 64, [](int) { return 64; }); });
  report("divergent_barrier", [&] { return run(divergent_barrier, 64, same); });
  report("divergent_shuffle", [&] { return run(divergent_shuffle, 32, same); });
  report("shuffle_from_nobody", [&] { return run(shuffle_from_nobody, 32, same); });
  report("misaligned_ldmatrix", [&] { return run(misaligned_ldmatrix, 32, same); });
  report("ldmatrix_outside", [&] { return run(ldmatrix_outside, 32, same); });
  report("too_many_threads", [&] { return run(scans, 1025, same); });
  report("after_errors", [&] { return run(reverse_block<true>, 256, reversed); });
  report("mma_bf16", [] { return multiplies<bf16>(); });
  report("mma_f16", [] { return multiplies<f16>(); });
  report("partial_copy", [] {
    std::vector<int> out(8);
    simt::launch(partial_copy, 1, 1, 32, out.data());
    return out[0] == 1 && out[1] == 2 && out[2] == 0 && out[3] == 0 && out[4] == 0 && out[7] == 0;
  });
  report("scans", [] { return run(scans, 96, [](int) { return 1; }); });
  report("grid", [] { return covers_grid(); });
}
