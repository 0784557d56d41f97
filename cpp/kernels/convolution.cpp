// Convolution of a dense input with packed sparse weights: output-stationary, swept down strips of tiles.

#include "kernels.h"
#include "simd.h"
#include "storage.h"

namespace zerofl::ISA {
namespace {

constexpr int VECTORS = TILE / LANES;
// Made by the compiler: code that ran when the module is loaded would be this instruction set's, on any processor.
struct Places {
  int64_t at[VECTORS] = {};
  constexpr Places() {
    for (int v = 0; v < VECTORS; ++v) at[v] = v * LANES;
  }
};
constexpr Places IN_ORDER;
constexpr int AHEAD = 12;  // lists before its own that an addend's tile is fetched
// An addition takes about four cycles and two start in each, so eight sums have to be under way.
constexpr int CHAINS = VECTORS >= 8 ? 1 : 8 / VECTORS;

// to[places[v]] = start (or from[TILE]) + entries . window, vector by vector
INLINE void multiply_add(const Entry* entry, const Entry* end, const float* window, const float* from, float start,
                         bool streams, float* to, const int64_t places[VECTORS]) {
  Vec sum[CHAINS][VECTORS];
  for (int v = 0; v < VECTORS; ++v) sum[0][v] = from ? load(from + v * LANES) : broadcast(start);
  for (int c = 1; c < CHAINS; ++c)
    for (int v = 0; v < VECTORS; ++v) sum[c][v] = Vec{};
  for (; entry < end; entry += CHAINS)
    for (int c = 0; c < CHAINS; ++c) {
      const char* at = in_register(reinterpret_cast<const char*>(window) + entry[c].offset);
      const float* x = reinterpret_cast<const float*>(at);
      const Vec value = broadcast(entry[c].value);
      for (int v = 0; v < VECTORS; ++v) sum[c][v] += value * load(x + v * LANES);
    }
  for (int c = 1; c < CHAINS; ++c)
    for (int v = 0; v < VECTORS; ++v) sum[0][v] += sum[c][v];
  if (streams)
    for (int v = 0; v < VECTORS; ++v) stream(to + places[v], sum[0][v]);
  else
    for (int v = 0; v < VECTORS; ++v) store(to + places[v], sum[0][v]);
}

// to[0, count) = row[from, from + count), zero outside [0, row_floats).
INLINE void copy_padded(float* to, const float* row, int64_t from, int64_t row_floats, int count) {
  const int64_t begin = from >= 0 ? 0 : -from < count ? -from : count;
  const int64_t end = from + count <= row_floats ? count : row_floats - from > begin ? row_floats - from : begin;
  int64_t i = 0;
  for (; i < begin; ++i) to[i] = 0;
  for (; i + LANES <= end; i += LANES) store(to + i, load(row + from + i));
  for (; i < end; ++i) to[i] = row[from + i];
  for (; i < count; ++i) to[i] = 0;
}

// One window row of one channel.
void pack_channel(const PackedConvolution& c, const float* row, int strip, float* to) {
  const int64_t row_floats = (int64_t)c.in_width * c.batch;
  const int64_t begin = (int64_t)strip * c.strip * TILE;
  if (c.tile_floats == TILE && c.col_step == 1) {  // the windows of columns and tiles overlap: one stretch holds all
    copy_padded(to, row, begin + (int64_t)c.col0 * c.batch, row_floats, c.strip_floats);
    return;
  }
  for (int tile = 0; tile < c.strip; ++tile)
    for (int q = 0; q < c.window_width; ++q, to += TILE) {
      const int64_t at = begin + tile * TILE;
      if (c.col_step == 1) {
        copy_padded(to, row, at + (int64_t)(c.col0 + q) * c.batch, row_floats, TILE);
        continue;
      }
      for (int i = 0; i < TILE;) {  // a stretch of images at one position at a time
        const int64_t position = (at + i) / c.batch, image = (at + i) % c.batch;
        const int64_t column = position * c.col_step + c.col0 + q;
        const int count = c.batch - image < TILE - i ? (int)(c.batch - image) : TILE - i;
        if (column >= 0 && column < c.in_width)
          memcpy(to + i, row + column * c.batch + image, count * sizeof(float));
        else
          memset(to + i, 0, count * sizeof(float));
        i += count;
      }
    }
}

void pack_row(const PackedConvolution& c, const float* input, int strip, int row, int channel_begin, int channel_end,
              float* to) {
  const int64_t in_row = (int64_t)c.in_width * c.batch, plane = in_row * c.in_height;
  if (row < 0 || row >= c.in_height) {
    memset(to, 0, (int64_t)(channel_end - channel_begin) * c.strip_floats * sizeof(float));
    return;
  }
  for (int channel = channel_begin; channel < channel_end; ++channel, to += c.strip_floats)
    pack_channel(c, input + channel * plane + row * in_row, strip, to);
}

// Fetch what pack_row will read, while there is other work to do.
INLINE void prefetch_channel(const PackedConvolution& c, const float* input, int strip, int row, int channel) {
  if (row < 0 || row >= c.in_height) return;
  const int64_t row_floats = (int64_t)c.in_width * c.batch;
  const float* from = input + ((int64_t)channel * c.in_height + row) * row_floats;
  int64_t begin = ((int64_t)strip * c.strip * TILE + (int64_t)c.col0 * c.batch) * c.col_step,
          end = begin + c.strip_floats;
  if (begin < 0) begin = 0;
  if (end > row_floats) end = row_floats;
  for (int64_t i = begin; i < end; i += 16) __builtin_prefetch(from + i);
}

// Where each vector of a tile belongs in a row of the output, if the tile is whole and each vector is in one piece.
INLINE bool vector_places(const PackedConvolution& c, int64_t begin, int64_t places[VECTORS]) {
  if (c.tile_count(begin) < TILE) return false;
  const bool in_order = c.full_col_step == 1 && c.full_col0 == 0;
  if (!in_order && c.batch % LANES) return false;
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t at = begin + v * LANES;
    places[v] = in_order ? at : (at / c.batch * c.full_col_step + c.full_col0) * c.batch + at % c.batch;
  }
  return true;
}

// Call copy(stretch of a row of the output, stretch of the tile, count) for each piece of a tile.
template <class Copy>
INLINE void for_pieces(const PackedConvolution& c, int64_t begin, const Copy& copy) {
  const int count = c.tile_count(begin);
  for (int i = 0; i < count;) {
    const int64_t position = (begin + i) / c.batch, image = (begin + i) % c.batch;
    const int stretch = c.batch - image < count - i ? (int)(c.batch - image) : count - i;
    copy((position * c.full_col_step + c.full_col0) * c.batch + image, i, stretch);
    i += stretch;
  }
}

// A tile to where it belongs in a row of the output, in 16 bits.
template <class T>
INLINE void put_rounded(const PackedConvolution& c, int64_t begin, const float* tile, T* row) {
  if (c.full_col_step == 1 && c.full_col0 == 0)
    store_row(row + begin, tile, c.tile_count(begin));
  else
    for_pieces(c, begin, [&](int64_t i, int j, int count) { store_row(row + i, tile + j, count); });
}

}  // namespace

