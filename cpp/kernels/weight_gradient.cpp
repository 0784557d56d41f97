// The gradient of a convolution's weight from its non-zero activations: all taps of LANES output channels in registers.

#include "kernels.h"
#include "power.h"
#include "simd.h"

namespace zerofl::ISA {

int64_t find_active(const float* x, int64_t count, uint32_t first, float threshold, uint32_t* indices,
                    float* values);  // top_k.cpp

namespace {

constexpr int LINE = 16;  // floats of a cache line
constexpr int AHEAD = 8;  // lines of a weight's row that are asked for before they are changed

// sums[out][row][column][LANES] += sum over the entries of value * plane[out] at (offset - row * row_bytes - column *
// column_bytes), for OUTS vectors of output channels.
template <int OUTS, int ROWS_, int COLUMNS>
void accumulate(const Entry* entry, const Entry* end, const char* plane, int64_t out_bytes, int64_t row_bytes,
                int64_t column_bytes, float* sums, int64_t sums_out, int64_t sums_row) {
  Vec sum[OUTS][ROWS_][COLUMNS];
  for (int o = 0; o < OUTS; ++o)
    for (int p = 0; p < ROWS_; ++p)
      for (int q = 0; q < COLUMNS; ++q) sum[o][p][q] = load(sums + o * sums_out + p * sums_row + q * LANES);
  for (; entry < end; ++entry) {
    const Vec value = broadcast(entry->value);
    for (int o = 0; o < OUTS; ++o) {
      const char* at = plane + o * out_bytes + entry->offset;
      for (int p = 0; p < ROWS_; ++p, at -= row_bytes)
        for (int q = 0; q < COLUMNS; ++q)
          sum[o][p][q] += value * load(reinterpret_cast<const float*>(at - q * column_bytes));
    }
  }
  for (int o = 0; o < OUTS; ++o)
    for (int p = 0; p < ROWS_; ++p)
      for (int q = 0; q < COLUMNS; ++q) store(sums + o * sums_out + p * sums_row + q * LANES, sum[o][p][q]);
}

using Accumulate = void (*)(const Entry*, const Entry*, const char*, int64_t, int64_t, int64_t, float*, int64_t,
                            int64_t);

// The neighbouring column is a constant distance away in all but dilated convolutions.
template <int OUTS, int ROWS_, int COLUMNS>
void accumulate_adjacent(const Entry* entry, const Entry* end, const char* plane, int64_t out_bytes, int64_t row_bytes,
                         int64_t, float* sums, int64_t sums_out, int64_t sums_row) {
  accumulate<OUTS, ROWS_, COLUMNS>(entry, end, plane, out_bytes, row_bytes, LANES * sizeof(float), sums, sums_out,
                                   sums_row);
}

// As many taps at a time as leave room in 16 registers, by rows and columns. In a stride of 2 few taps meet a position:
// then two vectors of output channels are taken, or the time goes into reading entries.
constexpr int MAX_ROWS = 3, MAX_COLUMNS = 5, MAX_PAIRED = 2;
const Accumulate ADJACENT[MAX_ROWS][MAX_COLUMNS] = {
    {accumulate_adjacent<1, 1, 1>, accumulate_adjacent<1, 1, 2>, accumulate_adjacent<1, 1, 3>,
     accumulate_adjacent<1, 1, 4>, accumulate_adjacent<1, 1, 5>},
    {accumulate_adjacent<1, 2, 1>, accumulate_adjacent<1, 2, 2>, accumulate_adjacent<1, 2, 3>,
     accumulate_adjacent<1, 2, 4>, accumulate_adjacent<1, 2, 5>},
    {accumulate_adjacent<1, 3, 1>, accumulate_adjacent<1, 3, 2>, accumulate_adjacent<1, 3, 3>,
     accumulate_adjacent<1, 3, 4>, nullptr},
};
const Accumulate PAIRED[MAX_PAIRED][MAX_PAIRED] = {
    {accumulate_adjacent<2, 1, 1>, accumulate_adjacent<2, 1, 2>},
    {accumulate_adjacent<2, 2, 1>, accumulate_adjacent<2, 2, 2>},
};

// planes[image][plane][LANES] = the output gradient of LANES channels and of images [image_begin, image_end).
void make_planes(const WeightGradient& g, const float* grad_output, int first_out, int image_begin, int image_end,
                 float* planes) {
  const int64_t positions = (int64_t)g.out_height * g.out_width, channel = positions * g.batch;
  const int64_t plane = (int64_t)g.plane_height * g.plane_width * LANES;
  const int channels = g.out_channels - first_out < LANES ? g.out_channels - first_out : LANES;
  const float* from = grad_output + first_out * channel;
  for (int y = 0; y < g.out_height; ++y)
    for (int x = 0; x < g.out_width; ++x) {
      const float* at = from + ((int64_t)y * g.out_width + x) * g.batch;
      float* to = planes + ((int64_t)(y + g.top) * g.plane_width + x + g.left) * LANES;
      int image = image_begin;
      if (channels == LANES)
        for (; image + LANES <= image_end; image += LANES, to += LANES * plane) {
          Vec rows[LANES];
          for (int o = 0; o < LANES; ++o) rows[o] = load(at + o * channel + image);
          transpose(rows);
          for (int i = 0; i < LANES; ++i) store(to + i * plane, rows[i]);
        }
      for (; image < image_end; ++image, to += plane)
        for (int o = 0; o < LANES; ++o) to[o] = o < channels ? at[o * channel + image] : 0.0f;
    }
}

// The weight after a step with this part of its gradient, of one entry or a vector of them.
template <class T>
static inline __attribute__((always_inline)) T stepped(const Target& target, const Power& power, T weight, T gradient,
                                                       T* velocity) {
  if (target.power != 1) return powered(power, weight, gradient, velocity);
  if (target.weight_decay != 0) gradient += target.weight_decay * weight;
  if (velocity) gradient = *velocity = rounded(*velocity * target.momentum) + gradient;
  return weight - target.rate * gradient;
}

// Do with a line of the gradient, which belongs at `at`, what is to become of it.
INLINE void put_line(const Target& target, const Power& power, int64_t at, const Vec gradient[LINE / LANES],
                     bool large) {
  if (target.gradient) {
    float* line = target.gradient + at;
    const bool streams = large && (uintptr_t)line % 64 == 0;
    for (int v = 0; v < LINE / LANES; ++v)
      if (streams)
        stream(line + v * LANES, gradient[v]);
      else
        store(line + v * LANES, gradient[v]);
    return;
  }
  // These lines are of as many rows at a time as there are lanes, more than the processor follows by itself.
  __builtin_prefetch(target.weight + at + AHEAD * LINE, 1);
  if (target.velocity) __builtin_prefetch(target.velocity + at + AHEAD * LINE, 1);
  for (int v = 0; v < LINE / LANES; ++v, at += LANES) {
    Vec velocity = {};
    if (target.velocity) velocity = load(target.velocity + at);
    store(target.weight + at,
          stepped(target, power, load(target.weight + at), gradient[v], target.velocity ? &velocity : nullptr));
    if (target.velocity) store(target.velocity + at, velocity);
  }
}

// The same of `count` entries of as many rows as there are lanes, for steps on powers that may wait; returns how many of
// the entries it has done, whole vectors. Inputs that were never active have no gradient in any row.
int64_t wait_transposed(const float* from, int64_t stride, int64_t count, const Power& power, float* weight,
                        int64_t row) {
  Waiting waiting;
  waiting.count = 0;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    Vec columns[LANES];
    VecInt any = {};
    for (int j = 0; j < LANES; ++j) {
      columns[j] = load(from + (i + j) * stride);
      any |= columns[j] != 0;
    }
    if (!bits(any)) continue;
    transpose(columns);
    for (int o = 0; o < LANES; ++o) {
      __builtin_prefetch(weight + o * row + i + AHEAD * LINE, 1);
      waiting.add(power, weight, (uint32_t)(o * row + i), columns[o]);
    }
  }
  if (waiting.count) waiting.take(power, weight);
  return i;
}

// The gradient's entry at `at` + o * row + i is from[i * stride + o], for i in [0, count) and o in [0, channels), channels
// at most LANES.
void put_transposed(const float* from, int64_t stride, int64_t count, int channels, const Target& target, int64_t at,
                    int64_t row, bool large) {
  int64_t i = 0;
  const Power power = power_of(target);
  if (channels == LANES && !target.gradient && target.power != 1 && !target.velocity && target.weight_decay == 0)
    i = wait_transposed(from, stride, count, power, target.weight + at, row);
  if (channels == LANES)
    for (; i + LINE <= count; i += LINE) {  // a whole cache line of each row
      Vec columns[LINE / LANES][LANES];
      for (int v = 0; v < LINE / LANES; ++v) {
        for (int j = 0; j < LANES; ++j) columns[v][j] = load(from + (i + v * LANES + j) * stride);
        transpose(columns[v]);
      }
      for (int o = 0; o < LANES; ++o) {
        Vec line[LINE / LANES];
        for (int v = 0; v < LINE / LANES; ++v) line[v] = columns[v][o];
        put_line(target, power, at + o * row + i, line, large);
      }
    }
  for (; i < count; ++i)
    for (int o = 0; o < channels; ++o) {
      const int64_t entry = at + o * row + i;
      const float gradient = from[i * stride + o];
      if (target.gradient)
        target.gradient[entry] = gradient;
      else
        target.weight[entry] =
            stepped(target, power, target.weight[entry], gradient, target.velocity ? target.velocity + entry : nullptr);
    }
}

}  // namespace

