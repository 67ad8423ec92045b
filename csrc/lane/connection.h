// Messages between two processes of one machine, over a Unix socket of packets. No Python here.
//
// A long message lies in memory that the receiver has mapped already, a short one follows its
// header. A received message is a view of the memory. The sender writes there again when the
// receiver says that nobody reads it any more, and never if the receiver has forked while somebody
// did, as the child may. Both sides seal the size of the memory, as reading behind its end would
// kill the receiver. The other side may send anything at all: every number is checked.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "rows.h"

namespace coded_torch::lane {

constexpr size_t kAlignment = 64;  // bytes of a cache line
// Bytes of a message that follow its header: copying them takes about as long as to look after a
// block. Bytes of a packet, with its header and numbers of blocks.
constexpr size_t kShort = 1 << 16;
constexpr size_t kPacket = kShort + (1 << 12);
constexpr size_t kLeast = 1 << 16;  // bytes of a block; a smaller one would save only pages
// Blocks that wait for a message, or that a receiver maps, and their bytes, at most: enough for the
// parts of eight calls in flight. Not tuned.
constexpr size_t kMostBlocks = 48;
constexpr size_t kMostBytes = size_t(1) << 27;
// Blocks of a connection whose messages may be kept, each with a mapping. Further messages are
// copied. Not tuned: callers hold results of a few calls.
constexpr size_t kMostKept = 8;

// The other side has broken the rules of messages.
struct Broken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline size_t aligned(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

[[noreturn]] inline void fail(int code = errno) {
  throw std::system_error(code, std::generic_category());
}

// How often this process has forked. A view that was there before may be read by the child.
inline std::atomic<uint64_t> forks{0};

// A file descriptor that is closed with its owner.
class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~Descriptor() {
    if (number_ >= 0) ::close(number_);
  }
  int get() const { return number_; }

 private:
  int number_;
};

inline void seal(int descriptor, int more = 0) {
  if (fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | more) < 0) fail();
}

// Shared memory that keeps its size, mapped here.
class Memory {
 public:
  // Makes new memory, which exists while any process has it. It is mapped, unless it will be
  // frozen: a child that had the mapping would forbid the seal.
  explicit Memory(size_t size, bool is_mapped = true)
      : descriptor_(memfd_create("coded_torch", MFD_CLOEXEC | MFD_ALLOW_SEALING)), size_(size) {
    static std::atomic<int64_t> made{0};
    number_ = made++;
    if (descriptor_.get() < 0 || ftruncate(descriptor_.get(), off_t(size)) < 0) fail();
    seal(descriptor_.get());
    if (is_mapped) map(MAP_SHARED);
  }

  // Maps memory that another process has made. Writes to a copy are not seen elsewhere.
  Memory(Descriptor descriptor, bool is_copy) {
    seal(descriptor.get());
    const off_t size = lseek(descriptor.get(), 0, SEEK_END);
    if (size < 0) fail();
    if (size == 0) throw Broken("a message came in empty memory");
    size_ = size_t(size);
    descriptor_ = std::move(descriptor);
    map(is_copy ? MAP_PRIVATE : MAP_SHARED);
    descriptor_ = Descriptor();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { unmap(); }

  // Forbids writing for good, here and elsewhere.
  void freeze() { seal(descriptor_.get(), F_SEAL_WRITE); }
  // Writes to memory that is not mapped.
  void write(size_t offset, const char* from, size_t bytes) {
    while (bytes > 0) {
      const ssize_t written = pwrite(descriptor_.get(), from, bytes, off_t(offset));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) fail();
      offset += size_t(written);
      from += written;
      bytes -= size_t(written);
    }
  }
  int64_t number() const { return number_; }
  int descriptor() const { return descriptor_.get(); }
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void map(int how) {
    void* place = mmap(nullptr, size_, PROT_READ | PROT_WRITE, how, descriptor_.get(), 0);
    // The system may call it EAGAIN, which means here that nothing has come.
    if (place == MAP_FAILED) fail(ENOMEM);
    data_ = static_cast<char*>(place);
  }
  void unmap() {
    if (data_ != nullptr) munmap(data_, size_);
    data_ = nullptr;
  }

