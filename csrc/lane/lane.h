// The caller's end of the connections to the workers of a pool. No Python here.
//
// Of the threads that wait for replies, one leads: it waits for packets of all workers, takes them,
// and wakes the threads whose replies have come. Messages wait in one queue until a thread handles
// them, in the order in which they came. If no thread leads, the pool's own takes them.
#pragma once

#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <limits>
#include <map>

#include "connection.h"

namespace coded_torch::lane {

// Seconds between two looks of the pool's own thread while other threads lead. Not tuned.
constexpr double kParked = 0.05;
constexpr double kForever = 3600.0;

// A part of a call that the lane gives to a worker, and what came of it.
struct Row {
  std::shared_ptr<Message> message;  // until it is sent
  int64_t worker = -1;               // that has it, and the place of this worker
  int64_t place = -1;
  int64_t number = -1;                                     // of the part at the worker
  double began = std::numeric_limits<double>::infinity();  // seconds on the monotonic clock
  double ended = std::numeric_limits<double>::infinity();
  std::optional<Received> reply;
  int error = 0;  // the number of the error why it could not be sent
};

// The replies of one request. What it has was read and written under the lane's lock.
struct Call {
  std::vector<Row> rows;   // parts that the lane gives to workers
  size_t first_open = 0;   // the first row that has not ended
  bool is_frozen = false;  // whether Python has taken the rows over
  bool has_failed = false;
  int64_t received = 0;  // replies that have come
  int64_t settled = 0;   // of these, the ones that have been handled
  int64_t target = 0;    // of these, the ones that it waits for
  bool is_notified = false;
  std::condition_variable bell;
};

// What came from a worker.
struct News {
  enum Kind { kMessage, kEnd, kGone, kBroken };  // its connection has ended; its process has
  int64_t worker;
  Kind kind;
  std::optional<Received> message;
  std::string error;           // why nothing can be exchanged with it
  std::shared_ptr<Call> call;  // of which it is a reply
};

class Lane {
 public:
  Lane(int64_t part, int64_t reply)
      : part_(part),
        reply_(reply),
        epoll_(epoll_create1(EPOLL_CLOEXEC)),
        poke_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
        bell_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (epoll_.get() < 0 || poke_.get() < 0 || bell_.get() < 0) fail();
    listen(poke_.get(), kPoke);
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  // Hears a worker, whose replies have the kind ``reply``, and whose parts the kind ``part``.
  void add(int64_t worker, int64_t place, std::shared_ptr<Connection> connection) {
    std::lock_guard lock(mutex_);
    listen(connection->descriptor(), uint64_t(worker) << 1);
    workers_[worker].connection = std::move(connection);
    workers_[worker].place = place;
  }
  // Notes the process of a worker, whose descriptor is ready to read once it has ended.
  void watch(int64_t worker, int process, pid_t pid) {
    std::lock_guard lock(mutex_);
    listen(process, uint64_t(worker) << 1 | 1);
    workers_.at(worker).process = process;
    workers_.at(worker).pid = pid;
  }
  // Hears a worker no more, whose descriptors are still open.
  void remove(int64_t worker) {
    std::lock_guard lock(mutex_);
    const auto found = workers_.find(worker);
    if (found == workers_.end()) return;
    hush(found->second.connection->descriptor());
    if (found->second.process >= 0) hush(found->second.process);
    workers_.erase(found);
  }

  // A part that a worker is asked for. Its reply has the number, and counts for the call.
  struct Asked {
    int64_t worker;
    int64_t number;
    std::shared_ptr<Message> message;
    std::shared_ptr<Call> call;
  };

  // Sends parts to their workers. Returns the error number of each, 0 if it was sent.
  std::vector<int> ask(const std::vector<Asked>& parts) {
    std::vector<int> errors;
    for (const Asked& part : parts) {
      std::shared_ptr<Connection> connection;
      {
        std::lock_guard lock(mutex_);
        const auto found = workers_.find(part.worker);
        if (found == workers_.end()) {
          errors.push_back(EPIPE);
          continue;
        }
        Worker& asked = found->second;
        asked.number = part.number;
        asked.row = kNone;
        asked.call = part.call;
        asked.used = used(asked.pid);
        asked.since = seconds_now();
        connection = asked.connection;
      }
      errors.push_back(0);
      try {
        connection->send(part_, part.number, part.message.get());
      } catch (const std::system_error& error) {
        errors.back() = error.code().value();
      }
    }
    return errors;
  }

