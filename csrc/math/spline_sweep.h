// The two sweeps of the smoothing spline over a pack of columns, with the evaluation fused into the
// second, and their adjoint. Host and device, for any pack that adds, subtracts and scales.
//
// A column costs 6 operations a knot forward and 8 backward, 3 a point, and two stored numbers a
// knot; each value is read once and each result written once.
//
// Where two coefficients add up to 1, as they must for constants to stay constant, smoother and
// evaluation scale a difference by one of them: the one that is 0 without smoothing, so that
// interpolation is exact. The filter does not, since with much smoothing its errors add up over the
// knots (four times the error in float32), nor does the adjoint, whose results may be as small as
// the smaller of the two.
#pragma once

#include <cstdint>

#include "pack.h"
#include "spline_layout.h"

namespace coded_torch {

// A plan as the kernels see it (spline_layout.h), in the accumulation type.
template <class Coefficient>
struct SplinePlan {
  const Coefficient* knots;   // [n, 12]
  const Coefficient* points;  // [N, 4]
  const int32_t* first;       // [n + 1]
  const int32_t* order;       // [N]
  int64_t num_knots;

  CODED_TORCH_HD SplinePlan(const Coefficient* coefficients, const int32_t* schedule, int64_t n)
      : knots(coefficients),
        points(coefficients + kKnotCoefficients * n),
        first(schedule),
        order(schedule + n + 1),
        num_knots(n) {}

  CODED_TORCH_HD const Coefficient* knot(int64_t i) const { return knots + kKnotCoefficients * i; }
  CODED_TORCH_HD const Coefficient* point(int64_t j) const {
    return points + kPointCoefficients * j;
  }
  CODED_TORCH_HD int32_t begin(int64_t slot) const { return first[slot]; }
  CODED_TORCH_HD int32_t place(int64_t j) const { return order[j]; }
};

// (value, slope) of the curve at a knot, or their adjoints.
template <class Columns>
struct SplineState {
  Columns v, s;
};

// States kept between the sweeps, `stride` packs apart: in a cache, shared memory, or a workspace.
// After turn() they are read from the last to the first.
template <class Columns>
struct StateStack {
  Columns* base;
  int64_t stride;

