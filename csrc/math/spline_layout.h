// How a plan lies in memory, for the host that makes it and the kernels that read it.
#pragma once

#include <cstdint>

#include "pack.h"

namespace coded_torch {

// Slots: slot i holds the points of [t_i, t_{i+1}), the last one those at and beyond the last knot,
// the first one also those before the first knot.
//
// coefficients  [n, 12] a row per knot, then [N, 4] a row per point, points sorted by slot; for
//               devices maybe [n, N], the map's dense matrix transposed, points in caller's order
// schedule      [n + 1] first point of each slot, then [N] the caller's index of each sorted point
constexpr int64_t kKnotCoefficients = 12;
constexpr int64_t kPointCoefficients = 4;

constexpr int64_t coefficients_size(int64_t num_knots, int64_t num_points) {
  return kKnotCoefficients * num_knots + kPointCoefficients * num_points;
}

// Rounded up, so that the next plan's rows start on a multiple of 16 bytes.
constexpr int64_t matrix_size(int64_t num_knots, int64_t num_points) {
  return (num_knots * num_points + 3) / 4 * 4;
}

constexpr int64_t schedule_size(int64_t num_knots, int64_t num_points) {
  return num_knots + 1 + num_points;
}

// Row of knots 1 .. n-2. Filter, from the state (v, s) here and the value y at the next knot:
//     v' = k0 (v + h s) + k1 y,    s' = ks s + k2 (y - v)
// Smoother, from the filtered state (v, s) here and the smoothed state (v', s') at the next knot:
//     a00 v + a01 s + c00 v' + c01 s',    -c10 v + a11 s + c10 v' + c11 s'
enum KnotCoefficient { kH, kK0, kK1, kK2, kKs, kA00, kA01, kA11, kC00, kC01, kC10, kC11 };
// Row of knot 0: v0 = a y0 + c (v' - h s'), s0 = s' + b (v' - h s' - y0). Knot n-1 has none.
enum FirstKnotCoefficient { kFirstH, kFirstInverseH, kFirstA, kFirstB, kFirstC };

}  // namespace coded_torch
