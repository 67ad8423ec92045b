// Random messages to a lane, from workers that reply as they should and from one that sends
// anything. Every call must get its replies, with the numbers that were asked for, and what is
// wrong must be told. .ci/full runs it with sanitizers; the argument is the number of seconds.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <thread>

#include "lane/lane.h"

using namespace coded_torch::lane;
using Clock = std::chrono::steady_clock;

constexpr int64_t kPart = 3, kReply = 4;
constexpr int64_t kHonest = 5;  // workers; the others send anything
constexpr int kCallers = 4;
constexpr double kPatience = 60.0;  // seconds in which each call must have ended

[[noreturn]] static void stop(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::_Exit(1);
}

static std::pair<int, int> sockets() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) fail();
  return {ends[0], ends[1]};
}

// Numbers of a length, each of which follows from the first and its place.
static std::vector<int64_t> numbers(int64_t first, size_t count) {
  std::vector<int64_t> made(count);
  for (size_t i = 0; i < count; ++i) made[i] = first * 31 + int64_t(i);
  return made;
}

static std::shared_ptr<Message> message(const std::vector<int64_t>& values, Blocks& blocks) {
  const std::string pickle = "pickle";
  const size_t bytes = values.size() * sizeof(int64_t);
  const Form form{pickle, aligned(pickle.size()) + bytes, {0}};
  const Piece piece{0, reinterpret_cast<const char*>(values.data()), bytes};
  return std::make_shared<Message>(form, std::vector<Piece>{piece}, &blocks);
}

// Replies with the numbers of each message, until the other side ends.
static void serve(int socket) {
  auto blocks = std::make_shared<Blocks>();
  Connection connection(socket, blocks);
  try {
    while (auto received = connection.receive()) {
      const char* at = received->view->data() + aligned(received->length);
      size_t count;
      std::memcpy(&count, at, sizeof count);  // the first number says how many there are
      std::vector<int64_t> values(count);
      std::memcpy(values.data(), at, count * sizeof(int64_t));
      const int64_t number = received->number;
      received.reset();  // the memory can be used again
      connection.send(kReply, number, message(values, *blocks).get());
    }
  } catch (const std::system_error& error) {
    const int code = error.code().value();
    if (code != EPIPE && code != ECONNRESET) stop(error.what());
  }
}

// Sends anything, until the other side ends.
static void send_anything(int socket, unsigned seed) {
  Descriptor end(socket);
  std::mt19937 random(seed);
  const auto below = [&random](int64_t most) { return int64_t(random() % uint64_t(most)); };
  for (int sent = 0; sent < 200; ++sent) {
    const int64_t wild[] = {-1, 0, 1, 2, 3, 7, 64, 1 << 20, INT64_MAX, INT64_MIN};
    const auto number = [&] { return wild[below(10)]; };
    const bool is_wild = below(4) == 0;
    Header header{below(9), is_wild ? number() : below(9), is_wild ? number() : below(80), -1, 0,
                  0};
    if (below(2)) header.block = is_wild ? number() : below(6);
    header.is_new = below(3) == 0;
    if (below(3) == 0) header.num_read = is_wild ? number() : below(3);
    std::vector<char> body(size_t(below(300)));
    for (char& byte : body) byte = char(below(4) ? 0 : random());
    std::vector<int> passed;
    if (header.is_new && below(8)) {
      const int memory = memfd_create("lane_messages", MFD_ALLOW_SEALING | MFD_CLOEXEC);
      const size_t size = below(5) ? size_t(below(5)) << 14 : size_t(0);
      if (ftruncate(memory, off_t(size)) < 0) fail();
      passed.push_back(memory);
      if (below(8) == 0) passed.push_back(eventfd(0, EFD_CLOEXEC));
    }
    iovec pieces[2] = {{&header, below(20) ? sizeof header : size_t(below(48))},
                       {body.data(), body.size()}};
    msghdr packet{};
    packet.msg_iov = pieces;
    packet.msg_iovlen = 2;
    alignas(cmsghdr) char room[CMSG_SPACE(2 * sizeof(int))] = {};
    if (!passed.empty()) {
      packet.msg_control = room;
      packet.msg_controllen = CMSG_SPACE(passed.size() * sizeof(int));
      cmsghdr* control = CMSG_FIRSTHDR(&packet);
      control->cmsg_level = SOL_SOCKET;
      control->cmsg_type = SCM_RIGHTS;
      control->cmsg_len = CMSG_LEN(passed.size() * sizeof(int));
      std::memcpy(CMSG_DATA(control), passed.data(), passed.size() * sizeof(int));
    }
    const bool has_ended = sendmsg(end.get(), &packet, MSG_NOSIGNAL) < 0;
    for (int descriptor : passed) ::close(descriptor);
    if (has_ended) return;
    if (below(8) == 0) std::this_thread::sleep_for(std::chrono::microseconds(below(2000)));
  }
}

// What the pool's Python does: it gives parts to idle workers, and handles news, under one lock.
class Pool {
 public:
  Pool() : lane_(kPart, kReply), blocks_(std::make_shared<Blocks>()) {
    for (int64_t worker = 0; worker < kHonest; ++worker) {
      add(worker, [](int socket) { serve(socket); });
      idle_.insert(worker);
    }
    next_ = kHonest;
    add_liar();
  }

