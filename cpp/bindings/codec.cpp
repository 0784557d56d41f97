#include <nanobind/ndarray.h>

#include <algorithm>
#include <string>

#include "bindings/tensors.h"
#include "codec/codec.h"

namespace zerofl {
namespace {

template <class T>
using Numbers = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;  // of numpy; to be taken without conversion

// The sums of each model's bytes: with others, or other sizes, the decoder would read or write behind them.
int64_t checked_models(const Numbers<const uint32_t>& cumulative, const Numbers<const int64_t>& sizes, size_t bytes) {
  const size_t models = sizes.shape(0);
  bool good = cumulative.shape(0) == models * (SYMBOLS + 1);
  const uint32_t* sums = cumulative.data();
  for (size_t model = 0; good && model < models; ++model, sums += SYMBOLS + 1) {
    good = sums[0] == 0 && sums[SYMBOLS] == WHOLE;
    for (int i = 0; good && i < SYMBOLS; ++i) good = sums[i] < sums[i + 1];
  }
  if (!good) throw nb::value_error("expected for each size 257 sums from 0 to 2^24, each above the one before");
  size_t left = bytes;
  for (size_t model = 0; model < models; ++model) {
    const int64_t size = sizes.data()[model];
    if (size < 0 || static_cast<size_t>(size) > left) throw nb::value_error("the sizes are not those of the bytes");
    left -= static_cast<size_t>(size);
  }
  if (left) throw nb::value_error("the sizes are not those of the bytes");
  return static_cast<int64_t>(models);
}

struct Sizes {
  int64_t of[CLASSES];

