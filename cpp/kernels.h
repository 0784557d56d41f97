// The kernels of one instruction set: plain functions on pointers and ints. bindings.cpp allocates and shares out the work.
//
// Activations and their gradients lie batch innermost: [channels, height, width, batch], contiguous. Then one weight
// meets contiguous vectors of images, wherever the weight is, and a whole row is one flat vector in which the neighbour
// to the right lies `batch` floats further on.
#pragma once

#include <stdint.h>

namespace zerofl {

// A non-zero weight or activation, and where what it is multiplied with begins: a distance in bytes.
struct Entry {
  float value;
  uint32_t offset;
};

constexpr int TILE = 64;  // floats of an output row that are computed together, and stay in registers

// A convolution with packed weights, of which grad_input is one too (of the output gradient, one for each phase of the
// stride). Output row y and window row p meet in input row y * row_step + row0 + p; columns likewise.
struct Convolution {
  int batch;
  int in_channels, in_height, in_width;
  int out_channels, out_height, out_width;  // of this phase
  int row_step, row0, col_step, col0;       // from output to input
  int window_height, window_width;          // the extent of the kernel's taps
  // Where the phase's outputs lie in the whole output tensor.
  int full_height, full_width, full_row_step, full_row0, full_col_step, full_col0;

  // Work is done in strips of `strip` tiles of a row. Their input window is packed `block` input channels at a time: for
  // each window row and channel `strip_floats` floats, of which tile t's begin at t * tile_floats, and of these the ones
  // that meet the kernel's column q at q * column_floats.
  int block, strip, strip_floats, tile_floats, column_floats;
  int rows;    // output rows in a sweep down a strip
  bool large;  // whether the output will not stay in the caches

  // Non-zeros by group of output channels, block of input channels, and output channel. Within a group and block the
  // channels are in the order of their number of non-zeros, so that the loop over them runs equally long many times and
  // its end is predicted: order[list] is the channel, entries [starts[list], starts[list + 1]) are its non-zeros, a
  // multiple of Kernels::entries_multiple of them.
  int group;  // output channels in a group
  const Entry* entries;
  const int32_t* starts;
  const int32_t* order;

  int blocks() const { return (in_channels + block - 1) / block; }
  int groups() const { return (out_channels + group - 1) / group; }
  int tiles() const { return (int)(((int64_t)out_width * batch + TILE - 1) / TILE); }
  int tile_count(int64_t begin) const {  // floats of the tile that begins there in an output row
    const int64_t left = (int64_t)out_width * batch - begin;
    return left < TILE ? (int)left : TILE;
  }
  int strips() const { return (tiles() + strip - 1) / strip; }
  int row_floats() const { return block * strip_floats; }  // of a window row
};

constexpr int SPARE_ROWS = 3;  // packed window rows beyond a window's own, so that they seldom have to be moved

// The gradient of a convolution's weight, from the output gradient and the packed non-zero activations. Those are split by
// the position's phase (in a stride of 2, even or odd) and by groups of images, so that the part of the output gradient
// they meet stays in the cache: for each image, a plane with zero borders, LANES output channels innermost.
constexpr int IMAGE_BLOCK = 16;  // images whose planes of the output gradient are made at a time

struct WeightGradient {
  int batch, image_group;  // images in a group
  int in_channels, out_channels, out_height, out_width, kernel_height, kernel_width;
  int outs;  // vectors of output channels at a time, 1 or 2
  int plane_height, plane_width, top, left;  // of the bordered plane, and where the output gradient lies in it
  bool large;  // whether grad_weight will not stay in the caches
  int phases;
  const struct Phase* phase;
  // For each input channel its entries, which list after list have the offset of the plane's position that meets tap
  // (row0, column0) of the phase. List phase * image_groups() + image group begins at starts[channel * (lists() + 1) + list].
  const Entry* const* entries;
  const int32_t* starts;

  int image_block() const { return batch < IMAGE_BLOCK ? batch : IMAGE_BLOCK; }
  int image_groups() const { return (batch + image_group - 1) / image_group; }
  int lists() const { return phases * image_groups(); }
};

// The taps that positions of one phase meet: a grid of rows and columns `step` apart, to the upper left in the plane.
struct Phase {
  int row0, rows, row_step, column0, columns, column_step;  // taps of the kernel
  int plane_row_step, plane_column_step;                    // from one to the next in the plane
};


constexpr int LINEAR_OUT = 64;  // output channels of a linear layer's gradient that are computed at a time
constexpr uint8_t NOWHERE = 255;

struct Kernels {
  const char* name;
  int lanes;
  int entries_multiple;  // of every list of a Convolution

