// Copies of rows, and a look whether their numbers are finite, in one pass. No Python here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace coded_torch::lane {

// How numbers are stored, as far as their infinities and NaN are told by it.
enum class Kind { kOther, kHalf, kBfloat16, kSingle, kDouble };

// Bytes that are looked at while they are in the first cache. Not tuned.
constexpr size_t kTogether = 1 << 14;

// Copies numbers of a kind, whose exponents have the bits of a mask. False if one of them is not
// finite. The copies are looked at, as others may write to the numbers.
template <typename Bits, Bits mask>
inline bool copy_numbers(char* to, const char* from, size_t bytes) {
  bool is_finite = true;
  for (size_t begin = 0; begin < bytes; begin += kTogether) {
    const size_t size = std::min(kTogether, bytes - begin);
    std::memcpy(to + begin, from + begin, size);
    Bits odd = 0;
    for (size_t at = begin; at < begin + size; at += sizeof(Bits)) {
      Bits bits;
      std::memcpy(&bits, to + at, sizeof bits);
      odd = Bits(odd | Bits((bits & mask) == mask));
    }
    is_finite = is_finite && odd == 0;
  }
  return is_finite;
}

inline bool copy_numbers(Kind kind, char* to, const char* from, size_t bytes) {
  switch (kind) {
    case Kind::kHalf:
      return copy_numbers<uint16_t, 0x7c00>(to, from, bytes);
    case Kind::kBfloat16:
      return copy_numbers<uint16_t, 0x7f80>(to, from, bytes);
    case Kind::kSingle:
      return copy_numbers<uint32_t, 0x7f800000>(to, from, bytes);
    case Kind::kDouble:
      return copy_numbers<uint64_t, 0x7ff0000000000000>(to, from, bytes);
    default:
      std::memcpy(to, from, bytes);
      return true;
  }
}

// A tensor of all rows, which lie end to end.
struct Rows {
  char* data;
  size_t bytes;
  size_t row_bytes;
  Kind kind;

  // Copies some rows, which lie end to end, to their places. False if one is not finite, or there
  // is no such place.
  bool put(const char* from, const int64_t* rows, size_t count) const {
    bool is_finite = true;
    for (size_t begin = 0, end = 0; begin < count; begin = end) {
      // Rows that follow each other are copied at once.
      for (end = begin + 1; end < count && rows[end] == rows[end - 1] + 1;) ++end;
      const size_t size = (end - begin) * row_bytes;
      const size_t at = size_t(rows[begin]) * row_bytes;
      if (rows[begin] < 0 || at + size > bytes) return false;
      is_finite = copy_numbers(kind, data + at, from + begin * row_bytes, size) && is_finite;
    }
    return is_finite;
  }
};

}  // namespace coded_torch::lane
