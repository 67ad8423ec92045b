// Runs the CUDA kernels over a whole grid, block by block and thread by thread, on the host: their
// body as the host's compiler sees it or, with CODED_TORCH_PTX, as nvcc does (tests/ptx.py). Memory
// is allocated to the byte, so that AddressSanitizer sees every access out of bounds.
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "../../csrc/ops/cuda/grid.h"
#include "block.h"

using namespace coded_torch;

#ifdef CODED_TORCH_PTX
#include "ptx.h"

namespace coded_torch {
// As declared in spline.cu, so that their names are those of the translated kernels.
template <class T, bool kTranspose, States kStates>
void spline_kernel(SplineArgs args, SplineGrid grid, void* workspace);
template <class T, int kWidth>
void dense_kernel(SplineArgs args, DenseGrid grid, bool transpose);
void mark_written(RowIndex scatter, int64_t entries, char* written);
void zero_unwritten(const char* written, char* out, int64_t row_bytes, int64_t row_stride_bytes);
}  // namespace coded_torch

template <class T, bool kTranspose, States kStates>
static void run_blocks(const SplineArgs& args, const SplineGrid& grid, void* workspace) {
  ptx::run_grid(&spline_kernel<T, kTranspose, kStates>, grid.blocks, grid.threads,
                grid.shared_bytes, args, grid, workspace);
}
template <class T, int kWidth>
static void run_blocks(const SplineArgs& args, const DenseGrid& grid, bool transpose) {
  ptx::run_grid(&dense_kernel<T, kWidth>, grid.blocks, grid.threads, grid.shared_bytes, args, grid,
                transpose);
}
#else
// Calls run(block, shared memory) for each block; what it holds is NaN, so that nothing may be read
// unwritten.
template <class Grid, class Run>
static void each_block(const Grid& grid, const Run& run) {
  const auto shared = std::make_unique<char[]>(grid.shared_bytes);
  for (int64_t block = 0; block < grid.blocks; ++block) {
    std::memset(shared.get(), 0xff, grid.shared_bytes);
    run(block, shared.get());
  }
}

template <class T, bool kTranspose, States kStates>
static void run_blocks(const SplineArgs& args, const SplineGrid& grid, void* workspace) {
  each_block(grid, [&](int64_t block, char* shared) {
    for (int thread = 0; thread < grid.threads; ++thread) {
      spline_thread<T, kTranspose, kStates>(args, grid, block, thread, shared, workspace);
    }
  });
}

template <class T, int kWidth>
static void run_blocks(const SplineArgs& args, const DenseGrid& grid, bool transpose) {
  each_block(grid, [&](int64_t index, char* shared) {
    block::run_threads(grid.threads, [&](uint32_t thread) {
      dense_thread<T, kWidth>(args, grid, transpose, index, static_cast<int>(thread), shared,
                              [] { block::barrier(0); });
    });
  });
}
#endif

// What a call was done with, as Python sees it.
struct Launched {
  int kernel;  // Choice::Kernel
  int states;  // of a sweep
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int64_t workspace_bytes;
};

static Launched launched(const SplineGrid& grid) {
  return {Choice::kSweep,    static_cast<int>(grid.states), grid.blocks, grid.threads,
          grid.shared_bytes, grid.workspace_bytes};
}
static Launched launched(const Choice& choice) {
  const DenseGrid& grid = choice.grid;
  return {choice.kernel, 0, grid.blocks, grid.threads, grid.shared_bytes, 0};
}

template <class T, bool kTranspose, States kStates>
static void run_grid(const SplineArgs& args, const SplineGrid& grid) {
  const auto workspace = std::make_unique<char[]>(grid.workspace_bytes);
  std::memset(workspace.get(), 0xff, grid.workspace_bytes);
  run_blocks<T, kTranspose, kStates>(args, grid, workspace.get());
}

