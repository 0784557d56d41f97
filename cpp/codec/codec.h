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
// which the last is not 0, hold just so many bytes. They are sizes[0] bytes of the first model, sizes[1] of the next, and
// so on. In a model byte b has probability (cumulative[b + 1] - cumulative[b]) / WHOLE, which has to be above 0; there are
// SYMBOLS + 1 sums, from 0 to WHOLE, and those of the next model follow.
bool ans_decode(const uint32_t* cumulative, const int64_t* sizes, int64_t models, const uint32_t* words,
                int64_t word_count, uint8_t* bytes);

// How many bits are set; -1 if one of those that belong to no entry is.
int64_t count_bits(const uint8_t* bits, int64_t count);

// Numbers of four bytes, rotated left by one bit -> the plane of their highest bytes, the next one, and so on; and back.
void split_planes(const uint32_t* numbers, int64_t count, uint8_t* planes);
void merge_planes(const uint8_t* planes, int64_t count, uint32_t* numbers);

// Classes of magnitude: by half octaves below the largest one, so that class CLASSES - 1 has the largest, and class 0 zero
// and all that are small beside it.
constexpr int CLASSES = 24;
constexpr int HALF_OCTAVE = 22;  // the bits of a float below

// The bits of the largest magnitude; 0 if there is none.
uint32_t largest_magnitude(const float* x, int64_t count);

// The class of each number among those of which this is the largest; none may be larger.
void magnitude_classes(const float* x, int64_t count, uint32_t largest, uint8_t* classes);

// How many there are of each of the CLASSES; false if there is another one.
bool count_classes(const uint8_t* classes, int64_t count, int64_t* sizes);

// A bitmap -> one for each class, of its entries' bits, each from a byte of its own on; and back. False, with no memory
// touched but the bitmaps', if the bitmaps of these sizes are not those of the classes.
bool deal_bits(const uint8_t* classes, int64_t count, const int64_t* sizes, const uint8_t* bits, uint8_t* dealt);
bool gather_bits(const uint8_t* classes, int64_t count, const int64_t* sizes, const uint8_t* dealt, uint8_t* bits);

// Numbers -> those of class 0 in their order, those of class 1, and so on; and back.
template <class T>
void deal(const uint8_t* classes, int64_t count, const int64_t* sizes, const T* numbers, T* dealt);
template <class T>
void gather(const uint8_t* classes, int64_t count, const int64_t* sizes, const T* dealt, T* numbers);

// Floats' bits as steps from those received: a sign, and below it 0 for none; and back.
template <class T>
void subtract(const T* numbers, const T* received, int64_t count, T* differences);
template <class T>
void add(const T* received, const T* differences, int64_t count, T* numbers);

}  // namespace zerofl
