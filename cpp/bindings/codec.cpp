#include <nanobind/ndarray.h>

#include "bindings/tensors.h"
#include "codec/codec.h"

namespace zerofl {
namespace {

template <class T>
using Numbers = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;  // of numpy; to be taken without conversion

// The sums of a byte's probabilities: with others the decoder would read behind them.
const uint32_t* checked(const Numbers<const uint32_t>& cumulative) {
  bool good = cumulative.shape(0) == SYMBOLS + 1 && cumulative.data()[0] == 0 && cumulative.data()[SYMBOLS] == WHOLE;
  for (int i = 0; good && i < SYMBOLS; ++i) good = cumulative.data()[i] < cumulative.data()[i + 1];
  if (!good) throw nb::value_error("expected 257 sums from 0 to 2^24, each above the one before");
  return cumulative.data();
}

void expect_planes(size_t bytes, size_t numbers) {
  if (bytes != 4 * numbers) throw nb::value_error("planes does not have 4 bytes for each number");
}

}  // namespace

void bind_codec(nb::module_& m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  m.def(
      "ans_decode",
      [](Numbers<const uint32_t> cumulative, Numbers<const uint32_t> words, Numbers<uint8_t> bytes) {
        return ans_decode(checked(cumulative), words.data(), static_cast<int64_t>(words.shape(0)), bytes.data(),
                          static_cast<int64_t>(bytes.shape(0)));
      },
      "cumulative"_a.noconvert(), "words"_a.noconvert(), "bytes"_a.noconvert(), release);
  m.def(
      "active_bits",
      [](ConstFloats<1> x, ConstFloats<1> by, float threshold, Bytes bits) {
        expect(by, {x.size()}, "by");
        expect(bits, {(x.size() + 7) / 8}, "bits");
        return kernels->active_bits(x.data(), by.data(), threshold, x.size(), bits.data());
      },
      "x"_a, "by"_a, "threshold"_a, "bits"_a, release);
  m.def(
      "take_bits",
      [](ConstFloats<1> x, ConstBytes bits, Floats<1> values) {
        expect(bits, {(x.size() + 7) / 8}, "bits");
        if (count_bits(bits.data(), x.size()) != values.size())
          throw nb::value_error("values does not have an entry for each bit, or there is a bit behind the last entry");
        take_bits(x.data(), bits.data(), x.size(), values.data(), values.size());
      },
      "x"_a, "bits"_a, "values"_a, release);
  m.def(
      "split_planes",
      [](Numbers<const uint32_t> numbers, Numbers<uint8_t> planes) {
        expect_planes(planes.shape(0), numbers.shape(0));
        split_planes(numbers.data(), static_cast<int64_t>(numbers.shape(0)), planes.data());
      },
      "numbers"_a.noconvert(), "planes"_a.noconvert(), release);
  m.def(
      "merge_planes",
      [](Numbers<const uint8_t> planes, Numbers<uint32_t> numbers) {
        expect_planes(planes.shape(0), numbers.shape(0));
        merge_planes(planes.data(), static_cast<int64_t>(numbers.shape(0)), numbers.data());
      },
      "planes"_a.noconvert(), "numbers"_a.noconvert(), release);
}

}  // namespace zerofl
