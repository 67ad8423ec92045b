// Runs the CUDA kernels over a whole grid, block by block and thread by thread, on the host: their
// body as the host's compiler sees it; with CODED_TORCH_PTX, as NVRTC does (tests/ptx.py); or with
// CODED_TORCH_THREADS, by a thread of the host for each CUDA thread (tests/cuda_as_cpp.py).
// Memory is allocated to the byte, so that AddressSanitizer sees every access out of bounds.
#include <cstring>
#include <exception>
#include <memory>

#include "../../csrc/ops/cuda/grid.h"
#include "block.h"

using namespace coded_torch;

#ifdef CODED_TORCH_PTX
#include "ptx.h"

static void run_blocks(const SplineArgs& args, const Variant& variant, const Grid& grid,
                       void* workspace) {
  ptx::run_grid(variant.name(), grid.blocks, grid.threads, grid.shared_bytes, args, grid,
                workspace);
}
#elif defined(CODED_TORCH_THREADS)
#include "threads.h"

static void run_blocks(const SplineArgs& args, const Variant& variant, const Grid& grid,
                       void* workspace) {
  void* parameters[] = {const_cast<SplineArgs*>(&args), const_cast<Grid*>(&grid), &workspace};
  threads::run_grid(variant.name(), grid.blocks, grid.threads, grid.shared_bytes, parameters);
}
#else
// As the kernel of spline.cu.
template <class T, bool kTranspose>
static void run_thread(const SplineArgs& args, Kind kind, const Grid& grid, int64_t block,
                       int thread, void* shared, void* workspace) {
  const auto barrier = [] { block::barrier(0); };
  switch (kind) {
    case Kind::kSweep:
      return spline_thread<T, kTranspose, Kind::kSweep>(args, grid, block, thread, shared,
                                                        workspace);
    case Kind::kWorkspaceSweep:
      return spline_thread<T, kTranspose, Kind::kWorkspaceSweep>(args, grid, block, thread, shared,
                                                                 workspace);
    case Kind::kProduct:
      return dense_thread<T, 1>(args, grid, kTranspose, block, thread, shared, barrier);
    case Kind::kWideProduct:
      return dense_thread<T, kDenseWidth<T> >(args, grid, kTranspose, block, thread, shared,
                                              barrier);
  }
}

template <class T>
static void run_blocks(const SplineArgs& args, const Variant& variant, const Grid& grid,
                       void* workspace) {
  const auto run = variant.transpose ? &run_thread<T, true> : &run_thread<T, false>;
  // What it holds is NaN before, so that nothing may be read unwritten.
  const auto shared = std::make_unique<char[]>(grid.shared_bytes);
  for (int64_t block = 0; block < grid.blocks; ++block) {
    std::memset(shared.get(), 0xff, grid.shared_bytes);
    block::run_threads(grid.threads, [&](uint32_t thread) {
      run(args, variant.kind, grid, block, static_cast<int>(thread), shared.get(), workspace);
    });
  }
}

static void run_blocks(const SplineArgs& args, const Variant& variant, const Grid& grid,
                       void* workspace) {
  switch (variant.dtype) {
    case DType::kFloat64:
      return run_blocks<double>(args, variant, grid, workspace);
    case DType::kFloat32:
      return run_blocks<float>(args, variant, grid, workspace);
    case DType::kBFloat16:
      return run_blocks<bfloat16>(args, variant, grid, workspace);
    case DType::kFloat16:
      return run_blocks<float16>(args, variant, grid, workspace);
  }
}
#endif

// What a call is done with, as Python sees it.
struct Launched {
  int kind;
  Grid grid;
};

extern "C" {

// What Python takes them for.
int64_t coded_torch_sizeof_args() { return sizeof(SplineArgs); }
int64_t coded_torch_sizeof_launched() { return sizeof(Launched); }

// The launch configuration alone, for sizes that no memory holds.
Launched coded_torch_plan_grid(const SplineArgs* args, int dtype, bool transpose, Device device) {
  const Variant variant = choose(*args, static_cast<DType>(dtype), transpose, device);
  return {static_cast<int>(variant.kind), plan_grid(*args, variant, device)};
}

// `failure` receives what went wrong, if anything.
Launched coded_torch_run_grid(const SplineArgs* args, int dtype, bool transpose, Device device,
                              char failure[80]) {
  const Launched launched = coded_torch_plan_grid(args, dtype, transpose, device);
  const Variant variant{static_cast<Kind>(launched.kind), static_cast<DType>(dtype), transpose};
  const auto workspace = std::make_unique<char[]>(launched.grid.workspace_bytes);
  std::memset(workspace.get(), 0xff, launched.grid.workspace_bytes);
  try {
    run_blocks(*args, variant, launched.grid, workspace.get());
  } catch (const std::exception& error) {
    std::strncpy(failure, error.what(), 79);
  }
  return launched;
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
