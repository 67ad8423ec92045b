// The bodies of the CUDA kernels of matern52_out and matern52_among: functions of the thread, that
// run on the host just as well.
#pragma once

#include <cmath>
#include <cstring>

#include "../../math/matern.h"
#include "../matern_args.h"

namespace coded_torch {

// Numbers one by one.
template <class T>
struct Scalars {
  using Number = T;
  using Numbers = T;
  using Integers = typename ExpFormat<T>::Bits;

  CODED_TORCH_HD static Integers bits(Numbers x) {
    Integers out;
    memcpy(&out, &x, sizeof out);
    return out;
  }
  CODED_TORCH_HD static Numbers numbers(Integers bits) {
    Numbers out;
    memcpy(&out, &bits, sizeof out);
    return out;
  }
  CODED_TORCH_HD static Numbers sqrt(Numbers x) { return std::sqrt(x); }
};

constexpr int kMaternThreads = 256;  // a block
// Numbers that a thread reads at once: 16 bytes, the widest access of the memory system.
template <class T>
constexpr int kMaternWidth = 16 / sizeof(T);

// Those of one access.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) MaternPack {
  T number[kWidth];
};

// Whether packs lie as accesses of their size need them. The memory's end does not matter.
template <class T>
bool fits_wide(const MaternArgs& args) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return aligned(args.squared) && aligned(args.out);
}

// The numbers of one thread: a pack, or the last ones, one by one.
template <class T, int kWidth>
CODED_TORCH_HD void matern_thread(const MaternArgs& args, T scale, int64_t thread) {
  using Packed = MaternPack<T, kWidth>;
  const int64_t first = thread * kWidth;
  const T* from = static_cast<const T*>(args.squared);
  T* to = static_cast<T*>(args.out);
  if (first + kWidth <= args.count) {
    Packed pack = *reinterpret_cast<const Packed*>(from + first);
    CODED_TORCH_UNROLL
    for (int k = 0; k < kWidth; ++k) pack.number[k] = matern52<Scalars<T>>(pack.number[k], scale);
    *reinterpret_cast<Packed*>(to + first) = pack;
    return;
  }
  for (int64_t i = first; i < args.count; ++i) to[i] = matern52<Scalars<T>>(from[i], scale);
}

// One number of the result.
template <class T>
CODED_TORCH_HD void matern_among_thread(const MaternAmongArgs& args, T scale, int64_t thread) {
  if (thread >= args.num_rows * args.num_columns) return;
  const int64_t row = args.rows[thread / args.num_columns];
  const int64_t column = args.columns[thread % args.num_columns];
  const T squared = static_cast<const T*>(args.squared)[row * args.stride + column];
  static_cast<T*>(args.out)[thread] = matern52<Scalars<T>>(squared, scale);
}

}  // namespace coded_torch
