// Runs the CUDA kernel's body over a whole grid, block by block and thread by thread, on the host.
// Memory is allocated to the byte, so that AddressSanitizer sees every access out of bounds.
#include <cstring>
#include <memory>

#include "../../csrc/ops/cuda/spline_block.h"

using namespace coded_torch;

template <class T, int kWidth, bool kTranspose, States kStates>
static void run_grid(const SplineArgs& args, const SplineGrid& grid) {
  const auto shared = std::make_unique<char[]>(grid.shared_bytes);
  const auto workspace = std::make_unique<char[]>(grid.workspace_bytes);
  std::memset(workspace.get(), 0xff, grid.workspace_bytes);
  for (int64_t block = 0; block < grid.blocks; ++block) {
    std::memset(shared.get(), 0xff, grid.shared_bytes);  // NaN: nothing may be read unwritten
    for (int thread = 0; thread < grid.threads; ++thread) {
      spline_thread<T, kWidth, kTranspose, kStates>(args, grid, block, thread, shared.get(),
                                                    workspace.get());
    }
  }
}

template <class T, int kWidth, bool kTranspose>
static SplineGrid run(const SplineArgs& args, const Device& device) {
  const SplineGrid grid =
      plan_grid(args, kWidth, sizeof(acc_t<T>), kWidth > 1 ? kRegisterKnots<T> : 0, device);
  switch (grid.states) {
    case States::kRegisters:
      if constexpr (kWidth > 1) run_grid<T, kWidth, kTranspose, States::kRegisters>(args, grid);
      break;
    case States::kShared:
      run_grid<T, kWidth, kTranspose, States::kShared>(args, grid);
      break;
    case States::kWorkspace:
      run_grid<T, kWidth, kTranspose, States::kWorkspace>(args, grid);
      break;
  }
  return grid;
}

template <class T>
static SplineGrid run(const SplineArgs& args, bool transpose, const Device& device) {
  if (!fits_wide<T>(args)) {
    return transpose ? run<T, 1, true>(args, device) : run<T, 1, false>(args, device);
  }
  return transpose ? run<T, kWidePack<T>, true>(args, device)
                   : run<T, kWidePack<T>, false>(args, device);
}

extern "C" {

// What Python takes them for.
int64_t coded_torch_sizeof_args() { return sizeof(SplineArgs); }
int64_t coded_torch_sizeof_grid() { return sizeof(SplineGrid); }

SplineGrid coded_torch_run_grid(const SplineArgs* args, int dtype, bool transpose, Device device) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat64:
      return run<double>(*args, transpose, device);
    case DType::kFloat32:
      return run<float>(*args, transpose, device);
    case DType::kBFloat16:
      return run<bfloat16>(*args, transpose, device);
    default:
      return run<float16>(*args, transpose, device);
  }
}

// The launch configuration alone, for sizes that no memory holds.
SplineGrid coded_torch_plan_grid(const SplineArgs* args, int width, int64_t acc_bytes,
                                 Device device) {
  return plan_grid(*args, width, acc_bytes, 0, device);
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
