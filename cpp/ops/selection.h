// Which entries of a tensor are active, and where they are.
#pragma once

#include <cstdint>
#include <optional>
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

// How far a threshold moves from one step to the next, as a share of it. A weight's is hardly another one; an activation's is
// that of other images.
struct Moves {
  float mostly, nearly_always;
};

constexpr Moves OF_WEIGHTS{0.004f, 0.03f}, OF_ACTIVATIONS{0.03f, 0.1f};

// The entries of a part of a tensor that are active, in order, and their indices in it.
struct Found {
  Array<uint32_t> indices;
  Array<float> values;
  int64_t size = 0;
  int64_t above = 0;          // of them above the bracket that `find` was given,
  std::vector<float> within;  // and the magnitudes of those within it

  void find(const Kernels& kernels, const float* x, int64_t count, float threshold, const Bracket* bracket);
  void count(const Kernels& kernels, const Bracket& bracket);
};

// The active entries of each part of x, `part` entries long, and the threshold. One pass over x if the guess is not much too
// high, or a sample's is not, where there is none; a few otherwise.
float find_chosen(const Kernels& kernels, int threads, const float* x, int64_t count, int64_t part,
                  const Choice& choice, Moves moves, std::vector<Found>& found);

// What a scan of a weight found from a little below `near` on, right after its update, in parts of LINEAR_OUT rows. If the
// next threshold is close to `near`, the active entries are among these, and choosing them takes no pass over the weight.
struct Candidates {
  float near = 0;
  int64_t rows = 0, row = 0;  // of the weight, and entries of a row
  std::vector<Found> found;

  Candidates() = default;
  Candidates(Candidates&&) = default;
  Candidates& operator=(Candidates&&) = default;
};

// Where a scan begins for thresholds near this one.
float scan_from(float near);
// Whether one makes sense for so many active entries, and indices are wide enough.
bool can_scan(float near, int64_t active, int64_t rows, int64_t row);
// Take over part `part` of what a scan found, from runs of `scan`.
void gather(const Kernels& kernels, const Scan& scan, int64_t part, Candidates& candidates);
// If `candidates` are of a weight of this shape and enough for this choice, move them to `found`, drop those that are not
// active, and return the threshold.
std::optional<float> choose_among(const Kernels& kernels, int threads, int64_t rows, int64_t row, const Choice& choice,
                                  Candidates& candidates, std::vector<Found>& found);

// The active entries of all parts.
int64_t total_size(const std::vector<Found>& found);

// The k-th largest magnitude of x, exactly; NaN counts as the largest.
float top_k_threshold(const Kernels& kernels, int threads, const float* x, int64_t count, int64_t k);

}  // namespace zerofl
