// The kernels of one instruction set: plain functions on pointers and ints. ops/ and bindings/ allocate and share out the work.
//
// Activations and their gradients are stored batch innermost: [channels, height, width, batch], contiguous. Then one weight
// meets contiguous vectors of images, wherever the weight is, and a whole row is one flat vector in which the neighbour
// to the right is `batch` floats further on.
#pragma once

#include <stdint.h>

namespace zerofl {

// A non-zero weight or activation, and where what it is multiplied with begins: a distance in bytes.
struct Entry {
  float value;
  uint32_t offset;
};

// How a convolution's output is stored until its normalisation, which reads it, has been differentiated.
enum Storage : int { FLOAT32, FLOAT16, BFLOAT16 };
[[gnu::always_inline]] inline int64_t bytes_of(Storage storage) { return storage == FLOAT32 ? 4 : 2; }

constexpr int TILE = 64;  // floats of an output row that are computed together, and stay in registers

// A convolution with packed weights, of which grad_input is one too (of the output gradient, one for each phase of the
// stride). Output row y and window row p meet in input row y * row_step + row0 + p; columns likewise.
struct PackedConvolution {
  int batch;
  int in_channels, in_height, in_width;
  int out_channels, out_height, out_width;  // of this phase
  int row_step, row0, col_step, col0;  // from output to input
  int window_height, window_width;  // the extent of the kernel's taps
  // Where the phase's outputs are in the whole output tensor.
  int full_height, full_width, full_row_step, full_row0, full_col_step, full_col0;

  // Work is done in strips of `strip` tiles of a row. Their input window is packed `block` input channels at a time: for
  // each window row and channel `strip_floats` floats, of which tile t's begin at t * tile_floats, and of these the ones
  // that meet the kernel's column q at q * column_floats.
  int block, strip, strip_floats, tile_floats, column_floats;
  int rows;  // output rows in a sweep down a strip
  bool large;  // whether the output will not stay in the caches
  Storage storage;  // of the output

  // Non-zeros by group of output channels, block of input channels, and output channel. Within a group and block the
  // channels are in the order of their number of non-zeros, so that the loop over them runs equally long many times and
  // its end is predicted: order[list] is the channel, entries [starts[list], starts[list + 1]) are its non-zeros, a
  // multiple of Kernels::entries_multiple of them.
  int group;  // output channels in a group
  const Entry* entries;
  const int32_t* starts;
  const int32_t* order;

  [[gnu::always_inline]] int blocks() const { return (in_channels + block - 1) / block; }
  [[gnu::always_inline]] int groups() const { return (out_channels + group - 1) / group; }
  [[gnu::always_inline]] int tiles() const { return (int)(((int64_t)out_width * batch + TILE - 1) / TILE); }
  [[gnu::always_inline]] int tile_count(int64_t begin) const {  // floats of the tile that begins there in an output row
    const int64_t left = (int64_t)out_width * batch - begin;
    return left < TILE ? (int)left : TILE;
  }
  [[gnu::always_inline]] int strips() const { return (tiles() + strip - 1) / strip; }
  [[gnu::always_inline]] int row_floats() const { return block * strip_floats; }  // of a window row
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
  int plane_height, plane_width, top, left;  // of the bordered plane, and where the output gradient is in it
  bool large;  // whether grad_weight will not stay in the caches
  int phases;
  const struct Phase* phase;
  // For each input channel its entries, which list after list have the offset of the plane's position that meets tap
  // (row0, column0) of the phase. List phase * image_groups() + image group begins at starts[channel * (lists() + 1) + list].
  const Entry* const* entries;
  const int32_t* starts;

  [[gnu::always_inline]] int image_block() const { return batch < IMAGE_BLOCK ? batch : IMAGE_BLOCK; }
  [[gnu::always_inline]] int image_groups() const { return (batch + image_group - 1) / image_group; }
  [[gnu::always_inline]] int lists() const { return phases * image_groups(); }
};

// What becomes of a weight's gradient. It is stored at `gradient`; or, where that is null, each part of it is used for a
// step of SGD on the weight as soon as it is computed, and is nowhere in memory: torch.optim.SGD's arithmetic, with
// `velocity` null unless there is momentum. With a `power` above 1, up to 2, the step is on v, of which the weight is
// v |v|^(power - 1).
struct Target {
  float* gradient;
  float *weight, *velocity;
  float rate, momentum, weight_decay, power;
};

// What a scan of LINEAR_OUT rows of a weight finds, right after each part of it was updated: entries that are not below
// `from` in magnitude and not zero. They come in runs one behind the other, for each LINEAR_IN input channels one run of
// every row; sizes[block * LINEAR_OUT + row] is how long it is. An index counts from the first row's first channel.
struct Scan {
  float from;
  uint32_t* indices;
  float* values;
  int32_t* sizes;
};

// The taps that positions of one phase meet: a grid of rows and columns `step` apart, to the upper left in the plane.
struct Phase {
  int row0, rows, row_step, column0, columns, column_step;  // taps of the kernel
  int plane_row_step, plane_column_step;  // from one to the next in the plane
};

constexpr int SPARE = 16;  // entries that find_active and partition may overwrite behind what they found
constexpr int LINEAR_OUT = 64, LINEAR_IN = 512;  // channels of a linear layer's gradient that are computed at a time
constexpr uint8_t NOWHERE = 255;

struct Kernels {
  const char* name;
  int lanes;
  int entries_multiple;  // of every list of a PackedConvolution

#define KERNEL(result, name, parameters) result(*name) parameters;
#include "signatures.inc"
#undef KERNEL
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace zerofl
