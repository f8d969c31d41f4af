// Small kernels, right and wrong on purpose, that show what the emulated device catches. Prints
// `name right`, `name wrong` (a wrong answer) or `name error: ...` a line; see test_simt.py.
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <vector>

#include "common/cuda/block.cuh"
#include "common/cuda/ptx_sm90.cuh"

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

// A warp writes, and the other reads what the first has announced.
template <bool kWait>
void announce(int* out) {
  struct Shared {
    Barrier barrier;
    int x[32];
  };
  auto& s = shared_memory<Shared>();
  const int low = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) barrier_init(s.barrier, 32);
  __syncthreads();
  bool good = true;
  for (int round = 0; round < 8; ++round) {
    if (threadIdx.x < 32) {
      s.x[low] = round + low;
      barrier_arrive(s.barrier);
    } else {
      if (kWait) barrier_wait(s.barrier, round % 2);
      good = good && s.x[31 - low] == round + 31 - low;
    }
    __syncthreads();
  }
  out[threadIdx.x] = good;
}

// Broken rules -----------------------------------------------------------------------------------

void divergent_barrier(int*) {
  if (threadIdx.x < 32) __syncthreads();
}
void divergent_shuffle(int* out) {
  if (threadIdx.x < 16)
    out[0] = __shfl_sync(~0u, 1, 0);
  else
    __syncwarp();
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

void deadlock(int*) {
  auto& barrier = shared_memory<Barrier>();
  if (threadIdx.x == 0) barrier_init(barrier, 65);
  __syncthreads();
  barrier_arrive(barrier);
  barrier_wait(barrier, 0);
}
void barrier_without_count(int*) { barrier_arrive(shared_memory<Barrier>()); }
void wgmma_without_fence(int*) {
  auto& barrier = shared_memory<Barrier>();
  if (threadIdx.x == 0) barrier_init(barrier, 128);
  __syncthreads();
  barrier_arrive(barrier);
  barrier_wait(barrier, 0);
  float d[8][4];
  wgmma(bf16{}, d, {0, 0, 0, 0}, matrix_descriptor(&barrier));
}

// Twins ------------------------------------------------------------------------------------------

struct Operands {
  uint16_t a[16][24], b[8][24], b_by_rows[16][8];
};

template <class T>
float small(int i) {
  return static_cast<float>(i * 37 % 23 - 11) / 8;
}

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

// 1 and sixteen products of 1.5 * 2^-24, three quarters of its last bit, in that last bit.
void add_small_products(float* out) {
  const uint32_t left = pack_pair<bf16>(0x1.8p-12f, 0x1.8p-12f);
  const uint32_t right = pack_pair<bf16>(0x1p-12f, 0x1p-12f);
  float d[4] = {1, 1, 1, 1};
  mma(bf16{}, d, {left, left, left, left}, {right, right});
  for (int i = 0; i < 4; ++i) out[lane_id() * 4 + i] = (d[i] - 1) * 0x1p23f;
}

bool adds_small_products(bool truncate, float expected) {
  std::vector<float> out(128);
  simt::tensor_cores_truncate = truncate;
  simt::launch(add_small_products, 1, 32, 16, out.data());
  simt::tensor_cores_truncate = true;
  for (const float x : out) {
    if (x != expected) return false;
  }
  return true;
}

// Swizzled by hand: 16 bytes number i of a row of 128 bytes are at i ^ row % 8.
struct SwizzledOperands {
  uint16_t a[64][64], b[128][64], b_by_rows[2][16][64];

  static int column(int row, int k) { return (k / 8 ^ row % 8) * 8 + k % 8; }
};

// D = A B with 64 x 64 x 128 numbers in shared memory, and D += A B with 64 x 16 x 128 and A, its
// first columns, in registers.
template <class T, bool kWait>
void multiply_by_warpgroup(float* out) {
  char* start = &shared_memory<char>();
  auto& s = *reinterpret_cast<SwizzledOperands*>(start + (0u - shared_address(start)) % 1024);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  for (int i = thread; i < 64 * 64; i += 128) {
    s.a[i / 64][s.column(i / 64, i % 64)] = from_float<T>(small<T>(i)).bits;
  }
  for (int i = thread; i < 128 * 64; i += 128) {
    s.b[i / 64][s.column(i / 64, i % 64)] = from_float<T>(small<T>(i + 7)).bits;
  }
  for (int i = thread; i < 16 * 128; i += 128) {
    const int k = i / 128, column = i % 128;
    s.b_by_rows[column / 64][k][s.column(k, column % 64)] = from_float<T>(small<T>(i + 5)).bits;
  }
  fence_shared_for_wgmma();
  __syncthreads();
  float d[16][4];
  uint32_t a[4];
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int row = warp_id() * 16 + lane / 4 + quarter % 2 * 8;
    const int first = row * 64 + lane % 4 * 2 + quarter / 2 * 8;
    a[quarter] = pack_pair<T>(small<T>(first), small<T>(first + 1));
  }
  wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    wgmma(T{}, d, advance(matrix_descriptor(s.a[0]), 32 * k),
          advance(matrix_descriptor(s.b[0]), 32 * k), k > 0);
  }
  wgmma(T{}, d, a, matrix_descriptor(s.b_by_rows[0][0], sizeof s.b_by_rows[0]));
  wgmma_commit();
  if (kWait) wgmma_wait<0>(d);
  for (int i = 0; i < 64; ++i) {
    const int row = warp_id() * 16 + lane / 4 + i % 4 / 2 * 8;
    out[row * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i / 4][i % 4];
  }
}

