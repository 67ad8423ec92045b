// The body of the kernel that sweeps columns. A thread owns a column and needs no other thread's
// data.
#pragma once

#include "../../math/spline_sweep.h"
#include "rows.h"

namespace coded_torch {

// Rows and states asked for before they are needed: what hides the memory's latency where a
// multiprocessor has few warps. A register each, or two.
constexpr int kRowsAhead = 8;
constexpr int kStatesAhead = 4;

// A plan whose coefficients are read 16 bytes at a time.
template <class Acc>
struct DevicePlan : SplinePlan<Acc> {
  using SplinePlan<Acc>::SplinePlan;

  CODED_TORCH_HD RowPack<Acc, 4> quarter(const Acc* from) const {
    constexpr int kLoad = 16 / sizeof(Acc);
    RowPack<Acc, 4> row;
    CODED_TORCH_UNROLL
    for (int i = 0; i < 4; i += kLoad) {
      const auto part = load_constant<RowPack<Acc, kLoad>>(from + i);
      CODED_TORCH_UNROLL
      for (int k = 0; k < kLoad; ++k) row.value[i + k] = part.value[k];
    }
    return row;
  }
  struct Knot {
    RowPack<Acc, 4> part[kKnotCoefficients / 4];
    CODED_TORCH_HD Acc operator[](int i) const { return part[i / 4].value[i % 4]; }
  };
  // the compiler leaves out the parts that are not used.
  CODED_TORCH_HD Knot knot(int64_t i) const {
    const Acc* row = SplinePlan<Acc>::knot(i);
    return {{quarter(row), quarter(row + 4), quarter(row + 8)}};
  }
  CODED_TORCH_HD RowPack<Acc, 4> point(int64_t j) const {
    return quarter(SplinePlan<Acc>::point(j));
  }
  CODED_TORCH_HD int32_t begin(int64_t slot) const { return load_constant(this->first + slot); }
  CODED_TORCH_HD int32_t place(int64_t j) const { return load_constant(this->order + j); }
};

// States that are read back before they are needed.
template <class Columns>
struct StatesAhead : StateStack<Columns> {
  SplineState<Columns> next[kStatesAhead];

  CODED_TORCH_HD StatesAhead(Columns* base, int64_t stride) : StateStack<Columns>{base, stride} {}
  CODED_TORCH_HD void turn(int64_t count) {
    CODED_TORCH_UNROLL
    for (int k = 0; k < kStatesAhead; ++k) fetch(count - 1 - k, &next[k]);
  }
  CODED_TORCH_HD SplineState<Columns> get(int64_t i) {
    const SplineState<Columns> state = next[0];
    CODED_TORCH_UNROLL
    for (int k = 1; k < kStatesAhead; ++k) next[k - 1] = next[k];
    fetch(i - kStatesAhead, &next[kStatesAhead - 1]);
    return state;
  }
  CODED_TORCH_HD void fetch(int64_t i, SplineState<Columns>* state) const {
    if (i >= 0) *state = StateStack<Columns>::get(i);
  }
};

constexpr int kMaxThreads = 128;

// Sweeps column `index`. `kept`: where the thread keeps its states.
template <class T, bool kTranspose, class Kept>
CODED_TORCH_HD void spline_column(const SplineArgs& args, int64_t index, Kept& kept) {
  using Acc = acc_t<T>;
  using Columns = Pack<Acc, 1>;
  const ColumnPack<T, 1> pack(args, index);
  const DevicePlan<Acc> plan(
      static_cast<const Acc*>(args.coefficients) + pack.group * args.coefficients_stride,
      args.schedule + pack.group * args.schedule_stride, args.num_knots);
  const auto fetch = [&](int32_t k) { return pack.fetch(kTranspose ? plan.place(k) : k); };
  RowsAhead<RowPack<T, 1>, kRowsAhead, decltype(fetch)> rows(
      fetch, static_cast<int32_t>(kTranspose ? args.num_points : args.num_knots));
  const auto load = [&](int64_t) { return pack.widen(rows.next()); };
  const auto store = [&](int64_t j, const Columns& columns) { pack.store(j, columns); };
  if constexpr (kTranspose) {
    spline_sweep_adjoint<Columns>(plan, kept, load, store);
  } else {
    spline_sweep<Columns>(plan, kept, load, store);
  }
}

// A thread sweeps its columns. `shared` holds grid.shared_bytes, `workspace` grid.workspace_bytes.
template <class T, bool kTranspose, Kind kKind>
CODED_TORCH_HD void spline_thread(const SplineArgs& args, const Grid& grid, int64_t block,
                                  int thread, void* shared, void* workspace) {
  using Columns = Pack<acc_t<T>, 1>;
  const int64_t columns = args.num_groups * args.num_columns;
  const int64_t first = block * grid.threads + thread;
  // Neighbouring threads' states lie side by side: no bank conflicts, coalesced in a workspace.
  if constexpr (kKind == Kind::kWorkspaceSweep) {
    const int64_t threads = grid.blocks * grid.threads;
    StatesAhead<Columns> kept(static_cast<Columns*>(workspace) + first, threads);
    for (int64_t index = first; index < columns; index += threads) {
      spline_column<T, kTranspose>(args, index, kept);
    }
  } else if (first < columns) {
    StatesAhead<Columns> kept(static_cast<Columns*>(shared) + thread, grid.threads);
    spline_column<T, kTranspose>(args, first, kept);
  }
}

}  // namespace coded_torch
