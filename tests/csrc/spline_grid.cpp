// Runs the CUDA kernel's body over a whole grid, block by block and thread by thread, on the host.
// Memory is allocated to the byte, so that AddressSanitizer sees every access out of bounds.
#include <cstring>
#include <memory>

#include "../../csrc/ops/cuda/spline_block.h"

using namespace coded_torch;

template <class T, int kWidth, bool kRegisters>
static SplineGrid run_grid(const SplineArgs& args, bool transpose, int64_t shared_bytes) {
  const SplineGrid grid = plan_grid(args, kWidth, sizeof(acc_t<T>), kRegisters, shared_bytes);
  const auto shared = std::make_unique<char[]>(grid.shared_bytes);
  const auto workspace = std::make_unique<char[]>(grid.workspace_bytes);
  const auto run = transpose ? &spline_thread<T, kWidth, true, kRegisters>
                             : &spline_thread<T, kWidth, false, kRegisters>;
  for (int64_t block = 0; block < grid.blocks; ++block) {
    std::memset(shared.get(), 0xff, grid.shared_bytes);  // NaN: nothing may be read unwritten
    for (int thread = 0; thread < grid.threads; ++thread) {
      run(args, grid, block, thread, shared.get(), workspace.get());
    }
  }
  return grid;
}

template <class T>
static SplineGrid run(const SplineArgs& args, bool transpose, int64_t shared_bytes) {
  if (!fits_wide<T>(args)) return run_grid<T, 1, false>(args, transpose, shared_bytes);
  return fits_registers<T>(args) ? run_grid<T, kWidePack<T>, true>(args, transpose, shared_bytes)
                                 : run_grid<T, kWidePack<T>, false>(args, transpose, shared_bytes);
}

extern "C" {

SplineGrid coded_torch_run_grid(const SplineArgs* args, int dtype, bool transpose,
                                int64_t shared_bytes) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat64:
      return run<double>(*args, transpose, shared_bytes);
    case DType::kFloat32:
      return run<float>(*args, transpose, shared_bytes);
    case DType::kBFloat16:
      return run<bfloat16>(*args, transpose, shared_bytes);
    default:
      return run<float16>(*args, transpose, shared_bytes);
  }
}

// The launch configuration alone, for sizes that no memory holds.
SplineGrid coded_torch_plan_grid(const SplineArgs* args, int width, int64_t acc_bytes,
                                 int64_t shared_bytes) {
  return plan_grid(*args, width, acc_bytes, false, shared_bytes);
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
