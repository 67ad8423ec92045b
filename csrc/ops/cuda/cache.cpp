#include "cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>

namespace coded_torch {

namespace fs = std::filesystem;

constexpr uintmax_t kMostBytes = uintmax_t{64} << 20;  // a kernel has some 70 KB
constexpr int kMostWaits = 3000;                       // of 10 ms
constexpr int kMostTrials = 2;                         // that never ended

static std::string hash(const std::string& text) {
  return std::to_string(std::hash<std::string>{}(text));
}

// Nobody else may write there, since what is read there runs.
static fs::path own_folder() {
  const auto of = [](const char* name) {
    const char* value = std::getenv(name);
    return fs::path(value ? value : "");
  };
  const fs::path cache =
      of("XDG_CACHE_HOME").empty() ? of("HOME") / ".cache" : of("XDG_CACHE_HOME");
  const fs::path path = cache / "coded_torch";
  if (!path.is_absolute()) return {};
  std::error_code ignored;
  fs::create_directories(cache, ignored);
  mkdir(path.c_str(), 0700);
  struct stat about{};
  const bool own = stat(path.c_str(), &about) == 0 && S_ISDIR(about.st_mode) &&
                   about.st_uid == geteuid() && (about.st_mode & 022) == 0;
  return own ? path : fs::path();
}

Place::Place(const std::string& key) : key_(key), path_(own_folder()) {
  if (path_.empty()) return;
  path_ /= hash(key) + ".kernel";
  const std::string lock = path_.string() + ".lock";
  lock_ = open(lock.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  if (lock_ < 0) return;
  for (int i = 0; flock(lock_, LOCK_EX | LOCK_NB) != 0; ++i) {
    const bool is_held = errno == EWOULDBLOCK;
    is_tried_elsewhere_ = is_held && !mark().empty();
    if (is_held && !is_tried_elsewhere_ && i < kMostWaits) {
      usleep(10000);
      continue;
    }
    close(lock_);
    lock_ = -1;
    return;
  }
}

Place::~Place() {
  if (lock_ < 0) return;
  flock(lock_, LOCK_UN);  // of a process that was forked meanwhile, too
  close(lock_);
}

// Of the file that is locked: a digit, which counts trials, a space, and the machine.
std::string Place::mark() const {
  std::string text(4096, '\0');
  const ssize_t bytes = pread(lock_, text.data(), text.size(), 0);
  text.resize(bytes > 0 ? bytes : 0);
  return text;
}

void Place::begin_trial(const std::string& machine) {
  if (lock_ < 0) return;
  const std::string before = mark();
  const bool counts = before.size() > 2 && before.substr(2) == machine;
  const int trials = counts ? before[0] - '0' : 0;
  if (trials >= kMostTrials) {
    throw Failure("its trial ended " + std::to_string(trials) +
                  " processes, or never ended there; remove " + path_.string() +
                  ".lock to try again");
  }
  const std::string text = std::to_string(trials + 1) + " " + machine;
  // Where the disk is full, there is no mark, and the next process tries the kernel, too.
  is_marked_ = pwrite(lock_, text.data(), text.size(), 0) > 0;
  if (ftruncate(lock_, is_marked_ ? text.size() : 0) == 0) fsync(lock_);
}

void Place::end_trial() {
  if (!is_marked_) return;
  is_marked_ = false;
  if (ftruncate(lock_, 0) != 0) unlink((path_.string() + ".lock").c_str());
}

std::string Place::read() const {
  std::ostringstream text;
  text << std::ifstream(path_, std::ios::binary).rdbuf();  // nothing where reading fails
  const std::string all = text.str();
  // The hash of the code, a line, the key, the code: another key's file is none.
  const size_t line = all.find('\n') + 1, begin = line + key_.size();
  if (line == 0 || all.size() <= begin || all.compare(line, key_.size(), key_) != 0) return "";
  const std::string code = all.substr(begin);
  if (all.compare(0, line - 1, hash(code)) != 0) return "";
  std::error_code ignored;
  fs::last_write_time(path_, fs::file_time_type::clock::now(), ignored);
  return code;
}

// What was used longest ago goes first.
static void bound(const fs::path& folder) try {
  std::multimap<fs::file_time_type, fs::directory_entry> files;
  uintmax_t total = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (!entry.is_regular_file() || entry.path().extension() == ".lock") continue;
    total += entry.file_size();
    files.emplace(entry.last_write_time(), entry);
  }
  for (const auto& [_, entry] : files) {
    if (total <= kMostBytes) return;
    total -= entry.file_size();
    fs::remove(entry.path());
  }
} catch (const fs::filesystem_error&) {
  // Another process has removed a file meanwhile, and goes on.
}

// Whole or not at all. A failure costs the next process a compilation, nothing else.
void Place::write(const std::string& code) const {
  if (path_.empty()) return;
  const fs::path part = path_.string() + "." + std::to_string(getpid());
  std::ofstream file(part, std::ios::binary);
  file << hash(code) << '\n' << key_ << code;
  file.close();
  std::error_code failed;
  if (file) fs::rename(part, path_, failed);
  if (!file || failed) fs::remove(part, failed);
  bound(path_.parent_path());
}

}  // namespace coded_torch
