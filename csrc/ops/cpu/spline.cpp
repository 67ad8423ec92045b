// spline_apply on the CPU: tiles of columns over threads. A column's result depends on nothing but
// the column, so neither on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../../math/half.h"
#include "../../math/spline_sweep.h"
#include "../spline_checks.h"
#include "capabilities.h"
#include "huge_pages.h"

namespace coded_torch {

// Results of at least this many bytes go past the cache.
constexpr int64_t kStreamBytes = int64_t{4} << 20;
// A thread is worth waking for this many values read and written.
constexpr int64_t kValuesPerThread = int64_t{1} << 15;
// States of a tile that fit here are kept on the stack.
constexpr int64_t kStackBytes = int64_t{64} << 10;

static bool can_stream(const SplineArgs& args, int64_t out_bytes, int64_t value_bytes) {
  const auto aligned = [](int64_t bytes) { return bytes % 64 == 0; };
  return out_bytes >= kStreamBytes && aligned(reinterpret_cast<intptr_t>(args.out)) &&
         aligned(args.out_row_stride * value_bytes) && aligned(args.out_group_stride * value_bytes);
}

// All that keeps a sweep in bounds: slots that share out the points, and results in the rows there
// are. Without a branch an entry, so that it costs nothing beside a sweep of few columns.
static void check_schedule(const int32_t* schedule, int64_t plans, int64_t num_knots,
                           int64_t num_points) {
  for (int64_t p = 0; p < plans; ++p) {
    const int32_t* first = schedule + p * schedule_size(num_knots, num_points);
    const int32_t* order = first + num_knots + 1;
    int32_t bad = first[0] != 0 || first[num_knots] != num_points;
    for (int64_t i = 0; i < num_knots; ++i) bad |= first[i] > first[i + 1];
    const auto points = static_cast<uint32_t>(num_points);
    for (int64_t j = 0; j < num_points; ++j) bad |= static_cast<uint32_t>(order[j]) >= points;
    STD_TORCH_CHECK(!bad, "spline_apply: schedule must hold slots rising from 0 to ", num_points,
                    " and an order of as many points, got others in row ", p);
  }
}

static void check_gather(const RowIndex& gather, int64_t entries) {
  for (int64_t i = 0; i < entries; ++i) {
    STD_TORCH_CHECK(gather.rows[i] >= -1 && gather.rows[i] < gather.num_rows,
                    "spline_apply: gather must lie in -1..", gather.num_rows - 1, ", got ",
                    gather.rows[i]);
  }
}

// Also zeroes the rows of the result that nothing is written to.
static void check_scatter(const RowIndex& scatter, int64_t entries, char* out, int64_t row_bytes,
                          int64_t row_stride_bytes) {
  for (int64_t i = 0; i < entries; ++i) {
    const int64_t row = scatter.rows[i];
    STD_TORCH_CHECK(row >= -1 && row < scatter.num_rows, "spline_apply: scatter must lie in -1..",
                    scatter.num_rows - 1, ", got ", row);
  }
  if (row_bytes == 0) return;  // no memory bounds the number of rows, and none of them is written
  std::vector<bool> written(scatter.num_rows, false);
  for (int64_t i = 0; i < entries; ++i) {
    const int64_t row = scatter.rows[i];
    if (row < 0) continue;
    STD_TORCH_CHECK(!written[row], "spline_apply: scatter must name no row twice, got ", row,
                    " again");
    written[row] = true;
  }
  for (int64_t row = 0; row < scatter.num_rows; ++row) {
    if (!written[row]) std::memset(out + row * row_stride_bytes, 0, row_bytes);
  }
}

Tensor spline_apply_cpu(const Tensor& values, const Tensor& coefficients, const Tensor& schedule,
                        bool transpose, const std::optional<Tensor>& gather,
                        const std::optional<Tensor>& scatter, std::optional<int64_t> num_rows) {
  const TileKernels& kernels = *chosen_capability().load()->tiles;
  const SplineCall call =
      prepare_spline(values, coefficients, schedule, transpose, {gather, scatter, num_rows});
  const SplineArgs& args = call.args;
  const int64_t value_bytes = static_cast<int64_t>(call.out.element_size());
  ask_for_huge_pages(args.out, call.out.numel() * value_bytes);
  touch_huge_pages(args.out, call.out.numel() * value_bytes);
  check_schedule(args.schedule, schedule.size(0), args.num_knots,
                 schedule.size(1) - 1 - args.num_knots);
  if (gather) check_gather(args.gather, gather->numel());
  if (scatter) {
    check_scatter(args.scatter, scatter->numel(), static_cast<char*>(args.out),
                  args.num_columns * value_bytes, args.out_row_stride * value_bytes);
  }
  if (args.num_groups == 0 || args.num_columns == 0) return call.out;

  const int64_t acc_bytes = std::max<int64_t>(value_bytes, sizeof(float));
  const int64_t columns = kernels.tile_bytes / acc_bytes;
  const int64_t tiles = args.num_groups * ((args.num_columns + columns - 1) / columns);
  const int64_t rows = schedule.size(1) - 1;  // read and written
  const int64_t grain = std::max<int64_t>(1, kValuesPerThread / (rows * columns));
  const bool stream = can_stream(args, call.out.numel() * value_bytes, value_bytes);
  const TileFunction run = kernels.run[static_cast<int>(call.dtype)][transpose];
  const int64_t kept_bytes = num_kept_states(args.num_knots) * 2 * kernels.tile_bytes;

  std::atomic<bool> out_of_memory{false};  // an exception must not leave a parallel body
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    alignas(64) char stack[kStackBytes];
    if (kept_bytes <= kStackBytes) {
      run(args, begin, end, stack, stream);
      return;
    }
    const std::unique_ptr<void, decltype(&std::free)> kept(std::aligned_alloc(64, kept_bytes),
                                                           &std::free);
    if (kept) {
      run(args, begin, end, kept.get(), stream);
    } else {
      out_of_memory = true;
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "spline_apply: out of memory for ", kept_bytes,
                  " bytes of states per thread");
  return call.out;
}

std::string cpu_capabilities() {
  std::string names;
  for (const Capability& found : capabilities()) names += (names.empty() ? "" : " ") + found.name;
  return names;
}

void use_cpu_capability(const std::string& name) {
  for (const Capability& found : capabilities()) {
    if (found.name == name) return chosen_capability().store(&found);
  }
  STD_TORCH_CHECK(false, "_use_cpu_capability: capability must be one of ", cpu_capabilities(),
                  ", got ", name);
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CPU, m) {
  m.impl("spline_apply", TORCH_BOX(&spline_apply_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CompositeExplicitAutograd, m) {
  m.impl("cpu_capabilities", TORCH_BOX(&cpu_capabilities));
  m.impl("_use_cpu_capability", TORCH_BOX(&use_cpu_capability));
}

}  // namespace coded_torch
