// Who may access which memory when, by vector clocks: two accesses of which nothing says which
// comes first are a race, however they happened to be timed. Knows no torch.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>

namespace accelerator {

using Stream = std::pair<int, int64_t>;   // device and number; 0 is the device's default stream
using Clock = std::map<Stream, int64_t>;  // how much of each stream's work has been waited for

const Stream kHost = {-1, 0};  // owns pinned memory, which is freed once no device reads it

struct Memory {
  const void* base;
  size_t bytes;
  Stream owner;  // the stream that was current when it was allocated
};

// A kernel on a stream, and the line of Python that launched it.
struct Kernel {
  Stream stream;
  int64_t time;
  std::string name, site;
};

inline void join(Clock& into, const Clock& other) {
  for (const auto& [stream, time] : other) {
    int64_t& mine = into[stream];
    mine = mine > time ? mine : time;
  }
}

class Order {
 public:
  // A stream's work so far, for others to wait for.
  Clock event(const Stream& stream) {
    const std::lock_guard guard(lock_);
    join(streams_[stream], host_);
    return streams_[stream];
  }
  void wait(const Stream& stream, const Clock& event) {
    const std::lock_guard guard(lock_);
    join(streams_[stream], event);
  }
  void host_waits(const Clock& event) {
    const std::lock_guard guard(lock_);
    join(host_, event);
  }
  void host_waits(int device) {
    const std::lock_guard guard(lock_);
    for (const auto& [stream, clock] : streams_)
      if (stream.first == device) join(host_, clock);
  }

  Kernel launch(const Stream& stream, const char* name, const char* site) {
    const std::lock_guard guard(lock_);
    Clock& clock = streams_[stream];
    join(clock, host_);
    return {stream, ++clock[stream], name, site};
  }

  void allocated(const void* base, size_t bytes, const Stream& owner) {
    const std::lock_guard guard(lock_);
    blocks_[base] = {{base, bytes, owner}, {}, {}, {}};
  }
  void record_stream(const void* base, const Stream& stream) {
    const std::lock_guard guard(lock_);
    if (const auto found = blocks_.find(base); found != blocks_.end())
      found->second.recorded.insert(stream);
  }

  // The allocator gives the memory to whom its owner's stream serves next.
  size_t freed(const void* base) {
    const std::lock_guard guard(lock_);
    const auto found = blocks_.find(base);
    const Block& block = found->second;
    const auto [_, bytes, owner] = block.memory;
    const auto check = [&](const Kernel& kernel) {
      if (owner == kHost || kernel.stream == owner || block.recorded.count(kernel.stream) ||
          precedes(kernel, host_) || precedes(kernel, streams_[owner]))
        return;
      reports_ += "memory of " + show(owner) + " is freed while " + show(kernel) +
                  "\n  may still use it; record_stream was not called\n";
    };
    if (block.write) check(*block.write);
    for (const auto& [stream, kernel] : block.reads) check(kernel);
    blocks_.erase(found);
    return bytes;
  }

  void access(const void* base, const Kernel& kernel, bool writes) {
    const std::lock_guard guard(lock_);
    const auto found = blocks_.find(base);
    if (found == blocks_.end()) return;
    Block& block = found->second;
    const auto check = [&](const Kernel& earlier, const char* did) {
      if (precedes(earlier, streams_[kernel.stream])) return;
      reports_ += show(kernel) + "\n  " + (writes ? "writes" : "reads") + " what " + show(earlier) +
                  "\n  " + did + ", and does not wait for it\n";
    };
    if (block.write) check(*block.write, "writes");
    if (writes) {
      for (const auto& [stream, earlier] : block.reads) check(earlier, "reads");
      block.reads.clear();
      block.write = kernel;
    } else {
      block.reads[kernel.stream] = kernel;
    }
  }

  // The memory that holds an address.
  std::optional<Memory> around(const void* address) {
    const std::lock_guard guard(lock_);
    auto next = blocks_.upper_bound(address);
    if (next == blocks_.begin()) return {};
    const Memory& memory = (--next)->second.memory;
    const auto offset = static_cast<const char*>(address) - static_cast<const char*>(memory.base);
    return static_cast<size_t>(offset) < memory.bytes ? std::optional(memory) : std::nullopt;
  }

  std::string take_reports() {
    const std::lock_guard guard(lock_);
    return std::exchange(reports_, {});
  }

 private:
  struct Block {
    Memory memory;
    std::set<Stream> recorded;
    std::optional<Kernel> write;     // the last one
    std::map<Stream, Kernel> reads;  // the last one of each stream since then
  };

  static bool precedes(const Kernel& kernel, const Clock& clock) {
    const auto found = clock.find(kernel.stream);
    return found != clock.end() && found->second >= kernel.time;
  }
  static std::string show(const Stream& stream) {
    return "cuda:" + std::to_string(stream.first) + ", stream " + std::to_string(stream.second);
  }
  static std::string show(const Kernel& kernel) {
    return kernel.name + " (" + show(kernel.stream) + ", from " + kernel.site + ")";
  }

  std::mutex lock_;
  Clock host_;
  std::map<Stream, Clock> streams_;
  std::map<const void*, Block> blocks_;
  std::string reports_;
};

}  // namespace accelerator
