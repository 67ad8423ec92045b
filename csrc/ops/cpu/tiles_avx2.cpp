#include "tiles.h"

#ifdef CODED_TORCH_X86_TILES
#pragma GCC target("arch=x86-64-v3")
#define CODED_TORCH_TILES kAvx2Tiles
#define CODED_TORCH_VECTOR_BYTES 32
#include "tiles.inc"
#endif
