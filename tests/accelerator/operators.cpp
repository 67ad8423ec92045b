// The operators of torch on the pretended devices: each runs its CPU kernel on the same memory,
// after the checks that its CUDA kernel would make and after its accesses are put in order.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "device.h"

namespace accelerator {

using at::Tensor;
using c10::Device;
using c10::DispatchKeySet;

static const void* base_of(const Tensor& tensor) { return tensor.storage().data(); }
static DispatchKeySet only(c10::DispatchKey key) { return DispatchKeySet(key); }

// The same memory as a tensor of the CPU.
static Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  const c10::Storage& storage = tensor.storage();
  void* base = const_cast<void*>(storage.data());
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(),
                    c10::DataPtr(base, c10::DeviceType::CPU));
  auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(same), only(c10::DispatchKey::CPU),
                                                       tensor.dtype());
  auto* impl = host.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return host;
}

static Device device_or_current(std::optional<Device> device) {
  return device && device->has_index() ? *device : Device(kCuda, current_device());
}
static Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                    std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>,
                    std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_generic(size, memory(), only(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}
static Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                            std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                            std::optional<Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_strided_generic(size, stride, memory(), only(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}
static const Tensor& resize_(const Tensor& self, at::IntArrayRef size,
                             std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

static Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.numel()) {
    const bool both = to.is_cuda() && from.is_cuda();
    const c10::DeviceIndex there = (both || from.is_cuda() ? from : to).device().index();
    const Stream here = both ? current_stream(to.device().index()) : current_stream(there);
    // Between devices torch lets either stream wait for the other, before and after.
    if (both) order().wait(current_stream(there), order().event(here));
    const Kernel kernel = launch(there, "aten::copy_");
    order().access(base_of(from), kernel, false);
    order().access(base_of(to), kernel, true);
    if (both) order().wait(here, order().event(kernel.stream));
    const Tensor& host = to.is_cuda() ? from : to;
    if (!both && !(non_blocking && host.is_pinned())) synchronize(there, "aten::copy_");
  }
  on_host(to).copy_(on_host(from));
  return to;
}
static at::Scalar item(const Tensor& self) {
  order().access(base_of(self), launch(self.device().index(), "aten::item"), false);
  synchronize(self.device().index(), "aten::item");
  return on_host(self).item();
}
static void record_stream(Tensor& self, c10::Stream stream) {
  order().record_stream(base_of(self), {stream.device_index(), stream.id()});
}

using Names = std::set<std::string>;
static const Names kTakesIndices = {"aten::index", "aten::index_put", "aten::index_put_",
                                    "aten::_index_put_impl_"};
// Take a number of the host as a tensor without dimensions, as pointwise operators do.
static const Names kTakesNumbers = {
    "aten::masked_fill", "aten::masked_fill_", "aten::where",      "aten::fill_",
    "aten::index_fill",  "aten::index_fill_",  "aten::index_put_", "aten::_index_put_impl_",
    "aten::lerp",        "aten::addcmul",      "aten::addcdiv"};
// Their results, or the sizes of these, are needed on the host.
static const Names kSynchronizing = {
    "aten::nonzero",           "aten::masked_select",      "aten::_unique2",
    "aten::unique_dim",        "aten::unique_consecutive", "aten::equal",
    "aten::repeat_interleave", "aten::bincount",           "aten::_linalg_check_errors",
    "aten::_linalg_eigh",      "aten::_linalg_svd"};

// A call of an operator through the dispatcher: its arguments are the last of a stack.
struct Call {
  const c10::OperatorHandle& op;
  torch::jit::Stack& stack;
  const std::string name = op.schema().name();
  const std::vector<c10::Argument>& arguments = op.schema().arguments();
  const size_t begin = stack.size() - arguments.size();
  const std::vector<c10::IValue> given{stack.begin() + begin, stack.end()};
  std::vector<std::pair<Tensor, Tensor>> written;  // on the device, on the host

  static bool writes(const c10::Argument& argument) {
    return argument.alias_info() && argument.alias_info()->isWrite();
  }

  // All tensors, each replaced by what the function returns.
  template <class Function>
  void map(const Function& function) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto one = [&](const Tensor& t) { return t.defined() ? function(t, arguments[i]) : t; };
      c10::IValue& value = stack[begin + i];
      if (value.isTensor()) {
        value = one(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<Tensor> list;
        for (const Tensor& t : value.toTensorVector()) list.push_back(one(t));
        value = list;
      } else if (value.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> list;
        for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
          list.push_back(t ? std::optional(one(*t)) : t);
        value = list;
      }
    }
  }

  // The device of all operands, or of the result, whose arguments become the host's.
  Device check_devices() {
    std::optional<Device> common;
    const std::string expected = "Expected all tensors to be on the same device, but found ";
    map([&](const Tensor& t, const c10::Argument& argument) {
      if (t.is_cuda() && !common) common = t.device();
      TORCH_CHECK(!t.is_cuda() || t.device() == common, expected, *common, " and ", t.device(),
                  " in ", name, " (", argument.name(), ")");
      return t;
    });
    const bool numbers = op.hasTag(at::Tag::pointwise) || kTakesNumbers.count(name);
    map([&](const Tensor& t, const c10::Argument& argument) {
      const bool index = kTakesIndices.count(name) && argument.name() == "indices";
      const bool number = numbers && t.dim() == 0 && !writes(argument);
      TORCH_CHECK(t.is_cuda() || !common || index || number, expected, "at least two devices, ",
                  *common, " and cpu! (", name, ", ", argument.name(), ")");
      return t;
    });
    for (size_t i = 0; i < arguments.size(); ++i) {
      c10::IValue& value = stack[begin + i];
      if (value.isDevice() && value.toDevice().is_cuda()) {
        if (!common) common = device_or_current(value.toDevice());
        value = Device(c10::DeviceType::CPU);
      } else if (value.isGenerator()) {
        TORCH_CHECK(value.toGenerator().device().is_cuda(), name,
                    ": expected a 'cuda' device type for generator but found 'cpu'");
        value = host_generator(value.toGenerator());
      }
    }
    TORCH_CHECK(common, name, ": no operand is on a CUDA device");
    return *common;
  }

  Kernel launch_on(Device device) {
    Kernel kernel = launch(device.index(), name.c_str());
    map([&](const Tensor& t, const c10::Argument& argument) {
      if (t.has_storage()) order().access(base_of(t), kernel, writes(argument));
      return t;
    });
    bool waits = kSynchronizing.count(name);
    if (name == "aten::_index_put_impl_") {  // other indexing does this by operators of its own
      const bool fills = given[2].toTensor().numel() == 1;
      for (const std::optional<Tensor>& t : given[1].toOptionalTensorVector()) {
        if (!t || !t->defined()) continue;
        const bool mask = t->scalar_type() == at::kBool || t->scalar_type() == at::kByte;
        waits |= t->is_cuda() ? mask && !fills : t->numel() > 0;
      }
    }
    if (waits) synchronize(device.index(), name.c_str());
    return kernel;
  }

  void run_on_host() {
    map([&](const Tensor& t, const c10::Argument& argument) {
      // A result without a size yet gets its memory from the CPU kernel.
      const bool unsized = argument.is_out() && t.is_cuda() && t.numel() == 0;
      Tensor host = unsized ? at::empty(t.sizes(), t.options().device(at::kCPU)) : on_host(t);
      if (t.is_cuda() && writes(argument)) written.emplace_back(t, host);
      return host;
    });
    op.redispatchBoxed(only(c10::DispatchKey::CPU), &stack);
    for (const auto& [device, host] : written) {
      if (host.numel() && host.storage().data() == base_of(device)) continue;
      at::native::resize_(device, host.sizes(), std::nullopt);
      auto* impl = device.unsafeGetTensorImpl();
      impl->set_sizes_and_strides(host.sizes(), host.strides());
      on_host(device).copy_(host);
    }
  }

  // Results that are arguments are these; others move to the device.
  void return_to(Device device, const Kernel& kernel) {
    const auto move = [&](const Tensor& host) {
      if (!host.defined() || host.is_cuda()) return host;
      Tensor moved =
          empty_strided(host.sizes(), host.strides(), host.scalar_type(), {}, device, {});
      on_host(moved).copy_(host);
      if (host.unsafeGetTensorImpl()->is_wrapped_number())
        moved.unsafeGetTensorImpl()->set_wrapped_number(true);
      if (moved.numel()) order().access(base_of(moved), kernel, true);
      return moved;
    };
    const auto& returns = op.schema().returns();
    const size_t first = stack.size() - returns.size();
    for (size_t i = 0; i < returns.size(); ++i) {
      c10::IValue& value = stack[first + i];
      if (const auto* alias = returns[i].alias_info()) {
        for (size_t j = 0; j < arguments.size(); ++j)
          if (arguments[j].alias_info() && *arguments[j].alias_info() == *alias) value = given[j];
      } else if (value.isTensor()) {
        value = move(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<Tensor> list;
        for (const Tensor& t : value.toTensorVector()) list.push_back(move(t));
        value = list;
      }
    }
  }
};

static void run(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  Call call{op, *stack};
  TORCH_CHECK(op.schema().getNamespace() == "aten", call.name,
              " has no kernel for CUDA: it is not one of torch's own");
  const Device device = call.check_devices();
  const c10::DeviceGuard guard(device);  // each of torch's CUDA kernels has one
  const Kernel kernel = call.launch_on(device);
  call.run_on_host();
  call.return_to(device, kernel);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

// Those that make memory, views or order themselves.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize_);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &item);
  m.impl("record_stream", &record_stream);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
}

}  // namespace accelerator
