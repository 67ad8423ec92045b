#include "launch.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <vector>

// For the build, which compiles this file again where a source of the kernels has changed.
#include "spline.cu"

asm(R"(
  .pushsection .rodata
coded_torch_sources:
  .incbin "math/pack.h"
  .incbin "math/half.h"
  .incbin "math/spline_layout.h"
  .incbin "math/spline_sweep.h"
  .incbin "ops/spline_args.h"
  .incbin "ops/cuda/rows.h"
  .incbin "ops/cuda/dense_block.h"
  .incbin "ops/cuda/spline_block.h"
  .incbin "ops/cuda/spline.cu"
  .byte 0
  .popsection)");
extern "C" __attribute__((visibility("hidden"))) const char coded_torch_sources[];

namespace coded_torch {

template <class Function>
static Function* find(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (!found) throw Failure(std::string("CUDA lacks ") + name);
  return reinterpret_cast<Function*>(found);
}

// ---- NVRTC -----------------------------------------------------------------------------------

// All in one text: what the kernels need of the standard library, the first of them defines.
static const std::string& sources() {
  static const std::string all = [] {
    std::string text = coded_torch_sources;
    for (const char* directive : {"#include", "#pragma once"}) {
      for (size_t at; (at = text.find(directive)) != std::string::npos;) text.replace(at, 2, "//");
    }
    return text;
  }();
  return all;
}

static std::vector<std::string> options(const Variant& variant, const std::string& architecture) {
  static const char* kinds[] = {"kSweep", "kWorkspaceSweep", "kProduct", "kWideProduct"};
  static const char* types[] = {"double", "float", "bfloat16", "float16"};
  return {"--gpu-architecture=" + architecture,
          "-std=c++17",
          "-default-device",
          "-DKERNEL=" + variant.name(),
          std::string("-DKIND=") + kinds[static_cast<int>(variant.kind)],
          std::string("-DTYPE=") + types[static_cast<int>(variant.dtype)],
          std::string("-DTRANSPOSE=") + (variant.transpose ? "true" : "false")};
}

class Nvrtc {
 public:
  explicit Nvrtc(void* library) : library_(library) {
    if (!library) throw Failure("there is no NVRTC, which torch's builds for CUDA bring");
  }
  Nvrtc(const Nvrtc&) = delete;
  ~Nvrtc() {
    if (program_) find<int(void**)>(library_, "nvrtcDestroyProgram")(&program_);
  }

  template <class... Types>
  void call(const char* name, Types... arguments) const {
    const int error = find<int(Types...)>(library_, name)(arguments...);
    if (error == 0) return;
    const std::string text = find<const char*(int)>(library_, "nvrtcGetErrorString")(error);
    const std::string log = program_ ? get("ProgramLog") : "";
    throw Failure("NVRTC " + version() + ": " + text + " " + log.substr(0, log.find('\n')));
  }

  std::string version() const {
    int major = 0, minor = 0;
    find<int(int*, int*)>(library_, "nvrtcVersion")(&major, &minor);
    return std::to_string(major) + "." + std::to_string(minor);
  }

  // A card runs the machine code of its own generation's earlier members. PTX, which the driver
  // compiles again, is only for cards newer than NVRTC: it may be newer than the driver.
  std::string architecture(int capability) const {
    int count = 0, same = 0, below = 0;
    call("nvrtcGetNumSupportedArchs", &count);
    std::vector<int> known(count);
    call("nvrtcGetSupportedArchs", known.data());
    for (const int each : known) {
      if (each > capability) continue;
      below = std::max(below, each);
      if (each / 10 == capability / 10) same = std::max(same, each);
    }
    if (same) return "sm_" + std::to_string(same);
    if (below) return "compute_" + std::to_string(below);
    throw Failure("NVRTC " + version() + " compiles for no card as old as sm_" +
                  std::to_string(capability));
  }

  std::string compile(const std::vector<std::string>& options, bool ptx) {
    std::vector<const char*> raw;
    for (const std::string& option : options) raw.push_back(option.c_str());
    const char** none = nullptr;
    call("nvrtcCreateProgram", &program_, sources().c_str(), "coded_torch.cu", 0, none, none);
    call("nvrtcCompileProgram", program_, static_cast<int>(raw.size()), raw.data());
    return get(ptx ? "PTX" : "CUBIN");
  }

 private:
  std::string get(const std::string& what) const {
    size_t size = 0;
    find<int(void*, size_t*)>(library_, ("nvrtcGet" + what + "Size").c_str())(program_, &size);
    std::string text(size, '\0');
    find<int(void*, char*)>(library_, ("nvrtcGet" + what).c_str())(program_, text.data());
    return text;
  }

