// The K-th largest magnitude of n numbers, and the numbers without those below it: §3.1's top K on an NVIDIA GPU.
//
// A number is its bits, a WORD: 32 of a float, 16 of a half or bfloat16. Its key is the bits without the sign, moved to
// the top of 31: keys are ordered as magnitudes are, and those of NaN are the largest. A radix select finds the K-th
// key 11, 10 and 10 bits at a time, the highest first, each digit in a launch of `find_digit`: its blocks count the
// digits of those keys that share the ones found so far, and the last block to finish sees which one the K-th key has.
//
// tests/sparse/emulate.cpp runs it on a CPU. Sizes are `long long`, which is what Python's int becomes.

#ifndef WORD
#define WORD unsigned
#endif
#ifndef THREADS
#define THREADS 512  // a block of `find_digit`
#endif

constexpr int BINS = 2048;
constexpr int COPIES = 4;  // of a block's histogram, so that fewer threads meet in one bin
constexpr int PER_THREAD = BINS / THREADS;
constexpr int PER_PACK = 16 / sizeof(WORD);

struct alignas(16) Pack {  // what a thread loads at once
  WORD words[PER_PACK];
};

// What the launches hand on to each other; all zeros before the first.
struct State {
  int counts[3][BINS];
  unsigned found;  // the digits so far
  int left;  // of the K, how many are among the keys that share them
  int done[3];  // blocks that finished
  int active;  // entries not below the K-th magnitude and not zero: K, and more where several equal it
};

__device__ inline unsigned key_of(WORD word) { return ((unsigned)word << (32 - 8 * sizeof(WORD))) & 0x7fffffffu; }

__device__ inline void count(int* bins, int& zeros, unsigned key, int shift, int width, unsigned found) {
  if ((key >> shift >> width) != found) return;
  const unsigned digit = (key >> shift) & ((1u << width) - 1);
  // Bin 0 is counted apart: a ReLU leaves half of its output at zero, and all threads would wait for one another.
  if (digit == 0)
    zeros++;
  else
    atomicAdd(&bins[digit], 1);
}

// Pass 0, 1 or 2 over x, which is aligned to 16 bytes, for 1 <= k <= n < 2^31; the last one writes the threshold.
extern "C" __global__ void find_digit(const WORD* x, State* state, WORD* threshold, long long n, long long k,
                                      long long pass, long long infinity) {
  __shared__ int bins[COPIES][BINS];
  __shared__ int sums[THREADS];
  __shared__ bool is_last;
  const int t = threadIdx.x;
  const int shift = 20 - 10 * (int)pass, width = pass ? 10 : 11;
  const unsigned found = state->found;

  for (int i = t; i < COPIES * BINS; i += THREADS) bins[0][i] = 0;
  __syncthreads();
  int* mine = bins[(t / 32) % COPIES];
  int zeros = 0;
  const Pack* packs = (const Pack*)x;
  for (long long i = (long long)blockIdx.x * THREADS + t; i < n / PER_PACK; i += (long long)gridDim.x * THREADS) {
    const Pack pack = packs[i];
    for (int j = 0; j < PER_PACK; j++) count(mine, zeros, key_of(pack.words[j]), shift, width, found);
  }
  if (blockIdx.x == 0 && t < n % PER_PACK) count(mine, zeros, key_of(x[n - 1 - t]), shift, width, found);

  sums[t] = zeros;
  __syncthreads();
  for (int d = THREADS / 2; d; d /= 2) {
    if (t < d) sums[t] += sums[t + d];
    __syncthreads();
  }
  if (t == 0) bins[0][0] += sums[0];
  __syncthreads();
  int* counts = state->counts[pass];
  for (int b = t; b < BINS; b += THREADS) {
    int sum = 0;
    for (int c = 0; c < COPIES; c++) sum += bins[c][b];
    if (sum) atomicAdd(&counts[b], sum);
  }
  __threadfence();
  __syncthreads();
  if (t == 0) is_last = atomicAdd(&state->done[pass], 1) == (int)gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  // Each thread has a run of bins, the highest digits first; how many keys are in the runs before its own?
  const int left = pass ? state->left : (int)k;
  int own[PER_THREAD], sum = 0;
  for (int j = 0; j < PER_THREAD; j++) {
    own[j] = atomicAdd(&counts[BINS - 1 - PER_THREAD * t - j], 0);
    sum += own[j];
  }
  sums[t] = sum;
  __syncthreads();
  for (int d = 1; d < THREADS; d *= 2) {
    const int before = t >= d ? sums[t - d] : 0;
    __syncthreads();
    sums[t] += before;
    __syncthreads();
  }
  int above = sums[t] - sum;
  for (int j = 0; j < PER_THREAD; j++) {
    if (above < left && left <= above + own[j]) {  // true of one bin in the block
      const unsigned kth = found << width | (unsigned)(BINS - 1 - PER_THREAD * t - j);
      state->found = kth;
      state->left = left - above;
      if (pass == 2) {
        *threshold = (WORD)(kth >> (32 - 8 * sizeof(WORD)));
        // Nothing is below a threshold that is NaN; where it is zero, the bin has the zeros.
        state->active = kth > infinity ? (int)n : (int)k - (left - above) + (kth ? own[j] : 0);
      }
    }
    above += own[j];
  }
}

// out = x where its magnitude is not below the threshold, else +0; both of n words aligned to 16 bytes.
extern "C" __global__ void keep_active(const WORD* x, const WORD* threshold, WORD* out, long long n,
                                       long long infinity) {
  const unsigned least = key_of(*threshold) > infinity ? 0 : key_of(*threshold);
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n / PER_PACK) {
    Pack pack = ((const Pack*)x)[i];
    for (int j = 0; j < PER_PACK; j++) pack.words[j] = key_of(pack.words[j]) < least ? 0 : pack.words[j];
    ((Pack*)out)[i] = pack;
  }
  if (i < n % PER_PACK) out[n - 1 - i] = key_of(x[n - 1 - i]) < least ? 0 : x[n - 1 - i];
}
