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
  const int file = open(lock.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  if (file < 0) return;
  int failed = flock(file, LOCK_EX | LOCK_NB);
  for (int i = 0; failed && errno == EWOULDBLOCK && i < kMostWaits; ++i) {
    usleep(10000);
    failed = flock(file, LOCK_EX | LOCK_NB);
  }
  struct stat about{};
  const bool marked = fstat(file, &about) == 0 && about.st_size > 0;
  if (failed || marked) close(file);
  if (marked) {
    throw Failure("its trial never ended in another process; remove " + lock + " to try again");
  }
  if (!failed) lock_ = file;
}

Place::~Place() {
  if (lock_ < 0) return;
  flock(lock_, LOCK_UN);  // of a process that was forked meanwhile, too
  close(lock_);
}

void Place::begin_trial() const {
  if (lock_ >= 0 && ::write(lock_, "trial", 5) > 0) fsync(lock_);
}

void Place::end_trial() const {
  if (lock_ >= 0 && ftruncate(lock_, 0) != 0) unlink((path_.string() + ".lock").c_str());
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