void weight_gradient(const WeightGradient& g, const float* grad_output, const Target& target, int first_out,
                     int in_begin, int in_end, float* planes, float* sums) {
  const int taps = g.kernel_height * g.kernel_width, outs = first_out + LANES < g.out_channels ? g.outs : 1;
  const int64_t plane = (int64_t)g.plane_height * g.plane_width * LANES, planes_out = plane * g.image_block();
  const int64_t tap_row = (int64_t)g.kernel_width * LANES, sums_out = (int64_t)(in_end - in_begin) * taps * LANES;
  memset(sums, 0, outs * sums_out * sizeof(float));
  for (int block = 0; block < g.batch; block += IMAGE_BLOCK) {
    const int block_end = block + IMAGE_BLOCK < g.batch ? block + IMAGE_BLOCK : g.batch;
    for (int o = 0; o < outs; ++o)
      make_planes(g, grad_output, first_out + o * LANES, block, block_end, planes + o * planes_out);
    for (int image = block; image < block_end; image += g.image_group) {
      const char* at = reinterpret_cast<const char*>(planes + (image - block) * plane);
      for (int f = 0; f < g.phases; ++f) {
        const Phase& phase = g.phase[f];
        const int64_t row_bytes = (int64_t)phase.plane_row_step * g.plane_width * LANES * sizeof(float);
        const int64_t column_bytes = (int64_t)phase.plane_column_step * LANES * sizeof(float);
        const bool adjacent = phase.plane_column_step == 1 && phase.column_step == 1;
        const int list = f * g.image_groups() + image / g.image_group;
        for (int channel = in_begin; channel < in_end; ++channel) {
          const int32_t* starts = g.starts + (int64_t)channel * (g.lists() + 1) + list;
          const Entry *begin = g.entries[channel] + starts[0], *end = g.entries[channel] + starts[1];
          if (begin == end) continue;
          float* to = sums + (int64_t)(channel - in_begin) * taps * LANES;
          const int column_chunk = !adjacent ? 1 : outs == 2 ? MAX_PAIRED : MAX_COLUMNS;
          for (int q = 0; q < phase.columns; q += column_chunk) {
            const int columns = phase.columns - q < column_chunk ? phase.columns - q : column_chunk;
            const int row_chunk = outs == 2 ? MAX_PAIRED : columns == MAX_COLUMNS ? 2 : MAX_ROWS;
            for (int p = 0; p < phase.rows; p += row_chunk) {
              const int rows = phase.rows - p < row_chunk ? phase.rows - p : row_chunk;
              (outs == 2 ? PAIRED[rows - 1][columns - 1] : ADJACENT[rows - 1][columns - 1])(
                  begin, end, at - p * row_bytes - q * column_bytes, planes_out * (int64_t)sizeof(float), row_bytes,
                  column_bytes,
                  to + (phase.row0 + p * phase.row_step) * tap_row + (phase.column0 + q * phase.column_step) * LANES,
                  sums_out, phase.row_step * tap_row);
            }
          }
        }
      }
    }
  }
  const int64_t row = (int64_t)g.in_channels * taps;
  for (int o = 0; o < outs; ++o) {
    const int first = first_out + o * LANES, channels = g.out_channels - first < LANES ? g.out_channels - first : LANES;
    put_transposed(sums + o * sums_out, LANES, (int64_t)(in_end - in_begin) * taps, channels, target,
                   first * row + (int64_t)in_begin * taps, row, g.large);
  }
  if (g.large) fence();
}

