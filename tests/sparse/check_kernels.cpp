// The kernels beside plain loops, without Python and PyTorch: for processors that only an emulator runs here
// (make test-aarch64). Draws shapes until the number given, prints what it compared, and fails at the first difference.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "codec/codec.h"
#include "ops/linear_weight.h"
#include "ops/normalization.h"
#include "ops/packing.h"

using namespace zerofl;

namespace {

const Kernels& kernels = kernels_baseline;
std::mt19937_64 random_bits(1);
int compared = 0;

int drawn(int low, int high) { return low + static_cast<int>(random_bits() % (high - low + 1)); }

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(random_bits);
  return values;
}

[[noreturn]] void fail(const char* what, double found, double expected) {
  std::printf("%s: %.9g where plain loops give %.9g\n", what, found, expected);
  std::exit(1);
}

// The largest deviation relative to the largest entry.
void close(const char* what, const float* found, const std::vector<double>& expected, double tolerance = 1e-5) {
  double largest = 1e-30;
  for (double value : expected) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(std::abs(found[i] - expected[i]) <= tolerance * largest)) fail(what, found[i], expected[i]);
  ++compared;
}

void same(const char* what, double found, double expected) {
  if (!(found == expected)) fail(what, found, expected);
  ++compared;
}

float kth_magnitude(std::vector<float> values, int64_t k) {
  if (k == 0) return INFINITY;
  for (float& value : values) value = std::abs(value);
  std::sort(values.begin(), values.end(), std::greater<float>());
  return values[k - 1];
}

// The entries from the k-th magnitude on, zeros elsewhere.
std::vector<float> top_k(const std::vector<float>& values, int64_t k) {
  const float threshold = kth_magnitude(values, k);
  std::vector<float> kept = values;
  for (float& value : kept)
    if (std::abs(value) < threshold) value = 0;
  return kept;
}

// Call visit(output index, input index, weight index) for each product of a convolution, all batch innermost.
template <class Visit>
void for_products(const Geometry& g, const Visit& visit) {
  for (int o = 0; o < g.out_channels; ++o)
    for (int c = 0; c < g.in_channels; ++c)
      for (int p = 0; p < g.kernel_height; ++p)
        for (int q = 0; q < g.kernel_width; ++q)
          for (int y = 0; y < g.out_height; ++y)
            for (int x = 0; x < g.out_width; ++x) {
              const int v = y * g.stride_height + p * g.dilation_height - g.padding_height;
              const int h = x * g.stride_width + q * g.dilation_width - g.padding_width;
              if (v < 0 || h < 0 || v >= g.in_height || h >= g.in_width) continue;
              for (int n = 0; n < g.batch; ++n)
                visit(((int64_t{o} * g.out_height + y) * g.out_width + x) * g.batch + n,
                      ((int64_t{c} * g.in_height + v) * g.in_width + h) * g.batch + n,
                      ((int64_t{o} * g.in_channels + c) * g.kernel_height + p) * g.kernel_width + q);
            }
}

Geometry drawn_geometry(bool linear) {
  for (;;) {
    Geometry g{};
    g.batch = linear ? drawn(1, 90) : drawn(1, 36), g.in_channels = drawn(1, linear ? 200 : 20);
    g.out_channels = drawn(1, linear ? 150 : 40);
    g.stride_height = g.stride_width = g.dilation_height = g.dilation_width = 1;
    g.in_height = g.in_width = g.kernel_height = g.kernel_width = g.out_height = g.out_width = 1;
    if (linear) return g;
    g.in_height = drawn(1, 9), g.in_width = drawn(1, 9), g.kernel_height = drawn(1, 4), g.kernel_width = drawn(1, 6);
    g.stride_height = drawn(1, 3), g.stride_width = drawn(1, 3), g.padding_height = drawn(0, 2);
    g.padding_width = drawn(0, 2), g.dilation_height = drawn(1, 2), g.dilation_width = drawn(1, 2);
    const int height = g.in_height + 2 * g.padding_height - g.dilation_height * (g.kernel_height - 1) - 1;
    const int width = g.in_width + 2 * g.padding_width - g.dilation_width * (g.kernel_width - 1) - 1;
    g.out_height = height / g.stride_height + 1, g.out_width = width / g.stride_width + 1;
    if (height >= 0 && width >= 0) return g;
  }
}

