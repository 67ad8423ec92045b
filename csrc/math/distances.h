// Squared distances of rows, or their inner products, of a few with a few others at a time: each
// number that is read serves several pairs. Distances are made from differences, not from products,
// so that small ones are as exact as large ones, and belong to points whatever is rounded.
#pragma once

#include <cstdint>

#include "pack.h"

namespace coded_torch {

// What is made of two rows a and b: the sum of (a - b)^2, or of a b.
enum class Pairs { kDistances, kProducts };

// Adds the terms of numbers, or of vectors of them, of every a with every b.
template <Pairs kPairs, class Numbers, int kRows, int kOthers>
CODED_TORCH_HD void add_terms(const Numbers (&a)[kRows], const Numbers (&b)[kOthers],
                              Numbers (&sums)[kRows][kOthers]) {
  CODED_TORCH_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CODED_TORCH_UNROLL
    for (int j = 0; j < kOthers; ++j) {
      if constexpr (kPairs == Pairs::kProducts) {
        sums[i][j] = sums[i][j] + a[i] * b[j];
      } else {
        const Numbers difference = a[i] - b[j];
        sums[i][j] = sums[i][j] + difference * difference;
      }
    }
  }
}

// 0 where rounding of rows of these squared lengths may be all that there is.
template <class T>
CODED_TORCH_HD T beyond_rounding(T squared, T a, T b, T nothing) {
  return squared <= (T{1} + a + b) * nothing ? T{0} : squared;
}

}  // namespace coded_torch
