// The body of the CUDA kernels of squared_distances and inner_products: a function of the thread,
// that runs on the host just as well.
#pragma once

#include "../../math/distances.h"
#include "../distances_args.h"

namespace coded_torch {

constexpr int kDistancesThreads = 128;  // a block
constexpr int kDistancesTile = 4;       // a thread has so many rows, and as many others
// Numbers that a thread reads at once: 16 bytes, the widest access of the memory system.
template <class T>
constexpr int kDistancesWidth = 16 / sizeof(T);

// Whether all rows lie as accesses of 16 bytes need them.
template <class T>
bool fits_wide(const DistancesArgs& args) {
  return reinterpret_cast<uintptr_t>(args.rows) % 16 == 0 &&
         args.num_columns % kDistancesWidth<T> == 0 && args.stride % kDistancesWidth<T> == 0;
}

inline int64_t distances_tiles(const DistancesArgs& args) {
  const int64_t tiles = (args.num_rows + kDistancesTile - 1) / kDistancesTile;
  return tiles * tiles;
}

// The pairs of one thread. Those of rows a and b, and of b and a, are added up alike.
template <Pairs kPairs, class T, int kWidth>
CODED_TORCH_HD void distances_thread(const DistancesArgs& args, T nothing, int64_t thread) {
  using Numbers = Pack<T, kWidth>;
  const int64_t n = args.num_rows, tiles = (n + kDistancesTile - 1) / kDistancesTile;
  if (thread >= tiles * tiles) return;
  const int64_t first = thread / tiles * kDistancesTile, other = thread % tiles * kDistancesTile;
  const T* rows = static_cast<const T*>(args.rows);
  const auto row = [&](int64_t i) { return rows + (i < n ? i : n - 1) * args.stride; };
  Pack<T, kWidth> sums[kDistancesTile][kDistancesTile];
  CODED_TORCH_UNROLL
  for (int i = 0; i < kDistancesTile; ++i) {
    CODED_TORCH_UNROLL
    for (int j = 0; j < kDistancesTile; ++j) sums[i][j] = Numbers::zero();
  }
  for (int64_t k = 0; k < args.num_columns; k += kWidth) {
    Numbers a[kDistancesTile], b[kDistancesTile];
    CODED_TORCH_UNROLL
    for (int i = 0; i < kDistancesTile; ++i) {
      a[i] = *reinterpret_cast<const Numbers*>(row(first + i) + k);
      b[i] = *reinterpret_cast<const Numbers*>(row(other + i) + k);
    }
    add_terms<kPairs>(a, b, sums);
  }
  const T* squares = static_cast<const T*>(args.squares);
  T* out = static_cast<T*>(args.out);
  CODED_TORCH_UNROLL
  for (int i = 0; i < kDistancesTile; ++i) {
    CODED_TORCH_UNROLL
    for (int j = 0; j < kDistancesTile; ++j) {
      const int64_t left = first + i, right = other + j;
      if (left >= n || right >= n) continue;
      T sum = sums[i][j].lane[0];
      CODED_TORCH_UNROLL
      for (int lane = 1; lane < kWidth; ++lane) sum = sum + sums[i][j].lane[lane];
      if constexpr (kPairs == Pairs::kDistances) {
        sum = beyond_rounding(sum, squares[left], squares[right], nothing);
      }
      out[left * n + right] = sum;
    }
  }
}

}  // namespace coded_torch
