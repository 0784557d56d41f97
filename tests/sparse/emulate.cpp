// Runs select.cu on a CPU: a block's threads are threads, which meet at barriers, and one block runs after another.
#include <barrier>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __syncthreads() barrier->arrive_and_wait()
#define __threadfence()

struct Index {
  unsigned x;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::unique_ptr<std::barrier<>> barrier;

static int atomicAdd(int* where, int value) { return __atomic_fetch_add(where, value, __ATOMIC_SEQ_CST); }

#include "select.cu"

static void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (unsigned block = 0; block < blocks; block++) {
    barrier = std::make_unique<std::barrier<>>(threads);
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; thread++)
      running.emplace_back([=] {
        threadIdx.x = thread;
        blockIdx.x = block;
        kernel();
        barrier->arrive_and_drop();
      });
    for (std::thread& each : running) each.join();
  }
}

// The threshold for k, x without what is below it, and how many entries are not.
extern "C" int emulate(const WORD* x, WORD* threshold, WORD* out, long long n, long long k, long long infinity,
                       unsigned blocks) {
  State state = {};
  for (int pass = 0; pass < 3; pass++)
    launch(blocks, THREADS, [&] { find_digit(x, &state, threshold, n, k, pass, infinity); });
  launch((unsigned)(n / PER_PACK / THREADS) + 1, THREADS, [&] { keep_active(x, threshold, out, n, infinity); });
  return state.active;
}
