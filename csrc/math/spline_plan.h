// The plan of a smoothing spline: everything that does not depend on the values.
//
// The natural cubic smoothing spline through (t_i, y_i) with penalties L_i minimises
//     sum_i (y_i - g(t_i))^2 / L_i + integral g''(t)^2 dt .
// It is the posterior mean of an integrated Wiener process, so the banded system in the unknowns
// (value, slope) at each knot is block tridiagonal with 2 x 2 blocks, and its block factorisation
// is a Kalman filter followed by the Rauch-Tung-Striebel sweep (Wecker and Ansley, 1983). Unlike
// the pentadiagonal form in second derivatives, whose condition grows like n^4, it keeps its
// digits. L = 0 interpolates and needs no case of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "spline_layout.h"

namespace coded_torch {

// The gains are expanded until no two large terms are subtracted, and `det` is carried along rather
// than computed as vv ss - vs^2: every coefficient keeps its relative accuracy, for any smoothing
// and any gap ratio, where the usual expressions lose all digits at large smoothing. For the same
// reason the steps above are combinations of states, not corrections to a state: a filtered slope
// may be thousands of times larger than the smoothed one.
struct SplineCovariance {
  double vv, vs, ss, det;  // of (value, slope) at a knot, given the values up to it
};

inline void plan_knots(const double* knots, const double* penalties, int64_t n,
                       double* coefficients) {
  std::fill(coefficients, coefficients + kKnotCoefficients * n, 0.0);
  if (n < 2) return;
  const double h0 = knots[1] - knots[0], cubed = h0 * h0 * h0 / 3, total = penalties[0] + cubed;
  coefficients[kFirstH] = h0;
  coefficients[kFirstInverseH] = 1 / h0;
  coefficients[kFirstA] = cubed / total;
  coefficients[kFirstB] = h0 * h0 / 2 / total;
  coefficients[kFirstC] = penalties[0] / total;
  // The flat prior taken to its limit: two values determine the line, up to their own noise.
  SplineCovariance p;
  p.vv = penalties[1];
  p.vs = penalties[1] / h0;
  p.ss = (penalties[0] + penalties[1]) / (h0 * h0) + h0 / 3;
  p.det = penalties[1] * (penalties[0] / (h0 * h0) + h0 / 3);
  for (int64_t i = 1; i + 1 < n; ++i) {
    double* row = coefficients + kKnotCoefficients * i;
    const double h = knots[i + 1] - knots[i], penalty = penalties[i + 1];
    // The prediction {a, b; b, c} = F P F' + Q at the next knot, and its determinant.
    const double a = p.vv + h * (2 * p.vs + h * (p.ss + h / 3));
    const double b = p.vs + h * (p.ss + h / 2);
    const double c = p.ss + h;
    const double det = p.det + h * (p.vv + h * (p.vs + h * (p.ss / 3 + h / 12)));
    row[kH] = h;
    row[kK0] = penalty / (a + penalty);
    row[kK1] = a / (a + penalty);
    row[kK2] = b / (a + penalty);
    row[kKs] = (p.vv + h * p.vs - h * h * h / 6 + penalty) / (a + penalty);  // 1 - h k2
    // A = F^-1 Q {a, b; b, c}^-1 F,  C = P F' {a, b; b, c}^-1
    row[kA00] = h * (h * (p.vs / 2 + h * (p.ss / 3 + h / 12))) / det;  // 1 where penalties are 0
    row[kA01] = -h * h * (p.vv / 2 + h * p.vs / 3) / det;
    row[kA11] = h * (p.vv + h * (p.vs / 2 + h * h / 12)) / det;
    row[kC00] = (p.det + h * (p.vv + h * p.vs / 2)) / det;
    row[kC01] = -h * (p.det + h * (p.vv / 2 + h * p.vs / 6)) / det;
    row[kC10] = h * (p.vs + h * p.ss / 2) / det;
    row[kC11] = (p.det - h * h * (p.vs / 2 + h * p.ss / 6)) / det;
    p.vv = a * row[kK0];
    p.vs = b * row[kK0];
    p.ss = (c * penalty + det) / (a + penalty);
    p.det = det * row[kK0];
  }
}

// Four weights of a point on (value, slope) at the lower and at the upper knot of its slot.
inline void plan_point(const double* knots, int64_t n, int64_t slot, double point,
                       double* weights) {
  const double x = point - knots[slot];
  weights[0] = 1;
  weights[1] = n > 1 ? x : 0;  // one knot gives a constant
  weights[2] = weights[3] = 0;
  if (slot + 1 == n || x < 0) return;  // beyond the ends the natural spline is its tangent
  const double h = knots[slot + 1] - knots[slot];
  // Measured from the nearer knot, so that neither end loses digits.
  const double u = x / h, w = (knots[slot + 1] - point) / h;
  weights[0] = (1 + 2 * u) * w * w;
  weights[1] = h * u * w * w;
  weights[2] = u * u * (1 + 2 * w);
  weights[3] = -h * u * u * w;
}

// What lengths are multiplied by to make the mean gap about 1. The curve is the same in every unit
// of length, with penalties in its cube, but only in one near the gaps does float32 hold the
// coefficients. A power of two, so that nothing is rounded.
inline double plan_scale(const double* knots, int64_t n) {
  if (n < 2) return 1;
  const double length = std::min(knots[n - 1] - knots[0], std::numeric_limits<double>::max());
  return std::ldexp(1.0, -std::max(std::ilogb(length / static_cast<double>(n - 1)), -1023));
}

// Plans a spline with `n` >= 1 strictly increasing knots and `num_points` points in any order.
inline void plan_spline(const double* knots, const double* penalties, int64_t n,
                        const double* points, int64_t num_points, double* coefficients,
                        int32_t* schedule) {
  const double scale = plan_scale(knots, n);
  std::vector<double> scaled(2 * n + num_points);
  double* t = scaled.data();
  double* l = t + n;
  double* z = l + n;
  for (int64_t i = 0; i < n; ++i) t[i] = knots[i] * scale;
  for (int64_t i = 0; i < n; ++i) l[i] = penalties[i] * scale * scale * scale;
  for (int64_t j = 0; j < num_points; ++j) z[j] = points[j] * scale;
  plan_knots(t, l, n, coefficients);
  // Counting sort by slot; the scatter below advances first[slot] to the end of the slot.
  int32_t* first = schedule;
  int32_t* order = schedule + n + 1;
  const auto slot_of = [&](double point) {
    return std::max<int64_t>(std::upper_bound(t, t + n, point) - t - 1, 0);
  };
  std::fill(first, first + n + 1, 0);
  std::vector<int32_t> slots(num_points);
  for (int64_t j = 0; j < num_points; ++j) {
    slots[j] = static_cast<int32_t>(slot_of(z[j]));
    ++first[slots[j] + 1];
  }
  for (int64_t i = 0; i < n; ++i) first[i + 1] += first[i];
  double* weights = coefficients + kKnotCoefficients * n;
  for (int64_t j = 0; j < num_points; ++j) {
    const int32_t slot = slots[j];
    const int32_t position = first[slot]++;
    order[position] = static_cast<int32_t>(j);
    plan_point(t, n, slot, z[j], weights + kPointCoefficients * position);
  }
  for (int64_t i = n; i > 0; --i) first[i] = first[i - 1];
  first[0] = 0;
}

}  // namespace coded_torch