// The bits of a number in 16 of them: with so many digits, and no exponent below the least; no larger one than there is.
int rounded(float value, int digits, int least) {
  int exponent;
  std::frexp(value, &exponent);
  exponent = std::max(exponent - 1, least);
  const double units = std::nearbyint(std::ldexp(std::abs(double{value}), digits - 1 - exponent));  // ties to even
  const int magnitude = static_cast<int>(units) + (((exponent - least)) << (digits - 1));
  return (std::signbit(value) ? 0x8000 : 0) + magnitude;
}

// Powerpropagation's step, with momentum and weight decay, or where `rests` of weights of which many are zero.
void check_power(const PackedInput& input, const std::vector<float>& grad_output, const std::vector<double>& expected,
                 bool rests) {
  const int64_t size = static_cast<int64_t>(expected.size());
  const double power = 1.25, momentum = rests ? 0 : 0.9, decay = rests ? 0 : 0.01;
  std::vector<float> weight = normal(size), velocity = normal(size);
  if (rests)
    for (int64_t i = 0; i < size; i += drawn(1, 3)) weight[i] = 0;
  std::vector<float> stepped = weight, moved = velocity;
  input.grad_weight(2, grad_output.data(),
                    Target{nullptr, stepped.data(), rests ? nullptr : moved.data(), 0.1f, static_cast<float>(momentum),
                           static_cast<float>(decay), static_cast<float>(power)});
  std::vector<double> weights(size), velocities(size);
  for (int64_t i = 0; i < size; ++i) {
    const double v = std::copysign(std::pow(std::abs(double{weight[i]}), 1 / power), weight[i]);
    velocities[i] = momentum * velocity[i] + expected[i] * power * std::pow(std::abs(v), power - 1) + decay * v;
    const double after = v - 0.1 * velocities[i];
    weights[i] = after * std::pow(std::abs(after), power - 1);
    if (rests) velocities[i] = velocity[i];
  }
  close("velocity of a power", moved.data(), velocities);
  close("weight after a step on its power", stepped.data(), weights);
}

// The gradient, and a step of SGD with momentum and weight decay in its place.
void check_gradient(const PackedInput& input, const std::vector<float>& grad_output,
                    const std::vector<double>& expected) {
  const int64_t size = static_cast<int64_t>(expected.size());
  std::vector<float> gradient(size), weight = normal(size), velocity = normal(size), stepped = weight, moved = velocity;
  input.grad_weight(2, grad_output.data(), Target{gradient.data(), nullptr, nullptr, 0, 0, 0, 1});
  close("grad_weight", gradient.data(), expected);
  input.grad_weight(2, grad_output.data(), Target{nullptr, stepped.data(), moved.data(), 0.1f, 0.9f, 0.01f, 1});
  std::vector<double> weights(size), velocities(size);
  for (int64_t i = 0; i < size; ++i) {
    velocities[i] = 0.9 * velocity[i] + expected[i] + 0.01 * weight[i];
    weights[i] = weight[i] - 0.1 * velocities[i];
  }
  close("velocity", moved.data(), velocities);
  close("weight after a step", stepped.data(), weights);

  for (const bool rests : {false, true}) check_power(input, grad_output, expected, rests);
}

void check_convolution() {
  const Geometry g = drawn_geometry(false);
  const std::vector<float> x = normal(int64_t{g.in_channels} * g.in_height * g.in_width * g.batch);
  const std::vector<float> w = normal(int64_t{g.out_channels} * g.in_channels * g.taps());
  const std::vector<float> dy = normal(int64_t{g.out_channels} * g.out_height * g.out_width * g.batch);
  const std::vector<float> bias = normal(g.out_channels);
  const int64_t k_w = drawn(1, static_cast<int>(w.size())), k_x = drawn(1, static_cast<int>(x.size()));
  const std::vector<float> active_w = top_k(w, k_w), active_x = top_k(x, k_x);
  std::vector<double> y(dy.size()), dx(x.size()), dw(w.size());
  for (size_t i = 0; i < y.size(); ++i) y[i] = bias[i / (y.size() / g.out_channels)];
  for_products(g, [&](int64_t to, int64_t from, int64_t by) {
    y[to] += double{x[from]} * active_w[by];
    dx[from] += double{dy[to]} * active_w[by];
    dw[by] += double{dy[to]} * active_x[from];
  });
  PackedWeight weight(kernels, 2, g, w.data(), TopK{k_w, 0}, true);
  const PackedInput input(kernels, 2, g, x.data(), TopK{k_x, 0});
  same("the weight's threshold", weight.threshold, kth_magnitude(w, k_w));
  std::vector<float> output(y.size()), grad_input(x.size());
  weight.forward.run(kernels, 2, x.data(), bias.data(), nullptr, output.data());
  close("forward", output.data(), y);
  weight.backward.run(kernels, 2, dy.data(), nullptr, nullptr, grad_input.data());
  close("grad_input", grad_input.data(), dx);
  check_gradient(input, dy, dw);
  std::vector<uint16_t> stored(y.size());
  weight.forward.run(kernels, 2, x.data(), bias.data(), nullptr, stored.data(), BFLOAT16);
  for (size_t i = 0; i < stored.size(); ++i) same("bfloat16", stored[i], rounded(output[i], 8, -126));
  weight.forward.run(kernels, 2, x.data(), bias.data(), nullptr, stored.data(), FLOAT16);
  for (size_t i = 0; i < stored.size(); ++i) same("float16", stored[i], rounded(output[i], 11, -14));
}

