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
  // The features of x86-64-v3 and x86-64-v4, as the files of the kernels name them: GCC 11 does not
  // take the names of the levels here.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("fma") && __builtin_cpu_supports("lzcnt") &&
                    __builtin_cpu_supports("movbe");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", &kAvx512Tiles, &kAvx512Matern, &kAvx512Estimate});
  }
  if (avx2) {
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
