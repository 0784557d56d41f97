// The time that each part of a training step has taken, for the benchmarks.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace zerofl {

enum Part { TOP_K, PACKING, FORWARD, GRAD_INPUT, GRAD_WEIGHT, NORMALISATION, PARTS };
constexpr const char* PART_NAMES[PARTS] = {"top_k", "packing", "forward", "grad_input", "grad_weight", "normalisation"};

inline std::atomic<int64_t> spent_nanoseconds[PARTS];

// Counts the time that it lives.
struct Stopwatch {
  explicit Stopwatch(Part part) : part(part) {}
  ~Stopwatch() { spent_nanoseconds[part] += (std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1); }

  Part part;
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
};

}  // namespace zerofl
