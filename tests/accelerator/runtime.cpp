// The CUDA runtime, as far as csrc/ops/cuda calls it, in place of NVIDIA's: a launch runs the
// translated PTX of the kernel on the host, and fails where a device's would.
#include <cstring>
#include <mutex>
#include <utility>

#include "ptx.h"

// Of device.cpp, whose library is loaded before.
extern "C" {
void* accelerator_begin(void* stream, const char* name);
void accelerator_access(void* kernel, const void* base, bool writes);
void accelerator_end(void* kernel);
const void* accelerator_around(const void* address, size_t* bytes);
}

namespace accelerator {

// By the numbers of cudaDeviceAttr, in bytes; an H100's.
static const std::map<int, int> kAttributes = {
    {16, 132},     // multiprocessors
    {81, 233472},  // shared memory of a multiprocessor
    {97, 232448},  // the most that a block may ask for
    {111, 1024},   // what the runtime keeps of it for each block
};
constexpr size_t kSharedWithoutAsking = 48 << 10;
// The numbers of cudaError that are told apart by nobody but who debugs.
enum Error { kInvalidValue = 1, kInvalidConfiguration = 9, kInvalidHandle = 400, kTrapped = 700 };

struct Dim {
  unsigned x, y, z;
};
struct Configuration {
  Dim grid, block;
  size_t shared_bytes;
  void* stream;
};
struct Function {
  const ptx::Kernel* kernel;
  size_t max_shared_bytes;
};

static std::mutex lock;
static std::map<const void*, Function> functions;  // by the host's stub
static thread_local std::vector<Configuration> configurations;
static thread_local int last_error = 0;
static thread_local std::string last_reason;

static int fail(Error error, const std::string& reason) {
  last_reason = reason;
  return last_error = error;
}

// The memory that the running kernel has accessed.
struct Range {
  uint64_t begin, bytes;
  bool read, written;
};
static thread_local std::vector<Range> ranges;

static void access(uint64_t address, uint64_t bytes, bool writes) {
  for (Range& range : ranges) {
    if (address - range.begin >= range.bytes || address - range.begin + bytes > range.bytes)
      continue;
    (writes ? range.written : range.read) = true;
    return;
  }
  size_t size = 0;
  const void* base = accelerator_around(reinterpret_cast<void*>(address), &size);
  const uint64_t begin = reinterpret_cast<uint64_t>(base);
  if (!base || address + bytes > begin + size) throw std::runtime_error("an illegal memory access");
  ranges.push_back({begin, size, !writes, writes});
}

static Function& function_of(const void* host) {
  const std::lock_guard guard(lock);
  return functions.at(host);  // stays where it is
}

static int launch(const void* host, const Configuration& to, void** parameters) {
  const Function& function = function_of(host);
  const Dim &grid = to.grid, &block = to.block;
  if (!grid.x || grid.x > 0x7fffffff || grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1)
    return fail(kInvalidConfiguration, "a grid that is not supported");
  if (to.shared_bytes > function.max_shared_bytes)
    return fail(kInvalidValue, "more shared memory than was asked for");
  const std::string& name = function.kernel->name;
  void* kernel = accelerator_begin(to.stream, name.c_str());
  if (!kernel) return fail(kInvalidHandle, name + ": the stream is another device's");
  ranges.clear();
  ptx::on_access = &access;
  int error = 0;
  try {
    for (unsigned i = 0; i < grid.x; ++i)
      ptx::run_block(*function.kernel, i, block.x, static_cast<uint32_t>(to.shared_bytes),
                     parameters);
  } catch (const std::exception& exception) {
    error = fail(kTrapped, name + ": " + exception.what());
  }
  for (const Range& range : ranges) {
    const void* base = reinterpret_cast<void*>(range.begin);
    if (range.read) accelerator_access(kernel, base, false);
    if (range.written) accelerator_access(kernel, base, true);
  }
  accelerator_end(kernel);
  return error;
}

}  // namespace accelerator

// What nvcc's code for the host and the launchers call.
extern "C" {
using namespace accelerator;

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const void* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  for (const auto& [address, kernel] : ptx::kernels())
    if (kernel.name == name) functions[host] = {&kernel, kSharedWithoutAsking};
}
unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared_bytes, void* stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared_bytes, void** stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared_bytes = last.shared_bytes, *stream = last.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int __cudaLaunchKernel(const void* host, Dim grid, Dim block, void** parameters,
                       size_t shared_bytes, void* stream) {
  return launch(host, {grid, block, shared_bytes, stream}, parameters);
}
int cudaLaunchKernel(const void* host, Dim grid, Dim block, void** parameters, size_t shared_bytes,
                     void* stream) {
  return launch(host, {grid, block, shared_bytes, stream}, parameters);
}
int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  constexpr int kMaxDynamicSharedMemory = 8;
  if (attribute != kMaxDynamicSharedMemory || value > kAttributes.at(97))
    return fail(kInvalidValue, "an attribute of a function that is not supported");
  function_of(host).max_shared_bytes = value;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const auto found = kAttributes.find(attribute);
  if (found == kAttributes.end()) return fail(kInvalidValue, "an attribute that is not known here");
  *value = found->second;
  return 0;
}
int cudaMemsetAsync(void* memory, int value, size_t bytes, void* stream) {
  size_t size = 0;
  const char* base = static_cast<const char*>(accelerator_around(memory, &size));
  if (!base || static_cast<char*>(memory) + bytes > base + size)
    return fail(kInvalidValue, "memory that is not the device's");
  void* kernel = accelerator_begin(stream, "cudaMemsetAsync");
  if (!kernel) return fail(kInvalidHandle, "the stream is another device's");
  accelerator_access(kernel, base, true);
  accelerator_end(kernel);
  std::memset(memory, value, bytes);
  return 0;
}
int cudaGetLastError() { return std::exchange(last_error, 0); }
const char* cudaGetErrorString(int) { return last_reason.c_str(); }
}
