// The CUDA kernel's body and its launch configuration. A thread owns its columns and needs no other
// thread's data, so the body is a function of (block, thread, shared memory) that runs on the host
// just as well: the CPU tests run it over a whole grid.
#pragma once

#include <algorithm>
#include <cstddef>

#include "../../math/half.h"
#include "../../math/spline_sweep.h"
#include "../spline_args.h"

namespace coded_torch {

// Columns a thread reads at once: 16 bytes, the widest access of the memory system.
template <class T>
constexpr int kWidePack = 16 / sizeof(T);

// A row's worth of a thread's columns, moved as one access.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) RowPack {
  T value[kWidth];
};

// Rows asked for before they are needed: what a thread keeps in flight.
constexpr int kRowsAhead = 3;

// At most so many knots have their states in registers: 64 of them.
template <class T>
constexpr int kRegisterKnots = 128 / (kWidePack<T> * sizeof(acc_t<T>));

// The rows of a sweep in its order, each fetched `kAhead` rows before it is handed out.
template <class Row, int kAhead, class Fetch>
class RowsAhead {
 public:
  // fetch(k) reads the k-th row of `count`.
  CODED_TORCH_HD RowsAhead(const Fetch& fetch, int32_t count) : fetch_(fetch), count_(count) {
    CODED_TORCH_UNROLL
    for (int k = 0; k < kAhead; ++k) fetch_next(&rows_[k]);
  }
  CODED_TORCH_HD Row next() {
    const Row row = rows_[0];
    CODED_TORCH_UNROLL
    for (int k = 1; k < kAhead; ++k) rows_[k - 1] = rows_[k];
    fetch_next(&rows_[kAhead - 1]);
    return row;
  }

 private:
  CODED_TORCH_HD void fetch_next(Row* row) {
    if (fetched_ < count_) *row = fetch_(fetched_++);
  }

  const Fetch& fetch_;
  int32_t count_, fetched_ = 0;
  Row rows_[kAhead];
};

// As one access of 16 bytes, into which nvcc does not join a pack's stores by itself, and first to
// leave the cache: results are not read again here.
template <class Row>
CODED_TORCH_HD void store_row(void* to, const Row& row) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Row) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &row, sizeof bits);
    __stcs(static_cast<uint4*>(to), bits);
    return;
  }
#endif
  *static_cast<Row*>(to) = row;
}

// Where a thread keeps the states between the sweeps.
enum class States { kRegisters, kShared, kWorkspace };

struct SplineGrid {
  int64_t packs;  // of kWidth columns, over all groups
  int64_t blocks;
  int threads;  // a block
  States states;
  int64_t shared_bytes;     // a block; 0 where the states live elsewhere
  int64_t workspace_bytes;  // in all; 0 where the states live elsewhere
};

// What a launch has to know of the device.
struct Device {
  int index;
  int multiprocessors;
  int shared_bytes;  // that a block may have where a multiprocessor is to hold two
};

constexpr int kMaxThreads = 128;
constexpr int kMinThreads = 32;  // a warp
// The x dimension of a grid holds 2^31 - 1 blocks.
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
// So many of kMaxThreads are resident at 128 registers a thread. With a workspace no more are
// launched, and stride over the columns: it grows with the device, not with the batch.
constexpr int64_t kResidentBlocks = 4;

// Registers, where they are enough and packs wide, leave the shared memory empty and all rows of
// the values in flight at once. Shared memory serves as long as a multiprocessor's holds two blocks
// of a warp: fewer could not keep enough loads in flight.
inline SplineGrid plan_grid(const SplineArgs& args, int width, int64_t acc_bytes,
                            int64_t register_knots, const Device& device) {
  SplineGrid grid{};
  grid.packs = args.num_groups * (args.num_columns / width);
  const int64_t per_thread = num_kept_states(args.num_knots) * 2 * width * acc_bytes;
  grid.threads = kMaxThreads;
  if (args.num_knots <= register_knots) {
    grid.states = States::kRegisters;
  } else if (kMinThreads * per_thread <= device.shared_bytes) {
    grid.states = States::kShared;
    while (grid.threads * per_thread > device.shared_bytes) grid.threads /= 2;
    grid.shared_bytes = grid.threads * per_thread;
  } else {
    grid.states = States::kWorkspace;
  }
  grid.blocks = (grid.packs + grid.threads - 1) / grid.threads;
  if (grid.states == States::kWorkspace) {
    grid.blocks = std::min(grid.blocks, kResidentBlocks * device.multiprocessors);
    grid.workspace_bytes = grid.blocks * grid.threads * per_thread;
  }
  return grid;
}

