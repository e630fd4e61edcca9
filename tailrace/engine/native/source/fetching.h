/* Cached tokens brought near before they are read: a block is a short range of memory far from the last one, which no
 * processor guesses. As much is fetched as is read meanwhile, a span ahead and on into the next job: prefetches that come
 * too many at once are dropped. */
#pragma once
#include "attention.h"

enum { UNIT_LINES = 8, UNIT = UNIT_LINES * LINE /* bytes fetched at once */ };

/* A row's cached tokens [first, end) for `heads` key heads from that of `cached` on, each with `group` of queries. */
typedef struct {
    Cached cached;
    const element *query;
    int64_t heads, group, first, end;
} DecodeJob;

/* Of a job's tokens [at, end) the keys, then the values, block by block, of all its heads. */
typedef struct {
    Cached cached; /* of the first head */
    int64_t at, end, bytes; /* of the keys in a block */
    const char *unit, *range_end;
    int is_value;
    const DecodeJob *next; /* NULL once it has begun */
} Fetching;

INLINE void enter_range(Fetching *own) {
    const element *keys = key_at(&own->cached, own->at / own->cached.block * own->cached.block);
    own->unit = (const char *)(keys + (own->is_value ? own->cached.value_offset : 0));
    own->range_end = own->unit + own->bytes;
}

static void begin_fetching(Fetching *own, const DecodeJob *job) {
    *own = (Fetching){.cached = job->cached, .at = job->first, .end = job->end};
    own->bytes = job->heads * job->cached.block * job->cached.head_dim * (int64_t)sizeof(element);
    if (own->at < own->end) enter_range(own);
}

INLINE void fetch_unit(Fetching *own) {
    if (own->at >= own->end) {
        if (own->next) begin_fetching(own, own->next);
        return;
    }
    UNROLL for (int i = 0; i < UNIT_LINES; i++) __builtin_prefetch(own->unit + i * LINE, 0, 3);
    own->unit += UNIT;
    if (own->unit < own->range_end) return;
    if (own->is_value) own->at = (own->at / own->cached.block + 1) * own->cached.block;
    own->is_value = !own->is_value;
    if (own->at < own->end) enter_range(own);
}

/* As much as `rows` of the keys or values of one head. */
INLINE void fetch_rows(Fetching *own, int64_t rows, int64_t head_dim) {
    const int64_t bytes = rows * head_dim * (int64_t)sizeof(element);
    for (int64_t i = 0; i < bytes; i += UNIT) fetch_unit(own);
}

/* What of the current job's tokens before `until` the work so far was too short for. */
static void fetch_until(Fetching *own, int64_t until) {
    while (own->next && own->at < smaller(own->end, until)) fetch_unit(own);
}
