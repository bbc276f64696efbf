// Threads that go through the same steps side by side, each doing its share of every step.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cemg {

struct Share {
  int64_t begin, end;
};

// Where threads wait for each other. They spin, since a step takes microseconds and waking a thread as long;
// after a while they offer their core to others.
class Barrier {
 public:
  void wait(int64_t threads) noexcept {
    const int64_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int64_t kSpins = 1 << 12;

  static void pause() noexcept {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  std::atomic<int64_t> arrived_{0};
  std::atomic<int64_t> phase_{0};
};

struct Worker {
  int64_t index, count;
  Barrier* barrier;

  // This worker's part of so many equal tasks.
  Share share(int64_t tasks) const noexcept { return {tasks * index / count, tasks * (index + 1) / count}; }
  void wait() const noexcept {
    if (count > 1) barrier->wait(count);
  }
};

// Runs work(Worker) on up to `threads` threads at once.
template <class Work>
void run_team([[maybe_unused]] int64_t threads, const Work& work) {
  Barrier barrier;
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(threads))
  work(Worker{omp_get_thread_num(), omp_get_num_threads(), &barrier});
#else
  work(Worker{0, 1, &barrier});
#endif
}

}  // namespace cemg
