// Memory that is about to be written for the first time.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace coded_torch {

constexpr int64_t kHugePageBytes = int64_t{2} << 20;

// New memory costs a page fault for every page that is touched, and with pages of 4 KiB many times
// what writing it costs. Where the system leaves the size to the program, this asks for large ones,
// for as many as lie within the memory as a whole. The advice may be refused: then nothing is lost.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t end = (address + bytes) / kHugePageBytes * kHugePageBytes;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Touches every large page of such memory, whose contents are lost, each from one thread: where
// several write to a new page at once, each of them clears one, and all but one do so in vain.
inline void touch_huge_pages(void* memory, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (address + kHugePageBytes - 1) / kHugePageBytes;
  const auto count =
      static_cast<int64_t>((address + bytes) / kHugePageBytes) - static_cast<int64_t>(first);
  if (count < 2) return;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t page = begin; page < end; ++page) {
      *reinterpret_cast<volatile char*>((first + page) * kHugePageBytes) = 0;
    }
  });
}

}  // namespace coded_torch
