// What PTX's instructions do, for code that tests/ptx.py translates: one function each, of the same
// name, for the types that it names. Operands are registers, whose bits count, not their type.
// run_block() runs one block of a translated kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/math/half.h"
#include "block.h"

namespace ptx {

using coded_torch::bfloat16;
using coded_torch::float16;

// A word of shared memory: who wrote and who read it since the threads last met.
struct Word {
  uint32_t written_in, writer, read_in, reader;
};
constexpr uint32_t kNever = ~0u, kSeveral = ~0u;

// A block of kMostShared bytes is as much as any device has.
constexpr uint32_t kMostShared = 227 << 10;

// The block that runs.
struct Block {
  uint32_t index, threads;
  char* shared;
  uint32_t shared_bytes;
  Word* words;
};
inline thread_local Block current;

// A translated kernel. `call` takes the addresses of its parameters, as cuLaunchKernel does.
struct Kernel {
  void (*call)(void** parameters);
  uint32_t max_threads;  // of its __launch_bounds__; 1,024 without
};

// All translated kernels, by their names.
inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}
struct Registered {
  Registered(const char* name, Kernel kernel) { kernels()[name] = kernel; }
};

// Runs one block of a kernel. Shared memory is NaN before. Throws where a device would trap, hang
// or refuse the launch, and where two threads use a word of shared memory with no barrier between.
inline void run_block(const Kernel& kernel, uint32_t index, uint32_t threads, uint32_t shared_bytes,
                      void** parameters) {
  if (threads == 0 || threads > kernel.max_threads) {
    throw std::runtime_error("more threads than the launch bounds allow");
  }
  if (shared_bytes > kMostShared) throw std::runtime_error("more shared memory than there is");
  struct alignas(16) Line {
    char bytes[16];
  };
  static thread_local std::vector<Line> memory;
  static thread_local std::vector<Word> words;
  memory.resize(shared_bytes / sizeof(Line) + 1);
  std::memset(memory.data(), 0xff, shared_bytes);
  words.assign(shared_bytes / 4 + 1, {kNever, 0, kNever, 0});
  current = {index, threads, memory[0].bytes, shared_bytes, words.data()};
  block::run_threads(threads, [&](uint32_t) { kernel.call(parameters); });
}

// Runs all blocks of a kernel, whose parameters have the layout that it expects.
template <class... Parameters>
void run_grid(const std::string& name, int64_t blocks, int64_t threads, int64_t shared_bytes,
              Parameters... parameters) {
  void* addresses[] = {&parameters...};
  for (int64_t i = 0; i < blocks; ++i) {
    run_block(kernels().at(name), static_cast<uint32_t>(i), static_cast<uint32_t>(threads),
              static_cast<uint32_t>(shared_bytes), addresses);
  }
}

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
T op_div(auto a, auto b) {
  return as<T>(a) / as<T>(b);
}
template <class T>
T op_rem(auto a, auto b) {
  return as<T>(a) % as<T>(b);
}
template <class T>
T op_min(auto a, auto b) {
  return as<T>(a) < as<T>(b) ? as<T>(a) : as<T>(b);
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
  if constexpr (std::is_same_v<From, double>) {
    static_assert(std::is_same_v<To, float>);
    return static_cast<To>(as<double>(a));
  } else {
    static_assert(std::is_same_v<From, float>);
    To out;
    coded_torch::from_float(a, &out);
    return out;
  }
}

// An access of some bytes at once: aligned to them, or the device would trap.
inline char* checked(uint64_t address, uint64_t bytes) {
  if (address % bytes != 0) throw std::runtime_error("an access is not aligned");
  return reinterpret_cast<char*>(address);
}
// Asked before every access of global memory, where something stands in for the device.
inline thread_local void (*on_access)(uint64_t address, uint64_t bytes, bool writes) = nullptr;
inline char* checked_global(uint64_t address, uint64_t bytes, bool writes) {
  if (on_access) on_access(address, bytes, writes);
  return checked(address, bytes);
}
inline char* checked_shared(uint32_t offset, uint32_t bytes, bool writes) {
  if (offset + bytes > current.shared_bytes) throw std::runtime_error("out of the shared memory");
  if (offset % bytes != 0) throw std::runtime_error("a shared access is not aligned");
  const uint32_t me = block::run.thread, now = block::run.round;
  for (uint32_t i = offset / 4; i <= (offset + bytes - 1) / 4; ++i) {
    Word& word = current.words[i];
    const bool is_read = word.read_in == now, is_written = word.written_in == now;
    if ((is_written && word.writer != me) || (writes && is_read && word.reader != me)) {
      throw std::runtime_error("two threads use a word of shared memory with no barrier between");
    }
    if (writes) {
      word.written_in = now, word.writer = me;
    } else {
      word.reader = is_read && word.reader != me ? kSeveral : me, word.read_in = now;
    }
  }
  return current.shared + offset;
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
  read<T>(checked_global(address, sizeof(T) * sizeof...(to), false), to...);
}
template <class T, class... Registers>
void op_st_global(uint64_t address, Registers... values) {
  write<T>(checked_global(address, sizeof(T) * sizeof...(values), true), values...);
}
template <class T, class... Registers>
void op_ld_shared(uint32_t offset, Registers&... to) {
  read<T>(checked_shared(offset, sizeof(T) * sizeof...(to), false), to...);
}
template <class T, class... Registers>
void op_st_shared(uint32_t offset, Registers... values) {
  write<T>(checked_shared(offset, sizeof(T) * sizeof...(values), true), values...);
}
inline void op_prefetch_global_L2(uint64_t) {}
// Barriers are told apart by where they stand.
inline void op_bar_sync(int64_t, std::source_location here = std::source_location::current()) {
  block::barrier(static_cast<int>(here.line()));
}
template <class T, class... Registers>
void op_ld_param(uint64_t address, Registers&... to) {
  read<T>(checked(address, sizeof(T)), to...);
}

}  // namespace ptx