  explicit Sizes(const Numbers<const uint8_t>& classes) {
    if (!count_classes(classes.data(), static_cast<int64_t>(classes.shape(0)), of))
      throw nb::value_error("classes holds other numbers than 0 to 23");
  }
};

void expect_size(size_t size, size_t expected, const char* name) {
  if (size != expected) throw nb::value_error((std::string(name) + " does not have the size of the others").c_str());
}

// The sizes of the classes, if their bitmaps and all entries' have these sizes.
const int64_t* checked_sizes(const Numbers<const int64_t>& sizes, size_t entries, size_t dealt, size_t bits) {
  bool good = sizes.shape(0) == CLASSES && bits == (entries + 7) / 8;
  size_t bytes = 0;
  for (int c = 0; good && c < CLASSES; ++c) {
    const int64_t size = sizes.data()[c];
    good = size >= 0 && static_cast<size_t>(size) <= entries;
    bytes += (static_cast<size_t>(size) + 7) / 8;
  }
  if (!good || bytes != dealt) throw nb::value_error("the sizes are not those of the bitmaps");
  return sizes.data();
}

void expect_counted(bool counted) {
  if (!counted) throw nb::value_error("the bitmaps are not those of the classes");
}

// A value for each bit of x's entries.
template <class X, class Values>
void expect_entries(const X& x, const ConstBytes& bits, const Values& values) {
  expect(bits, {(x.size() + 7) / 8}, "bits");
  if (count_bits(bits.data(), x.size()) != values.size())
    throw nb::value_error("values does not have an entry for each bit, or there is a bit behind the last entry");
}

template <class T>
void bind_dealing(nb::module_& m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  m.def(
      "deal",
      [](Numbers<const uint8_t> classes, Numbers<const T> numbers, Numbers<T> dealt) {
        const Sizes sizes(classes);
        const size_t count = classes.shape(0);
        expect_size(numbers.shape(0), count, "numbers"), expect_size(dealt.shape(0), count, "dealt");
        deal(classes.data(), static_cast<int64_t>(count), sizes.of, numbers.data(), dealt.data());
      },
      "classes"_a.noconvert(), "numbers"_a.noconvert(), "dealt"_a.noconvert(), release);
  m.def(
      "gather",
      [](Numbers<const uint8_t> classes, Numbers<const T> dealt, Numbers<T> numbers) {
        const Sizes sizes(classes);
        const size_t count = classes.shape(0);
        expect_size(numbers.shape(0), count, "numbers"), expect_size(dealt.shape(0), count, "dealt");
        gather(classes.data(), static_cast<int64_t>(count), sizes.of, dealt.data(), numbers.data());
      },
      "classes"_a.noconvert(), "dealt"_a.noconvert(), "numbers"_a.noconvert(), release);
}

void expect_planes(size_t bytes, size_t numbers) {
  if (bytes != 4 * numbers) throw nb::value_error("planes does not have 4 bytes for each number");
}

template <class T>
void bind_differences(nb::module_& m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  m.def(
      "subtract",
      [](Numbers<const T> numbers, Numbers<const T> received, Numbers<T> differences) {
        const size_t count = numbers.shape(0);
        expect_size(received.shape(0), count, "received"), expect_size(differences.shape(0), count, "differences");
        subtract(numbers.data(), received.data(), static_cast<int64_t>(count), differences.data());
      },
      "numbers"_a.noconvert(), "received"_a.noconvert(), "differences"_a.noconvert(), release);
  m.def(
      "add",
      [](Numbers<const T> received, Numbers<const T> differences, Numbers<T> numbers) {
        const size_t count = numbers.shape(0);
        expect_size(received.shape(0), count, "received"), expect_size(differences.shape(0), count, "differences");
        add(received.data(), differences.data(), static_cast<int64_t>(count), numbers.data());
      },
      "received"_a.noconvert(), "differences"_a.noconvert(), "numbers"_a.noconvert(), release);
}

}  // namespace

void bind_codec(nb::module_& m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  m.def(
      "ans_decode",
      [](Numbers<const uint32_t> cumulative, Numbers<const int64_t> sizes, Numbers<const uint32_t> words,
         Numbers<uint8_t> bytes) {
        const int64_t models = checked_models(cumulative, sizes, bytes.shape(0));
        return ans_decode(cumulative.data(), sizes.data(), models, words.data(), static_cast<int64_t>(words.shape(0)),
                          bytes.data());
      },
      "cumulative"_a.noconvert(), "sizes"_a.noconvert(), "words"_a.noconvert(), "bytes"_a.noconvert(), release);
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
        expect_entries(x, bits, values);
        kernels->take_bits(x.data(), bits.data(), x.size(), values.data(), values.size());
      },
      "x"_a, "bits"_a, "values"_a, release);
  m.def(
      "add_entries",
      [](Floats<1> x, ConstBytes bits, ConstFloats<1> values, float weight) {
        expect_entries(x, bits, values);
        kernels->add_entries(x.data(), bits.data(), x.size(), values.data(), values.size(), weight);
      },
      "x"_a, "bits"_a, "values"_a, "weight"_a, release);
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
  m.def(
      "largest_magnitude",
      [](Numbers<const float> x) { return largest_magnitude(x.data(), static_cast<int64_t>(x.shape(0))); },
      "x"_a.noconvert(), release);
  m.def(
      "magnitude_classes",
      [](Numbers<const float> x, uint32_t largest, Numbers<uint8_t> classes) {
        const int64_t count = static_cast<int64_t>(x.shape(0));
        if (classes.shape(0) != x.shape(0)) throw nb::value_error("classes does not have one for each number");
        if (largest_magnitude(x.data(), count) > largest)
          throw nb::value_error("there is a larger number than largest");
        magnitude_classes(x.data(), count, largest, classes.data());
      },
      "x"_a.noconvert(), "largest"_a, "classes"_a.noconvert(), release);
  m.def(
      "count_classes",
      [](Numbers<const uint8_t> classes, Numbers<int64_t> sizes) {
        if (sizes.shape(0) != CLASSES) throw nb::value_error("sizes does not have 24 numbers");
        const Sizes found(classes);
        std::copy(found.of, found.of + CLASSES, sizes.data());
      },
      "classes"_a.noconvert(), "sizes"_a.noconvert(), release);
  m.def(
      "deal_bits",
      [](Numbers<const uint8_t> classes, Numbers<const int64_t> sizes, Numbers<const uint8_t> bits,
         Numbers<uint8_t> dealt) {
        const int64_t* of = checked_sizes(sizes, classes.shape(0), dealt.shape(0), bits.shape(0));
        expect_counted(
            deal_bits(classes.data(), static_cast<int64_t>(classes.shape(0)), of, bits.data(), dealt.data()));
      },
      "classes"_a.noconvert(), "sizes"_a.noconvert(), "bits"_a.noconvert(), "dealt"_a.noconvert(), release);
  m.def(
      "gather_bits",
      [](Numbers<const uint8_t> classes, Numbers<const int64_t> sizes, Numbers<const uint8_t> dealt,
         Numbers<uint8_t> bits) {
        const int64_t* of = checked_sizes(sizes, classes.shape(0), dealt.shape(0), bits.shape(0));
        expect_counted(
            gather_bits(classes.data(), static_cast<int64_t>(classes.shape(0)), of, dealt.data(), bits.data()));
      },
      "classes"_a.noconvert(), "sizes"_a.noconvert(), "dealt"_a.noconvert(), "bits"_a.noconvert(), release);
  bind_dealing<uint8_t>(m);
  bind_dealing<uint16_t>(m);
  bind_dealing<uint32_t>(m);
  bind_differences<uint16_t>(m);
  bind_differences<uint32_t>(m);
}

}  // namespace zerofl
