// Memory that is about to be written for the first time.
#pragma once

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

}  // namespace coded_torch
