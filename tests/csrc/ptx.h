// What PTX's instructions do, for code that tests/ptx.py translates: one function each, of the same
// name, for the types that it names. Operands are registers, whose bits count, not their type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "../../csrc/math/half.h"

namespace ptx {

using coded_torch::bfloat16;
using coded_torch::float16;

// The thread that runs, and its block's shared memory.
struct Thread {
  uint32_t index, block, block_size;
  char* shared;
  uint32_t shared_bytes;
};
inline Thread thread;

// A struct that is passed by value.
template <int kSize>
struct alignas(8) Bytes {
  char data[kSize];
};

template <class T>
uint64_t address_of(const T& parameter) {
  return reinterpret_cast<uint64_t>(&parameter);
}

// An operand as an instruction of type T reads it.
template <class T, class Register>
T as(Register value) {
  if constexpr (std::is_integral_v<T> && std::is_integral_v<Register>) {
    return static_cast<T>(value);
  } else {
    static_assert(sizeof(T) == sizeof(Register));
    T out;
    std::memcpy(&out, &value, sizeof out);
    return out;
  }
}

template <class Register, class T>
void set(Register& to, T value) {
  to = as<Register>(value);
}

// Sums and products of integers wrap, for which C++ wants them unsigned.
template <class T>
using Wide = std::conditional_t<std::is_floating_point_v<T>, T, uint64_t>;

template <class T>
T op_add(auto a, auto b) {
  return static_cast<T>(Wide<T>(as<T>(a)) + Wide<T>(as<T>(b)));
}
template <class T>
T op_sub(auto a, auto b) {
  return static_cast<T>(Wide<T>(as<T>(a)) - Wide<T>(as<T>(b)));
}
template <class T>
T op_mul(auto a, auto b) {
  return as<T>(a) * as<T>(b);
}
template <class T>
T op_mul_lo(auto a, auto b) {
  return static_cast<T>(Wide<T>(as<T>(a)) * Wide<T>(as<T>(b)));
}
template <class T>
auto op_mul_wide(auto a, auto b) {
  using Twice = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
  static_assert(sizeof(T) == 4);
  return static_cast<Twice>(as<T>(a)) * static_cast<Twice>(as<T>(b));
}
template <class T>
T op_mad_lo(auto a, auto b, auto c) {
  return op_add<T>(op_mul_lo<T>(a, b), c);
}
template <class T>
T op_fma_rn(auto a, auto b, auto c) {
  return std::fma(as<T>(a), as<T>(b), as<T>(c));
}
template <class T>
T op_sqrt_rn(auto a) {
  return std::sqrt(as<T>(a));
}
template <class T>
T op_div(auto a, auto b) {
  return as<T>(a) / as<T>(b);
}
template <class T>
T op_max(auto a, auto b) {
  return as<T>(a) > as<T>(b) ? as<T>(a) : as<T>(b);
}
template <class T>
T op_neg(auto a) {
  return op_sub<T>(0, a);
}
template <class T>
T op_and(auto a, auto b) {
  return as<T>(a) & as<T>(b);
}
template <class T>
T op_or(auto a, auto b) {
  return as<T>(a) | as<T>(b);
}
template <class T>
T op_xor(auto a, auto b) {
  return as<T>(a) ^ as<T>(b);
}
template <class T>
T op_not(auto a) {
  if constexpr (std::is_same_v<T, bool>) return !a;
  return static_cast<T>(~as<T>(a));
}
template <class T>
T op_shl(auto a, auto by) {
  return as<uint32_t>(by) < 8 * sizeof(T) ? as<T>(a) << as<uint32_t>(by) : T{0};
}
template <class T>
T op_shr(auto a, auto by) {  // of signed numbers with their sign
  const uint32_t most = 8 * sizeof(T) - 1, shift = as<uint32_t>(by);
  if (std::is_unsigned_v<T> && shift > most) return 0;
  return as<T>(a) >> (shift < most ? shift : most);
}

template <class T>
bool op_setp_eq(auto a, auto b) {
  return as<T>(a) == as<T>(b);
}
template <class T>
bool op_setp_ne(auto a, auto b) {
  return as<T>(a) != as<T>(b);
}
template <class T>
bool op_setp_lt(auto a, auto b) {
  return as<T>(a) < as<T>(b);
}
template <class T>
bool op_setp_le(auto a, auto b) {
  return as<T>(a) <= as<T>(b);
}
template <class T>
bool op_setp_gt(auto a, auto b) {
  return as<T>(a) > as<T>(b);
}
template <class T>
bool op_setp_ge(auto a, auto b) {
  return as<T>(a) >= as<T>(b);
}
template <class T>
T op_selp(auto yes, auto no, bool condition) {
  return condition ? as<T>(yes) : as<T>(no);
}

template <class T>
T op_mov(auto a) {
  return as<T>(a);
}
// Memory is one here.
template <class T>
T op_cvta_to_global(auto a) {
  return as<T>(a);
}
// Halves of a number, the lower first.
template <class T, class Half>
void op_mov(auto whole, Half& low, Half& high) {
  const auto bits = as<T>(whole);
  static_assert(sizeof(T) == 2 * sizeof(Half));
  low = as<Half>(bits);
  high = as<Half>(static_cast<T>(bits >> (8 * sizeof(Half))));
}
template <class T, class Half>
T op_mov(Half low, Half high) {
  static_assert(sizeof(T) == 2 * sizeof(Half));
  return T{low} | T{high} << (8 * sizeof(Half));
}

template <class To, class From>
To op_cvt(auto a) {
  if constexpr (std::is_integral_v<From>) {
    static_assert(std::is_integral_v<To>);
    return static_cast<To>(as<From>(a));
  } else {
    static_assert(std::is_same_v<To, float>);
    return coded_torch::to_float(as<From>(a));
  }
}
template <class To, class From>
To op_cvt_rn(auto a) {
  static_assert(std::is_same_v<From, float>);
  To out;
  coded_torch::from_float(a, &out);
  return out;
}

// An access of some bytes at once: aligned to them, or the device would trap.
inline char* checked(uint64_t address, uint64_t bytes) {
  if (address % bytes != 0) throw std::runtime_error("an access is not aligned");
  return reinterpret_cast<char*>(address);
}
inline char* checked_shared(uint32_t offset, uint32_t bytes) {
  if (offset + bytes > thread.shared_bytes) throw std::runtime_error("out of the shared memory");
  if (offset % bytes != 0) throw std::runtime_error("a shared access is not aligned");
  return thread.shared + offset;
}

template <class T, class... Registers>
void read(const char* from, Registers&... to) {
  T value;
  ((std::memcpy(&value, from, sizeof value), from += sizeof value, set(to, value)), ...);
}
template <class T, class... Registers>
void write(char* to, Registers... values) {
  const T all[] = {as<T>(values)...};
  std::memcpy(to, all, sizeof all);
}

template <class T, class... Registers>
void op_ld_global(uint64_t address, Registers&... to) {
  read<T>(checked(address, sizeof(T) * sizeof...(to)), to...);
}
template <class T, class... Registers>
void op_st_global(uint64_t address, Registers... values) {
  write<T>(checked(address, sizeof(T) * sizeof...(values)), values...);
}
template <class T, class... Registers>
void op_ld_shared(uint32_t offset, Registers&... to) {
  read<T>(checked_shared(offset, sizeof(T) * sizeof...(to)), to...);
}
template <class T, class... Registers>
void op_st_shared(uint32_t offset, Registers... values) {
  write<T>(checked_shared(offset, sizeof(T) * sizeof...(values)), values...);
}
template <class T, class... Registers>
void op_ld_param(uint64_t address, Registers&... to) {
  read<T>(checked(address, sizeof(T)), to...);
}

}  // namespace ptx
