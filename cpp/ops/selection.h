// Which entries of a tensor are active, and where they are.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/memory.h"

namespace zerofl {

// Which entries of a tensor are active: the k largest in magnitude, and all that equal the k-th. They begin near `near`,
// if that is above 0: then finding them takes one pass; the result does not depend on it.
struct TopK {
  int64_t k;
  float near;
};

// Or those from a threshold on. About `expected` of them: the work is cut for so many; the result does not depend on it
// but for the order of its sums.
struct AtLeast {
  float threshold;
  int64_t expected;
};

using Choice = std::variant<TopK, AtLeast>;

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
float find_chosen(const Kernels& kernels, int threads, const float* x, int64_t count, int64_t part,
                  const Choice& choice, std::vector<Found>& found);

// The active entries of all parts.
int64_t total_size(const std::vector<Found>& found);

// The k-th largest magnitude of x, exactly; NaN counts as the largest.
float top_k_threshold(const Kernels& kernels, int threads, const float* x, int64_t count, int64_t k);

}  // namespace zerofl
