/* Threads that all run one function from end to end and meet at barriers.
 *
 * Whoever waits spins for some microseconds, about what the shares of an operation differ by, then sleeps: waiting
 * threads never take a core from one that works. */
#pragma once
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

enum { SPINS = 1000, MAX_THREADS = 256 };

typedef struct Threads Threads;
typedef struct {
    Threads *all;
    int64_t index, count;
    void *scratch;
} Thread;

struct Threads {
    int64_t count;
    size_t scratch_bytes;
    pthread_mutex_t mutex;
    pthread_cond_t begun, met;
    uint64_t job;
    int is_closing;
    void (*function)(Thread *, void *);
    void *argument;
    atomic_int arrived;
    atomic_uint meeting;
    pthread_t handles[MAX_THREADS];
    Thread members[MAX_THREADS];
};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Returns in no thread before all have called it. */
static void barrier(Thread *thread) {
    Threads *all = thread->all;
    if (all->count == 1) return;
    unsigned meeting = atomic_load(&all->meeting);
    if (atomic_fetch_add(&all->arrived, 1) + 1 == all->count) {
        atomic_store(&all->arrived, 0);
        pthread_mutex_lock(&all->mutex);
        atomic_store(&all->meeting, meeting + 1);
        pthread_cond_broadcast(&all->met);
        pthread_mutex_unlock(&all->mutex);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&all->meeting) != meeting) return;
        pause_briefly();
    }
    pthread_mutex_lock(&all->mutex);
    while (atomic_load(&all->meeting) == meeting) pthread_cond_wait(&all->met, &all->mutex);
    pthread_mutex_unlock(&all->mutex);
}

static void *serve(void *given) {
    Thread *thread = given;
    Threads *all = thread->all;
    for (uint64_t done = 0;; done++) {
        pthread_mutex_lock(&all->mutex);
        while (all->job == done && !all->is_closing) pthread_cond_wait(&all->begun, &all->mutex);
        int is_closing = all->is_closing;
        pthread_mutex_unlock(&all->mutex);
        if (is_closing) return NULL;
        all->function(thread, all->argument);
        barrier(thread);
    }
}

/* The caller is thread 0; returns when every thread has returned. */
static void run_on_all(Threads *all, void (*function)(Thread *, void *), void *argument) {
    if (all->count > 1) {
        pthread_mutex_lock(&all->mutex);
        all->function = function;
        all->argument = argument;
        all->job++;
        pthread_cond_broadcast(&all->begun);
        pthread_mutex_unlock(&all->mutex);
    }
    function(&all->members[0], argument);
    barrier(&all->members[0]);
}

static void close_threads(Threads *all) {
    pthread_mutex_lock(&all->mutex);
    all->is_closing = 1;
    pthread_cond_broadcast(&all->begun);
    pthread_mutex_unlock(&all->mutex);
    for (int64_t i = 1; i < all->count; i++) pthread_join(all->handles[i], NULL);
    for (int64_t i = 0; i < all->count; i++) free(all->members[i].scratch);
    free(all);
}

/* NULL when there is no memory, or no thread to be had. */
static Threads *open_threads(int64_t count, size_t scratch_bytes) {
    Threads *all = calloc(1, sizeof *all);
    if (!all) return NULL;
    pthread_mutex_init(&all->mutex, NULL);
    pthread_cond_init(&all->begun, NULL);
    pthread_cond_init(&all->met, NULL);
    all->scratch_bytes = scratch_bytes;
    for (int64_t i = 0; i < count; i++) {
        Thread *member = &all->members[i];
        *member = (Thread){all, i, count, NULL};
        int failed = posix_memalign(&member->scratch, 4096, scratch_bytes);
        if (!failed && i > 0) {
            failed = pthread_create(&all->handles[i], NULL, serve, member);
            if (failed) free(member->scratch);
        }
        if (failed) {
            close_threads(all);
            return NULL;
        }
        all->count = i + 1;
    }
    return all;
}
