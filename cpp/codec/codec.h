// What updates spend their time in: bitmaps of positions, their entropy coding, and planes of bytes. The specification is
// in exchange/update.py and exchange/wire/, which do the same with libraries where this module could not be built.
//
// A bitmap has a bit for each entry, the first in a byte's highest bit, and its unused bits are 0.
#pragma once

#include <cstdint>

namespace zerofl {

constexpr int SYMBOLS = 256;  // a bitmap's bytes
constexpr int PRECISION = 24;  // the probability of a byte is a multiple of 2^-PRECISION
constexpr uint32_t WHOLE = 1 << PRECISION;

// The bytes that were encoded to these words by asymmetric numeral systems with a state of 64 bits; whether the words, of
// which the last is not 0, hold just so many bytes. Byte b has probability (cumulative[b + 1] - cumulative[b]) / WHOLE,
// which has to be above 0; there are SYMBOLS + 1 sums, from 0 to WHOLE.
bool ans_decode(const uint32_t* cumulative, const uint32_t* words, int64_t word_count, uint8_t* bytes, int64_t count);

// How many bits are set; -1 if one of those that belong to no entry is.
int64_t count_bits(const uint8_t* bits, int64_t count);

// The entries of x where there is a bit, of which there are `found`, one after another.
void take_bits(const float* x, const uint8_t* bits, int64_t count, float* values, int64_t found);

// Numbers of four bytes, rotated left by one bit -> the plane of their highest bytes, the next one, and so on; and back.
void split_planes(const uint32_t* numbers, int64_t count, uint8_t* planes);
void merge_planes(const uint8_t* planes, int64_t count, uint32_t* numbers);

}  // namespace zerofl