void check_linear() {
  const Geometry g = drawn_geometry(true);
  const std::vector<float> x = normal(int64_t{g.in_channels} * g.batch), dy = normal(int64_t{g.out_channels} * g.batch);
  const std::vector<float> w = normal(int64_t{g.out_channels} * g.in_channels), bias = normal(g.out_channels);
  const int64_t k_w = drawn(1, static_cast<int>(w.size())), k_x = drawn(1, static_cast<int>(x.size()));
  const std::vector<float> active_w = top_k(w, k_w), active_x = top_k(x, k_x);
  std::vector<double> y(dy.size()), dx(x.size()), dw(w.size());
  for (size_t i = 0; i < y.size(); ++i) y[i] = bias[i / g.batch];
  for_products(g, [&](int64_t to, int64_t from, int64_t by) {
    y[to] += double{x[from]} * active_w[by];
    dx[from] += double{dy[to]} * active_w[by];
    dw[by] += double{dy[to]} * active_x[from];
  });
  std::vector<float> output(y.size()), grad_input(x.size());
  if (g.batch <= TILE) {
    const LinearWeight weight(kernels, 2, g, w.data(), TopK{k_w, 0});
    weight.forward(2, x.data(), bias.data(), output.data());
    weight.grad_input(2, dy.data(), grad_input.data());
  } else {
    const PackedWeight weight(kernels, 2, g, w.data(), TopK{k_w, 0}, true);
    weight.forward.run(kernels, 2, x.data(), bias.data(), nullptr, output.data());
    weight.backward.run(kernels, 2, dy.data(), nullptr, nullptr, grad_input.data());
  }
  close("linear forward", output.data(), y);
  close("linear grad_input", grad_input.data(), dx);
  check_gradient(PackedInput(kernels, 2, g, x.data(), TopK{k_x, 0}), dy, dw);
}

// What a step's scan leaves for the next one is what a pass over the weight after it finds.
void check_candidates() {
  Geometry g = drawn_geometry(true);
  g.out_channels = drawn(1, LINEAR_OUT + 10), g.in_channels = drawn(1, 2 * LINEAR_IN + 40), g.batch = drawn(1, 4);
  const int64_t size = int64_t{g.out_channels} * g.in_channels, k = drawn(1, static_cast<int>(size));
  const std::vector<float> x = normal(int64_t{g.in_channels} * g.batch), dy = normal(int64_t{g.out_channels} * g.batch);
  std::vector<float> w = normal(size);
  Candidates candidates;
  candidates.near = kth_magnitude(w, k), candidates.rows = g.out_channels, candidates.row = g.in_channels;
  const Target target{nullptr, w.data(), nullptr, 0.001f, 0, 0, 1};
  PackedInput(kernels, 2, g, x.data(), TopK{static_cast<int64_t>(x.size()), 0})
      .grad_weight(2, dy.data(), target, &candidates);
  const TopK choice{k, candidates.near};
  const LinearWeight scanned(kernels, 2, g, w.data(), choice, &candidates), read(kernels, 2, g, w.data(), choice);
  same("candidates are used up", static_cast<double>(candidates.found.size()), 0);
  same("the threshold among candidates", scanned.threshold, kth_magnitude(w, k));
  const auto lists = [&g](const LinearWeight& weight) {
    std::vector<double> entries;
    for (size_t part = 0; part < weight.found.size(); ++part)
      for (int64_t i = 0; i < weight.found[part].size; ++i) {
        entries.push_back(static_cast<double>(part) * weight.part_rows * g.in_channels +
                          weight.found[part].indices.data()[i]);
        entries.push_back(weight.found[part].values.data()[i]);
      }
    return entries;
  };
  const std::vector<double> found = lists(scanned), expected = lists(read);
  same("active weights among candidates", static_cast<double>(found.size()), static_cast<double>(expected.size()));
  for (size_t i = 0; i < found.size(); ++i) same("an active weight among candidates", found[i], expected[i]);
}

