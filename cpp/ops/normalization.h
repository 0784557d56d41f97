// Batch normalisation in the batch-innermost layout, shared out by channel.
#pragma once

#include "kernels/kernels.h"

namespace zerofl {

// x [channels, count], stored as `storage` says -> y = relu(weight * (x - mean) / sqrt(variance + epsilon) + bias + residual), without the ReLU if
// not asked for; weight, bias and residual may be null. `of_batch` first computes the mean and the biased variance of each
// channel of x, and moves the running ones (which may be null) towards them by `momentum`, the variance unbiased; else they
// are given. positive, if given, gets ceil(count / 8) bytes a channel, a bit for each y > 0 or NaN.
void batch_norm(const Kernels& kernels, int threads, const void* x, Storage storage, int channels, int64_t count,
                bool of_batch, float* mean, float* variance, float* running_mean, float* running_variance,
                float momentum, float epsilon, const float* weight, const float* bias, const float* residual, bool relu,
                float* y, uint8_t* positive);

// The gradients of `batch_norm` with the statistics of x itself. grad_residual may be null.
void batch_norm_backward(const Kernels& kernels, int threads, const float* grad_y, const void* x, Storage storage,
                         const uint8_t* positive, int channels, int64_t count, const float* mean, const float* variance,
                         float epsilon, const float* weight, float* grad_x, float* grad_weight, float* grad_bias,
                         float* grad_residual);

}  // namespace zerofl
