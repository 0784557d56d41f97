#include "codec/codec.h"

namespace zerofl {
namespace {

constexpr int WORD = 32, BUCKET = 12;  // bits
constexpr uint64_t FULL = uint64_t{1} << WORD;  // a state below it takes another word, where there is one

// Which byte a quantile belongs to: the one that has the first quantile of its bucket, or one of the next.
struct Quantiles {
  uint8_t first[WHOLE >> BUCKET];

  explicit Quantiles(const uint32_t* cumulative) {
    int symbol = 0;
    for (uint32_t bucket = 0; bucket < WHOLE >> BUCKET; ++bucket) {
      while (cumulative[symbol + 1] <= bucket << BUCKET) ++symbol;
      first[bucket] = static_cast<uint8_t>(symbol);
    }
  }
};

}  // namespace

bool ans_decode(const uint32_t* cumulative, const int64_t* sizes, int64_t models, const uint32_t* words,
                int64_t word_count, uint8_t* bytes) {
  const uint32_t* word = words + word_count;
  uint64_t state = 0;
  while (word > words && state < FULL) state = state << WORD | *--word;
  for (int64_t model = 0; model < models; ++model, cumulative += SYMBOLS + 1) {
    const Quantiles quantiles(cumulative);
    for (const uint8_t* end = bytes + sizes[model]; bytes < end; ++bytes) {
      const uint32_t quantile = state & (WHOLE - 1);
      int symbol = quantiles.first[quantile >> BUCKET];
      while (cumulative[symbol + 1] <= quantile) ++symbol;
      const uint32_t begin = cumulative[symbol];
      *bytes = static_cast<uint8_t>(symbol);
      state = (state >> PRECISION) * (cumulative[symbol + 1] - begin) + (quantile - begin);
      if (state < FULL && word > words) state = state << WORD | *--word;
    }
  }
  return state == 0 && word == words;
}

}  // namespace zerofl
