// spline_apply on CUDA: check, choose, allocate, launch. A kernel is used once it has been tried
// (coded_torch/_extension.py); before, and where it is not right, torch's own operators compute.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../spline_checks.h"
#include "launch.h"

namespace coded_torch {

constexpr int kMostDevices = 64;

// A kernel on a device. Its first caller tries it; who comes meanwhile does not wait.
struct Kernel {
  enum State { kUntried, kUnusable, kRight };
  std::atomic<State> state{kUntried};
  std::atomic<int64_t> launches{0};
  void* function = nullptr;
};

static Kernel& kernel_of(int64_t device, const Variant& variant) {
  static Kernel all[kMostDevices][Variant::kCount];
  STD_TORCH_CHECK(device >= 0 && device < kMostDevices, "coded_torch: device must be 0..",
                  kMostDevices - 1, ", got ", device);
  return all[device][variant.number()];
}

static Variant variant_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < Variant::kCount, "coded_torch: number must be 0..",
                  Variant::kCount - 1, ", got ", number);
  return Variant::of(number);
}

// Only torch's builds for CUDA have the function.
static void* current_stream(int device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream")
                                         : nullptr);
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != 0) throw Failure("torch gives no current stream");
  return stream;
}

static void run(const SplineCall& call, const Variant& variant, const Device& device,
                Kernel& kernel, void* stream) {
  SplineArgs args = call.args;
  if (args.num_groups == 0 || args.num_columns == 0) return;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(args.coefficients) % 16 == 0,
                  "spline_apply: coefficients must start on a multiple of 16 bytes on CUDA");
  Grid grid = plan_grid(args, variant, device);
  // Owned by the allocator of the current stream: the next owner's work comes after this kernel.
  std::optional<Tensor> workspace;
  void* memory = nullptr;
  if (grid.workspace_bytes > 0) {
    workspace = torch::stable::empty({grid.workspace_bytes}, ScalarType::Byte, std::nullopt,
                                     call.values.device());
    memory = workspace->mutable_data_ptr();
  }
  void* parameters[] = {&args, &grid, &memory};
  launch(device, kernel.function, grid, stream, parameters);
  ++kernel.launches;
}

template <class Result, class... Arguments>
static Result call_python(const char* name, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

// Null, and once a warning, where there is no driver or stream of CUDA: torch's builds for ROCm
// take their devices for CUDA's.
static const Device* find_device(int index, void** stream) {
  try {
    const Device& device = device_at(index);
    *stream = current_stream(index);
    return &device;
  } catch (const Failure& failure) {
    call_python<bool>("coded_torch::_fall_back", std::string(failure.what()));
    return nullptr;
  }
}

static bool is_right(Kernel& kernel, const Variant& variant, const Device& device, void* stream) {
  const Kernel::State state = kernel.state;
  if (state != Kernel::kUntried) return state == Kernel::kRight;
  if (!finish(device, stream)) return false;
  Kernel::State untried = Kernel::kUntried;
  if (!kernel.state.compare_exchange_strong(untried, Kernel::kUnusable)) return false;
  try {
    const auto right = call_python<std::optional<bool>>(
        "coded_torch::_try_kernel", int64_t{device.index}, int64_t{variant.number()});
    if (!right) kernel.state = Kernel::kUntried;  // another process tries it
    if (right == true) kernel.state = Kernel::kRight;
    return right == true;
  } catch (...) {  // such as an interruption, which says nothing of the kernel
    kernel.state = Kernel::kUntried;
    throw;
  }
}

using Index = std::optional<Tensor>;

Tensor spline_apply_cuda(const Tensor& values, const Tensor& coefficients, const Tensor& schedule,
                         bool transpose, const Index& gather, const Index& scatter,
                         std::optional<int64_t> num_rows) {
  const int index = values.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  SplineCall call =
      prepare_spline(values, coefficients, schedule, transpose, {gather, scatter, num_rows});
  void* stream = nullptr;
  if (const Device* device = find_device(index, &stream)) {
    const Variant variant = choose(call.args, call.dtype, transpose, *device);
    Kernel& kernel = kernel_of(index, variant);
    if (is_right(kernel, variant, *device, stream)) {
      if (num_rows) torch::stable::zero_(call.out);  // not all rows may be written
      run(call, variant, *device, kernel, stream);
      return call.out;
    }
  }
  return call_python<Tensor>("coded_torch::_spline_by_torch", values, coefficients, schedule,
                             transpose, gather, scatter, num_rows);
}

// ---- for the trial of a kernel, in its order -------------------------------------------------

// A trial has a thread of its own: where it does not come to its end, the thread's leaves the mark.
static thread_local std::optional<Place> place;

bool load_kernel(int64_t index, int64_t number, int64_t nvrtc, const std::string& machine) {
  const Variant variant = variant_of(number);
  Kernel& kernel = kernel_of(index, variant);
  const Device& device = device_at(static_cast<int>(index));
  kernel.function = load(reinterpret_cast<void*>(nvrtc), variant, device, machine, &place);
  return kernel.function != nullptr;
}

Tensor run_kernel(const Tensor& values, const Tensor& coefficients, const Tensor& schedule,
                  bool transpose, const Index& gather, const Index& scatter,
                  std::optional<int64_t> num_rows, int64_t number) {
  const int index = values.get_device_index();
  const Variant variant = variant_of(number);
  SplineCall call =
      prepare_spline(values, coefficients, schedule, transpose, {gather, scatter, num_rows});
  torch::stable::zero_(call.out);
  run(call, variant, device_at(index), kernel_of(index, variant), current_stream(index));
  return call.out;
}

void end_trial() {
  if (place) place->end_trial();
  place.reset();
}

// ---- for information and tests ---------------------------------------------------------------

Tensor compile_kernel(const std::string& architecture, int64_t number, int64_t nvrtc) {
  const std::string code =
      compile(reinterpret_cast<void*>(nvrtc), variant_of(number), architecture);
  const Tensor out = torch::stable::empty({static_cast<int64_t>(code.size())}, ScalarType::Byte);
  std::memcpy(out.mutable_data_ptr(), code.data(), code.size());
  return out;
}

std::string kernel_name(int64_t number) { return variant_of(number).name(); }

// Of a kernel that is loaded: by a number of CUfunction_attribute.
int64_t kernel_attribute(int64_t index, int64_t number, int64_t attribute) {
  return attribute_of(device_at(static_cast<int>(index)),
                      kernel_of(index, variant_of(number)).function, static_cast<int>(attribute));
}

int64_t launches(int64_t index, int64_t number) {
  return kernel_of(index, variant_of(number)).launches;
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CUDA, m) {
  const char* choice = std::getenv("CODED_TORCH_CUDA");
  if (!choice || std::strcmp(choice, "0") != 0) {
    m.impl("spline_apply", TORCH_BOX(&spline_apply_cuda));
  }
  m.impl("_run_kernel", TORCH_BOX(&run_kernel));
}

STABLE_TORCH_LIBRARY_IMPL(coded_torch, CompositeExplicitAutograd, m) {
  m.impl("_load_kernel", TORCH_BOX(&load_kernel));
  m.impl("_end_trial", TORCH_BOX(&end_trial));
  m.impl("_compile_kernel", TORCH_BOX(&compile_kernel));
  m.impl("_kernel_name", TORCH_BOX(&kernel_name));
  m.impl("_kernel_attribute", TORCH_BOX(&kernel_attribute));
  m.impl("_relax", TORCH_BOX(&relax));
  m.impl("_keep", TORCH_BOX(&keep));
  m.impl("_launches", TORCH_BOX(&launches));
}

}  // namespace coded_torch