  // Says whether a worker takes rows of calls while it has no part.
  void let_take(int64_t worker, bool takes) {
    std::lock_guard lock(mutex_);
    const auto found = workers_.find(worker);
    if (found == workers_.end()) return;
    found->second.takes = takes;
    start();
  }
  // Adds a row to a call. The next idle worker takes it, unless the call is frozen.
  void add_row(const std::shared_ptr<Call>& call, std::shared_ptr<Message> message) {
    std::lock_guard lock(mutex_);
    call->rows.emplace_back().message = std::move(message);
    if (call->is_frozen) return;
    queue_.emplace_back(call, call->rows.size() - 1);
    start();
  }
  // Gives no more rows of a call to workers, and makes news of the replies that still come.
  void freeze(Call& call) {
    if (is_foreign()) return;
    std::lock_guard lock(mutex_);
    if (call.is_frozen) return;
    call.is_frozen = true;
    call.settled = call.received;
    const auto end = std::remove_if(queue_.begin(), queue_.end(),
                                    [&](const auto& entry) { return entry.first.get() == &call; });
    queue_.erase(end, queue_.end());
    call.is_notified = true;
    wake(call);
  }
  // Whether so many rows of a call have replies, one has failed, or Python has taken them over.
  bool is_stopped(const Call& call, int64_t target) {
    std::lock_guard lock(mutex_);
    return call.is_frozen || call.has_failed || closed_ || call.received >= target;
  }
  // Whether each row of a call has a reply.
  bool is_done(const Call& call) {
    std::lock_guard lock(mutex_);
    return !call.is_frozen && !call.has_failed && call.first_open == call.rows.size();
  }

  // The seconds of processor time of a worker since it was asked for its part, or was looked at.
  double look_at(int64_t worker) {
    std::lock_guard lock(mutex_);
    const auto found = workers_.find(worker);
    if (found == workers_.end()) return 0.0;
    const double before = found->second.used;
    found->second.used = used(found->second.pid);
    return std::max(found->second.used - before, 0.0);
  }

  // Waits until so many replies to a call have come, it is notified, there is news that is no
  // reply or that somebody wants at once, a row has run for ``late`` seconds, or for some seconds.
  // ``interrupted`` is called after a signal. Returns false if a row is late.
  bool wait(Call& call, int64_t target, double seconds, double late,
            const std::function<void()>& interrupted) {
    if (is_foreign()) return true;
    const auto last = Clock::now() + duration(seconds);
    bool in_time = true;
    std::unique_lock lock(mutex_);
    call.target = target;
    while (!closed_ && call.received < target && !call.is_notified && !is_urgent()) {
      const auto now = Clock::now();
      auto end = last;
      if (late < kForever && call.first_open < call.rows.size()) {
        // The first row that has not ended began first.
        const double due = std::min(call.rows[call.first_open].began, seconds_at(now)) + late;
        const auto at = now + duration(due - seconds_at(now));
        in_time = at > now;
        end = std::min(last, at);
      }
      if (now >= end) break;
      if (leader_ != nullptr) {
        followers_.push_back(&call);
        call.bell.wait_until(lock, end);
        followers_.remove(&call);
        continue;
      }
      leader_ = &call;
      thread_ = pthread_self();
      lock.unlock();
      const bool is_signal = !poll_once(milliseconds(end - now), lock);
      leader_ = nullptr;
      led_until_ = Clock::now() + duration(kParked);
      if (is_signal) {
        pass_lead();
        lock.unlock();
        interrupted();
        lock.lock();
      }
    }
    call.is_notified = false;
    pass_lead();
    return in_time;
  }

  // Takes the messages that have come, unless another thread leads.
  void look() {
    if (is_foreign()) return;
    std::unique_lock lock(mutex_);
    if (leader_ != nullptr || closed_) return;
    lock.unlock();
    poll_once(0, lock);
  }

  // Waits, for the pool's own thread, until there is news and nobody leads, for `ring`, or for some
  // seconds.
  void stand_by(double seconds) {
    std::unique_lock lock(mutex_);
    if (closed_ || is_urgent()) return;
    // A thread that has just led will soon lead again.
    const bool is_led = leader_ != nullptr || Clock::now() < led_until_;
    lock.unlock();
    pollfd heard[2] = {{bell_.get(), POLLIN, 0}, {epoll_.get(), POLLIN, 0}};
    seconds = std::clamp(seconds, 0.0, is_led ? kParked : kForever);
    ::poll(heard, is_led ? 1 : 2, milliseconds(duration(seconds)));
    uint64_t rings;
    (void)!read(bell_.get(), &rings, sizeof rings);
    look();
  }
  void ring() {
    if (!is_foreign()) write_to(bell_);
  }
  // Ends the wait of a call, or the next one.
  void notify(Call& call) {
    if (is_foreign()) return;
    std::lock_guard lock(mutex_);
    call.is_notified = true;
    wake(call);
  }

