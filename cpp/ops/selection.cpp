#include "ops/selection.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "runtime/clock.h"
#include "runtime/threads.h"

namespace zerofl {
namespace {

constexpr int64_t FEW = 1 << 13;        // entries of which a threshold is found at once
constexpr int RUN = 8;                  // neighbouring entries in a threshold's sample
constexpr int64_t MOST_RUNS = 1 << 10;  // of the sample
constexpr int64_t PART = 1 << 16;       // entries of a tensor that a thread looks at at a time

Bracket about(float near, float share) { return {near * (1 - share), near * (1 + share)}; }
bool is_near(float near) { return near > 0 && near < INFINITY; }
// Many candidates take more memory than the pass that they spare is worth.
bool is_worth_keeping(int64_t active, int64_t count) { return active <= count / 4; }

// Brackets about `near`, in which to look one after the other.
std::vector<Bracket> brackets_of(float near, Moves moves) {
  const Bracket wide = about(near, moves.nearly_always);
  return {about(near, moves.mostly), wide, {wide.high, INFINITY}};
}

// The k-th largest magnitude, if it is in one of the brackets; then what is below is dropped. `found` is what is not below
// the lowest of them, counted within the first.
std::optional<float> choose(const Kernels& kernels, int threads, int64_t k, const std::vector<Bracket>& brackets,
                            std::vector<Found>& found) {
  const int64_t parts = static_cast<int64_t>(found.size());
  if (total_size(found) < k) return std::nullopt;
  for (const Bracket& bracket : brackets) {
    if (&bracket != &brackets[0]) parallel(threads, parts, [&](int64_t i) { found[i].count(kernels, bracket); });
    int64_t over = 0;
    std::vector<float> within;
    for (const Found& f : found) {
      over += f.above;
      within.insert(within.end(), f.within.begin(), f.within.end());
    }
    if (over >= k || k > over + static_cast<int64_t>(within.size())) continue;
    const float threshold = top_k_threshold(kernels, threads, within.data(), within.size(), k - over);
    parallel(threads, parts, [&](int64_t i) {
      found[i].size = kernels.drop_below(found[i].size, threshold, found[i].indices.data(), found[i].values.data());
    });
    return threshold;
  }
  return std::nullopt;
}

// Magnitudes between which the k-th largest of x is, nearly always, by a sample of short runs, an odd step apart so that
// they meet all images and positions alike.
Bracket sampled(const float* x, int64_t count, int64_t k) {
  const int64_t runs = std::min(MOST_RUNS, count / (8 * RUN)), step = (count / runs - 1) | 1;
  std::vector<float> sample;
  for (int64_t run = 0; run < runs; ++run)
    for (int i = 0; i < RUN; ++i) {
      const float magnitude = std::fabs(x[run * step + i]);
      sample.push_back(magnitude == magnitude ? magnitude : INFINITY);
    }
  const double size = static_cast<double>(sample.size()), share = static_cast<double>(k) / count;
  // Neighbours are alike, so a run tells less than RUN entries would; a bracket that fails costs one more pass.
  const double margin = 6 * std::sqrt(share * (1 - share) / size) + 1 / size;
  const auto quantile = [&](double from_top) {
    const auto place = sample.begin() + static_cast<int64_t>(from_top * size);
    std::nth_element(sample.begin(), place, sample.end(), std::greater<float>());
    return *place;
  };
  return {share + margin < 1 ? quantile(share + margin) : 0, share - margin > 0 ? quantile(share - margin) : INFINITY};
}

}  // namespace

void Found::find(const Kernels& kernels, const float* x, int64_t count, float threshold, const Bracket* bracket) {
  uint32_t* index = reinterpret_cast<uint32_t*>(scratch(0, count + SPARE));
  float* value = scratch(1, count + SPARE);
  size = kernels.find_active(x, count, 0, threshold, index, value);
  indices.allocate(size), values.allocate(size);
  memcpy(indices.data(), index, size * sizeof(uint32_t));
  memcpy(values.data(), value, size * sizeof(float));
  if (bracket) this->count(kernels, *bracket);  // while the values are in the caches
}

void Found::count(const Kernels& kernels, const Bracket& bracket) {
  float* between = scratch(0, size + SPARE);
  const int64_t found = kernels.partition(values.data(), size, bracket.low, bracket.high, between, &above);
  within.assign(between, between + found);
}

int64_t total_size(const std::vector<Found>& found) {
  int64_t total = 0;
  for (const Found& part : found) total += part.size;
  return total;
}

float find_chosen(const Kernels& kernels, int threads, const float* x, int64_t count, int64_t part,
                  const Choice& choice, Moves moves, std::vector<Found>& found) {
  const Stopwatch stopwatch(TOP_K);
  const int64_t parts = static_cast<int64_t>(found.size());
  const auto find = [&](float threshold, const Bracket* bracket) {
    parallel(threads, parts, [&](int64_t i) {
      found[i].find(kernels, x + i * part, std::min(part, count - i * part), threshold, bracket);
    });
  };
  if (const AtLeast* given = std::get_if<AtLeast>(&choice)) {
    find(given->threshold, nullptr);
    return given->threshold;
  }
  const auto [k, near] = std::get<TopK>(choice);
  std::optional<float> chosen;
  const auto among = [&](float low, const std::vector<Bracket>& brackets) {
    find(low, &brackets[0]);
    return (chosen = choose(kernels, threads, k, brackets, found)).has_value();
  };
  if (k > 0 && is_near(near) && among(about(near, moves.nearly_always).low, brackets_of(near, moves))) return *chosen;
  if (k > 0 && is_worth_keeping(k, count) && count > FEW) {
    const Bracket bracket = sampled(x, count, k);
    if (bracket.low > 0 && among(bracket.low, {bracket, {bracket.high, INFINITY}})) return *chosen;
  }
  const float threshold = top_k_threshold(kernels, threads, x, count, k);
  find(threshold, nullptr);
  return threshold;
}

float scan_from(float near) { return about(near, OF_WEIGHTS.nearly_always).low; }

bool can_scan(float near, int64_t active, int64_t rows, int64_t row) {
  return is_near(near) && is_worth_keeping(active, rows * row) &&
         std::min<int64_t>(rows, LINEAR_OUT) * row <= INT32_MAX;
}

void gather(const Kernels& kernels, const Scan& scan, int64_t part, Candidates& candidates) {
  const int64_t blocks = (candidates.row + LINEAR_IN - 1) / LINEAR_IN;
  const int64_t rows = std::min<int64_t>(LINEAR_OUT, candidates.rows - part * LINEAR_OUT);
  std::vector<int64_t> begins(blocks * LINEAR_OUT);
  int64_t size = 0;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t row = 0; row < rows; ++row) {
      begins[block * LINEAR_OUT + row] = size;
      size += scan.sizes[block * LINEAR_OUT + row];
    }
  Found& found = candidates.found[part];
  found.indices.allocate(size), found.values.allocate(size), found.size = size;
  uint32_t* index = found.indices.data();
  float* value = found.values.data();
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t run = block * LINEAR_OUT + row, begin = begins[run], length = scan.sizes[run];
      memcpy(index, scan.indices + begin, length * sizeof(uint32_t));
      memcpy(value, scan.values + begin, length * sizeof(float));
      index += length, value += length;
    }
  found.count(kernels, about(candidates.near, OF_WEIGHTS.mostly));  // while the values are in the caches
}