  CODED_TORCH_HD void put(int64_t i, const SplineState<Columns>& state) const {
    base[2 * i * stride] = state.v;
    base[(2 * i + 1) * stride] = state.s;
  }
  CODED_TORCH_HD SplineState<Columns> get(int64_t i) const {
    return {base[2 * i * stride], base[(2 * i + 1) * stride]};
  }
  CODED_TORCH_HD void turn(int64_t) const {}
};

// How many states are kept: all but those of the first and the last knot.
CODED_TORCH_HD int64_t num_kept_states(int64_t num_knots) {
  return num_knots > 2 ? num_knots - 2 : 0;
}

// A GPU's threads wait less where the loads of a few knots are asked for at once.
#define CODED_TORCH_KNOTS_AT_ONCE 4

// result(order, .) = spline through (knots, values) at the points.
// load(i) reads values row i, called for 0, 1, .. in turn; store(j, columns) writes result row j.
template <class Columns, class Kept, class Plan, class Load, class Store>
CODED_TORCH_HD void spline_sweep(const Plan& plan, Kept& kept, Load& load, const Store& store) {
  using State = SplineState<Columns>;
  const int64_t n = plan.num_knots;
  const Columns first_value = load(0);
  State state{first_value, Columns::zero()};
  if (n > 1) {
    state.v = load(1);
    state.s = plan.knot(0)[kFirstInverseH] * (state.v - first_value);
  }
  CODED_TORCH_UNROLL_BY(CODED_TORCH_KNOTS_AT_ONCE)
  for (int64_t i = 1; i + 1 < n; ++i) {  // filter: from knot i to knot i + 1
    const auto k = plan.knot(i);
    kept.put(i - 1, state);
    const Columns value = load(i + 1);
    const Columns slope = k[kKs] * state.s + k[kK2] * (value - state.v);
    state.v = k[kK0] * (state.v + k[kH] * state.s) + k[kK1] * value;
    state.s = slope;
  }
  kept.turn(num_kept_states(n));
  State upper = state;
  CODED_TORCH_UNROLL_BY(CODED_TORCH_KNOTS_AT_ONCE)
  for (int64_t i = n - 1; i >= 0; --i) {  // smooth: from knot i + 1 to knot i, then evaluate
    if (i == 0 && n > 1) {
      const Columns tangent = upper.v - plan.knot(0)[kFirstH] * upper.s;
      state.v = plan.knot(0)[kFirstA] * first_value + plan.knot(0)[kFirstC] * tangent;
      state.s = upper.s + plan.knot(0)[kFirstB] * (tangent - first_value);
    } else if (i + 1 < n) {
      const auto k = plan.knot(i);
      const State here = kept.get(i - 1);
      const Columns rise = upper.v - here.v;
      state.v = here.v + k[kC00] * rise + k[kA01] * here.s + k[kC01] * upper.s;
      state.s = k[kC10] * rise + k[kA11] * here.s + k[kC11] * upper.s;
    }
    const Columns rise = upper.v - state.v;
    for (int64_t j = plan.begin(i); j < plan.begin(i + 1); ++j) {
      const auto w = plan.point(j);
      store(plan.place(j), state.v + w[1] * state.s + w[2] * rise + w[3] * upper.s);
    }
    upper = state;
  }
}

// The transpose of spline_sweep: both sweeps reversed, with the same coefficients.
// load(j) reads gradient row j of the results, in the order of the points; store(i, columns) writes
// gradient row i of the values.
template <class Columns, class Kept, class Plan, class Load, class Store>
CODED_TORCH_HD void spline_sweep_adjoint(const Plan& plan, Kept& kept, Load& load,
                                         const Store& store) {
  using State = SplineState<Columns>;
  const int64_t n = plan.num_knots;
  Columns first_value = Columns::zero();
  State state{Columns::zero(), Columns::zero()};
  CODED_TORCH_UNROLL_BY(CODED_TORCH_KNOTS_AT_ONCE)
  for (int64_t i = 0; i < n; ++i) {
    State upper{Columns::zero(), Columns::zero()};
    for (int64_t j = plan.begin(i); j < plan.begin(i + 1); ++j) {
      const auto w = plan.point(j);
      const Columns gradient = load(plan.place(j));
      state.v = state.v + w[0] * gradient;
      state.s = state.s + w[1] * gradient;
      upper.v = upper.v + w[2] * gradient;
      upper.s = upper.s + w[3] * gradient;
    }
    if (i + 1 == n) break;
    if (i == 0) {
      const Columns slope = plan.knot(0)[kFirstB] * state.s;
      const Columns tangent = plan.knot(0)[kFirstC] * state.v + slope;
      first_value = plan.knot(0)[kFirstA] * state.v - slope;
      upper.v = upper.v + tangent;
      upper.s = upper.s + state.s - plan.knot(0)[kFirstH] * tangent;
    } else {
      const auto k = plan.knot(i);
      const Columns slope = k[kC10] * state.s;
      kept.put(i - 1, {k[kA00] * state.v - slope, k[kA01] * state.v + k[kA11] * state.s});
      upper.v = upper.v + k[kC00] * state.v + slope;
      upper.s = upper.s + k[kC01] * state.v + k[kC11] * state.s;
    }
    state = upper;
  }
  kept.turn(num_kept_states(n));
  CODED_TORCH_UNROLL_BY(CODED_TORCH_KNOTS_AT_ONCE)
  for (int64_t i = n - 2; i >= 1; --i) {
    const auto k = plan.knot(i);
    const State lower = kept.get(i - 1);
    const Columns value = k[kK0] * state.v, slope = k[kK2] * state.s;
    store(i + 1, k[kK1] * state.v + slope);
    state.s = lower.s + k[kH] * value + k[kKs] * state.s;
    state.v = lower.v + value - slope;
  }
  if (n > 1) {
    const Columns slope = plan.knot(0)[kFirstInverseH] * state.s;
    store(1, state.v + slope);
    store(0, first_value - slope);
  } else {
    store(0, state.v);
  }
}

}  // namespace coded_torch
