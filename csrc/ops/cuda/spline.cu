// spline_apply on CUDA: check, allocate, launch. The kernel's body is in spline_block.h.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "spline_block.h"
#include "stream.h"

namespace coded_torch {

template <class T, int kWidth, bool kTranspose>
__global__ void __launch_bounds__(kMaxThreads)
    spline_kernel(SplineArgs args, SplineGrid grid, void* workspace) {
  extern __shared__ __align__(16) char shared[];
  spline_thread<T, kWidth, kTranspose>(args, grid, blockIdx.x, static_cast<int>(threadIdx.x),
                                       shared, workspace);
}

template <class T, int kWidth, bool kTranspose>
static void launch(const SplineCall& call, int device_index) {
  int shared_per_multiprocessor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_per_multiprocessor,
                                        cudaDevAttrMaxSharedMemoryPerMultiprocessor, device_index));
  const SplineGrid grid = plan_grid(call.args, kWidth, sizeof(acc_t<T>), shared_per_multiprocessor);
  STD_TORCH_CHECK(grid.blocks <= kMaxBlocks, "spline_apply: at most ", kMaxBlocks,
                  " blocks fit a grid, got ", grid.blocks);
  const Tensor workspace = torch::stable::empty({grid.workspace_bytes}, ScalarType::Byte,
                                                std::nullopt, call.values.device());
  const auto kernel = spline_kernel<T, kWidth, kTranspose>;
  constexpr int kSharedWithoutAsking = 48 << 10;
  if (grid.shared_bytes > kSharedWithoutAsking) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(grid.shared_bytes)));
  }
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes,
           current_stream(device_index)>>>(call.args, grid, workspace.mutable_data_ptr());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
static void launch(const SplineCall& call, bool transpose, int device_index) {
  if (fits_wide<T>(call.args)) {
    transpose ? launch<T, kWidePack<T>, true>(call, device_index)
              : launch<T, kWidePack<T>, false>(call, device_index);
  } else {
    transpose ? launch<T, 1, true>(call, device_index) : launch<T, 1, false>(call, device_index);
  }
}

Tensor spline_apply_cuda(const Tensor& values, const Tensor& coefficients, const Tensor& schedule,
                         bool transpose) {
  const int device_index = values.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const SplineCall call = prepare_spline(values, coefficients, schedule, transpose);
  if (call.args.num_groups == 0 || call.args.num_columns == 0) return call.out;
  switch (call.dtype) {
    case DType::kFloat64:
      launch<double>(call, transpose, device_index);
      break;
    case DType::kFloat32:
      launch<float>(call, transpose, device_index);
      break;
    case DType::kBFloat16:
      launch<bfloat16>(call, transpose, device_index);
      break;
    case DType::kFloat16:
      launch<float16>(call, transpose, device_index);
      break;
  }
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CUDA, m) {
  m.impl("spline_apply", TORCH_BOX(&spline_apply_cuda));
}

}  // namespace coded_torch