std::optional<float> choose_among(const Kernels& kernels, int threads, int64_t rows, int64_t row, const Choice& choice,
                                  Candidates& candidates, std::vector<Found>& found) {
  const TopK* top_k = std::get_if<TopK>(&choice);
  if (!top_k || top_k->k <= 0 || !is_near(top_k->near)) return std::nullopt;
  if (candidates.near != top_k->near || candidates.rows != rows || candidates.row != row) return std::nullopt;
  const Stopwatch stopwatch(TOP_K);
  found = std::move(candidates.found);
  candidates = Candidates();
  return choose(kernels, threads, top_k->k, brackets_of(top_k->near, OF_WEIGHTS), found);
}

float top_k_threshold(const Kernels& kernels, int threads, const float* x, int64_t count, int64_t k) {
  if (k <= 0) return INFINITY;
  if (count <= FEW) {
    std::vector<float> all(count + SPARE);
    int64_t above;  // NaN, which no comparison finds
    const int64_t found = kernels.partition(x, count, 0, INFINITY, all.data(), &above);
    if (k <= above) return NAN;
    std::nth_element(all.begin(), all.begin() + (k - above - 1), all.begin() + found, std::greater<float>());
    return all[k - above - 1];
  }
  // One pass counts what is above the sample's bracket and keeps what is within, a few percent, of which the k-th is found
  // in the same way.
  auto [low, high] = sampled(x, count, k);
  const int64_t parts = (count + PART - 1) / PART;
  std::vector<int64_t> above(parts), found(parts);
  std::vector<std::vector<float>> kept(parts);
  while (true) {
    parallel(threads, parts, [&](int64_t part) {
      const int64_t begin = part * PART;
      float* between = scratch(0, PART + SPARE);
      found[part] = kernels.partition(x + begin, std::min(PART, count - begin), low, high, between, &above[part]);
      kept[part].assign(between, between + found[part]);
    });
    const int64_t over = std::accumulate(above.begin(), above.end(), int64_t{0});
    const int64_t within = std::accumulate(found.begin(), found.end(), int64_t{0});
    if (over < k && k <= over + within) {
      if (low == high) return low;
      std::vector<float> all;
      all.reserve(within);
      for (const auto& part : kept) all.insert(all.end(), part.begin(), part.end());
      if (within > count / 2) {  // too little progress to try more of the same
        const auto place = all.begin() + (k - over - 1);
        std::nth_element(all.begin(), place, all.end(), std::greater<float>());
        return *place;
      }
      return top_k_threshold(kernels, threads, all.data(), within, k - over);
    }
    if (over >= k) {
      if (high == INFINITY) return NAN;  // only NaN is above
      low = high, high = INFINITY;
    } else {
      high = low, low = 0;
    }
  }
}

}  // namespace zerofl