  // Says whether each reply is news for somebody: a part waits for a worker, or a worker leaves.
  void want_replies(bool wanted) {
    std::lock_guard lock(mutex_);
    wants_replies_ = wanted;
  }

  // The first news that has not been handled; it stays until `pop`.
  const News* front() {
    if (is_foreign()) return nullptr;
    std::lock_guard lock(mutex_);
    return news_.empty() ? nullptr : &news_.front();
  }
  // Whether the process of a worker has ended.
  bool is_gone(int64_t worker) {
    std::lock_guard lock(mutex_);
    const auto found = workers_.find(worker);
    return found == workers_.end() || found->second.is_gone;
  }
  // Whether a worker is at a part.
  bool has_part(int64_t worker) {
    if (is_foreign()) return false;
    std::lock_guard lock(mutex_);
    const auto found = workers_.find(worker);
    return found != workers_.end() && found->second.number != kNone;
  }
  // Removes and returns the first news: whoever takes it may release its memory in peace.
  News pop() {
    std::lock_guard lock(mutex_);
    News first = std::move(news_.front());
    news_.pop_front();
    num_urgent_ -= first.call == nullptr;
    if (first.call != nullptr) ++first.call->settled;
    return first;
  }
  int64_t settled(const Call& call) {
    std::lock_guard lock(mutex_);
    return call.settled;
  }
  // The thread that leads, or 0.
  uint64_t leader() {
    std::lock_guard lock(mutex_);
    return leader_ == nullptr ? 0 : uint64_t(thread_);
  }

