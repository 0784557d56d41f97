// Which entries of a tensor are active, and where they are.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace zerofl {

// Memory that is not initialised, for what is about to be written.
template <class T>
struct Array {
  std::unique_ptr<T, void (*)(void*)> memory{nullptr, pool_free};

  void allocate(int64_t count) { memory.reset(static_cast<T*>(pool_allocate(count * sizeof(T)))); }
  T* data() const { return memory.get(); }
};

// Which entries of a tensor are active: those from `threshold` on, or the k largest in magnitude (all that equal the
// k-th), which begin near `threshold` if that is above 0.
struct Choice {
  int64_t k;
  float threshold;
  bool exact;
};

// Magnitudes between which a threshold is expected.
struct Bracket {
  float low, high;
};

// The entries of a part of a tensor that are active, in order, and their indices in it.
struct Found {
  Array<uint32_t> indices;
  Array<float> values;
  int64_t size = 0;
  int64_t above = 0;          // of them above the bracket that `find` was given,
  std::vector<float> within;  // and the magnitudes of those within it

  void find(const Kernels& kernels, const float* x, int64_t count, float threshold, const Bracket* bracket);
  void count(const Kernels& kernels, const Bracket& bracket);
  void drop_below(float threshold);
};

// The active entries of each part of x, `part` entries long, and the threshold. One pass over x if the guess is good.
float find_chosen(const Kernels& kernels, int threads, const float* x, int64_t count, int64_t part, const Choice& choice,
                  std::vector<Found>& found);

// The active entries of all parts.
int64_t total_size(const std::vector<Found>& found);

// The k-th largest magnitude of x, exactly; NaN counts as the largest.
float top_k_threshold(const Kernels& kernels, int threads, const float* x, int64_t count, int64_t k);

// A buffer of the calling thread that grows and stays; `slot` tells buffers in use at the same time apart.
float* scratch(int slot, int64_t floats);

}  // namespace zerofl
