/* The likeliest logits of a head with rounded weights, computed again from the weights as they came: so rounding seldom
 * decides which token is the likeliest. As refine_best of tailrace.engine.models.decoder. */
#pragma once
#include <math.h>

#include "threads.h"
#include "vector.h"

typedef struct {
    Threads *threads;
    float *logits; /* [rows, vocab] */
    int64_t rows, vocab, inputs;
    const element *x;      /* [rows, inputs] */
    const element *weight; /* [vocab, inputs] */
    float share;           /* of the best logit: those that are no further from it are computed again */
} Refinement;

enum { SCANNED = 4 * VL };

INLINE vfloat greater(vfloat a, vfloat b) { return (vfloat)chosen(a > b, (vword)a, (vword)b); }

/* Of SCANNED logits; NaN counts for nothing. */
INLINE float best_of(const float *logits) {
    vfloat best = splat(-INFINITY);
    UNROLL for (int v = 0; v < SCANNED / VL; v++) best = greater(load(logits + v * VL), best);
    return max_of(best);
}

static float logit_of(const element *x, const element *weight, int64_t inputs) {
    vfloat sum = {0};
    for (int64_t i = 0; i < inputs; i += VL) sum += load_some(x + i, inputs - i) * load_some(weight + i, inputs - i);
    return sum_of(sum);
}

static void refine_row(const Refinement *own, int64_t row) {
    float *logits = own->logits + row * own->vocab, best = -INFINITY;
    const int64_t scanned = own->vocab / SCANNED * SCANNED;
    for (int64_t i = 0; i < scanned; i += SCANNED) best = fmaxf(best, best_of(logits + i));
    for (int64_t i = scanned; i < own->vocab; i++) best = fmaxf(best, logits[i]);
    const float least = best - fabsf(best) * own->share;
    for (int64_t i = 0; i < own->vocab; i += SCANNED) {
        if (i < scanned && !(best_of(logits + i) >= least)) continue;
        for (int64_t token = i; token < smaller(i + SCANNED, own->vocab); token++)
            if (logits[token] >= least)
                logits[token] = logit_of(own->x + row * own->inputs, own->weight + token * own->inputs, own->inputs);
    }
}

static void run_refine(Thread *thread, void *given) {
    const Refinement *own = given;
    const int64_t end = own->rows * (thread->index + 1) / thread->count;
    for (int64_t row = own->rows * thread->index / thread->count; row < end; row++) refine_row(own, row);
}

void tailrace_refine(const Refinement *refinement) { run_on_all(refinement->threads, run_refine, (void *)refinement); }
