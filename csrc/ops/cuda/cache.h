// Compiled kernels on the disk: in $XDG_CACHE_HOME/coded_torch, or ~/.cache/coded_torch.
#pragma once

#include <filesystem>
#include <stdexcept>
#include <string>

namespace coded_torch {

// Why there is no kernel: a sentence for the user.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The place of one kernel, which has a lock. While a process compiles the kernel, others wait. A
// trial marks the file of the lock. A mark that nobody locks is a trial that never ended: what
// ended one process would end the next, so after two of them nobody tries the kernel again.
class Place {
 public:
  // `key` is all that the code depends on. Waits 30 s for the lock, then goes on without.
  explicit Place(const std::string& key);
  Place(const Place&) = delete;
  ~Place();

  bool is_tried_elsewhere() const { return is_tried_elsewhere_; }  // by another process, now
  std::string read() const;  // empty where there is none, or none that is whole
  void write(const std::string& code) const;
  // Trials count as long as `machine`, one line, is the same.
  void begin_trial(const std::string& machine);
  void end_trial();  // nothing where none has begun

 private:
  std::string mark() const;

  std::string key_;
  std::filesystem::path path_;  // empty where no folder is this user's alone
  int lock_ = -1;
  bool is_tried_elsewhere_ = false;
  bool is_marked_ = false;  // by this trial
};

}  // namespace coded_torch