  void* library_;
  void* program_ = nullptr;
};

std::string compile(void* nvrtc, const Variant& variant, const std::string& architecture) {
  return Nvrtc(nvrtc).compile(options(variant, architecture), architecture[0] == 'c');
}

// ---- the driver ------------------------------------------------------------------------------

static void* driver() {
  static void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw Failure("there is no driver of CUDA: libcuda.so.1 is missing");
  return library;
}

static void check(int error, const char* name) {
  if (error == 0) return;
  const char* text = "";
  find<int(int, const char**)>(driver(), "cuGetErrorString")(error, &text);
  throw Failure(std::string(name) + ": " + (text ? text : std::to_string(error)));
}

template <class... Types>
static void call(const char* name, Types... arguments) {
  check(find<int(Types...)>(driver(), name)(arguments...), name);
}

const Device& device_at(int index) {
  static std::mutex mutex;
  static std::map<int, Device> all;
  const std::lock_guard guard(mutex);
  if (const auto found = all.find(index); found != all.end()) return found->second;
  int handle = 0;
  call("cuInit", 0u);
  call("cuDeviceGet", &handle, index);
  const auto attribute = [&](int which) {  // a number of CUdevice_attribute
    int value = 0;
    call("cuDeviceGetAttribute", &value, which, handle);
    return value;
  };
  Device device{};
  device.index = index;
  device.capability = 10 * attribute(75) + attribute(76);
  device.multiprocessors = attribute(16);
  device.reserved_bytes = attribute(111);
  device.shared_bytes = attribute(81) / 2 - device.reserved_bytes;
  call("cuDevicePrimaryCtxRetain", &device.context, handle);  // torch's, for good
  return all[index] = device;
}

// The device's context is current. torch sets it in threads that have called CUDA's runtime only.
class Inside {
 public:
  explicit Inside(const Device& device) {
    static auto* const push = find<int(void*)>(driver(), "cuCtxPushCurrent_v2");
    check(push(device.context), "cuCtxPushCurrent");
  }
  Inside(const Inside&) = delete;
  ~Inside() {
    static auto* const pop = find<int(void**)>(driver(), "cuCtxPopCurrent_v2");
    void* context;
    pop(&context);
  }
};

// While it lives, other threads' captures are no matter to what the calling thread does.
class Relaxed {
 public:
  Relaxed() { call("cuThreadExchangeStreamCaptureMode", &mode_); }
  Relaxed(const Relaxed&) = delete;
  ~Relaxed() {
    static auto* const exchange = find<int(int*)>(driver(), "cuThreadExchangeStreamCaptureMode");
    exchange(&mode_);
  }

 private:
  int mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED
};

void relax() { thread_local const Relaxed relaxed; }

std::string keep(const std::string& key, const std::string& text) {
  const Place place(key + "\n" + sources());
  const std::string kept = place.read();
  if (kept.empty() && !text.empty()) place.write(text);
  return kept.empty() ? text : kept;
}

void* load(void* nvrtc, const Variant& variant, const Device& device, const std::string& machine,
           std::optional<Place>* place) {
  relax();
  Nvrtc compiler(nvrtc);
  const std::string architecture = compiler.architecture(device.capability);
  const std::vector<std::string> all = options(variant, architecture);
  std::string key = "NVRTC " + compiler.version();
  for (const std::string& option : all) key += " " + option;
  place->emplace(key + "\n" + sources());
  if ((*place)->is_tried_elsewhere()) return nullptr;
  std::string code = (*place)->read();
  if (code.empty()) {
    code = compiler.compile(all, architecture[0] == 'c');
    (*place)->write(code);
  }
  int version = 0;
  call("cuDriverGetVersion", &version);
  (*place)->begin_trial(machine + ", driver " + std::to_string(version));
  const Inside context(device);
  void* module = nullptr;  // stays loaded
  void* function = nullptr;
  call("cuModuleLoadData", &module, static_cast<const void*>(code.data()));
  call("cuModuleGetFunction", &function, module, variant.name().c_str());
  call("cuFuncSetAttribute", function, 8, device.shared_bytes);  // the most a block may have
  return function;
}

int attribute_of(const Device& device, void* function, int attribute) {
  const Inside context(device);
  int value = 0;
  call("cuFuncGetAttribute", &value, attribute, function);
  return value;
}

bool finish(const Device& device, void* stream) {
  const Inside context(device);
  int capturing = 0;
  call("cuStreamIsCapturing", stream, &capturing);
  if (capturing) return false;
  const Relaxed relaxed;
  call("cuStreamSynchronize", stream);
  return true;
}

void launch(const Device& device, void* function, const Grid& grid, void* stream,
            void** parameters) {
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of the x dimension
  if (grid.blocks > kMostBlocks) {
    throw Failure("spline_apply: at most " + std::to_string(kMostBlocks) +
                  " blocks fit a grid, got " + std::to_string(grid.blocks));
  }
  static auto* const launch_kernel =
      find<int(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
               void**, void**)>(driver(), "cuLaunchKernel");
  const Inside context(device);
  check(launch_kernel(function, static_cast<unsigned>(grid.blocks), 1, 1, grid.threads, 1, 1,
                      grid.shared_bytes, stream, parameters, nullptr),
        "cuLaunchKernel");
}

}  // namespace coded_torch
