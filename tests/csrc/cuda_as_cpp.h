// What the text for NVRTC needs to be C++ that a host compiles (tests/cuda_as_cpp.py): CUDA's
// keywords, and its functions for the one thread of a block that the running thread of the host is.
#pragma once

#include <cstdint>
#include <cstring>

#define __CUDACC__
#define __CUDACC_RTC__
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
extern thread_local Index threadIdx, blockIdx;
char* shared_memory();  // of the block
void __syncthreads();

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
inline const void* __cvta_generic_to_global(const void* address) { return address; }

// Inline assembly is a call of a function with the instruction's name: from results, to operands.
inline void prefetch_global_L2(const void*) {}
inline void cvt_f32_f16(float& to, uint16_t from) {
  _Float16 half;
  std::memcpy(&half, &from, sizeof half);
  to = half;
}
inline void cvt_rn_f16_f32(uint16_t& to, float from) {
  const _Float16 half = static_cast<_Float16>(from);
  std::memcpy(&to, &half, sizeof to);
}
inline void cvt_rn_bf16_f32(uint16_t& to, float from) {
  uint32_t bits;
  std::memcpy(&bits, &from, sizeof bits);
  const uint32_t even = bits >> 16 & 1;
  to = static_cast<uint16_t>(from != from ? 0x7fff : (bits + 0x7fff + even) >> 16);
}

// Makes a kernel known by its name. It takes its parameters by their addresses, as cuLaunchKernel.
struct Kernel {
  Kernel(const char* name, void (*call)(void** parameters));
};
