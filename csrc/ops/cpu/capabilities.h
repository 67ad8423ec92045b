// The instruction sets of this machine that have kernels.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <string>
#include <vector>

#include "kernels.h"

namespace coded_torch {

struct Capability {
  std::string name;
  const TileKernels* tiles;
  const MaternKernels* matern;
  const EstimateKernels* estimate;
};

inline std::vector<Capability> find_capabilities() {
  std::vector<Capability> found;
#ifdef CODED_TORCH_X86_KERNELS
  if (__builtin_cpu_supports("x86-64-v4")) {
    found.push_back({"avx512", &kAvx512Tiles, &kAvx512Matern, &kAvx512Estimate});
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    found.push_back({"avx2", &kAvx2Tiles, &kAvx2Matern, &kAvx2Estimate});
  }
#endif
  found.push_back({"baseline", &kBaselineTiles, &kBaselineMatern, &kBaselineEstimate});
  return found;
}

// Best first.
inline const std::vector<Capability>& capabilities() {
  static const std::vector<Capability> found = find_capabilities();
  return found;
}

// The best, unless _use_cpu_capability chose another one. An operator reads it once.
inline std::atomic<const Capability*>& chosen_capability() {
  static std::atomic<const Capability*> chosen{&capabilities().front()};
  return chosen;
}

}  // namespace coded_torch
