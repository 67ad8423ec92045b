// The CUDA runtime as launchers use it: its errors, and the current stream of a tensor's device.
// Torch has macros for these, under names and in headers that differ from 2.10 to 2.13.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

namespace coded_torch {

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it again
  STD_TORCH_CHECK(error == cudaSuccess, "coded_torch: CUDA error: ", cudaGetErrorString(error));
}

inline void check_launch() { check_cuda(cudaGetLastError()); }

inline int device_attribute(cudaDeviceAttr name, int device_index) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device_index));
  return value;
}

inline int multiprocessors_of(int device_index) {
  return device_attribute(cudaDevAttrMultiProcessorCount, device_index);
}

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  const AOTITorchError failed = aoti_torch_get_current_cuda_stream(device_index, &stream);
  STD_TORCH_CHECK(failed == AOTI_TORCH_SUCCESS, "coded_torch: device ", device_index,
                  " must have a current stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace coded_torch
