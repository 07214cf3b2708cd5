// Vectors as wide as the level's registers, for kernels whose loops the compiler's own vectoriser does not keep in
// registers: sums over a row, and 16-bit floats two to a word.
//
// GCC's and Clang's vector extensions, no intrinsics: one source for every level. Operations are per element, so the
// width changes no bit; sums have 64 lanes at every width. Vectors are passed by reference only, because passing one by
// value depends on the instruction set.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#include "common/macros.h"
#include "cpu/levels.h"
#include "cpu/rows.h"

namespace lfm_fast {

static_assert(std::endian::native == std::endian::little, "16-bit floats are taken apart as halves of a word");

// Before a loop over the pairs of a block, so that its sums stay in registers. An instrumented kernel has none to spare,
// and unrolled it would take minutes to compile.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define LFM_UNROLL_PAIRS
#else
#define LFM_UNROLL_PAIRS _Pragma("GCC unroll 8")
#endif

constexpr int64_t kBlock = 64;  // elements of a row taken at a time; lanes of a sum

template <Level level>
struct Vectors;

#define LFM_VECTORS(level, floats)                                  \
  template <>                                                       \
  struct Vectors<level> {                                           \
    static constexpr int width = floats;                            \
    typedef float Float __attribute__((vector_size(4 * floats)));   \
    typedef uint32_t Bits __attribute__((vector_size(4 * floats))); \
    typedef int32_t Int __attribute__((vector_size(4 * floats)));   \
  }
LFM_VECTORS(Level::baseline, 4);
LFM_VECTORS(Level::avx2, 8);
LFM_VECTORS(Level::avx512, 16);
#undef LFM_VECTORS

// Two vectors of neighbouring elements. In natural order the first holds the first half; split, the first holds the
// elements of even number, which is how 16-bit floats come out of their words without a shuffle.
enum class Order { natural, split };

template <Level level>
struct Pair {
  typename Vectors<level>::Float a, b;
};

// The order in which rows of these two element types meet.
constexpr Order order_of(Element first, Element second) {
  return first == Element::float32 && second == Element::float32 ? Order::natural : Order::split;
}

// What NaN a value may be. Rounding adds to a NaN's payload, which may carry over into a number. It cannot where the
// lower half of the payload is empty: so in every NaN that arithmetic makes, and in those it passes on from bfloat16.
enum class Nan { any, short_payload };

// What NaN the arithmetic on two such rows may come upon.
constexpr Nan nan_of(Element first, Element second) {
  return first == Element::bfloat16 && second == Element::bfloat16 ? Nan::short_payload : Nan::any;
}

constexpr int64_t size_of(Element element) { return element == Element::float32 ? 4 : 2; }

template <Level level, int... places>
LFM_HD void shuffle(const typename Vectors<level>::Float& u, const typename Vectors<level>::Float& v,
                    typename Vectors<level>::Float& out, std::integer_sequence<int, places...>) {
#if defined(__clang__)
  out = __builtin_shufflevector(u, v, places...);
#else
  out = __builtin_shuffle(u, v, typename Vectors<level>::Int{places...});
#endif
}

template <int first, int step, int modulus, typename Sequence>
struct Places;
template <int first, int step, int modulus, int... i>
struct Places<first, step, modulus, std::integer_sequence<int, i...>> {
  using type = std::integer_sequence<int, ((first + step * i) % modulus)...>;
  // first, first + width, first + 1, first + width + 1, ...: what puts even and odd elements side by side again
  using zipped = std::integer_sequence<int, (first + i / 2 + i % 2 * static_cast<int>(sizeof...(i)))...>;
};
template <Level level, int first, int step, int modulus>
using PlacesOf = Places<first, step, modulus, std::make_integer_sequence<int, Vectors<level>::width>>;

// The elements of a pair at `place`, as float32.
template <Level level, Order order, Element element>
LFM_HD void load(const char* place, Pair<level>& out) {
  using V = Vectors<level>;
  constexpr int width = V::width;
  if constexpr (element == Element::float32) {
    typename V::Float u, v;
    std::memcpy(&u, place, sizeof u);
    std::memcpy(&v, place + sizeof u, sizeof v);
    if constexpr (order == Order::natural) {
      out.a = u;
      out.b = v;
    } else {
      shuffle<level>(u, v, out.a, typename PlacesOf<level, 0, 2, 2 * width>::type{});
      shuffle<level>(u, v, out.b, typename PlacesOf<level, 1, 2, 2 * width>::type{});
    }
  } else {
    static_assert(element == Element::bfloat16 && order == Order::split);
    typename V::Bits words;
    std::memcpy(&words, place, sizeof words);
    out.a = (typename V::Float)(words << 16);
    out.b = (typename V::Float)(words & 0xffff0000u);
  }
}

// float_to_bfloat16 of common/low_precision.h, the result in the upper half of each word.
template <Level level, Nan nan>
LFM_HD void round_to_bfloat16(const typename Vectors<level>::Float& value, typename Vectors<level>::Bits& out) {
  using Bits = typename Vectors<level>::Bits;
  const Bits bits = (Bits)value;
  out = bits + 0x7fffu + ((bits >> 16) & 1u);
  if constexpr (nan == Nan::any) out = value == value ? out : bits | 0x400000u;
}

template <Level level, Order order, Element element, Nan nan = Nan::any>
LFM_HD void store(char* place, const Pair<level>& in) {
  using V = Vectors<level>;
  constexpr int width = V::width;
  if constexpr (element == Element::float32) {
    typename V::Float u = in.a, v = in.b;
    if constexpr (order == Order::split) {
      shuffle<level>(in.a, in.b, u, typename PlacesOf<level, 0, 1, 2 * width>::zipped{});
      shuffle<level>(in.a, in.b, v, typename PlacesOf<level, width / 2, 1, 2 * width>::zipped{});
    }
    std::memcpy(place, &u, sizeof u);
    std::memcpy(place + sizeof u, &v, sizeof v);
  } else {
    static_assert(element == Element::bfloat16 && order == Order::split);
    typename V::Bits low, high;
    round_to_bfloat16<level, nan>(in.a, low);
    round_to_bfloat16<level, nan>(in.b, high);
    const typename V::Bits words = (low >> 16) | (high & 0xffff0000u);
    std::memcpy(place, &words, sizeof words);
  }
}

// `pair` as it will be read back from where it is stored.
template <Level level, Element element, Nan nan>
LFM_HD void round_as_stored(Pair<level>& pair) {
  using V = Vectors<level>;
  if constexpr (element == Element::bfloat16) {
    typename V::Bits low, high;
    round_to_bfloat16<level, nan>(pair.a, low);
    round_to_bfloat16<level, nan>(pair.b, high);
    pair.a = (typename V::Float)(low & 0xffff0000u);
    pair.b = (typename V::Float)(high & 0xffff0000u);
  }
}

// A sum over a row: lane j takes elements j, j + 64, j + 128, ..., then lanes are added in halves.
template <Level level, Order order>
struct LaneSum {
  using Float = typename Vectors<level>::Float;
  static constexpr int width = Vectors<level>::width, vectors = kBlock / width;
  Float lanes[vectors];

  LFM_HD LaneSum() {
    for (int k = 0; k < vectors; ++k) lanes[k] = Float{};
  }

  template <int half>
  LFM_HD static void fold(Float& v) {
    if constexpr (half >= 1) {
      Float upper;
      shuffle<level>(v, v, upper, typename PlacesOf<level, half, 1, width>::type{});
      v += upper;
      fold<half / 2>(v);
    }
  }

  LFM_HD float total() {
    for (int n = vectors / 2; n > 1; n /= 2)
      for (int k = 0; k < n; ++k) lanes[k] += lanes[k + n];
    if constexpr (order == Order::natural) {
      lanes[0] += lanes[1];
      fold<width / 2>(lanes[0]);
      return lanes[0][0];
    } else {  // even and odd elements meet last at every width
      fold<width / 2>(lanes[0]);
      fold<width / 2>(lanes[1]);
      return lanes[0][0] + lanes[1][0];
    }
  }
};

}  // namespace lfm_fast
