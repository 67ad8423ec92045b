// Two CUDA devices for a CPU build of torch, whose memory is the host's: devices, streams, events,
// allocators and generators as torch asks for them. A kernel has run when its launch returns; what
// could have happened on a device is for clocks.h to say. operators.cpp has the kernels.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>

namespace accelerator {

using c10::Device;
using c10::DeviceIndex;

static thread_local DeviceIndex device_now = 0;
// The first ones, of which a test may want fewer.
static const int num_devices = [] {
  const char* wanted = std::getenv("CODED_TORCH_ACCELERATOR_DEVICES");
  return wanted ? std::atoi(wanted) : kDevices;
}();
static thread_local int64_t streams_now[kDevices] = {0, 0};
static std::atomic<int> sync_debug_mode{0};
static const char* (*find_site)() = nullptr;

Order& order() {
  static Order& instance = *new Order;  // memory may be freed while the process ends
  return instance;
}
DeviceIndex current_device() { return device_now; }
Stream current_stream(DeviceIndex device) { return {device, streams_now[device]}; }
Kernel launch(DeviceIndex device, const char* name) {
  // Before any lock is taken, as it waits for Python's.
  const char* site = find_site ? find_site() : "";
  return order().launch(current_stream(device), name, site);
}

static void host_waits(const char* reason) {
  const char* message = "called a synchronizing CUDA operation: ";  // torch's words, and the reason
  if (sync_debug_mode == 1) TORCH_WARN(message, reason);
  TORCH_CHECK(sync_debug_mode != 2, message, reason);
}
void synchronize(DeviceIndex device, const char* reason) {
  host_waits(reason);
  order().host_waits(order().event(current_stream(device)));
}

// Memory of the current device, or of the host where devices may read it (pinned).
struct Allocator final : c10::Allocator {
  const bool pinned;
  explicit Allocator(bool pinned) : pinned(pinned) {}

  // All ones: NaN of every type, for what is read before it is written or after it is freed.
  static void free(void* base) {
    if (!base) return;
    std::memset(base, 0xff, order().freed(base));
    std::free(base);
  }
  c10::DataPtr allocate(size_t bytes) override {
    const Device device = pinned ? Device(c10::DeviceType::CPU) : Device(kCuda, device_now);
    if (!bytes) return {nullptr, nullptr, &free, device};
    constexpr size_t kAlignment = 512;  // as cudaMalloc's
    void* base = nullptr;
    if (posix_memalign(&base, kAlignment, bytes)) throw std::bad_alloc();
    std::memset(base, 0xff, bytes);
    order().allocated(base, bytes, pinned ? kHost : current_stream(device_now));
    return {base, base, &free, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
c10::Allocator* memory() {
  static Allocator instance(false);
  return &instance;
}
static c10::Allocator* pinned_memory() {
  static Allocator instance(true);
  return &instance;
}

// A kernel has run when its launch returns, so the host's clock is the device's.
using Time = std::chrono::steady_clock;
struct Event {
  Clock work;
  Time::time_point at;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream pack(DeviceIndex device, int64_t number) {
    return c10::Stream(c10::Stream::UNSAFE, Device(kCuda, device), number);
  }
  static Stream unpack(const c10::Stream& stream) { return {stream.device_index(), stream.id()}; }
  static DeviceIndex index(Device device) {
    return device.has_index() ? device.index() : device_now;
  }

  c10::DeviceType type() const override { return kCuda; }
  DeviceIndex deviceCount() const noexcept override { return num_devices; }
  Device getDevice() const override { return {kCuda, device_now}; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < num_devices, "CUDA error: invalid device ordinal");
    device_now = index(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override { device_now = device.index(); }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }

  c10::Stream getStream(Device device) const override {
    return pack(index(device), streams_now[index(device)]);
  }
  c10::Stream getDefaultStream(Device device) const override { return pack(index(device), 0); }
  c10::Stream getNewStream(Device device, int) const override {
    static std::atomic<int64_t> last{0};
    return pack(index(device), ++last * kDevices + index(device));
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    streams_now[stream.device_index()] = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    order().host_waits(order().event(unpack(stream)));
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    host_waits("stream.synchronize");
    order().host_waits(order().event(unpack(stream)));
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    host_waits("device.synchronize");
    order().host_waits(device);
  }

  void record(void** event, const c10::Stream& stream, const DeviceIndex,
              const c10::EventFlag) const override {
    if (!*event) *event = new Event;
    *static_cast<Event*>(*event) = {order().event(unpack(stream)), Time::now()};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) order().wait(unpack(stream), static_cast<Event*>(event)->work);
  }
  bool queryEvent(void* event) const override {
    if (event) order().host_waits(static_cast<Event*>(event)->work);
    return true;
  }
  double elapsedTime(void* begin, void* end, const DeviceIndex) const override {
    using Milliseconds = std::chrono::duration<double, std::milli>;
    return Milliseconds(static_cast<Event*>(end)->at - static_cast<Event*>(begin)->at).count();
  }
  void synchronizeEvent(void* event) const override {
    host_waits("event.synchronize");
    queryEvent(event);
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    order().record_stream(data.get(), unpack(stream));
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Its numbers come from a generator of the host, which kernels on the host are given instead.
struct Generator final : c10::GeneratorImpl {
  at::Generator host = at::detail::createCPUGenerator();
  explicit Generator(DeviceIndex device)
      : GeneratorImpl(Device(kCuda, device), c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->host = host.clone();
    return copy;
  }
};
at::Generator host_generator(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return num_devices; }
  DeviceIndex deviceCount() const override { return num_devices; }
  DeviceIndex current_device() const override { return device_now; }
  DeviceIndex getCurrentDevice() const override { return device_now; }
  Device getDeviceFromPtr(void*) const override { return {kCuda, device_now}; }
  bool isPinnedPtr(const void* data) const override {
    const auto block = order().around(data);
    return block && block->owner == kHost;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_memory(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return memory(); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? device_now : device);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    static const at::Generator all[kDevices] = {getNewGenerator(0), getNewGenerator(1)};
    return all[device < 0 ? device_now : device];
  }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)

static const bool registered = [] {
  constexpr uint8_t kFirst = 255;
  c10::SetAllocator(kCuda, memory(), kFirst);
  return true;
}();

}  // namespace accelerator

extern "C" {
using namespace accelerator;

// For plugin.py.

void accelerator_set_site(const char* (*function)()) { find_site = function; }
void accelerator_set_sync_debug(int mode) { sync_debug_mode = mode; }
int accelerator_get_sync_debug() { return sync_debug_mode; }
const char* accelerator_take_reports() {
  static std::string reports;
  reports = order().take_reports();
  return reports.c_str();
}

// For driver.cpp. Begins a kernel on a device, unless the stream is another's.
void* accelerator_begin(int device, void* handle, const char* name) {
  const auto number = reinterpret_cast<int64_t>(handle);
  if (number && number % kDevices != device) return nullptr;
  return new Kernel(order().launch({device, number}, name, find_site ? find_site() : ""));
}
void accelerator_access(void* kernel, const void* base, bool writes) {
  order().access(base, *static_cast<Kernel*>(kernel), writes);
}
void accelerator_end(void* kernel) { delete static_cast<Kernel*>(kernel); }
const void* accelerator_around(const void* address, size_t* bytes) {
  const auto block = order().around(address);
  *bytes = block ? block->bytes : 0;
  return block ? block->base : nullptr;
}

// A CPU build of torch does not have it, and launches ask for it.
bool accelerator_has_streams = true;
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(streams_now[device]);
  return accelerator_has_streams ? 0 : 1;
}
}