// Wide packs need every row of a thread's columns to start on a multiple of the access.
template <class T>
bool fits_wide(const SplineArgs& args) {
  constexpr int64_t kWidth = kWidePack<T>;
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return aligned(args.in) && aligned(args.out) && args.num_columns % kWidth == 0 &&
         args.in_row_stride % kWidth == 0 && args.in_group_stride % kWidth == 0 &&
         args.out_row_stride % kWidth == 0 && args.out_group_stride % kWidth == 0;
}

// Sweeps the columns of pack `index`. `kept`: where the thread keeps its states.
template <class T, int kWidth, bool kTranspose, int kAhead, class Kept>
CODED_TORCH_HD void spline_pack(const SplineArgs& args, int64_t index, Kept& kept) {
  using Acc = acc_t<T>;
  using Columns = Pack<Acc, kWidth>;
  using Row = RowPack<T, kWidth>;
  const int64_t packs = args.num_columns / kWidth;
  const int64_t group = index / packs, column = index % packs * kWidth;

  const SplinePlan<Acc> plan(
      static_cast<const Acc*>(args.coefficients) + group * args.coefficients_stride,
      args.schedule + group * args.schedule_stride, args.num_knots);
  const T* in = static_cast<const T*>(args.in) + group * args.in_group_stride + column;
  T* out = static_cast<T*>(args.out) + group * args.out_group_stride + column;
  const auto fetch = [&](int32_t k) {
    const int64_t at = args.gather.at(kTranspose ? plan.order[k] : k, group);
    if (at < 0) return Row{};
    return *reinterpret_cast<const Row*>(in + at * args.in_row_stride);
  };
  RowsAhead<Row, kAhead, decltype(fetch)> rows(
      fetch, kTranspose ? plan.first[args.num_knots] : static_cast<int32_t>(args.num_knots));
  const auto load = [&](int64_t) {
    const Row row = rows.next();
    Columns columns;
    CODED_TORCH_UNROLL
    for (int k = 0; k < kWidth; ++k) columns.lane[k] = to_float(row.value[k]);
    return columns;
  };
  const auto store = [&](int64_t j, const Columns& columns) {
    const int64_t at = args.scatter.at(j, group);
    if (at < 0) return;
    Row row;
    CODED_TORCH_UNROLL
    for (int k = 0; k < kWidth; ++k) from_float(columns.lane[k], &row.value[k]);
    store_row(out + at * args.out_row_stride, row);
  };
  if constexpr (kTranspose) {
    spline_sweep_adjoint<Columns>(plan, kept, load, store);
  } else {
    spline_sweep<Columns>(plan, kept, load, store);
  }
}

// A thread sweeps its packs of columns. `shared` holds grid.shared_bytes, `workspace`
// grid.workspace_bytes.
template <class T, int kWidth, bool kTranspose, States kStates>
CODED_TORCH_HD void spline_thread(const SplineArgs& args, const SplineGrid& grid, int64_t block,
                                  int thread, void* shared, void* workspace) {
  using Columns = Pack<acc_t<T>, kWidth>;
  const int64_t first = block * grid.threads + thread;
  // Neighbouring threads' states lie side by side: no bank conflicts, coalesced in a workspace.
  if constexpr (kStates == States::kWorkspace) {
    const int64_t threads = grid.blocks * grid.threads;
    const StateStack<Columns> kept{static_cast<Columns*>(workspace) + first, threads};
    for (int64_t index = first; index < grid.packs; index += threads) {
      spline_pack<T, kWidth, kTranspose, kRowsAhead>(args, index, kept);
    }
  } else if (first >= grid.packs) {
    return;
  } else if constexpr (kStates == States::kShared) {
    const StateStack<Columns> kept{static_cast<Columns*>(shared) + thread, grid.threads};
    spline_pack<T, kWidth, kTranspose, kRowsAhead>(args, first, kept);
  } else {
    StateRegisters<Columns, kRegisterKnots<T>> kept;
    spline_pack<T, kWidth, kTranspose, kTranspose ? kRowsAhead : kRegisterKnots<T>>(args, first,
                                                                                    kept);
  }
}

}  // namespace coded_torch