// Of a linear layer, which is a convolution of a single position: few entries meet in a list, so many output channels are
// computed at a time, and the time goes into writing the result.
void linear_gradient(const WeightGradient& g, const float* grad_output, const Target& target, int first_out,
                     const Scan* scan, float* planes, float* sums) {
  const int channels = g.out_channels - first_out < LINEAR_OUT ? g.out_channels - first_out : LINEAR_OUT;
  for (int image = 0; image < g.batch; ++image)
    for (int o = 0; o < LINEAR_OUT; ++o)
      planes[image * LINEAR_OUT + o] = o < channels ? grad_output[(int64_t)(first_out + o) * g.batch + image] : 0.0f;
  constexpr int VECTORS = LINEAR_OUT / LANES < 8 ? LINEAR_OUT / LANES : 8;
  int64_t found = 0;
  for (int begin = 0; begin < g.in_channels; begin += LINEAR_IN) {
    const int count = g.in_channels - begin < LINEAR_IN ? g.in_channels - begin : LINEAR_IN;
    for (int i = 0; i < count; ++i) {
      const int32_t* starts = g.starts + (int64_t)(begin + i) * (g.lists() + 1);
      const Entry* first = g.entries[begin + i];
      for (int o = 0; o < LINEAR_OUT; o += VECTORS * LANES) {
        Vec sum[VECTORS] = {};
        for (int group = 0; group < g.lists(); ++group)
          for (const Entry* entry = first + starts[group]; entry < first + starts[group + 1]; ++entry) {
            // The offset is that of an image of the group, in planes of one vector.
            const int64_t image = group * g.image_group + entry->offset / (LANES * sizeof(float));
            for (int v = 0; v < VECTORS; ++v)
              sum[v] += broadcast(entry->value) * load(planes + image * LINEAR_OUT + o + v * LANES);
          }
        for (int v = 0; v < VECTORS; ++v) store(sums + i * LINEAR_OUT + o + v * LANES, sum[v]);
      }
    }
    for (int o = 0; o < channels; o += LANES)
      put_transposed(sums + o, LINEAR_OUT, count, channels - o < LANES ? channels - o : LANES, target,
                     (int64_t)(first_out + o) * g.in_channels + begin, g.in_channels, g.large);
    if (!scan) continue;
    int32_t* sizes = scan->sizes + begin / LINEAR_IN * LINEAR_OUT;
    for (int o = 0; o < channels; ++o) {  // while these weights are in the caches
      const float* weights = target.weight + (int64_t)(first_out + o) * g.in_channels + begin;
      sizes[o] = (int32_t)find_active(weights, count, (uint32_t)(o * g.in_channels + begin), scan->from,
                                      scan->indices + found, scan->values + found);
      found += sizes[o];
    }
  }
  if (g.large) fence();
}

}  // namespace zerofl::ISA
