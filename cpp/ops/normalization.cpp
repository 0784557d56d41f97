#include "ops/normalization.h"

#include <cmath>

#include "runtime/threads.h"

namespace zerofl {
namespace {

// Whether a tensor has left the caches before it is read again.
bool is_large(int64_t floats) { return floats >= 1 << 19; }

const void* at(const void* x, Storage storage, int64_t i) {
  return static_cast<const char*>(x) + i * bytes_of(storage);
}

}  // namespace

void batch_norm(const Kernels& kernels, int threads, const void* x, Storage storage, int channels, int64_t count,
                bool of_batch, float* mean, float* variance, float* running_mean, float* running_variance,
                float momentum, float epsilon, const float* weight, const float* bias, const float* residual, bool relu,
                float* y, uint8_t* positive) {
  // A channel at a time: what its statistics have read is still in a cache when it is normalised.
  parallel(threads, channels, [&](int64_t c) {
    const void* v = at(x, storage, c * count);
    if (of_batch) kernels.batch_norm_statistics(v, storage, count, mean + c, variance + c);
    if (of_batch && running_mean) {
      const float n = static_cast<float>(count);
      running_mean[c] += momentum * (mean[c] - running_mean[c]);
      running_variance[c] += momentum * (variance[c] * (n / (n - 1)) - running_variance[c]);
    }
    const float scale = (weight ? weight[c] : 1.0f) / std::sqrt(variance[c] + epsilon);
    kernels.batch_norm_apply(v, storage, residual ? residual + c * count : nullptr, count, scale, mean[c],
                             bias ? bias[c] : 0.0f, relu, is_large(channels * count), y + c * count,
                             positive ? positive + c * ((count + 7) / 8) : nullptr);
  });
}

void batch_norm_backward(const Kernels& kernels, int threads, const float* grad_y, const void* x, Storage storage,
                         const uint8_t* positive, int channels, int64_t count, const float* mean, const float* variance,
                         float epsilon, const float* weight, float* grad_x, float* grad_weight, float* grad_bias,
                         float* grad_residual) {
  parallel(threads, channels, [&](int64_t c) {
    const float* g = grad_y + c * count;
    const void* v = at(x, storage, c * count);
    const uint8_t* bits = positive ? positive + c * ((count + 7) / 8) : nullptr;
    float sum, dot;  // of g, and of g * (x - mean)
    kernels.batch_norm_sums(g, v, storage, bits, count, mean[c], &sum, &dot);
    const float inverse = 1.0f / std::sqrt(variance[c] + epsilon), scale = (weight ? weight[c] : 1.0f) * inverse;
    grad_weight[c] = dot * inverse;
    grad_bias[c] = sum;
    // grad_x = scale * (g - sum / count - (x - mean) * dot * inverse^2 / count)
    const float n = static_cast<float>(count), slope = -scale * dot * inverse * inverse / n;
    kernels.batch_norm_gradient(g, v, storage, bits, count, mean[c], scale, slope, -scale * sum / n,
                                is_large(channels * count), grad_x + c * count,
                                grad_residual ? grad_residual + c * count : nullptr);
  });
}

}  // namespace zerofl
