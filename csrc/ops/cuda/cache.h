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

// The place of one kernel, which has a lock. While a process compiles or tries the kernel, others
// wait. A trial that never ends leaves a mark, and nobody tries that kernel again: what ended one
// process would end the next.
class Place {
 public:
  // `key` is all that the code depends on. Waits 30 s for the lock, then goes on without.
  explicit Place(const std::string& key);
  Place(const Place&) = delete;
  ~Place();

  std::string read() const;  // empty where there is none, or none that is whole
  void write(const std::string& code) const;
  void begin_trial() const;
  void end_trial() const;

 private:
  std::string key_;
  std::filesystem::path path_;  // empty where no folder is this user's alone
  int lock_ = -1;
};

}  // namespace coded_torch