template <class T, bool kWait = true>
bool multiplies_by_warpgroup() {
  std::vector<float> out(64 * 128);
  simt::launch(multiply_by_warpgroup<T, kWait>, 1, 128, sizeof(SwizzledOperands) + 1024,
               out.data());
  for (int i = 0; i < 64 * 128; ++i) {
    const int row = i / 128, column = i % 128;
    float sum = 0;
    for (int k = 0; k < 64; ++k) sum += small<T>(row * 64 + k) * small<T>(column * 64 + k + 7);
    for (int k = 0; k < 16; ++k) sum += small<T>(row * 64 + k) * small<T>(k * 128 + column + 5);
    if (out[i] != sum) return false;
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
  const auto good = [](int) { return 1; };
  report("announced", [&] { return run(announce<true>, 64, good); });
  report("not_announced", [&] { return run(announce<false>, 64, good); });
  report("divergent_barrier", [&] { return run(divergent_barrier, 64, same); });
  report("divergent_shuffle", [&] { return run(divergent_shuffle, 32, same); });
  report("shuffle_from_nobody", [&] { return run(shuffle_from_nobody, 32, same); });
  report("misaligned_ldmatrix", [&] { return run(misaligned_ldmatrix, 32, same); });
  report("ldmatrix_outside", [&] { return run(ldmatrix_outside, 32, same); });
  report("deadlock", [&] { return run(deadlock, 64, same); });
  report("barrier_without_count", [&] { return run(barrier_without_count, 32, same); });
  report("wgmma_without_fence", [&] { return run(wgmma_without_fence, 128, same); });
  report("too_many_threads", [&] { return run(scans, 1025, same); });
  const auto with_shared = [](size_t limit, size_t bytes) {
    simt::set_shared_limit(limit);
    std::vector<int> out(32);
    simt::launch(reverse_warp<true>, 1, 32, bytes, out.data());
    return out[0] == 31;
  };
  report("much_shared", [&] { return with_shared(227 << 10, (99 << 10) + 1); });
  report("all_shared", [&] { return with_shared(99 << 10, 99 << 10); });
  report("too_much_shared", [&] { return with_shared(99 << 10, (99 << 10) + 1); });
  report("after_errors", [&] { return run(reverse_block<true>, 256, reversed); });
  report("mma_bf16", [] { return multiplies<bf16>(); });
  report("mma_f16", [] { return multiplies<f16>(); });
  report("mma_truncates", [] { return adds_small_products(true, 8); });
  report("mma_rounds", [] { return adds_small_products(false, 16); });
  report("wgmma_bf16", [] { return multiplies_by_warpgroup<bf16>(); });
  report("wgmma_f16", [] { return multiplies_by_warpgroup<f16>(); });
  report("no_wgmma_wait", [] { return multiplies_by_warpgroup<bf16, false>(); });
  report("partial_copy", [] {
    std::vector<int> out(8);
    simt::launch(partial_copy, 1, 1, 32, out.data());
    return out[0] == 1 && out[1] == 2 && out[2] == 0 && out[3] == 0 && out[4] == 0 && out[7] == 0;
  });
  report("scans", [] { return run(scans, 96, [](int) { return 1; }); });
  report("grid", [] { return covers_grid(); });
}
