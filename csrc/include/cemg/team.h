// One thread that goes through a program, and others that take parts of its larger steps where they can.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>
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

// Each thread has a share of a step's tasks, and then takes from the shares of others. So nobody waits for
// one whose core is busy with something else, but for what it had begun. Idle threads spin, since a step
// takes microseconds and waking a thread as long; after a while they offer their core to others.
class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads), shares_(static_cast<size_t>(threads)) {}

  int64_t threads() const noexcept { return threads_; }

  // Calls work(Share) on parts of so many tasks, on this thread, number 0, and its helpers, until all are
  // done. A part is worth the while of a thread, `cost` being about how many operations a task takes.
  template <class Work>
  void each(int64_t tasks, int64_t cost, const Work& work) noexcept {
    const int64_t least = std::max<int64_t>(1, kLeastOperations / std::max<int64_t>(1, cost));
    if (tasks <= 0) return;
    if (threads_ == 1 || tasks <= least || tasks > kMostTasks) return work(Share{0, tasks});
    // What a thread that is late still sees of the job before stays as it is, since two places take turns.
    jobs_[++number_ % 2].write(&call<Work>, &work, tasks, least);
    done_.store(0, std::memory_order_relaxed);
    for (int64_t thread = threads_ - 1; thread >= 0; --thread) {
      const auto first = static_cast<uint64_t>(tasks * thread / threads_);
      shares_[static_cast<size_t>(thread)].ticket.store(number_ << kBits | first, std::memory_order_release);
    }
    const int64_t others = tasks - take_all(0);
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) != others; ++spins) rest(spins);
  }

  // The life of helper `thread`, until it is dismissed.
  void help(int64_t thread) noexcept {
    const auto& own = shares_[static_cast<size_t>(thread)].ticket;
    uint64_t seen = 0;
    for (int64_t spins = 0; !over_.load(std::memory_order_acquire); ++spins) {
      const uint64_t number = own.load(std::memory_order_acquire) >> kBits;
      if (number != seen) {
        seen = number;
        spins = 0;
        const int64_t count = take_all(thread);
        if (count > 0) done_.fetch_add(count, std::memory_order_release);
      }
      rest(spins);
    }
  }

  void dismiss(bool over = true) noexcept { over_.store(over, std::memory_order_release); }

 private:
  static constexpr int64_t kSpins = 1 << 12;
  static constexpr int64_t kLeastOperations = 1 << 16;  // half a microsecond of products
  static constexpr int kBits = 32;  // of a ticket, for the next task; the others for the job
  static constexpr int64_t kMostTasks = (int64_t{1} << (kBits - 1)) - 1;

  // Who reads it while it changes does not get its ticket: whoever sees a new number here sees that the
  // tickets of the old one are gone.
  class Job {
   public:
    void write(void (*call)(const void*, Share), const void* work, int64_t tasks, int64_t least) noexcept {
      call_.store(call, std::memory_order_release);
      work_.store(work, std::memory_order_release);
      tasks_.store(tasks, std::memory_order_release);
      least_.store(least, std::memory_order_release);
    }
    void run(Share share) const noexcept { call_.load()(work_.load(), share); }
    int64_t tasks() const noexcept { return tasks_.load(std::memory_order_acquire); }
    int64_t least() const noexcept { return least_.load(std::memory_order_acquire); }

   private:
    std::atomic<void (*)(const void*, Share)> call_{nullptr};
    std::atomic<const void*> work_{nullptr};
    std::atomic<int64_t> tasks_{0}, least_{1};
  };
  struct alignas(64) Ticket {
    std::atomic<uint64_t> ticket{0};
  };

  template <class Work>
  static void call(const void* work, Share share) {
    (*static_cast<const Work*>(work))(share);
  }

  // Takes part of the job until no share has anything left. How many tasks it did.
  int64_t take_all(int64_t thread) noexcept {
    int64_t count = 0;
    for (int64_t i = 0; i < threads_; ++i) {
      const int64_t owner = (thread + i) % threads_;
      while (const int64_t some = take(owner)) count += some;
    }
    return count;
  }

  // Does half of what is left of a thread's share; 0 where nothing is.
  int64_t take(int64_t owner) noexcept {
    std::atomic<uint64_t>& place = shares_[static_cast<size_t>(owner)].ticket;
    uint64_t ticket = place.load(std::memory_order_acquire);
    for (;;) {
      const Job& job = jobs_[(ticket >> kBits) % 2];
      const auto next = static_cast<int64_t>(ticket & ((uint64_t{1} << kBits) - 1));
      const int64_t left = job.tasks() * (owner + 1) / threads_ - next;
      if (left <= 0) return 0;
      const int64_t count = std::min(left, std::max(job.least(), left / 2));
      if (place.compare_exchange_weak(ticket, ticket + static_cast<uint64_t>(count),
                                      std::memory_order_acq_rel, std::memory_order_acquire)) {
        job.run(Share{next, next + count});
        return count;
      }
    }
  }

  static void rest(int64_t spins) noexcept {
    if (spins >= kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  const int64_t threads_;
  uint64_t number_ = 0;  // of the job
  Job jobs_[2];
  std::vector<Ticket> shares_;
  alignas(64) std::atomic<int64_t> done_{0};  // tasks, by helpers
  alignas(64) std::atomic<bool> over_{false};
};

// Runs work(), with the team's helpers at hand.
template <class Work>
void run_team([[maybe_unused]] Team& team, const Work& work) {
#if defined(_OPENMP)
  std::exception_ptr thrown;  // must not leave the region
  team.dismiss(false);
#pragma omp parallel num_threads(static_cast<int>(team.threads())) if (team.threads() > 1)
  if (omp_get_thread_num() == 0) {
    try {
      work();
    } catch (...) {
      thrown = std::current_exception();
    }
    team.dismiss();
  } else {
    team.help(omp_get_thread_num());
  }
  if (thrown) std::rethrow_exception(thrown);
#else
  work();
#endif
}

}  // namespace cemg
