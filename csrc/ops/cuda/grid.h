// Which kernel applies a spline on CUDA, and how it is launched: the host's part.
#pragma once

#include <algorithm>
#include <string>

#include "dense_block.h"
#include "spline_block.h"

namespace coded_torch {

// What a launch has to know of the device.
struct Device {
  int index;
  int capability;  // 90 of sm_90
  int multiprocessors;
  int shared_bytes;    // that a block may have where a multiprocessor is to hold two
  int reserved_bytes;  // of a multiprocessor's shared memory for each block, beside the block's
  void* context;       // the primary one
};

// A kernel is compiled for a dtype and for a direction. All have numbers; those of wide products of
// float64, which there are not, would be the last.
struct Variant {
  Kind kind;
  DType dtype;
  bool transpose;

  static constexpr int kCount = 30;
  static Variant of(int64_t number) {
    return {Kind(number / 8), DType(3 - number / 2 % 4), number % 2 == 1};
  }
  int number() const {
    return 8 * static_cast<int>(kind) + 2 * (3 - static_cast<int>(dtype)) + (transpose ? 1 : 0);
  }
  std::string name() const {
    static const char* kinds[] = {"sweep", "workspace_sweep", "product", "wide_product"};
    static const char* types[] = {"float64", "float32", "bfloat16", "float16"};
    return std::string(kinds[static_cast<int>(kind)]) + "_" + types[static_cast<int>(dtype)] +
           (transpose ? "_transposed" : "");
  }
  int64_t value_bytes() const {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  }
  int64_t acc_bytes() const { return dtype == DType::kFloat64 ? 8 : 4; }
  int width() const { return kind == Kind::kWideProduct && dtype != DType::kFloat64 ? 4 : 1; }
};

inline int64_t state_bytes(const SplineArgs& args, const Variant& variant) {
  return num_kept_states(args.num_knots) * 2 * variant.acc_bytes();  // of a thread
}

// Blocks shrink to a warp where there are few columns, so that every multiprocessor has some.
inline Grid plan_sweep(const SplineArgs& args, const Variant& variant, const Device& device) {
  Grid grid{};
  const int64_t columns = args.num_groups * args.num_columns;
  const int64_t per_thread = state_bytes(args, variant);
  grid.threads = kMaxThreads;
  const int64_t full = kResidentThreads / kMaxThreads * device.multiprocessors;  // blocks
  while (grid.threads > kWarp && columns < grid.threads * full) grid.threads /= 2;
  grid.blocks = (columns + grid.threads - 1) / grid.threads;
  if (variant.kind == Kind::kSweep) {
    grid.shared_bytes = static_cast<int>(grid.threads * per_thread);
  } else {
    // No more blocks than are resident: the workspace grows with the device, not with the batch.
    const int64_t resident = kResidentThreads / grid.threads * device.multiprocessors;
    grid.blocks = std::min(grid.blocks, resident);
    grid.workspace_bytes = grid.blocks * grid.threads * per_thread;
  }
  return grid;
}

inline Grid plan_product(const SplineArgs& args, const Variant& variant, const Device& device) {
  const auto over = [](int64_t count, int64_t by) { return (count + by - 1) / by; };
  const int acc_bytes = static_cast<int>(variant.acc_bytes());
  Grid grid{};
  grid.rows_in = variant.transpose ? args.num_points : args.num_knots;
  grid.rows_out = variant.transpose ? args.num_knots : args.num_points;
  grid.packs = args.num_groups * (args.num_columns / variant.width());
  grid.tiles = over(grid.packs, kWarp);
  const int64_t all = over(grid.rows_out, kDenseRows);
  const int64_t fit = (device.shared_bytes / grid.rows_in - 16) / (kDenseRows * acc_bytes);
  grid.chunks = over(all, std::min<int64_t>(fit, kDenseWarps));
  const int warps = static_cast<int>(over(all, grid.chunks));
  grid.threads = warps * kWarp;
  grid.shared_bytes = static_cast<int>(grid.rows_in * dense_stride(warps, acc_bytes) * acc_bytes);
  // No more than are resident at once: each loads the matrix.
  const int reserved = device.reserved_bytes;
  const int64_t resident =
      std::min<int64_t>(kResidentThreads / grid.threads,
                        2 * (device.shared_bytes + reserved) / (grid.shared_bytes + reserved));
  const int64_t strides = std::max<int64_t>(resident * device.multiprocessors / grid.chunks, 1);
  grid.blocks = grid.chunks * std::min(grid.tiles, strides);
  return grid;
}

inline Grid plan_grid(const SplineArgs& args, const Variant& variant, const Device& device) {
  return variant.kind == Kind::kSweep || variant.kind == Kind::kWorkspaceSweep
             ? plan_sweep(args, variant, device)
             : plan_product(args, variant, device);
}

// Wide packs need every row of a thread's columns to start on a multiple of the access.
inline bool fits_wide(const SplineArgs& args, const Variant& wide) {
  const auto fits = [&](int64_t strides) { return strides % wide.width() == 0; };
  const auto aligned = [&](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % (wide.value_bytes() * wide.width()) == 0;
  };
  return aligned(args.in) && aligned(args.out) && fits(args.num_columns) &&
         fits(args.in_row_stride) && fits(args.in_group_stride) && fits(args.out_row_stride) &&
         fits(args.out_group_stride);
}

// Plans have a matrix where coded_torch/linear.py says that it is faster. The number of columns
// decides on nothing but the packs' width, which no result depends on: wide ones where every
// multiprocessor gets one of their blocks.
inline Variant choose(const SplineArgs& args, DType dtype, bool transpose, const Device& device) {
  const Variant narrow{Kind::kProduct, dtype, transpose},
      wide{Kind::kWideProduct, dtype, transpose};
  const int64_t rows_in = transpose ? args.num_points : args.num_knots;
  // The shared memory holds what one warp needs of the matrix.
  if (args.matrix != nullptr &&
      rows_in * (kDenseRows * narrow.acc_bytes() + 16) <= device.shared_bytes) {
    const bool is_wide = wide.width() > 1 && fits_wide(args, wide) &&
                         plan_product(args, wide, device).blocks >= device.multiprocessors;
    return is_wide ? wide : narrow;
  }
  // Shared memory serves while a multiprocessor's holds two blocks of kMaxThreads, as fewer threads
  // wait for the memory most of the time.
  const Variant sweep{Kind::kSweep, dtype, transpose};
  return kMaxThreads * state_bytes(args, sweep) <= device.shared_bytes
             ? sweep
             : Variant{Kind::kWorkspaceSweep, dtype, transpose};
}

}  // namespace coded_torch
