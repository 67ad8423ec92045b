// Runs kernels that are C++ (cuda_as_cpp.h) with a thread of the host for every CUDA thread and a
// real barrier, so that ThreadSanitizer sees each access that no barrier orders.
#pragma once

#include <algorithm>
#include <barrier>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda_as_cpp.h"

thread_local Index threadIdx, blockIdx;

namespace threads {

using Call = void (*)(void** parameters);
inline std::map<std::string, Call>& kernels() {
  static std::map<std::string, Call> all;
  return all;
}

struct alignas(16) Line {
  char bytes[16];
};

struct Block {
  unsigned index;
  std::vector<Line> shared;
  std::barrier<> barrier;
  std::vector<int> meetings;  // of each thread

  // What the memory holds is NaN before, so that nothing may be read unwritten.
  Block(unsigned index, int threads, int shared_bytes)
      : index(index), shared(shared_bytes / sizeof(Line)), barrier(threads), meetings(threads) {
    std::memset(shared.data(), 0xff, shared_bytes);
  }
};
inline thread_local Block* current;

constexpr int kTogether = 512;  // threads at once, or two blocks: threads of different blocks race

// Throws where a device would hang.
inline void run_grid(const std::string& name, int64_t blocks, int threads, int shared_bytes,
                     void** parameters) {
  const Call call = kernels().at(name);
  const int64_t together = std::max(2, kTogether / threads);
  for (int64_t first = 0; first < blocks; first += together) {
    std::vector<std::unique_ptr<Block>> running;
    std::vector<std::thread> all;
    for (int64_t i = first; i < std::min(first + together, blocks); ++i) {
      running.push_back(std::make_unique<Block>(static_cast<unsigned>(i), threads, shared_bytes));
      for (int thread = 0; thread < threads; ++thread) {
        all.emplace_back([=, block = running.back().get()] {
          current = block;
          blockIdx.x = block->index;
          threadIdx.x = static_cast<unsigned>(thread);
          call(parameters);
          block->barrier.arrive_and_drop();  // the others do not wait for it
        });
      }
    }
    for (std::thread& thread : all) thread.join();
    for (const auto& block : running) {
      for (const int count : block->meetings) {
        if (count != block->meetings[0]) throw std::runtime_error("threads miss a barrier");
      }
    }
  }
}

}  // namespace threads

Kernel::Kernel(const char* name, void (*call)(void**)) { threads::kernels()[name] = call; }
char* shared_memory() { return threads::current->shared[0].bytes; }
void __syncthreads() {
  ++threads::current->meetings[threadIdx.x];
  threads::current->barrier.arrive_and_wait();
}
