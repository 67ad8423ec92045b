#include "kernels.h"

#ifdef CODED_TORCH_X86_KERNELS
#pragma GCC target("arch=x86-64-v4")
#define CODED_TORCH_TILES kAvx512Tiles
#define CODED_TORCH_MATERN kAvx512Matern
#define CODED_TORCH_ESTIMATE kAvx512Estimate
#define CODED_TORCH_VECTOR_BYTES 64
#include "estimate.inc"
#include "matern.inc"
#include "spline.inc"
#endif
