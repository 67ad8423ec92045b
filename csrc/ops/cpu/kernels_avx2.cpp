#include "kernels.h"

#ifdef CODED_TORCH_X86_KERNELS
#pragma GCC target("arch=x86-64-v3")
#define CODED_TORCH_TILES kAvx2Tiles
#define CODED_TORCH_MATERN kAvx2Matern
#define CODED_TORCH_ESTIMATE kAvx2Estimate
#define CODED_TORCH_VECTOR_BYTES 32
#include "estimate.inc"
#include "matern.inc"
#include "spline.inc"
#endif