template <class T, bool kTranspose>
static Launched sweep(const SplineArgs& args, const Device& device) {
  const SplineGrid grid = plan_grid(args, sizeof(acc_t<T>), device);
  grid.states == States::kShared ? run_grid<T, kTranspose, States::kShared>(args, grid)
                                 : run_grid<T, kTranspose, States::kWorkspace>(args, grid);
  return launched(grid);
}

template <class T>
static Launched run(const SplineArgs& args, bool transpose, const Device& device) {
  const Choice choice = choose<T>(args, transpose, device);
  if (choice.kernel == Choice::kSweep) {
    return transpose ? sweep<T, true>(args, device) : sweep<T, false>(args, device);
  }
  choice.kernel == Choice::kWide ? run_blocks<T, kDenseWidth<T>>(args, choice.grid, transpose)
                                 : run_blocks<T, 1>(args, choice.grid, transpose);
  return launched(choice);
}

static Launched run(const SplineArgs& args, int dtype, bool transpose, const Device& device) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat64:
      return run<double>(args, transpose, device);
    case DType::kFloat32:
      return run<float>(args, transpose, device);
    case DType::kBFloat16:
      return run<bfloat16>(args, transpose, device);
    default:
      return run<float16>(args, transpose, device);
  }
}

#ifdef CODED_TORCH_PTX
// As launch_zero_unwritten() in spline.cu.
static void zero_rest(const SplineArgs& args, int64_t entries, int64_t value_bytes) {
  const auto written = std::make_unique<char[]>(args.scatter.num_rows);
  ptx::run_grid(&mark_written, (entries + kMaxThreads - 1) / kMaxThreads, kMaxThreads, 0,
                args.scatter, entries, written.get());
  ptx::run_grid(&zero_unwritten, args.scatter.num_rows, kMaxThreads, 0, written.get(),
                static_cast<char*>(args.out), args.num_columns * value_bytes,
                args.out_row_stride * value_bytes);
}
#else
static void zero_rest(const SplineArgs& args, int64_t entries, int64_t value_bytes) {
  std::vector<bool> written(args.scatter.num_rows);
  for (int64_t i = 0; i < entries; ++i) {
    if (args.scatter.rows[i] >= 0) written[args.scatter.rows[i]] = true;
  }
  for (int64_t row = 0; row < args.scatter.num_rows; ++row) {
    if (written[row]) continue;
    std::memset(static_cast<char*>(args.out) + row * args.out_row_stride * value_bytes, 0,
                args.num_columns * value_bytes);
  }
}
#endif

extern "C" {

// What Python takes them for.
int64_t coded_torch_sizeof_args() { return sizeof(SplineArgs); }
int64_t coded_torch_sizeof_launched() { return sizeof(Launched); }

// `scattered`: entries of the index of results. `failure` receives what went wrong, if anything.
Launched coded_torch_run_grid(const SplineArgs* args, int dtype, bool transpose, Device device,
                              int64_t scattered, char failure[80]) {
  constexpr int64_t kValueBytes[] = {8, 4, 2, 2};
  try {
    if (args->scatter.rows) zero_rest(*args, scattered, kValueBytes[dtype]);
    return run(*args, dtype, transpose, device);
  } catch (const std::exception& error) {
    std::strncpy(failure, error.what(), 79);
    return {};
  }
}

// The launch configuration alone, for sizes that no memory holds.
Launched coded_torch_plan_grid(const SplineArgs* args, bool is_double, bool transpose,
                               Device device) {
  if (args->matrix == nullptr) return launched(plan_grid(*args, is_double ? 8 : 4, device));
  return launched(is_double ? choose<double>(*args, transpose, device)
                            : choose<float>(*args, transpose, device));
}

float coded_torch_half_to_float(uint16_t bits) { return to_float(float16{bits}); }

uint16_t coded_torch_float_to_half(float value) {
  float16 out;
  from_float(value, &out);
  return out.bits;
}

uint16_t coded_torch_float_to_bfloat16(float value) {
  bfloat16 out;
  from_float(value, &out);
  return out.bits;
}
}
