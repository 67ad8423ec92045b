// Squared distances of rows, of a few with a few others at a time: each number that is read serves
// several pairs. From differences, not from products, so that small ones are as exact as large
// ones, and belong to points whatever is rounded.
#pragma once

#include <cstdint>

#include "pack.h"

namespace coded_torch {

// sums[i][j] += (a_i - b_j)^2, of numbers or vectors of them.
template <class Numbers, int kRows, int kOthers>
CODED_TORCH_HD void add_squares(const Numbers (&a)[kRows], const Numbers (&b)[kOthers],
                                Numbers (&sums)[kRows][kOthers]) {
  CODED_TORCH_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CODED_TORCH_UNROLL
    for (int j = 0; j < kOthers; ++j) {
      const Numbers difference = a[i] - b[j];
      sums[i][j] = sums[i][j] + difference * difference;
    }
  }
}

// 0 where rounding of rows of these squared lengths may be all that there is.
template <class T>
CODED_TORCH_HD T beyond_rounding(T squared, T a, T b, T nothing) {
  return squared <= (T{1} + a + b) * nothing ? T{0} : squared;
}

}  // namespace coded_torch