  // Ends all waiting. Workers are not heard any more.
  void close() {
    if (is_foreign()) return;
    std::lock_guard lock(mutex_);
    closed_ = true;
    if (leader_ != nullptr) write_to(poke_);
    for (Call* call : followers_) call->bell.notify_all();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr uint64_t kPoke = ~uint64_t(0);

  static constexpr int64_t kNone = -1;

  struct Worker {
    std::shared_ptr<Connection> connection;
    int64_t place = kNone;
    int process = -1;
    pid_t pid = 0;
    double used = 0.0;       // seconds of processor time, at the last look
    double since = 0.0;      // when it was asked for its last part
    int64_t number = kNone;  // of its part
    int64_t row = kNone;     // of its part in the call, if it is a row
    std::shared_ptr<Call> call;
    bool takes = false;  // rows of calls
    bool is_gone = false;
  };

  static double seconds_at(Clock::time_point time) {
    return std::chrono::duration<double>(time.time_since_epoch()).count();
  }
  static double seconds_now() { return seconds_at(Clock::now()); }

  // Gives rows to idle workers: the one that has been idle for longest takes the next.
  void start() {
    while (!queue_.empty() && !closed_) {
      std::map<int64_t, Worker>::iterator best = workers_.end();
      for (auto at = workers_.begin(); at != workers_.end(); ++at) {
        const bool is_idle = at->second.takes && at->second.number == kNone;
        if (is_idle && (best == workers_.end() || at->second.since < best->second.since)) best = at;
      }
      if (best == workers_.end()) return;
      begin(best->first, best->second);
    }
  }
  // Gives the first row that waits to a worker.
  void begin(int64_t key, Worker& worker) {
    auto [call, place] = std::move(queue_.front());
    queue_.pop_front();
    Row& row = call->rows[place];
    worker.number = row.number = --last_number_;
    worker.row = int64_t(place);
    worker.used = used(worker.pid);
    worker.since = row.began = seconds_now();
    row.worker = key;
    row.place = worker.place;
    worker.call = std::move(call);
    try {
      worker.connection->send(part_, worker.number, row.message.get());
    } catch (const std::system_error& error) {
      const int code = error.code().value();
      if (code == EPIPE || code == ECONNRESET) return;  // it has died, which is heard next
      row.error = code;
      worker.call->has_failed = true;
      end_row(worker);
      return;
    }
    row.message.reset();
  }
  void end_row(Worker& worker) {
    const std::shared_ptr<Call> call = std::move(worker.call);
    call->rows[size_t(worker.row)].ended = seconds_now();
    worker.number = worker.row = kNone;
    const auto has_ended = [](const Row& row) {
      return row.ended < std::numeric_limits<double>::infinity();
    };
    while (call->first_open < call->rows.size() && has_ended(call->rows[call->first_open])) {
      ++call->first_open;
    }
    call->is_notified = call->is_notified || call->has_failed;
    if (++call->received >= call->target || call->has_failed) wake(*call);
  }

  static Clock::duration duration(double seconds) {
    return std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double>(std::clamp(seconds, 0.0, kForever)));
  }
  // The seconds of processor time of a process; 0 if it has ended.
  static double used(pid_t pid) {
    timespec time{};
    // Linux's clock of another process, as clock_getcpuclockid makes it.
    if (pid > 0) clock_gettime(clockid_t(~unsigned(pid) << 3 | 2), &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
  }
  static int milliseconds(Clock::duration time) {
    return int(std::chrono::ceil<std::chrono::milliseconds>(time).count());
  }
  static void write_to(const Descriptor& bell) {
    const uint64_t one = 1;
    (void)!write(bell.get(), &one, sizeof one);
  }

  // Whether this is a fork of the process that has the workers. It shares their descriptors, and
  // another thread may have held the lock.
  bool is_foreign() const { return getpid() != process_; }

  bool is_urgent() const { return num_urgent_ > 0 || (wants_replies_ && !news_.empty()); }

  void listen(int descriptor, uint64_t mark) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = mark;
    if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, descriptor, &event) < 0) fail();
  }
  void hush(int descriptor) { epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, descriptor, nullptr); }

  // Waits for messages, without the lock, and takes them, with it. False after a signal.
  bool poll_once(int timeout, std::unique_lock<std::mutex>& lock) {
    epoll_event events[64];
    const int count = epoll_wait(epoll_.get(), events, 64, timeout);
    const bool is_signal = count < 0 && errno == EINTR;
    lock.lock();
    for (int i = 0; i < count && !closed_; ++i) {
      const uint64_t mark = events[i].data.u64;
      if (mark == kPoke) {
        uint64_t pokes;
        (void)!read(poke_.get(), &pokes, sizeof pokes);
        continue;
      }
      const auto found = workers_.find(int64_t(mark >> 1));
      if (found == workers_.end()) continue;
      if (mark & 1) {
        found->second.is_gone = true;
        hush(found->second.process);
        while (hear(found->first, found->second)) {
        }
        add_news(News{found->first, News::kGone, std::nullopt, "", nullptr});
      } else {
        hear(found->first, found->second);
      }
    }
    return !is_signal;
  }

  // Takes one message. Returns whether there may be more.
  bool hear(int64_t number, Worker& worker) {
    News news{number, News::kMessage, std::nullopt, "", nullptr};
    try {
      news.message = worker.connection->receive();
      if (!news.message) news.kind = News::kEnd;
    } catch (const std::system_error& error) {
      const int code = error.code().value();
      if (code == EAGAIN || code == EINTR) return false;
      news.kind = News::kBroken;
      news.error = std::string("OSError: ") + std::strerror(code);
    } catch (const std::exception& error) {
      news.kind = News::kBroken;
      news.error = error.what();
    }
    const bool is_message = news.kind == News::kMessage;
    if (is_message && news.message->kind == reply_ && news.message->number == worker.number) {
      if (worker.row != kNone && !worker.call->is_frozen) {
        worker.call->rows[size_t(worker.row)].reply = std::move(news.message);
        end_row(worker);
        start();
        return true;
      }
      worker.number = worker.row = kNone;
      news.call = std::move(worker.call);
    }
    if (!is_message) hush(worker.connection->descriptor());
    add_news(std::move(news));
    start();
    return is_message;
  }

  void add_news(News news) {
    Call* call = news.call.get();
    num_urgent_ += call == nullptr;
    news_.push_back(std::move(news));
    if (call != nullptr && ++call->received >= call->target) wake(*call);
  }

  void wake(Call& call) {
    call.bell.notify_all();
    if (leader_ == &call && !pthread_equal(thread_, pthread_self())) write_to(poke_);
  }
  void pass_lead() {
    if (leader_ == nullptr && !followers_.empty()) followers_.front()->bell.notify_all();
  }

  const int64_t part_, reply_;
  const pid_t process_ = getpid();
  Descriptor epoll_, poke_, bell_;
  std::mutex mutex_;  // of all that follows
  std::map<int64_t, Worker> workers_;
  std::deque<std::pair<std::shared_ptr<Call>, size_t>> queue_;  // rows that wait for a worker
  int64_t last_number_ = kNone;  // of a row at its worker, below those of other parts
  std::deque<News> news_;
  size_t num_urgent_ = 0;  // of these, the ones that are no replies
  bool wants_replies_ = false;
  bool closed_ = false;
  std::list<Call*> followers_;  // the first to wait is first
  Call* leader_ = nullptr;
  pthread_t thread_{};  // of the leader
  Clock::time_point led_until_{};
};

}  // namespace coded_torch::lane