  int64_t number_ = -1;
  Descriptor descriptor_;
  char* data_ = nullptr;
  size_t size_ = 0;
};

using Block = std::shared_ptr<Memory>;

// Blocks in the order in which they were added. The oldest are dropped when they are too many.
class Kept {
 public:
  explicit Kept(size_t most_bytes) : most_bytes_(most_bytes) {}

  void add(int64_t number, Block block) {
    take(number);
    bytes_ += block->size();
    blocks_.emplace_back(number, std::move(block));
    while (blocks_.size() > 1 && (blocks_.size() > kMostBlocks || bytes_ > most_bytes_)) {
      bytes_ -= blocks_.front().second->size();
      blocks_.pop_front();
    }
  }
  Block find(int64_t number) const {
    for (const auto& [key, block] : blocks_) {
      if (key == number) return block;
    }
    return nullptr;
  }
  Block take(int64_t number) {
    for (auto at = blocks_.begin(); at != blocks_.end(); ++at) {
      if (at->first == number) return erased(at);
    }
    return nullptr;
  }
  // The last one of a size may still be in a cache.
  Block take_last(size_t size) {
    for (auto at = blocks_.end(); at != blocks_.begin();) {
      if ((--at)->second->size() == size) return erased(at);
    }
    return nullptr;
  }
  size_t size() const { return blocks_.size(); }
  void clear() {
    blocks_.clear();
    bytes_ = 0;
  }

 private:
  using List = std::list<std::pair<int64_t, Block>>;
  Block erased(List::iterator at) {
    Block block = std::move(at->second);
    bytes_ -= block->size();
    blocks_.erase(at);
    return block;
  }

  List blocks_;
  size_t bytes_ = 0;
  size_t most_bytes_;
};

// Blocks that nobody reads. Any thread may take and give them.
class Blocks {
 public:
  explicit Blocks(size_t most_bytes = kMostBytes) : free_(most_bytes) {}

  Block take(size_t size) {
    size_t rounded = kLeast;  // so that there is room for a somewhat larger message, too
    while (rounded < size) rounded *= 2;
    {
      std::lock_guard lock(mutex_);
      if (Block block = free_.take_last(rounded)) return block;
    }
    return std::make_shared<Memory>(rounded);
  }
  void give(Block block) {
    const int64_t number = block->number();
    std::lock_guard lock(mutex_);
    free_.add(number, std::move(block));
  }
  size_t size() {
    std::lock_guard lock(mutex_);
    return free_.size();
  }

 private:
  std::mutex mutex_;
  Kept free_;
};

// Numbers that lie in memory, end to end.
struct Piece {
  size_t offset;  // the place in the message, behind its pickle
  const char* data;
  size_t bytes;
  Kind kind = Kind::kOther;  // another one to be told whether they are finite
};

// What messages have in common that differ only in the numbers of their tensors.
struct Form {
  std::string pickle;
  size_t size;                 // bytes of a message
  std::vector<size_t> places;  // of the tensors, behind the pickle
};

// The units of a task: those of each tensor have the same size, and lie end to end. Messages take
// some of them, without a tensor for each.
struct Batch {
  struct Tensor {
    const char* data;
    size_t bytes;       // of all units
    size_t unit_bytes;  // 0 if every message gets the whole tensor
    Kind kind;
  };
  std::vector<Tensor> tensors;

  // Adds the pieces of a message of such a form, with some units.
  void add(const Form& form, const int64_t* units, size_t count, std::vector<Piece>& pieces) const {
    if (form.places.size() != tensors.size())
      throw std::invalid_argument("a form of other tensors");
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& tensor = tensors[i];
      size_t offset = form.places[i];
      if (tensor.unit_bytes == 0) {
        pieces.push_back(Piece{offset, tensor.data, tensor.bytes});
        continue;
      }
      for (size_t begin = 0, end = 0; begin < count; begin = end) {
        // Units that follow each other are one piece.
        for (end = begin + 1; end < count && units[end] == units[end - 1] + 1;) ++end;
        const size_t bytes = (end - begin) * tensor.unit_bytes;
        const size_t from = size_t(units[begin]) * tensor.unit_bytes;
        if (units[begin] < 0 || from + bytes > tensor.bytes) {
          throw std::invalid_argument("there is no such unit");
        }
        pieces.push_back(Piece{offset, tensor.data + from, bytes, tensor.kind});
        offset += bytes;
      }
    }
  }
};

