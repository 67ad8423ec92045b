// The driver of CUDA, as far as csrc/ops/cuda calls it, in place of NVIDIA's: a launch runs the
// translated PTX of the kernel on the host, and fails where a device's would.
#include <elf.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#include "ptx.h"

// Of device.cpp, whose library is loaded before.
extern "C" {
void* accelerator_begin(int device, void* stream, const char* name);
void accelerator_access(void* kernel, const void* base, bool writes);
void accelerator_end(void* kernel);
const void* accelerator_around(const void* address, size_t* bytes);
}

namespace accelerator {

// By the numbers of CUdevice_attribute, in bytes; an H100's.
static const std::map<int, int> kAttributes = {
    {16, 132},              // multiprocessors
    {75, 9},      {76, 0},  // the capability
    {81, 233472},           // shared memory of a multiprocessor
    {97, 232448},           // the most that a block may ask for
    {111, 1024},            // what the driver keeps of it for each block
};
constexpr int kDevices = 2, kSharedWithoutAsking = 48 << 10;
// The numbers of CUresult that are told apart by nobody but who debugs.
enum Error {
  kInvalidValue = 1,
  kNoDevice = 100,
  kNoContext = 201,
  kNoBinary = 209,
  kNotFound = 500,
  kFailed = 719
};

struct Function {
  std::string name;
  const ptx::Kernel* kernel;
  void* context;
  int max_shared_bytes = kSharedWithoutAsking;
};

static int contexts[kDevices];  // their addresses are the devices' contexts
static thread_local std::vector<void*> current;
static thread_local std::string last_reason;
static std::string fault;  // what goes wrong from now on
// What goes wrong with one kernel, "name=fault,name=fault": of processes that a command starts.
static std::string fault_of(const std::string& kernel) {
  const char* variable = std::getenv("CODED_TORCH_ACCELERATOR_FAULTS");
  const std::string all = std::string(",") + (variable ? variable : "") + ",";
  const size_t at = all.find("," + kernel + "=");
  if (at == std::string::npos) return fault;
  const size_t begin = at + kernel.size() + 2;
  return all.substr(begin, all.find(',', begin) - begin);
}
static int launches = 0;

static int fail(Error error, const std::string& reason) {
  last_reason = reason;
  return error;
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

// The name of the kernel, of machine code or PTX.
static std::string name_in(const char* code) {
  std::string text = code, mark = ".entry ";
  if (std::memcmp(code, ELFMAG, SELFMAG) == 0) {
    Elf64_Ehdr header;
    std::memcpy(&header, code, sizeof header);
    text.assign(code, header.e_shoff);  // all but the table of sections
    mark = std::string(1, '\0') + ".text.";
  }
  const size_t at = text.find(mark);
  if (at == std::string::npos) return "";
  const size_t begin = at + mark.size();
  return text.substr(begin, text.find_first_of(std::string("(\0", 2), begin) - begin);
}

}  // namespace accelerator

extern "C" {
using namespace accelerator;

// For tests: "no device", "no binary", "launch", "wrong", "capturing", "trapped", "killed",
// "another driver".
void driver_fault(const char* name) { fault = name; }
int driver_launches() { return launches; }

int cuInit(unsigned) {
  return fault == "no device" ? fail(kNoDevice, "no CUDA-capable device is detected") : 0;
}
// NVRTC asks for it.
int cuGetExportTable(const void** table, const void*) {
  *table = nullptr;
  return fail(kNotFound, "no table is exported");
}
int cuDriverGetVersion(int* version) {
  *version = fault == "another driver" ? 13020 : 13000;
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = last_reason.c_str();
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < kDevices ? 0 : fail(kInvalidValue, "invalid device ordinal");
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const auto found = kAttributes.find(attribute);
  if (found == kAttributes.end()) return fail(kInvalidValue, "an attribute that is not known here");
  // The second device is so new that NVRTC has no machine code for it, but PTX.
  *value = attribute == 75 && device == 1 ? 99 : found->second;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &contexts[device];
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  current.push_back(context);
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  *context = current.back();
  current.pop_back();
  return 0;
}
int cuModuleLoadData(void** module, const void* code) {
  if (current.empty()) return fail(kNoContext, "a module is loaded in no context");
  if (fault == "no binary") return fail(kNoBinary, "no kernel image is available for this device");
  const std::string name = name_in(static_cast<const char*>(code));
  const auto found = ptx::kernels().find(name);
  if (found == ptx::kernels().end()) return fail(kNotFound, "code of no kernel: " + name);
  *module = new Function{name, &found->second, current.back()};  // as a module, it stays
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (static_cast<Function*>(module)->name != name)
    return fail(kNotFound, "named symbol not found");
  *function = module;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  constexpr int kMaxDynamicSharedMemory = 8;
  if (attribute != kMaxDynamicSharedMemory || value > kAttributes.at(97))
    return fail(kInvalidValue, "an attribute of a function that is not supported");
  static_cast<Function*>(function)->max_shared_bytes = value;
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void*) {
  // By the numbers of CUfunction_attribute: bytes of local memory a thread, registers, versions.
  static const std::map<int, int> known = {{3, 0}, {4, 128}, {5, 90}, {6, 90}};
  const auto found = known.find(attribute);
  if (found == known.end()) return fail(kInvalidValue, "an attribute that is not known here");
  *value = found->second;
  return 0;
}
int cuStreamIsCapturing(void*, int* status) {
  if (current.empty()) return fail(kNoContext, "a stream is asked about in no context");
  *status = fault == "capturing";
  return 0;
}
int cuStreamSynchronize(void*) {
  if (current.empty()) return fail(kNoContext, "a stream is waited for in no context");
  return fault == "trapped" ? fail(kFailed, "an illegal memory access was encountered") : 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  static thread_local int now = 0;
  std::swap(*mode, now);
  return 0;
}
int cuLaunchKernel(void* handle, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty,
                   unsigned tz, unsigned shared_bytes, void* stream, void** parameters, void**) {
  const Function& function = *static_cast<Function*>(handle);
  ++launches;
  const std::string fault = fault_of(function.name);
  if (fault == "killed") std::raise(SIGKILL);  // as by a driver that ends the process
  if (fault == "launch") return fail(kFailed, "too many resources requested for launch");
  if (current.empty() || current.back() != function.context)
    return fail(kNoContext, function.name + ": the context is another device's");
  if (!x || x > 0x7fffffff || y != 1 || z != 1 || ty != 1 || tz != 1)
    return fail(kInvalidValue, "a grid that is not supported");
  if (static_cast<int>(shared_bytes) > function.max_shared_bytes)
    return fail(kInvalidValue, "more shared memory than was asked for");
  const int device = static_cast<int>(static_cast<int*>(current.back()) - contexts);
  void* kernel = accelerator_begin(device, stream, function.name.c_str());
  if (!kernel) return fail(kInvalidValue, function.name + ": the stream is another device's");
  ranges.clear();
  ptx::on_access = &access;
  int error = 0;
  try {
    for (unsigned i = fault == "wrong" ? 1 : 0; i < x; ++i)
      ptx::run_block(*function.kernel, i, threads, shared_bytes, parameters);
  } catch (const std::exception& exception) {
    error = fail(kFailed, function.name + ": " + exception.what());
  }
  for (const Range& range : ranges) {
    const void* base = reinterpret_cast<void*>(range.begin);
    if (range.read) accelerator_access(kernel, base, false);
    if (range.written) accelerator_access(kernel, base, true);
  }
  accelerator_end(kernel);
  return error;
}
}