  // Rows [row_begin, row_end) of a strip, for the output channels of one group. The sums start from `bias` by channel,
  // or from `addend` [out_channels, out_height, out_width, batch] if given.
  // window: (window_height + SPARE_ROWS) * row_floats() floats; sums: rows * strip * group * TILE floats.
  void (*convolve)(const Convolution&, const float* input, const float* bias, const float* addend, float* output,
                   int strip, int row_begin, int row_end, int group, float* window, float* sums);

  // grad_weight of outs * LANES output channels from first_out, and input channels [in_begin, in_end).
  // planes: outs * image_block * plane floats * LANES, zero; sums: outs * (in_end - in_begin) * taps * LANES floats.
  void (*weight_gradient)(const WeightGradient&, const float* grad_output, float* grad_weight, int first_out,
                          int in_begin, int in_end, float* planes, float* sums);
  // The same of LINEAR_OUT output channels, for a kernel and images of one position.
  // planes: batch * LINEAR_OUT floats; sums: 16 * LINEAR_OUT floats.
  void (*linear_gradient)(const WeightGradient&, const float* grad_output, float* grad_weight, int first_out,
                          int in_begin, int in_end, float* planes, float* sums);

  // One output channel of a linear layer: y = start + sum of value[i] * row (index[i] - first) of x, whose rows and y are
  // `vectors` vectors long.
  void (*linear_forward)(const uint32_t* index, const float* value, int64_t count, uint32_t first, const float* x,
                         int vectors, float start, float* y);
  // Its part of grad_input: row (index[i] - first) of dx += value[i] * dy.
  void (*linear_grad_input)(const uint32_t* index, const float* value, int64_t count, uint32_t first, const float* dy,
                            int vectors, float* dx);

  // The entries that are not below the threshold in magnitude and not zero, and their indices; returns how many.
  int64_t (*find_active)(const float* x, int64_t count, float threshold, uint32_t* indices, float* values);

  // Count the magnitudes above `high`, NaN among them, in *above, and copy those in [low, high]; returns how many.
  int64_t (*partition)(const float* x, int64_t count, float low, float high, float* between, int64_t* above);

  // A bit for each entry of x that is not +0 and where the magnitude of `by` is not below the threshold, the first in a
  // byte's highest bit and unused ones 0; returns how many there are.
  int64_t (*active_bits)(const float* x, const float* by, float threshold, int64_t count, uint8_t* bitmap);

  void (*batch_norm_statistics)(const float* x, int64_t count, float* mean, float* variance);
  // y = (x - mean) * scale + shift (+ residual), and max(., 0) of it if relu; positive (if given) gets a bit for each
  // y > 0. `large` tells that the whole tensor will not stay in the caches.
  void (*batch_norm_apply)(const float* x, const float* residual, int64_t count, float scale, float mean, float shift,
                           bool relu, bool large, float* y, uint8_t* positive);
  // g = grad_y where positive (all, without bits): its sum and that of g * (x - mean).
  void (*batch_norm_sums)(const float* grad_y, const float* x, const uint8_t* positive, int64_t count, float mean,
                          float* sum, float* dot);
  // grad_x = g * scale + (x - mean) * slope + shift; grad_residual (if given) = g.
  void (*batch_norm_gradient)(const float* grad_y, const float* x, const uint8_t* positive, int64_t count, float mean,
                              float scale, float slope, float shift, bool large, float* grad_x,
                              float* grad_residual);

  // One channel: x [height, width, batch] -> y [height / size, width / size, batch], the largest of each size x size
  // square, and 0 at least if relu. place tells which of the square it was, in reading order (the first of equals, and
  // NaN before all), or NOWHERE if it was below 0.
  void (*max_pool)(const float* x, int height, int width, int batch, int size, bool relu, float* y, uint8_t* place);
  void (*max_pool_gradient)(const float* grad_y, const uint8_t* place, int height, int width, int batch, int size,
                            float* grad_x);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace zerofl
