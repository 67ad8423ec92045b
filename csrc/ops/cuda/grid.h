// How the CUDA kernels of splines are launched, and which of them: the host's part.
#pragma once

#include <algorithm>

#include "dense_block.h"
#include "spline_block.h"

namespace coded_torch {

// The x dimension of a grid holds 2^31 - 1 blocks.
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// What a launch has to know of the device.
struct Device {
  int index;
  int multiprocessors;
  int shared_bytes;  // that a block may have where a multiprocessor is to hold two
};

// Shared memory serves while a multiprocessor's holds two blocks of kMaxThreads, as fewer threads
// wait for the memory most of the time. Blocks shrink to a warp where there are few columns, so
// that every multiprocessor has some.
inline SplineGrid plan_grid(const SplineArgs& args, int64_t acc_bytes, const Device& device) {
  SplineGrid grid{};
  const int64_t columns = args.num_groups * args.num_columns;
  const int64_t per_thread = num_kept_states(args.num_knots) * 2 * acc_bytes;
  grid.threads = kMaxThreads;
  while (grid.threads > kWarp &&
         columns < grid.threads * kResidentBlocks * device.multiprocessors) {
    grid.threads /= 2;
  }
  grid.blocks = (columns + grid.threads - 1) / grid.threads;
  if (kMaxThreads * per_thread <= device.shared_bytes) {
    grid.states = States::kShared;
    grid.shared_bytes = grid.threads * per_thread;
  } else {
    grid.states = States::kWorkspace;
    const int64_t resident = kResidentBlocks * (kMaxThreads / grid.threads);
    grid.blocks = std::min(grid.blocks, resident * device.multiprocessors);
    grid.workspace_bytes = grid.blocks * grid.threads * per_thread;
  }
  return grid;
}

// Whether the shared memory holds what one warp needs of the matrix.
inline bool fits_dense(int64_t rows_in, int64_t acc_bytes, const Device& device) {
  return rows_in * (kDenseRows * acc_bytes + 16) <= device.shared_bytes;
}

inline DenseGrid plan_dense(const SplineArgs& args, bool transpose, int width, int64_t acc_bytes,
                            const Device& device) {
  const auto over = [](int64_t count, int64_t by) { return (count + by - 1) / by; };
  DenseGrid grid{};
  grid.rows_in = transpose ? args.num_points : args.num_knots;
  grid.rows_out = transpose ? args.num_knots : args.num_points;
  grid.packs = args.num_groups * (args.num_columns / width);
  grid.tiles = over(grid.packs, kWarp);
  const int64_t all = over(grid.rows_out, kDenseRows);
  const int64_t fit = (device.shared_bytes / grid.rows_in - 16) / (kDenseRows * acc_bytes);
  grid.chunks = over(all, std::min<int64_t>(fit, kDenseWarps));
  const int warps = static_cast<int>(over(all, grid.chunks));
  grid.threads = warps * kWarp;
  grid.shared_bytes =
      static_cast<int>(grid.rows_in * dense_stride(warps, static_cast<int>(acc_bytes)) * acc_bytes);
  // No more than are resident at once: each loads the matrix. Two of kDenseWarps, or their like.
  const int64_t resident =
      std::min<int64_t>(2 * kDenseWarps / warps, 2 * device.shared_bytes / grid.shared_bytes);
  const int64_t strides = std::max<int64_t>(resident * device.multiprocessors / grid.chunks, 1);
  grid.blocks = grid.chunks * std::min(grid.tiles, strides);
  return grid;
}

// Wide packs need every row of a thread's columns to start on a multiple of the access.
template <class T>
bool fits_wide(const SplineArgs& args) {
  constexpr int64_t kWidth = kDenseWidth<T>;
  const auto aligned = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % (sizeof(T) * kWidth) == 0;
  };
  return aligned(args.in) && aligned(args.out) && args.num_columns % kWidth == 0 &&
         args.in_row_stride % kWidth == 0 && args.in_group_stride % kWidth == 0 &&
         args.out_row_stride % kWidth == 0 && args.out_group_stride % kWidth == 0;
}

// What a call is done with.
struct Choice {
  enum Kernel { kSweep, kNarrow, kWide } kernel;
  DenseGrid grid;
};

// Plans have a matrix where coded_torch/linear.py says that it is faster. The number of
// columns decides on nothing but the packs' width, which no result depends on: wide ones where
// every multiprocessor gets one of their blocks.
template <class T>
Choice choose(const SplineArgs& args, bool transpose, const Device& device) {
  constexpr int64_t kAcc = sizeof(acc_t<T>);
  const int64_t rows_in = transpose ? args.num_points : args.num_knots;
  if (args.matrix == nullptr || !fits_dense(rows_in, kAcc, device)) return {Choice::kSweep, {}};
  if (kDenseWidth<T> > 1 && fits_wide<T>(args)) {
    const DenseGrid wide = plan_dense(args, transpose, kDenseWidth<T>, kAcc, device);
    if (wide.blocks >= device.multiprocessors) return {Choice::kWide, wide};
  }
  return {Choice::kNarrow, plan_dense(args, transpose, 1, kAcc, device)};
}

}  // namespace coded_torch
