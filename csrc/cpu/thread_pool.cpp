#include "thread_pool.hpp"

#include "gnu_openmp.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace ropool::cpu {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int usable_processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
    return std::max(1U, std::thread::hardware_concurrency());
}

// The caller publishes a job, works on it itself, then withdraws it and waits for the workers that joined. A worker
// that wakes too late finds nothing to join, so nobody ever waits for a sleeping thread.
class Pool {
public:
    void run(std::int64_t units, std::int64_t grain, int threads, RangeFn range, void* context) {
        std::unique_lock<std::mutex> only(caller_, std::try_to_lock);
        if (!only.owns_lock()) {
            range(context, 0, units);
            return;
        }
        int helpers = 0;
        {
            const std::lock_guard<std::mutex> guard(mutex_);
            while (workers_ < threads - 1 && start_worker()) ++workers_;
            helpers = std::min(workers_, threads - 1);
            units_ = units;
            grain_ = grain;
            range_ = range;
            context_ = context;
            next_.store(0, std::memory_order_relaxed);
            seats_ = helpers;
            generation_.fetch_add(1, std::memory_order_release);
        }
        for (int i = 0; i < helpers; ++i) wake_.notify_one();
        work();
        {
            const std::lock_guard<std::mutex> guard(mutex_);
            seats_ = 0;
        }
        for (int spins = 0; joined_.load(std::memory_order_acquire) != 0; ++spins) {
            if (spins < kSpins) relax();
            else std::this_thread::yield();
        }
    }

private:
    static constexpr int kSpins = 1000;  // some tens of microseconds: short of a scheduler's notice

    bool start_worker() {
        try {
            std::thread([this] { serve(); }).detach();
            return true;
        } catch (const std::system_error&) {
            return false;  // no more threads to be had: fewer do the work
        }
    }

    void work() {
        for (;;) {
            const std::int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
            if (begin >= units_) return;
            range_(context_, begin, std::min(begin + grain_, units_));
        }
    }

    void serve() {
        std::uint64_t seen = 0;
        for (;;) {
            for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) relax();
            {
                std::unique_lock<std::mutex> guard(mutex_);
                wake_.wait(guard, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
                seen = generation_.load(std::memory_order_relaxed);
                if (seats_ == 0) continue;
                --seats_;
                joined_.fetch_add(1, std::memory_order_relaxed);
            }
            work();
            joined_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex caller_;  // held by the one caller whose job is running
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<std::uint64_t> generation_{0};
    int workers_ = 0;
    int seats_ = 0;  // how many more workers may join the job
    std::int64_t units_ = 0;
    std::int64_t grain_ = 1;
    RangeFn range_ = nullptr;
    void* context_ = nullptr;
    std::atomic<std::int64_t> next_{0};
    std::atomic<int> joined_{0};
};

// Never destroyed: workers sleep in it when the process exits. A forked child has none of the workers and perhaps a
// locked mutex, so it leaves the parent's pool alone and makes its own.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    Pool* existing = current.load(std::memory_order_acquire);
    if (existing != nullptr) return *existing;
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(existing, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *existing;
}

// One call on the OpenMP team: its threads take pieces until none is left.
struct TeamJob {
    std::int64_t units;
    std::int64_t grain;
    RangeFn range;
    void* context;
    std::atomic<std::int64_t> next{0};

    static void work(void* data) {
        auto* job = static_cast<TeamJob*>(data);
        for (;;) {
            const std::int64_t begin = job->next.fetch_add(job->grain, std::memory_order_relaxed);
            if (begin >= job->units) return;
            job->range(job->context, begin, std::min(begin + job->grain, job->units));
        }
    }
};

// A forked child has none of the team's threads, and GNU's runtime would wait for them for ever.
std::atomic<bool> forked{false};
std::atomic<bool> own_threads{false};

// Null: the pool of our own is what there is.
TeamFn team() {
    const bool alone = forked.load(std::memory_order_relaxed) || own_threads.load(std::memory_order_relaxed);
    return alone ? nullptr : gnu_openmp_team();
}

// Bytes that pay for a thread that has to be woken.
constexpr std::int64_t kWakingBytes = 512 * 1024;
// A team that is awake starts in about a microsecond, in which a core moves 10 to 50 KiB; a wider team starts later, so
// this is for each of its threads, as far as the bytes that pay for waking it.
constexpr std::int64_t kTeamBytesPerThread = 64 * 1024;

}  // namespace

void install_fork_handler() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] {
        forked.store(true, std::memory_order_relaxed);
        current.store(nullptr, std::memory_order_release);
    });
#endif
}

void use_own_threads() { own_threads.store(true, std::memory_order_relaxed); }

int worthwhile_threads(std::int64_t bytes, int threads) {
    if (threads <= 1 || bytes < kThreadedBytes) return 1;
    const std::int64_t least =
        team() == nullptr ? kWakingBytes : std::min(kWakingBytes, kTeamBytesPerThread * threads);
    return bytes < least ? 1 : std::min(threads, usable_processors());
}

void parallel_for(std::int64_t units, std::int64_t grain, int threads, RangeFn range, void* context) {
    if (threads <= 1 || units <= grain) {
        range(context, 0, units);
        return;
    }
    const TeamFn start = team();
    if (start == nullptr) {
        pool().run(units, grain, threads, range, context);
        return;
    }
    // 0: the whole team as PyTorch set it. A smaller one would make the runtime end the other threads, and PyTorch's
    // next operator would have to start them again.
    TeamJob job{units, grain, range, context};
    start(TeamJob::work, &job, 0, 0);
}

}  // namespace ropool::cpu