  // Asks for up to so many parts, and waits for them.
  void call(std::mt19937& random) {
    auto call = std::make_shared<Call>();
    int64_t asked = 0;
    {
      std::lock_guard lock(mutex_);
      std::vector<Lane::Asked> parts;
      for (size_t left = 1 + random() % 3; left > 0 && !idle_.empty(); --left) {
        const int64_t worker = *idle_.begin();
        idle_.erase(idle_.begin());
        const size_t count = random() % 4 ? 1 + random() % 100 : 1 + random() % 40000;
        std::vector<int64_t> values = numbers(++number_, count);
        values[0] = int64_t(count);
        parts.push_back({worker, number_, message(values, *blocks_), call});
        expected_[worker] = {number_, std::move(values), call};
        ++asked;
      }
      for (int error : lane_.ask(parts)) {
        if (error) stop("a part was not sent");
      }
      // A liar is asked, too: it may reply with the number.
      lane_.ask({{liar_, ++number_, message(numbers(1, 4), *blocks_), nullptr}});
    }
    const auto until = Clock::now() + std::chrono::duration<double>(kPatience);
    while (lane_.settled(*call) < asked) {
      if (Clock::now() > until) stop("a reply was lost");
      lane_.wait(*call, asked, random() % 3 ? 0.1 : 1e-4, kForever, [] {});
      if (random() % 16 == 0) lane_.notify(*call);
      hear();
    }
    num_calls_ += asked > 0;
  }

  void tend() {
    lane_.stand_by(0.01);
    hear();
    lane_.want_replies(num_calls_ % 2 == 0);
    ++forks;  // as a fork does
  }

  void close() {
    {
      std::lock_guard lock(mutex_);
      lane_.close();
      for (auto& [worker, connection] : connections_) connection->close();
    }
    for (auto& [worker, thread] : threads_) thread.join();
  }

  int64_t num_calls() const { return num_calls_; }
  int64_t num_liars() const { return next_ - kHonest; }

 private:
  struct Expected {
    int64_t number;
    std::vector<int64_t> values;
    std::shared_ptr<Call> call;
  };

  template <typename Work>
  void add(int64_t worker, Work work) {
    const auto [ours, theirs] = sockets();
    if (fcntl(ours, F_SETFL, O_NONBLOCK) < 0) fail();
    connections_[worker] = std::make_shared<Connection>(ours, blocks_);
    lane_.add(worker, worker, connections_[worker]);
    threads_[worker] = std::thread([work, socket = theirs] { work(socket); });
  }

  void add_liar() {
    liar_ = next_++;
    const unsigned seed = unsigned(liar_);
    add(liar_, [seed](int socket) { send_anything(socket, seed); });
  }

  void hear() {
    std::lock_guard lock(mutex_);
    while (const News* news = lane_.front()) {
      if (news->worker < kHonest) {
        check(*news);
      } else if (news->kind == News::kMessage) {
        if (news->message->kind == kReply) kept_.push_back(*news->message);  // is read later
        // Whoever reads it reads the pickle, and the memory behind it.
        const View& view = *news->message->view;
        const size_t bytes = std::max(news->message->length, view.size());
        sum_ += std::count(view.data(), view.data() + bytes, char(1));
        if (kept_.size() > 5) kept_.erase(kept_.begin());
      } else {
        lane_.remove(liar_);
        connections_.at(liar_)->close();
        connections_.erase(liar_);
        threads_.at(liar_).join();
        threads_.erase(liar_);
        add_liar();
      }
      lane_.pop();
    }
  }

  void check(const News& news) {
    if (news.kind != News::kMessage) stop("a worker that does as it should counts as broken");
    const Expected& expected = expected_.at(news.worker);
    if (news.message->number != expected.number || news.call != expected.call) {
      stop("a reply came to another call");
    }
    const char* at = news.message->view->data() + aligned(news.message->length);
    if (std::memcmp(at, expected.values.data(), expected.values.size() * sizeof(int64_t))) {
      stop("a reply has other numbers");
    }
    idle_.insert(news.worker);
  }

  Lane lane_;
  std::shared_ptr<Blocks> blocks_;
  std::mutex mutex_;  // of what follows
  std::map<int64_t, std::shared_ptr<Connection>> connections_;
  std::map<int64_t, std::thread> threads_;  // of the workers
  std::set<int64_t> idle_;
  std::map<int64_t, Expected> expected_;
  std::vector<Received> kept_;
  int64_t liar_ = 0, number_ = 0;
  int64_t sum_ = 0;
  std::atomic<int64_t> next_{0}, num_calls_{0};
};

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 1.0;
  const auto until = Clock::now() + std::chrono::duration<double>(seconds);
  Pool pool;
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i) {
    callers.emplace_back([&pool, until, i] {
      std::mt19937 random{unsigned(i)};
      while (Clock::now() < until) pool.call(random);
    });
  }
  std::thread own([&pool, until] {
    while (Clock::now() < until) pool.tend();
  });
  for (std::thread& caller : callers) caller.join();
  own.join();
  pool.close();
  std::printf("%ld calls, %ld workers that sent anything\n", long(pool.num_calls()),
              long(pool.num_liars()));
  return pool.num_calls() > 0 && pool.num_liars() > 1 ? 0 : 1;
}