// A message that is ready to be sent: a pickle, and the numbers of its tensors.
class Message {
 public:
  // Writes the message into a block, unless it is short. All receivers share one without blocks,
  // which none of them can change.
  Message(const Form& form, const std::vector<Piece>& pieces, Blocks* blocks)
      : length_(form.pickle.size()) {
    const size_t behind = aligned(length_);
    for (const Piece& piece : pieces) {
      if (behind + piece.offset + piece.bytes > form.size) {
        throw std::invalid_argument("a piece has no room in its message");
      }
    }
    if (blocks == nullptr) {
      block_ = std::make_shared<Memory>(std::max<size_t>(form.size, 1), false);
      block_->write(0, form.pickle.data(), form.pickle.size());
      for (const Piece& piece : pieces) {
        block_->write(behind + piece.offset, piece.data, piece.bytes);
      }
      block_->freeze();
      is_shared_ = true;
    } else if (form.size > kShort) {
      block_ = blocks->take(form.size);
      write(block_->data(), form, pieces);
    } else {
      body_.resize(form.size);
      write(body_.data(), form, pieces);
    }
  }
  size_t length() const { return length_; }
  bool is_shared() const { return is_shared_; }
  const Block& block() const { return block_; }
  const std::string& body() const { return body_; }
  // Whether the units of a batch that it has are finite.
  bool is_finite() const { return is_finite_; }

 private:
  void write(char* memory, const Form& form, const std::vector<Piece>& pieces) {
    std::memcpy(memory, form.pickle.data(), form.pickle.size());
    char* behind = memory + aligned(form.pickle.size());
    for (const Piece& piece : pieces) {
      char* to = behind + piece.offset;
      is_finite_ = copy_numbers(piece.kind, to, piece.data, piece.bytes) && is_finite_;
    }
  }

  size_t length_;  // bytes of the pickle
  std::string body_;
  Block block_;
  bool is_shared_ = false;
  bool is_finite_ = true;
};

// Whether somebody reads a block.
class Lease {
 public:
  void end() { state_ = forks == began_ ? kEnded : kForked; }
  bool has_ended() const { return state_ != kRead; }
  bool is_forked() const { return state_ == kForked; }

 private:
  enum State { kRead, kEnded, kForked };
  const uint64_t began_ = forks;
  std::atomic<State> state_{kRead};
};

// The memory of a received message. It is not written again while this is there.
class View {
 public:
  explicit View(std::string body) : body_(std::move(body)) {}
  View(Block block, std::shared_ptr<Lease> lease)
      : block_(std::move(block)), lease_(std::move(lease)) {}
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  ~View() {
    block_.reset();
    if (lease_ != nullptr) lease_->end();
  }
  char* data() { return block_ == nullptr ? body_.data() : block_->data(); }
  const char* data() const { return block_ == nullptr ? body_.data() : block_->data(); }
  size_t size() const { return block_ == nullptr ? body_.size() : block_->size(); }
  // Whether a view of few of its numbers would keep much memory that others could use.
  bool is_long() const { return lease_ != nullptr || body_.size() > kShort; }

 private:
  std::string body_;
  Block block_;
  std::shared_ptr<Lease> lease_;
};

struct Header {
  int64_t kind, number;
  int64_t length;    // bytes of the pickle
  int64_t block;     // the number of the block, or -1
  int64_t is_new;    // whether a descriptor of the block, or of memory of all, comes along
  int64_t num_read;  // how many numbers of blocks follow, which nobody reads; ~number if a fork may
};

struct Received {
  int64_t kind, number;
  size_t length;
  std::shared_ptr<View> view;
};

