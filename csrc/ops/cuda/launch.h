// Kernels that NVRTC compiles for the card that is there, and their launch. The functions of CUDA
// are found by their names: nothing of CUDA is needed to build, neither driver nor card to load. It
// knows no torch.
#pragma once

#include <optional>
#include <string>

#include "cache.h"
#include "grid.h"

namespace coded_torch {

const Device& device_at(int index);

// Machine code for an architecture such as sm_90, or the PTX of compute_90. `nvrtc` is a library
// that dlopen gave.
std::string compile(void* nvrtc, const Variant& variant, const std::string& architecture);

// From now on the calling thread may do what would spoil a graph that another thread captures.
void relax();
// Returns what the cache holds for a key and the kernels' sources, after keeping `text` where it
// holds nothing. Without a cache, the text.
std::string keep(const std::string& key, const std::string& text);

// Begins the trial of a kernel, and returns it; null, at once, while another process tries it.
// Takes a second where it has to be compiled. The calling thread is relaxed, so it is for the trial
// only. `machine` is a line of all that the trial depends on but the driver's version.
void* load(void* nvrtc, const Variant& variant, const Device& device, const std::string& machine,
           std::optional<Place>* place);
// By a number of CUfunction_attribute.
int attribute_of(const Device& device, void* function, int attribute);

// Waits for the work of a stream: if that has failed, no trial may take the blame. False, at once,
// while the stream is captured.
bool finish(const Device& device, void* stream);
void launch(const Device& device, void* function, const Grid& grid, void* stream,
            void** parameters);

}  // namespace coded_torch
