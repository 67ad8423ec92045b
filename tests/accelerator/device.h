// What the device and its operators share: its streams, its memory, and what waits for it.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

#include "clocks.h"

namespace accelerator {

constexpr c10::DeviceType kCuda = c10::DeviceType::CUDA;
constexpr int kDevices = 2;

Order& order();
c10::Allocator* memory();
at::Generator host_generator(const at::Generator& generator);
c10::DeviceIndex current_device();
Stream current_stream(c10::DeviceIndex device);

// Starts a kernel on the current stream of a device, on behalf of the running line of Python.
Kernel launch(c10::DeviceIndex device, const char* name);
// The host waits for the current stream of a device. As torch.cuda.set_sync_debug_mode() has it,
// that passes, warns or fails.
void synchronize(c10::DeviceIndex device, const char* reason);

}  // namespace accelerator