// One end of a connection. One thread sends at a time, and one receives; any tells.
class Connection {
 public:
  Connection(int descriptor, std::shared_ptr<Blocks> blocks)
      : socket_(descriptor), blocks_(std::move(blocks)), packet_(new char[kPacket]) {}

  int descriptor() const { return socket_.get(); }

  // Throws a system_error, and has sent nothing then: EPIPE if the other side has ended, EAGAIN if
  // it has left many unread.
  void send(int64_t kind, int64_t number, const Message* message = nullptr) {
    Header header{kind, number, 0, -1, 0, 0};
    int passed = -1;
    const std::string* body = nullptr;
    std::vector<int64_t> read;
    std::lock_guard lock(mutex_);
    if (message != nullptr) {
      header.length = int64_t(message->length());
      body = &message->body();
      const Block& block = message->block();
      if (block != nullptr && message->is_shared()) {
        passed = block->descriptor();
      } else if (block != nullptr) {
        header.block = block->number();
        if (sent_.find(header.block) == nullptr) passed = block->descriptor();
      }
    }
    for (const auto& [block, lease] : leases_) {
      if (lease->has_ended()) read.push_back(lease->is_forked() ? ~block : block);
    }
    header.is_new = passed >= 0;
    header.num_read = int64_t(read.size());
    iovec pieces[3] = {{&header, sizeof header},
                       {read.data(), read.size() * sizeof(int64_t)},
                       {body ? const_cast<char*>(body->data()) : nullptr, body ? body->size() : 0}};
    transmit(pieces, 3, passed);
    if (header.block >= 0) {
      if (header.is_new) sent_.add(header.block, message->block());
      lent_.emplace_back(header.block, message->block());
    }
    for (int64_t number_read : read) {
      const int64_t block = number_read < 0 ? ~number_read : number_read;
      leases_.erase(std::find_if(leases_.begin(), leases_.end(), [block](const auto& entry) {
        return entry.first == block && entry.second->has_ended();
      }));
    }
  }

  // Sends two numbers, from any thread, unless the other side has left many unread.
  void tell(int64_t kind, int64_t number) {
    Header header{kind, number, 0, -1, 0, 0};
    iovec piece{&header, sizeof header};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    (void)!sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  }

  // Returns nothing at the end. Throws Broken, or a system_error: EAGAIN if nothing has come.
  std::optional<Received> receive() {
    std::vector<Descriptor> descriptors;
    bool is_cut = false;
    ssize_t size = take_packet(descriptors, is_cut);
    // If the other side has left any unread, its last messages come after this error.
    if (size < 0 && errno == ECONNRESET) size = take_packet(descriptors, is_cut);
    if (size < 0) fail();
    if (size == 0) return std::nullopt;
    Header header;
    if (size_t(size) < sizeof header) throw Broken("a message came without a header");
    std::memcpy(&header, packet_.get(), sizeof header);
    const size_t behind = size_t(size) - sizeof header;
    if (header.num_read < 0 || size_t(header.num_read) > behind / sizeof(int64_t)) {
      throw Broken("a message has other numbers of blocks than it says");
    }
    const char* numbers = packet_.get() + sizeof header;
    std::lock_guard lock(mutex_);
    for (int64_t i = 0; i < header.num_read; ++i) {
      int64_t number;
      std::memcpy(&number, numbers + i * int64_t(sizeof number), sizeof number);
      give_back(number);
    }
    // The kernel drops a descriptor that is one too many for this process.
    if (is_cut || (header.is_new && descriptors.empty())) fail(EMFILE);
    auto view = viewed(header, descriptors, numbers + header.num_read * int64_t(sizeof(int64_t)),
                       behind - size_t(header.num_read) * sizeof(int64_t));
    if (header.length < 0 || size_t(header.length) > view->size()) {
      throw Broken("a message of " + std::to_string(header.length) + " bytes came in " +
                   std::to_string(view->size()));
    }
    return Received{header.kind, header.number, size_t(header.length), std::move(view)};
  }

