// The CUDA kernel's body and its launch configuration. A thread owns its columns and needs no other
// thread's data, so the body is a function of (block, thread, shared memory) that runs on the host
// just as well: the CPU tests run it over a whole grid.
#pragma once

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

struct SplineGrid {
  int64_t packs;  // of kWidth columns, over all groups
  int64_t blocks;
  int threads;              // a block
  int64_t shared_bytes;     // a block; 0 where the states live in the workspace
  int64_t workspace_bytes;  // in all; 0 where they live in shared memory
};

constexpr int kMaxThreads = 128;
constexpr int kMinThreads = 32;  // a warp
// The x dimension of a grid holds 2^31 - 1 blocks.
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// States go to shared memory as long as it holds two blocks of a warp per multiprocessor: fewer
// could not keep enough loads in flight. Beyond that, to global memory.
inline SplineGrid plan_grid(const SplineArgs& args, int width, int64_t acc_bytes,
                            int64_t shared_per_multiprocessor) {
  SplineGrid grid{};
  grid.packs = args.num_groups * (args.num_columns / width);
  const int64_t per_thread = num_kept_states(args.num_knots) * 2 * width * acc_bytes;
  grid.threads = kMaxThreads;
  while (grid.threads > kMinThreads && 2 * grid.threads * per_thread > shared_per_multiprocessor) {
    grid.threads /= 2;
  }
  if (2 * grid.threads * per_thread <= shared_per_multiprocessor) {
    grid.shared_bytes = grid.threads * per_thread;
  } else {
    grid.threads = kMaxThreads;
  }
  grid.blocks = (grid.packs + grid.threads - 1) / grid.threads;
  if (grid.shared_bytes == 0) grid.workspace_bytes = grid.blocks * grid.threads * per_thread;
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

template <class T, int kWidth, bool kTranspose>
CODED_TORCH_HD void spline_thread(const SplineArgs& args, const SplineGrid& grid, int64_t block,
                                  int thread, void* shared, void* workspace) {
  using Acc = acc_t<T>;
  using Columns = Pack<Acc, kWidth>;
  using Row = RowPack<T, kWidth>;
  const int64_t index = block * grid.threads + thread;
  if (index >= grid.packs) return;
  const int64_t packs = args.num_columns / kWidth;
  const int64_t group = index / packs, column = index % packs * kWidth;

  const SplinePlan<Acc> plan(
      static_cast<const Acc*>(args.coefficients) + group * args.coefficients_stride,
      args.schedule + group * args.schedule_stride, args.num_knots);
  const T* in = static_cast<const T*>(args.in) + group * args.in_group_stride + column;
  T* out = static_cast<T*>(args.out) + group * args.out_group_stride + column;
  const auto load = [&](int64_t i) {
    const int64_t at = args.gather.at(i, group);
    if (at < 0) return Columns::zero();
    const Row row = *reinterpret_cast<const Row*>(in + at * args.in_row_stride);
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
  // Neighbouring threads' states lie side by side: no bank conflicts, and coalesced in a workspace.
  const StateStack<Columns> kept =
      grid.workspace_bytes > 0
          ? StateStack<Columns>{static_cast<Columns*>(workspace) + index,
                                grid.blocks * grid.threads}
          : StateStack<Columns>{static_cast<Columns*>(shared) + thread, grid.threads};
  if constexpr (kTranspose) {
    spline_sweep_adjoint(plan, kept, load, store);
  } else {
    spline_sweep(plan, kept, load, store);
  }
}

}  // namespace coded_torch
