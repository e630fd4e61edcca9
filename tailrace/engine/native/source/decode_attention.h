/* Attention of one new token a sequence over its cached tokens. Everything is float but what is multiplied.
 *
 * A row is computed span by span, and the spans' results are put together in order, whichever threads had them: so a
 * row's result depends neither on the other rows nor on the number of threads. */
#pragma once
#include "fetching.h"

enum {
    SPAN = 256,             /* cached tokens at once */
    SPAN_BYTES = 384 << 10, /* of them, at most: the next span comes into the same cache meanwhile */
    SCORES = SPAN + 16,     /* a head's scores, with room for a tile that ends behind the span */
    HEADS = 4,              /* heads of a group at once */
    WORDS = 4 / PER_WORD    /* vectors of words at once of a value's row */
};

/* What is left of a sum after further tokens, and how much of theirs is added. */
typedef struct {
    float kept, added;
} Shares;

typedef struct {
    float queries[MAX_GROUP * MAX_HEAD_DIM]; /* as score_tokens reads them */
    float scores[MAX_GROUP * SCORES];
    Shares shares[MAX_GROUP];
    float out[MAX_GROUP * MAX_HEAD_DIM]; /* until the end in the order in which `widen` leaves a row */
    float best[MAX_GROUP], total[MAX_GROUP];
} DecodeScratch;

#if BF16_DOT
/* Of each 128 bits of a query the halves, twice each: as the keys of two tokens lie in score_four. */
static void take_queries(float *out, const element *query, int64_t group, int64_t head_dim) {
    for (int64_t h = 0; h < group; h++)
        for (int64_t i = 0; i < head_dim; i += 2 * VL) {
            __m512i words = (__m512i)load_words(query + h * head_dim + i, (head_dim - i) / 2);
            _mm512_storeu_si512(out + h * MAX_HEAD_DIM + i, _mm512_unpacklo_epi64(words, words));
            _mm512_storeu_si512(out + h * MAX_HEAD_DIM + i + VL, _mm512_unpackhi_epi64(words, words));
        }
}

/* sums[h]: in each 128 bits a quarter of the scores of four tokens. */
INLINE void score_four(const int heads, const float *queries, const element *const rows[4], int64_t head_dim,
                       __m512 sums[HEADS]) {
    vfloat pairs[HEADS][2] = {{{0}}};
    for (int64_t i = 0; i < head_dim; i += 2 * VL) {
        __m512i key[4];
        UNROLL for (int t = 0; t < 4; t++) key[t] = (__m512i)load_words(rows[t] + i, (head_dim - i) / 2);
        UNROLL for (int t = 0; t < 2; t++) {
            vword low = (vword)_mm512_unpacklo_epi64(key[2 * t], key[2 * t + 1]);
            vword high = (vword)_mm512_unpackhi_epi64(key[2 * t], key[2 * t + 1]);
            UNROLL for (int h = 0; h < heads; h++) {
                const vword_any *query = (const vword_any *)(queries + h * MAX_HEAD_DIM + i);
                pairs[h][t] = add_products(pairs[h][t], low, query[0]);
                pairs[h][t] = add_products(pairs[h][t], high, query[1]);
            }
        }
    }
    UNROLL for (int h = 0; h < heads; h++) {
        __m512 first = (__m512)pairs[h][0], second = (__m512)pairs[h][1];
        sums[h] = _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x88), _mm512_shuffle_ps(first, second, 0xdd));
    }
}

