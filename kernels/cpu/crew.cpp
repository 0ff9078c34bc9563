// Threads for products. They stay, and look out for the next product for a while before they sleep: a model asks for one
// within some ten microseconds, and to wake a thread takes longer than many a product.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "../quantforge.h"

namespace {

constexpr int MOST_HELPERS = 255, MOST_INPUTS = 16;
constexpr int PARTS_OF_A_THREAD = 4, ROWS = 32;  // rows of a part: a multiple of ROWS
constexpr auto AWAKE = std::chrono::microseconds(200);
constexpr size_t STACK = 4 << 20;  // kernels keep there what they decode

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A product whose rows are done in parts.
struct Job {
    qf_fn fn;
    const qf_array *in;
    qf_array *out;
    int n_in, n_out, span, helpers;
    int64_t first, last, step;
    int parts;

    int run(int part) const {
        qf_array mine[MOST_INPUTS];
        memcpy(mine, in, (size_t)n_in * sizeof *mine);
        const int64_t at = first + part * step;
        int64_t rows[2] = {at, at + step < last ? at + step : last};
        mine[span].data = rows;
        return fn(mine, n_in, out, n_out, nullptr);
    }
};

class Crew {
  public:
    // Whoever is free takes the next part, the caller among them. Returns an error of a part, if there was one.
    int run(const Job &job) {
        std::unique_lock<std::mutex> mine(in_use_, std::try_to_lock);
        if (!mine.owns_lock()) return alone(job);  // another product has the threads
        while (hired_ < job.helpers && hire()) {}
        uint32_t number;
        {
            std::lock_guard<std::mutex> lock(state_);
            job_ = job;
            rc_ = QF_OK;
            done_ = 0;
            number = number_of(next_) + 1;
            next_ = (uint64_t)number << 32;
        }
        if (asleep_) wake_.notify_all();
        work(job, number);
        for (int spins = 0; done_ < job.parts; spins++) spins < 4096 ? pause() : (void)sched_yield();
        return rc_;
    }

  private:
    static int alone(const Job &job) {
        int rc = QF_OK;
        for (int i = 0; i < job.parts && rc == QF_OK; i++) rc = job.run(i);
        return rc;
    }

    static uint32_t number_of(uint64_t next) { return (uint32_t)(next >> 32); }

    // Parts of the job of that number, as long as there are any: one that was taken keeps the job, and what it points to, alive.
    void work(const Job &job, uint32_t number) {
        uint64_t next = next_;
        while (number_of(next) == number && (int)(uint32_t)next < job.parts) {
            if (!next_.compare_exchange_weak(next, next + 1)) continue;
            if (const int rc = job.run((int)(uint32_t)next)) rc_ = rc;
            done_++;
            next = next_;
        }
    }

    void help(int me) {
        for (uint32_t seen = 0;;) {
            const auto until = std::chrono::steady_clock::now() + AWAKE;
            for (int i = 0; number_of(next_) == seen; i++) {
                pause();
                if (i % 64 == 63 && std::chrono::steady_clock::now() > until) break;
            }
            Job job;
            {
                std::unique_lock<std::mutex> lock(state_);
                asleep_++;
                wake_.wait(lock, [&] { return number_of(next_) != seen; });
                asleep_--;
                job = job_;
                seen = number_of(next_);
            }
            if (me < job.helpers) work(job, seen);
        }
    }

    bool hire() {
        struct Start { Crew *crew; int me; } *start = new Start{this, hired_};
        const auto body = [](void *p) -> void * {
            const Start s = *(Start *)p;
            delete (Start *)p;
            s.crew->help(s.me);
            return nullptr;
        };
        pthread_t thread;
        pthread_attr_t attr;
        pthread_attr_init(&attr);
        pthread_attr_setstacksize(&attr, STACK);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        sigset_t all, before;  // signals are the program's own threads'
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        const bool there = !pthread_create(&thread, &attr, body, start);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_attr_destroy(&attr);
        if (there) hired_++;
        else delete start;
        return there;
    }

    std::mutex in_use_, state_;
    std::condition_variable wake_;
    Job job_;                           // under state_
    std::atomic<uint64_t> next_{0};     // number of the job, and of its next part
    std::atomic<int> asleep_{0}, done_{0}, rc_{QF_OK};
    int hired_ = 0;                     // under in_use_
};

// Threads do not survive a fork. A crew is never freed: its threads wait in it when the program ends.
Crew *crew() {
    static std::mutex making;
    static std::atomic<Crew *> found{nullptr};
    static std::atomic<pid_t> owner{0};
    const pid_t me = getpid();
    if (owner == me) return found;
    std::lock_guard<std::mutex> lock(making);
    if (owner != me) {
        found = new Crew;
        owner = me;
    }
    return found;
}

}  // namespace

int qf_product(qf_fn fn, const qf_array *in, int n_in, qf_array *out, int n_out, int span, int threads) {
    if (n_in > MOST_INPUTS || span < 0 || span >= n_in || in[span].ndim != 1 || in[span].shape[0] != 2) return QF_ESHAPE;
    if (in[span].dtype != QF_I64) return QF_EDTYPE;
    const int64_t *rows = (const int64_t *)in[span].data, parts = (int64_t)threads * PARTS_OF_A_THREAD;
    if (threads < 2 || rows[1] <= rows[0]) return fn(in, n_in, out, n_out, nullptr);
    Job job{fn, in, out, n_in, n_out, span, threads - 1 < MOST_HELPERS ? threads - 1 : MOST_HELPERS, rows[0], rows[1], 0, 0};
    job.step = ((rows[1] - rows[0] + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
    job.parts = (int)((rows[1] - rows[0] + job.step - 1) / job.step);
    return crew()->run(job);
}
