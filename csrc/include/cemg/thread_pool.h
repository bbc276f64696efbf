// A thread pool for programs whose parallel loops take microseconds.
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

struct TaskRange {  // half open
  int64_t begin, end;
};

// One thread runs the program; the workers help with its parallel loops. Each thread starts with an equal
// range of a loop's tasks and then steals from the ranges of the others, so that a thread whose core is busy
// with another process delays the loop only by the tasks it has already taken. Idle workers spin, because a
// loop takes microseconds and waking a thread takes as long; after a while they yield their core.
class ThreadPool {
 public:
  explicit ThreadPool(int64_t threads) : threads_(threads), tickets_(static_cast<size_t>(threads)) {}

  int64_t threads() const noexcept { return threads_; }

  // Calls work(TaskRange) on parts of `tasks` tasks, on this thread (number 0) and on the workers, and
  // returns when all are done. `cost` is about how many operations a task takes; a part holds enough tasks to
  // be worth handing to a thread.
  template <class Work>
  void parallel_for(int64_t tasks, int64_t cost, const Work& work) noexcept {
    const int64_t min_tasks = std::max<int64_t>(1, kMinOperations / std::max<int64_t>(1, cost));
    if (tasks <= 0) return;
    if (threads_ == 1 || tasks <= min_tasks || tasks > kMaxTasks) return work(TaskRange{0, tasks});
    // Two slots alternate, so that the job before, which a late worker may still read, is not overwritten.
    jobs_[++job_number_ % 2].write(&call<Work>, &work, tasks, min_tasks);
    finished_.store(0, std::memory_order_relaxed);
    for (int64_t thread = threads_ - 1; thread >= 0; --thread) {
      const auto first = static_cast<uint64_t>(tasks * thread / threads_);
      tickets_[static_cast<size_t>(thread)].value.store(job_number_ << kTaskBits | first,
                                                        std::memory_order_release);
    }
    const int64_t by_workers = tasks - run_available(0);
    for (int64_t spins = 0; finished_.load(std::memory_order_acquire) != by_workers; ++spins) pause(spins);
  }

  // The loop of worker `thread`; returns after stop().
  void run_worker(int64_t thread) noexcept {
    const auto& ticket = tickets_[static_cast<size_t>(thread)].value;
    uint64_t last_job = 0;
    for (int64_t spins = 0; !stopped_.load(std::memory_order_acquire); ++spins) {
      const uint64_t job = ticket.load(std::memory_order_acquire) >> kTaskBits;
      if (job != last_job) {
        last_job = job;
        spins = 0;
        const int64_t count = run_available(thread);
        if (count > 0) finished_.fetch_add(count, std::memory_order_release);
      }
      pause(spins);
    }
  }

  void restart() noexcept { stopped_.store(false, std::memory_order_release); }
  void stop() noexcept { stopped_.store(true, std::memory_order_release); }

 private:
  static constexpr int64_t kSpins = 1 << 12;
  static constexpr int64_t kMinOperations = 1 << 16;  // of a part: half a microsecond of products
  static constexpr int kTaskBits = 32;  // the lower bits of a ticket: the next task; the upper bits: the job
  static constexpr int64_t kMaxTasks = (int64_t{1} << (kTaskBits - 1)) - 1;

  // A thread that reads a job while it is overwritten fails to take a ticket: it sees either the old job, or
  // at least one new field, and then the tickets of the old job are gone.
  class Job {
   public:
    void write(void (*call)(const void*, TaskRange), const void* work, int64_t tasks,
               int64_t min_tasks) noexcept {
      call_.store(call, std::memory_order_release);
      work_.store(work, std::memory_order_release);
      tasks_.store(tasks, std::memory_order_release);
      min_tasks_.store(min_tasks, std::memory_order_release);
    }
    void run(TaskRange range) const noexcept { call_.load()(work_.load(), range); }
    int64_t tasks() const noexcept { return tasks_.load(std::memory_order_acquire); }
    int64_t min_tasks() const noexcept { return min_tasks_.load(std::memory_order_acquire); }

   private:
    std::atomic<void (*)(const void*, TaskRange)> call_{nullptr};
    std::atomic<const void*> work_{nullptr};
    std::atomic<int64_t> tasks_{0}, min_tasks_{1};
  };
  struct alignas(64) Ticket {
    std::atomic<uint64_t> value{0};
  };

  template <class Work>
  static void call(const void* work, TaskRange range) {
    (*static_cast<const Work*>(work))(range);
  }

  // Runs tasks of the job, first its own and then those of other threads, until none are left to take.
  // Returns how many it ran.
  int64_t run_available(int64_t thread) noexcept {
    int64_t count = 0;
    for (int64_t i = 0; i < threads_; ++i) {
      const int64_t owner = (thread + i) % threads_;
      while (const int64_t taken = take_half(owner)) count += taken;
    }
    return count;
  }

  // Takes and runs half of the tasks left in the range of `owner`. Returns their number, 0 where none were
  // left.
  int64_t take_half(int64_t owner) noexcept {
    std::atomic<uint64_t>& current = tickets_[static_cast<size_t>(owner)].value;
    uint64_t ticket = current.load(std::memory_order_acquire);
    for (;;) {
      const Job& job = jobs_[(ticket >> kTaskBits) % 2];
      const auto next = static_cast<int64_t>(ticket & ((uint64_t{1} << kTaskBits) - 1));
      const int64_t left = job.tasks() * (owner + 1) / threads_ - next;
      if (left <= 0) return 0;
      const int64_t count = std::min(left, std::max(job.min_tasks(), left / 2));
      if (current.compare_exchange_weak(ticket, ticket + static_cast<uint64_t>(count),
                                        std::memory_order_acq_rel, std::memory_order_acquire)) {
        job.run(TaskRange{next, next + count});
        return count;
      }
    }
  }

  static void pause(int64_t spins) noexcept {
    if (spins >= kSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  const int64_t threads_;
  uint64_t job_number_ = 0;
  Job jobs_[2];
  std::vector<Ticket> tickets_;
  alignas(64) std::atomic<int64_t> finished_{0};  // tasks run by workers
  alignas(64) std::atomic<bool> stopped_{false};
};

// Runs work() on this thread while the pool's workers are ready to help, each on an OpenMP thread.
template <class Work>
void run_with_workers([[maybe_unused]] ThreadPool& pool, const Work& work) {
#if defined(_OPENMP)
  std::exception_ptr thrown;  // an exception must not leave the parallel region
  pool.restart();
#pragma omp parallel num_threads(static_cast<int>(pool.threads())) if (pool.threads() > 1)
  if (omp_get_thread_num() == 0) {
    try {
      work();
    } catch (...) {
      thrown = std::current_exception();
    }
    pool.stop();
  } else {
    pool.run_worker(omp_get_thread_num());
  }
  if (thrown) std::rethrow_exception(thrown);
#else
  work();
#endif
}

}  // namespace cemg