INLINE __m512 halved(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

INLINE void score_heads(const int heads, const float *queries, const element *keys, int64_t n, int64_t head_dim,
                        float *scores, Fetching *fetching) {
    __m512 fours[4][HEADS];
    UNROLL for (int four = 0; four < 4; four++) {
        const element *rows[4];
        UNROLL for (int t = 0; t < 4; t++)
            rows[t] = keys + (n == 16 ? 4 * four + t : smaller(4 * four + t, n - 1)) * head_dim;
        if (fetching) fetch_rows(fetching, 4, head_dim);
        score_four(heads, queries, rows, head_dim, fours[four]);
    }
    UNROLL for (int h = 0; h < heads; h++) {
        __m512 all = halved(halved(fours[0][h], fours[1][h]), halved(fours[2][h], fours[3][h]));
        store(scores + h * SCORES, (vfloat)all);
    }
}

/* scores [group, SCORES] of n <= 16 tokens from `keys` on. Writes 16 columns. */
INLINE void score_tokens(const float *queries, int64_t group, const element *keys, int64_t n, int64_t head_dim,
                         float *scores, Fetching *fetching) {
    for (int64_t h = 0; h < group; h += HEADS, fetching = NULL) {
        const float *some = queries + h * MAX_HEAD_DIM;
        switch (smaller(HEADS, group - h)) {
            case 1: score_heads(1, some, keys, n, head_dim, scores + h * SCORES, fetching); break;
            case 2: score_heads(2, some, keys, n, head_dim, scores + h * SCORES, fetching); break;
            case 3: score_heads(3, some, keys, n, head_dim, scores + h * SCORES, fetching); break;
            case 4: score_heads(4, some, keys, n, head_dim, scores + h * SCORES, fetching); break;
        }
    }
}
#else
static void take_queries(float *out, const element *query, int64_t group, int64_t head_dim) {
    for (int64_t h = 0; h < group; h++) {
        memset(out + h * MAX_HEAD_DIM, 0, MAX_HEAD_DIM * 4);
        for (int64_t i = 0; i < head_dim; i++) out[h * MAX_HEAD_DIM + i] = widened(query[h * head_dim + i]);
    }
}

/* scores [group, SCORES] of n <= 16 tokens from `keys` on. */
INLINE void score_tokens(const float *queries, int64_t group, const element *keys, int64_t n, int64_t head_dim,
                         float *scores, Fetching *fetching) {
    for (int64_t token = 0; token < n; token++) {
        const element *key = keys + token * head_dim;
        fetch_rows(fetching, 1, head_dim);
        for (int64_t h = 0; h < group; h++) {
            vfloat sum = {0};
            for (int64_t i = 0; i < head_dim; i += VL)
                sum += load(queries + h * MAX_HEAD_DIM + i) * load_some(key + i, head_dim - i);
            scores[h * SCORES + token] = sum_of(sum);
        }
    }
}
#endif

/* The shares of what was summed with `best` as the greatest score, and of a span; `best` and `total` become those of
 * both. Compiled once, so that wherever spans are put together it rounds alike. */
static __attribute__((noinline)) Shares add_span_total(float *best, float *total, float span_best, float span_total) {
    const float highest = span_best > *best ? span_best : *best;
    const Shares shares = {expf(*best - highest), expf(span_best - highest)};
    *total = *total * shares.kept + span_total * shares.added;
    *best = highest;
    return shares;
}

INLINE vfloat shared_sum(vfloat sum, vfloat span_sum, Shares shares) {
    return product_of(sum, splat(shares.kept)) + product_of(span_sum, splat(shares.added));
}

/* weights = e^(score * scale - their greatest) of n scores, in place. */
static Shares weigh(float *scores, int64_t n, float scale, float *best, float *total) {
    for (int64_t i = n; i < parts_of(n, VL) * VL; i++) scores[i] = -INFINITY;
    vfloat greatest = splat(LOWEST), sum = {0};
    for (int64_t i = 0; i < n; i += VL) greatest = at_least(load(scores + i), greatest);
    float highest = max_of(greatest) * scale;
    highest = highest > LOWEST ? highest : LOWEST;
    for (int64_t i = 0; i < n; i += VL) {
        vfloat weight = exp_of(load(scores + i) * scale - highest);
        store(scores + i, weight);
        sum += weight;
    }
    return add_span_total(best, total, highest, sum_of(sum));
}

/* out [heads, vectors of words] = its share + that of weights [heads, until - from] x values of tokens [from, until),
 * from one dimension on. */
INLINE void add_values(const int heads, const int vectors, const float *weights, const Shares *shares,
                       const Cached *cached, int64_t from, int64_t until, int64_t dimension, float *out,
                       Fetching *fetching) {
    const int64_t words = (cached->head_dim - dimension) / PER_WORD;
    vfloat sums[HEADS][WORDS * PER_WORD] = {{{0}}};
    for (int64_t at = from, n; at < until; at += n) {
        n = smaller(until - at, cached->block - at % cached->block);
        const element *value = key_at(cached, at) + cached->value_offset + dimension;
        for (int64_t token = 0; token < n; token++, value += cached->head_dim) {
            vfloat row[WORDS * PER_WORD];
            if (token % 4 == 0 && fetching) fetch_rows(fetching, 4, cached->head_dim);
            UNROLL for (int v = 0; v < vectors; v++)
                widen(load_words(value + v * VL * PER_WORD, v + 1 < vectors ? VL : words - v * VL), row + v * PER_WORD);
            UNROLL for (int h = 0; h < heads; h++)
                UNROLL for (int v = 0; v < vectors * PER_WORD; v++)
                    sums[h][v] += row[v] * weights[h * SCORES + at - from + token];
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors * PER_WORD; v++) {
            float *sum = out + h * MAX_HEAD_DIM + v * VL;
            store(sum, shared_sum(load(sum), sums[h][v], shares[h]));
        }
}

static void add_span(const float *scores, const Shares *shares, int64_t group, const Cached *cached, int64_t from,
                     int64_t until, float *sums, Fetching *fetching) {
    const int64_t size = WORDS * VL * PER_WORD;
    for (int64_t i = 0; i < cached->head_dim; i += size) {
        const int64_t vectors = smaller(WORDS, parts_of(cached->head_dim - i, VL * PER_WORD));
        for (int64_t h = 0; h < group; h += HEADS, fetching = NULL) {
            const float *weights = scores + h * SCORES;
            float *out = sums + h * MAX_HEAD_DIM + i;
#define CASE(hs, vs)                                                                                              \
    case (hs) * 8 + (vs): add_values(hs, vs, weights, shares + h, cached, from, until, i, out, fetching); break;
#if PER_WORD == 2
#define CASES(hs) CASE(hs, 1) CASE(hs, 2)
#else
#define CASES(hs) CASE(hs, 1) CASE(hs, 2) CASE(hs, 3) CASE(hs, 4)
#endif
            switch (smaller(HEADS, group - h) * 8 + vectors) { CASES(1) CASES(2) CASES(3) CASES(4) }
#undef CASES
#undef CASE
        }
    }
}

static void score_span(const float *queries, int64_t group, const Cached *cached, int64_t from, int64_t until,
                       float *all_scores, Fetching *fetching) {
    const int64_t head_dim = cached->head_dim, tile = smaller(16, cached->block);
    for (int64_t at = from, n; at < until; at += n) {
        n = smaller(smaller(until - at, tile), cached->block - at % cached->block);
        const element *keys = key_at(cached, at);
        float *scores = all_scores + at - from;
        /* The usual sizes once more, with the sizes as constants. */
        if (n == 16 && head_dim == 64)
            score_tokens(queries, group, keys, 16, 64, scores, fetching);
        else if (n == 16 && head_dim == 128)
            score_tokens(queries, group, keys, 16, 128, scores, fetching);
        else
            score_tokens(queries, group, keys, n, head_dim, scores, fetching);
    }
}

/* How many key heads are computed one after the other, so that what a block holds of them is fetched at once. */
INLINE int64_t heads_at_once(int64_t group, int64_t kv_heads, int64_t head_dim) {
    const int64_t fitting = SPAN_BYTES / (2 * SPAN * head_dim * (int64_t)sizeof(element));
    return smaller(kv_heads, larger(1, smaller(MAX_GROUP / group, fitting)));
}

/* Leaves own->out (not yet divided), best and total of each query head. `fetching` is of this job, and goes on to the
 * next one. */
static void attend_row(DecodeScratch *own, const DecodeJob *job, const DecodeJob *next, Fetching *fetching) {
    const int64_t head_dim = job->cached.head_dim, group = job->group;
    const float scale = 1.0f / sqrtf((float)head_dim);
    fetching->next = next;
    take_queries(own->queries, job->query, job->heads * group, head_dim);
    memset(own->out, 0, job->heads * group * MAX_HEAD_DIM * 4);
    for (int64_t h = 0; h < job->heads * group; h++) own->best[h] = LOWEST, own->total[h] = 0;
    for (int64_t from = job->first; from < job->end; from += SPAN) {
        const int64_t until = smaller(job->end, from + SPAN);
        fetch_until(fetching, until);
        for (int64_t head = 0, h = 0; head < job->heads; head++, h += group) {
            Cached cached = job->cached;
            cached.pool += head * cached.block * head_dim;
            score_span(own->queries + h * MAX_HEAD_DIM, group, &cached, from, until, own->scores, fetching);
            for (int64_t i = 0; i < group; i++)
                own->shares[i] =
                    weigh(own->scores + i * SCORES, until - from, scale, own->best + h + i, own->total + h + i);
            add_span(own->scores, own->shares, group, &cached, from, until, own->out + h * MAX_HEAD_DIM, fetching);
        }
    }
    for (int64_t h = 0; h < job->heads * group; h++)
        for (int64_t i = 0; i < head_dim; i += VL * PER_WORD) put_in_order(own->out + h * MAX_HEAD_DIM + i);
}
