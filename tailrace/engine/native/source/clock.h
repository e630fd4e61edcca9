/* Where a step's time goes, as thread 0 sees it, for who asks: some 300 readings of some 25 ns a step. Without a clock,
 * nothing. */
#pragma once
#include <time.h>

#include "threads.h"

/* PHASES of library.py; each ends at its barrier. */
typedef enum { EMBEDDING, NORMS, QKV, ROTARY, ATTENTION, ATTENTION_OUT, GATE_UP, DOWN, HEAD, NUM_PHASES } Phase;

typedef struct {
    double since, seconds[NUM_PHASES];
} Clock;

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void start_clock(const Thread *thread, Clock *clock) {
    if (clock && thread->index == 0) clock->since = seconds_now();
}

/* The time since the clock was started or last charged goes to `phase`. */
static void charge(const Thread *thread, Clock *clock, Phase phase) {
    if (!clock || thread->index > 0) return;
    const double now = seconds_now();
    clock->seconds[phase] += now - clock->since;
    clock->since = now;
}