  // Releases all but memory that somebody reads. Nobody may use the connection any more.
  void close() {
    std::lock_guard lock(mutex_);
    socket_ = Descriptor();
    sent_.clear();
    lent_.clear();
    known_.clear();
  }

 private:
  void transmit(iovec* pieces, size_t num_pieces, int passed) {
    msghdr message{};
    message.msg_iov = pieces;
    message.msg_iovlen = num_pieces;
    alignas(cmsghdr) char room[CMSG_SPACE(sizeof passed)] = {};
    if (passed >= 0) {
      message.msg_control = room;
      message.msg_controllen = sizeof room;
      cmsghdr* control = CMSG_FIRSTHDR(&message);
      control->cmsg_level = SOL_SOCKET;
      control->cmsg_type = SCM_RIGHTS;
      control->cmsg_len = CMSG_LEN(sizeof passed);
      std::memcpy(CMSG_DATA(control), &passed, sizeof passed);
    }
    while (sendmsg(socket_.get(), &message, MSG_NOSIGNAL) < 0) {
      if (errno != EINTR) fail();
    }
  }

  ssize_t take_packet(std::vector<Descriptor>& descriptors, bool& is_cut) {
    iovec piece{packet_.get(), kPacket};
    alignas(cmsghdr) char room[CMSG_SPACE(4 * sizeof(int))];
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = room;
    message.msg_controllen = sizeof room;
    const ssize_t size = recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    if (size < 0) return size;
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (size_t i = 0; i < count; ++i) {
        int descriptor;
        std::memcpy(&descriptor, CMSG_DATA(c) + i * sizeof descriptor, sizeof descriptor);
        descriptors.emplace_back(descriptor);
      }
    }
    is_cut = (message.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) != 0;
    return size;
  }

  // Takes back a block that the other side has read.
  void give_back(int64_t number) {
    const bool is_forked = number < 0;
    number = is_forked ? ~number : number;
    for (auto at = lent_.begin(); at != lent_.end(); ++at) {
      if (at->first != number) continue;
      Block block = std::move(at->second);
      lent_.erase(at);
      if (!is_forked) blocks_->give(std::move(block));  // else nobody writes there again
      return;
    }
    throw Broken("a message names block " + std::to_string(number) + ", which was not sent");
  }

  std::shared_ptr<View> viewed(const Header& header, std::vector<Descriptor>& descriptors,
                               const char* body, size_t size) {
    Block block;
    if (header.is_new) {
      const bool is_copy = header.block < 0;
      block = std::make_shared<Memory>(std::move(descriptors.front()), is_copy);
      if (is_copy) return std::make_shared<View>(std::move(block), nullptr);
      known_.add(header.block, block);
    } else if (header.block < 0) {
      return std::make_shared<View>(std::string(body, size));
    } else {
      block = known_.find(header.block);
      if (block == nullptr) {
        throw Broken("a message came in block " + std::to_string(header.block) +
                     ", which is not known");
      }
    }
    auto lease = std::make_shared<Lease>();
    size_t num_kept = 1;
    for (const auto& [number, other] : leases_) {
      if (number == header.block && !other->has_ended()) {
        throw Broken("a message came in block " + std::to_string(number) + ", which is read");
      }
      num_kept += !other->has_ended();
    }
    leases_.emplace_back(header.block, lease);
    if (num_kept <= kMostKept) return std::make_shared<View>(std::move(block), std::move(lease));
    lease->end();
    return std::make_shared<View>(std::string(block->data(), block->size()));
  }

  Descriptor socket_;
  std::shared_ptr<Blocks> blocks_;
  std::unique_ptr<char[]> packet_;
  std::mutex mutex_;                             // of what follows
  Kept sent_{kMostBytes};                        // blocks that the other side maps
  std::vector<std::pair<int64_t, Block>> lent_;  // blocks that the other side reads
  Kept known_{kMostBytes};                       // blocks of the other side
  std::vector<std::pair<int64_t, std::shared_ptr<Lease>>> leases_;  // of messages in them
};

}  // namespace coded_torch::lane