// Numbers that float16 and bfloat16 hold exactly, so that every storage has the same results.
std::vector<float> eighths(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(drawn(-100, 100)) / 8;
  return values;
}

void check_normalisation() {
  const int channels = drawn(1, 5);
  const int64_t count = drawn(2, 200), size = channels * count;
  const std::vector<float> x = eighths(size), residual = normal(size), g = normal(size), gamma = normal(channels),
                           beta = normal(channels);
  std::vector<double> y(size), dx(size), dgamma(channels), dbeta(channels), dr(size);
  std::vector<uint8_t> keeps(size);
  for (int c = 0; c < channels; ++c) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < count; ++i) mean += x[c * count + i] / static_cast<double>(count);
    for (int64_t i = 0; i < count; ++i) variance += std::pow(x[c * count + i] - mean, 2) / static_cast<double>(count);
    const double inverse = 1 / std::sqrt(variance + 0.1);
    for (int64_t i = c * count; i < (c + 1) * count; ++i) {
      y[i] = (x[i] - mean) * inverse * gamma[c] + beta[c] + residual[i];
      keeps[i] = y[i] > 0;
      y[i] = std::max(y[i], 0.0), dr[i] = keeps[i] ? g[i] : 0;
      dgamma[c] += dr[i] * (x[i] - mean) * inverse, dbeta[c] += dr[i];
    }
    for (int64_t i = c * count; i < (c + 1) * count; ++i)
      dx[i] =
          gamma[c] * inverse * (dr[i] - (dbeta[c] + (x[i] - mean) * inverse * dgamma[c]) / static_cast<double>(count));
  }
  for (Storage storage : {FLOAT32, FLOAT16, BFLOAT16}) {
    std::vector<char> stored(size * bytes_of(storage));
    for (int64_t i = 0; i < size;
         ++i) {  // exact, so the bits are the sign, a shifted exponent and the mantissa's first
      uint32_t bits;
      std::memcpy(&bits, &x[i], 4);
      const uint16_t brain = static_cast<uint16_t>(bits >> 16);
      const uint16_t half = static_cast<uint16_t>(
          x[i] == 0 ? bits >> 16 : (bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
      const void* from = storage == FLOAT32 ? static_cast<const void*>(&bits) : storage == FLOAT16 ? &half : &brain;
      std::memcpy(stored.data() + i * bytes_of(storage), from, bytes_of(storage));
    }
    std::vector<float> mean(channels), variance(channels), found(size), dx_found(size), dr_found(size),
        dgamma_found(channels), dbeta_found(channels);
    std::vector<uint8_t> positive(channels * ((count + 7) / 8));
    batch_norm(kernels, 2, stored.data(), storage, channels, count, true, mean.data(), variance.data(), nullptr,
               nullptr, 0, 0.1f, gamma.data(), beta.data(), residual.data(), true, found.data(), positive.data());
    close("batch_norm", found.data(), y);
    batch_norm_backward(kernels, 2, g.data(), stored.data(), storage, positive.data(), channels, count, mean.data(),
                        variance.data(), 0.1f, gamma.data(), dx_found.data(), dgamma_found.data(), dbeta_found.data(),
                        dr_found.data());
    close("batch_norm's grad_x", dx_found.data(), dx, 1e-4);
    close("grad_gamma", dgamma_found.data(), dgamma, 1e-4);
    close("grad_beta", dbeta_found.data(), dbeta, 1e-4);
    close("grad_residual", dr_found.data(), dr);
  }
}

void check_pooling() {
  const int height = drawn(1, 9), width = drawn(1, 9), batch = drawn(1, 40);
  const int size = drawn(1, std::min({height, width, 4})), rows = height / size, columns = width / size;
  const std::vector<float> x = eighths(int64_t{height} * width * batch), g = normal(int64_t{rows} * columns * batch);
  std::vector<double> y(g.size()), dx(x.size());
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      for (int n = 0; n < batch; ++n) {
        const int64_t to = (int64_t{r} * columns + c) * batch + n;
        int64_t best = -1;
        for (int i = 0; i < size; ++i)
          for (int j = 0; j < size; ++j) {
            const int64_t at = (int64_t{r * size + i} * width + c * size + j) * batch + n;
            if (best < 0 || x[at] > x[best]) best = at;
          }
        y[to] = std::max(x[best], 0.0f);
        if (x[best] > 0) dx[best] += g[to];
      }
  std::vector<float> found(y.size()), dx_found(x.size());
  std::vector<uint8_t> place(y.size());
  kernels.max_pool(x.data(), height, width, batch, size, true, found.data(), place.data());
  kernels.max_pool_gradient(g.data(), place.data(), height, width, batch, size, dx_found.data());
  close("max_pool", found.data(), y);
  close("max_pool's gradient", dx_found.data(), dx);
}

void check_selection() {
  const int64_t count = drawn(1, 70000), k = drawn(1, static_cast<int>(count));
  const std::vector<float> x = drawn(0, 1) ? normal(count) : eighths(count);
  const float threshold = kth_magnitude(x, k);
  same("top_k_threshold", top_k_threshold(kernels, 2, x.data(), count, k), threshold);
  std::vector<uint8_t> bits((count + 7) / 8), expected((count + 7) / 8);
  int64_t active = 0;
  std::vector<float> kept;
  for (int64_t i = 0; i < count; ++i)
    if (std::abs(x[i]) >= threshold && x[i] != 0) {
      expected[i / 8] |= static_cast<uint8_t>(0x80 >> (i % 8)), ++active;
      kept.push_back(x[i]);
    }
  same("active_bits", static_cast<double>(kernels.active_bits(x.data(), x.data(), threshold, count, bits.data())),
       static_cast<double>(active));
  if (bits != expected) fail("active_bits", 1, 0);
  std::vector<float> taken(active);
  kernels.take_bits(x.data(), bits.data(), count, taken.data(), active);
  if (taken != kept) fail("take_bits", 1, 0);
  std::vector<float> sums = x, plain = x;
  kernels.add_entries(sums.data(), bits.data(), count, kept.data(), active, 0.3f);
  for (int64_t i = 0; i < count; ++i)
    if (bits[i / 8] >> (7 - i % 8) & 1) {
      volatile float product = 0.3f * x[i];
      plain[i] += product;
    }
  if (sums != plain) fail("add_entries", 1, 0);
  std::vector<uint32_t> numbers(count), back(count);
  for (uint32_t& number : numbers) number = static_cast<uint32_t>(random_bits());
  std::vector<uint8_t> planes(4 * count);
  split_planes(numbers.data(), count, planes.data());
  merge_planes(planes.data(), count, back.data());
  if (back != numbers) fail("planes", 1, 0);
  const uint32_t largest = largest_magnitude(x.data(), count);
  std::vector<uint8_t> classes(count), of_classes(count / 8 + CLASSES + 1);
  magnitude_classes(x.data(), count, largest, classes.data());
  int64_t sizes[CLASSES];
  if (!count_classes(classes.data(), count, sizes)) fail("classes", 1, 0);
  std::vector<uint8_t> gathered(bits.size());
  if (!deal_bits(classes.data(), count, sizes, bits.data(), of_classes.data())) fail("deal_bits", 1, 0);
  if (!gather_bits(classes.data(), count, sizes, of_classes.data(), gathered.data())) fail("gather_bits", 1, 0);
  if (gathered != bits) fail("gather_bits", 1, 0);
  std::vector<uint32_t> dealt(count), differences(count);
  deal(classes.data(), count, sizes, numbers.data(), dealt.data());
  gather(classes.data(), count, sizes, dealt.data(), back.data());
  if (back != numbers) fail("gather", 1, 0);
  subtract(numbers.data(), dealt.data(), count, differences.data());
  add(dealt.data(), differences.data(), count, back.data());
  if (back != numbers) fail("add", 1, 0);
}

}  // namespace

int main(int count, char** arguments) {
  const int draws = count > 1 ? std::atoi(arguments[1]) : 0;
  if (draws < 1) return std::printf("usage: check_kernels DRAWS\n"), 2;
  for (int i = 0; i < draws; ++i) {
    check_convolution();
    check_linear();
    check_candidates();
    check_normalisation();
    check_pooling();
    check_selection();
  }
  std::printf("%s, %d lanes: %d results of %d draws agree with plain loops\n", kernels.name, kernels.lanes, compared,
              draws);
}
