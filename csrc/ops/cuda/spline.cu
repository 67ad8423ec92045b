// spline_apply on CUDA: check, allocate, launch. The kernel's body is in spline_block.h.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../spline_checks.h"
#include "grid.h"
#include "runtime.h"

namespace coded_torch {

template <class T, bool kTranspose, States kStates>
__global__ void __launch_bounds__(kMaxThreads, kResidentBlocks)
    spline_kernel(SplineArgs args, SplineGrid grid, void* workspace) {
  extern __shared__ __align__(16) char shared[];
  spline_thread<T, kTranspose, kStates>(args, grid, blockIdx.x, static_cast<int>(threadIdx.x),
                                        shared, workspace);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kDenseWarps* kWarp, 2)
    dense_kernel(SplineArgs args, DenseGrid grid, bool transpose) {
  extern __shared__ __align__(16) char shared[];
  dense_thread<T, kWidth>(args, grid, transpose, blockIdx.x, static_cast<int>(threadIdx.x), shared,
                          BlockBarrier{});
}

static void check_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "spline_apply: at most ", kMaxBlocks,
                  " blocks fit a grid, got ", blocks);
}

static Device device_of(int index) {
  // The runtime keeps some of a multiprocessor's shared memory for each block.
  const int shared_bytes =
      device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index) / 2 -
      device_attribute(cudaDevAttrReservedSharedMemoryPerBlock, index);
  return {index, multiprocessors_of(index), shared_bytes};
}

// The kernel keeps the number, so it is the most that any launch asks for: a smaller one from
// another thread would make a launch fail.
template <class Kernel>
static void allow_shared_memory(Kernel kernel, int64_t bytes, const Device& device) {
  constexpr int kSharedWithoutAsking = 48 << 10;
  if (bytes <= kSharedWithoutAsking) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  device.shared_bytes));
}

template <class T, bool kTranspose, States kStates>
static void launch(const SplineCall& call, const SplineGrid& grid, const Device& device) {
  // Owned by the allocator of the current stream: the next owner's work comes after this kernel.
  std::optional<Tensor> workspace;
  if constexpr (kStates == States::kWorkspace) {
    workspace = torch::stable::empty({grid.workspace_bytes}, ScalarType::Byte, std::nullopt,
                                     call.values.device());
  }
  const auto kernel = spline_kernel<T, kTranspose, kStates>;
  allow_shared_memory(kernel, grid.shared_bytes, device);
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes,
           current_stream(device.index)>>>(call.args, grid,
                                           workspace ? workspace->mutable_data_ptr() : nullptr);
  check_launch();
}

template <class T, bool kTranspose>
static void sweep(const SplineCall& call, const Device& device) {
  const SplineGrid grid = plan_grid(call.args, sizeof(acc_t<T>), device);
  check_blocks(grid.blocks);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(call.args.coefficients) % 16 == 0,
                  "spline_apply: coefficients must start on a multiple of 16 bytes on CUDA");
  grid.states == States::kShared ? launch<T, kTranspose, States::kShared>(call, grid, device)
                                 : launch<T, kTranspose, States::kWorkspace>(call, grid, device);
}

template <class T, int kWidth>
static void multiply(const SplineCall& call, bool transpose, const DenseGrid& grid,
                     const Device& device) {
  const auto kernel = dense_kernel<T, kWidth>;
  check_blocks(grid.blocks);
  allow_shared_memory(kernel, grid.shared_bytes, device);
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes,
           current_stream(device.index)>>>(call.args, grid, transpose);
  check_launch();
}

template <class T>
static void launch(const SplineCall& call, bool transpose, const Device& device) {
  switch (const Choice choice = choose<T>(call.args, transpose, device); choice.kernel) {
    case Choice::kWide:
      return multiply<T, kDenseWidth<T>>(call, transpose, choice.grid, device);
    case Choice::kNarrow:
      return multiply<T, 1>(call, transpose, choice.grid, device);
    case Choice::kSweep:
      return transpose ? sweep<T, true>(call, device) : sweep<T, false>(call, device);
  }
}

static __global__ void mark_written(RowIndex scatter, int64_t entries, char* written) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= entries) return;
  const int64_t row = scatter.at(i / scatter.num_groups, i % scatter.num_groups);
  if (row >= 0) written[row] = 1;
}

// A block for each row.
static __global__ void zero_unwritten(const char* written, char* out, int64_t row_bytes,
                                      int64_t row_stride_bytes) {
  if (written[blockIdx.x]) return;
  char* row = out + blockIdx.x * row_stride_bytes;
  for (int64_t i = threadIdx.x; i < row_bytes; i += blockDim.x) row[i] = 0;
}

// Zeroes the rows of the result that nothing is scattered to, and only those.
static void launch_zero_unwritten(const SplineCall& call, int device_index) {
  const RowIndex& scatter = call.args.scatter;
  const int64_t entries = call.indices.scatter->numel();
  const int64_t value_bytes = static_cast<int64_t>(call.out.element_size());
  const int64_t row_bytes = call.out.size(1) * value_bytes;
  if (scatter.num_rows == 0 || row_bytes == 0) return;
  check_blocks(scatter.num_rows);
  const cudaStream_t stream = current_stream(device_index);
  const Tensor written = torch::stable::empty({scatter.num_rows}, ScalarType::Byte, std::nullopt,
                                              call.values.device());
  char* flags = static_cast<char*>(written.mutable_data_ptr());
  check_cuda(cudaMemsetAsync(flags, 0, scatter.num_rows, stream));
  if (entries > 0) {
    const int64_t blocks = (entries + kMaxThreads - 1) / kMaxThreads;
    check_blocks(blocks);
    mark_written<<<static_cast<unsigned>(blocks), kMaxThreads, 0, stream>>>(scatter, entries,
                                                                            flags);
    check_launch();
  }
  zero_unwritten<<<static_cast<unsigned>(scatter.num_rows), kMaxThreads, 0, stream>>>(
      flags, static_cast<char*>(call.args.out), row_bytes, call.args.out_row_stride * value_bytes);
  check_launch();
}

Tensor spline_apply_cuda(const Tensor& values, const Tensor& coefficients, const Tensor& schedule,
                         bool transpose, const std::optional<Tensor>& gather,
                         const std::optional<Tensor>& scatter, std::optional<int64_t> num_rows) {
  const int device_index = values.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const SplineCall call =
      prepare_spline(values, coefficients, schedule, transpose, {gather, scatter, num_rows});
  if (num_rows) launch_zero_unwritten(call, device_index);
  if (call.args.num_groups == 0 || call.args.num_columns == 0) return call.out;
  const Device device = device_of(device_index);
  switch (call.dtype) {
    case DType::kFloat64:
      launch<double>(call, transpose, device);
      break;
    case DType::kFloat32:
      launch<float>(call, transpose, device);
      break;
    case DType::kBFloat16:
      launch<bfloat16>(call, transpose, device);
      break;
    case DType::kFloat16:
      launch<float16>(call, transpose, device);
      break;
  }
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CUDA, m) {
  m.impl("spline_apply", TORCH_BOX(&spline_apply_cuda));
}

}  // namespace coded_torch