void convolve(const PackedConvolution& c, const float* input, const float* bias, const float* addend, void* output,
              int strip, int row_begin, int row_end, int group, float* window, float* sums) {
  const int first = group * c.group;
  const int channels = c.out_channels - first < c.group ? c.out_channels - first : c.group;
  const int tiles = c.tiles() - strip * c.strip < c.strip ? c.tiles() - strip * c.strip : c.strip;
  const int blocks = c.blocks(), row_floats = c.row_floats(), capacity = c.window_height + SPARE_ROWS;
  const int64_t full_row = (int64_t)c.full_width * c.batch;
  for (int block = 0; block < blocks; ++block) {
    const int channel_begin = block * c.block;
    const int channel_end = channel_begin + c.block < c.in_channels ? channel_begin + c.block : c.in_channels;
    const int64_t list = ((int64_t)group * blocks + block) * c.group;
    const int32_t *starts = c.starts + list, *order = c.order + list;
    // Rows [packed_begin, packed_end) of the input are at the window's start; what is still needed moves there when it
    // is full.
    int packed_begin = 0, packed_end = 0;
    for (int y = row_begin; y < row_end; ++y) {
      const int top = y * c.row_step + c.row0;
      if (y == row_begin || top >= packed_end) {
        packed_begin = packed_end = top;
      } else if (top + c.window_height - packed_begin > capacity) {
        memmove(window, window + (int64_t)(top - packed_begin) * row_floats,
                (int64_t)(packed_end - top) * row_floats * sizeof(float));
        packed_begin = top;
      }
      for (; packed_end < top + c.window_height; ++packed_end)
        pack_row(c, input, strip, packed_end, channel_begin, channel_end,
                 window + (int64_t)(packed_end - packed_begin) * row_floats);
      const int64_t row = ((int64_t)y * c.full_row_step + c.full_row0) * full_row;
      const int in_channels = channel_end - channel_begin, lists = tiles * channels;
      int lists_done = 0, fetched = y + 1 < row_end ? 0 : in_channels;
      for (int tile = 0; tile < tiles; ++tile) {
        const float* here = window + (int64_t)(top - packed_begin) * row_floats + tile * c.tile_floats;
        float* tile_sums = sums + ((int64_t)(y - row_begin) * c.strip + tile) * c.group * TILE;
        const int64_t begin = ((int64_t)strip * c.strip + tile) * TILE;
        // Whole vectors go straight to where they belong in a row of the output.
        int64_t places[VECTORS] = {};
        const bool last = block + 1 == blocks;
        const bool direct = last && c.storage == FLOAT32 && vector_places(c, begin, places);
        alignas(64) float rounded_soon[TILE];
        const int count = c.tile_count(begin);
        for (int i = 0; i < channels; ++i) {
          const int channel = order[i];
          float* sum = tile_sums + (int64_t)(channel - first) * TILE;
          const int64_t at = row + channel * c.full_height * full_row;
          float* to = static_cast<float*>(output) + at;
          const float* from = block ? sum : nullptr;
          if (!block && addend) {
            const int64_t addend_row = (int64_t)c.out_width * c.batch, addend_at = y * addend_row + begin;
            if (i + AHEAD < channels)
              for (int line = 0; line < TILE; line += 16)
                __builtin_prefetch(addend + order[i + AHEAD] * c.out_height * addend_row + addend_at + line);
            from = addend + channel * c.out_height * addend_row + addend_at;
            if (count < TILE) {
              memset(sum, 0, TILE * sizeof(float));
              memcpy(sum, from, count * sizeof(float));
              from = sum;
            }
          }
          const float start = bias ? bias[channel] : 0.0f;
          if (direct)
            multiply_add(c.entries + starts[i], c.entries + starts[i + 1], here, from, start, c.large && is_aligned(to),
                         to, places);
          else if (last && c.storage != FLOAT32)
            multiply_add(c.entries + starts[i], c.entries + starts[i + 1], here, from, start, false, rounded_soon,
                         IN_ORDER.at);
          else
            multiply_add(c.entries + starts[i], c.entries + starts[i + 1], here, from, start, false, sum, IN_ORDER.at);
          for (++lists_done; fetched * lists < lists_done * in_channels; ++fetched)
            prefetch_channel(c, input, strip, packed_end, channel_begin + fetched);
          if (!last || direct) continue;
          if (c.storage == FLOAT32)
            for_pieces(c, begin, [&](int64_t i, int j, int count) { memcpy(to + i, sum + j, count * sizeof(float)); });
          else if (c.storage == FLOAT16)
            put_rounded(c, begin, rounded_soon, static_cast<Float16*>(output) + at);
          else
            put_rounded(c, begin, rounded_soon, static_cast<Bfloat16*>(output) + at);
        }
      }
    }
  }
  if (c.large) fence();
}

}  // namespace zerofl::ISA
