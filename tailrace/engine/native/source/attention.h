/* Attention that reads blocks where they lie: one token a sequence (decode), and chunks of new tokens (prefill).
 *
 * Sums, maxima and weights of decode are float; the softmax is online: Milakov & Gimelshein, "Online normalizer
 * calculation for softmax" (2018), tile by tile as in Dao et al., "FlashAttention" (2022). Heads that share a key head
 * are computed together, so a block is read once for all of them. */
#pragma once
#include <math.h>

#include "linear.h"

enum {
    AHEAD = 1,         /* tiles of keys that are fetched before they are needed */
    SPAN = 128,        /* cached tokens of decode at once */
    SCORES = SPAN + 16, /* a head's scores, with room for a tile that ends behind the span */
    QUERY_ROWS = 128,  /* rows (token, head) of prefill at once; one token's heads always go together */
    KEY_TILE = 256,    /* cached tokens of prefill at once */
    MAX_GROUP = 128,   /* query heads a key head */
    MAX_HEAD_DIM = 256,
    MIN_PART = 256 /* cached tokens that are worth a thread's while */
};
#define LOWEST (-1e30f)

/* Where the keys and values of one layer and key head lie. */
typedef struct {
    const element *pool; /* of the layer and head, in block 0 */
    int64_t block_stride, value_offset, block, head_dim;
    const int32_t *table;
} Cached;

INLINE const element *key_at(const Cached *cached, int64_t token) {
    return cached->pool + cached->table[token / cached->block] * cached->block_stride +
           token % cached->block * cached->head_dim;
}

/* ---- decode ---- */

typedef struct {
    float queries[MAX_GROUP * MAX_HEAD_DIM]; /* scaled; a pair of elements is a word where there is BF16_DOT */
    float scores[MAX_GROUP * SCORES];
    float out[MAX_GROUP * MAX_HEAD_DIM];
    float best[MAX_GROUP], total[MAX_GROUP];
} DecodeScratch;

#if BF16_DOT
/* 16 rows of 16 words become 16 columns. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

/* Words [first, first + 16) of n rows, as columns; rows past n and words past `words` are zero. */
INLINE void load_columns(const element *rows, int64_t stride, int64_t n, int64_t first, int64_t words,
                         __m512i columns[16]) {
    __mmask16 mask = words - first >= 16 ? 0xffff : (__mmask16)((1 << (words - first)) - 1);
    UNROLL for (int i = 0; i < 16; i++)
        columns[i] = i < n ? _mm512_maskz_loadu_epi32(mask, rows + i * stride + 2 * first) : _mm512_setzero_si512();
    transpose(columns);
}

INLINE void score_heads(const int heads, const float *queries, const element *keys, int64_t n, int64_t head_dim,
                        float *scores) {
    vfloat sums[4] = {{0}};
    const int64_t words = head_dim / 2;
    for (int64_t first = 0; first < words; first += 16) {
        __m512i columns[16];
        load_columns(keys, head_dim, n, first, words, columns);
        const word *pairs = (const word *)queries + first;
        UNROLL for (int i = 0; i < 16; i++)
            UNROLL for (int h = 0; h < heads; h++)
                sums[h] = add_product(sums[h], (vword)columns[i], pairs[h * MAX_HEAD_DIM + i]);
    }
    UNROLL for (int h = 0; h < heads; h++) store(scores + h * SCORES, sums[h]);
}

/* scores [group, SCORES]: n <= 16 tokens from `keys` on. Writes 16 columns. */
static void score_tokens(const float *queries, int64_t group, const element *keys, int64_t n, int64_t head_dim,
                         float *scores) {
    for (int64_t h = 0; h < group; h += 4) {
        const float *some = queries + h * MAX_HEAD_DIM;
        switch (smaller(4, group - h)) {
            case 1: score_heads(1, some, keys, n, head_dim, scores + h * SCORES); break;
            case 2: score_heads(2, some, keys, n, head_dim, scores + h * SCORES); break;
            case 3: score_heads(3, some, keys, n, head_dim, scores + h * SCORES); break;
            case 4: score_heads(4, some, keys, n, head_dim, scores + h * SCORES); break;
        }
    }
}

/* The scale goes to the scores: queries stay the elements that they are. */
static void take_queries(float *out, const element *query, int64_t group, int64_t head_dim) {
    for (int64_t h = 0; h < group; h++) {
        memset(out + h * MAX_HEAD_DIM, 0, MAX_HEAD_DIM * 4);
        memcpy(out + h * MAX_HEAD_DIM, query + h * head_dim, head_dim * sizeof(element));
    }
}
#else
static void score_tokens(const float *queries, int64_t group, const element *keys, int64_t n, int64_t head_dim,
                         float *scores) {
    for (int64_t token = 0; token < n; token++) {
        const element *key = keys + token * head_dim;
        for (int64_t h = 0; h < group; h++) {
            vfloat sum = {0};
            for (int64_t i = 0; i < head_dim; i += VL)
                sum += load(queries + h * MAX_HEAD_DIM + i) * load_some(key + i, head_dim - i);
            scores[h * SCORES + token] = sum_of(sum);
        }
    }
}

static void take_queries(float *out, const element *query, int64_t group, int64_t head_dim) {
    for (int64_t h = 0; h < group; h++) {
        memset(out + h * MAX_HEAD_DIM, 0, MAX_HEAD_DIM * 4);
        for (int64_t i = 0; i < head_dim; i++) out[h * MAX_HEAD_DIM + i] = widened(query[h * head_dim + i]);
    }
}
#endif

/* weights = e^(score * scale - best) of n scores, in place; what was summed before is scaled to the new best. */
INLINE void weigh(DecodeScratch *own, int64_t h, int64_t n, float scale, int64_t head_dim) {
    float *scores = own->scores + h * SCORES;
    for (int64_t i = n; i < parts_of(n, VL) * VL; i++) scores[i] = -INFINITY;
    vfloat best = splat(LOWEST);
    for (int64_t i = 0; i < n; i += VL) best = at_least(load(scores + i), best);
    float highest = max_of(best) * scale, before = own->best[h];
    highest = highest > before ? highest : before;
    vfloat total = {0};
    for (int64_t i = 0; i < n; i += VL) {
        vfloat weight = exp_of(load(scores + i) * scale - highest);
        store(scores + i, weight);
        total += weight;
    }
    if (highest > before) {
        float share = before == LOWEST ? 0.0f : expf(before - highest);
        own->total[h] *= share;
        for (int64_t i = 0; i < head_dim; i += VL)
            store(own->out + h * MAX_HEAD_DIM + i, load(own->out + h * MAX_HEAD_DIM + i) * share);
    }
    own->best[h] = highest;
    own->total[h] += sum_of(total);
}

/* out [heads, vectors * VL] += weights [heads, n] x values [n, ...] of one block. */
INLINE void add_values(const int heads, const int vectors, const float *weights, const element *values, int64_t n,
                       int64_t head_dim, int64_t width, float *out) {
    vfloat sums[4][4];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++) sums[h][v] = load(out + h * MAX_HEAD_DIM + v * VL);
    for (int64_t token = 0; token < n; token++) {
        vfloat row[4];
        UNROLL for (int v = 0; v < vectors; v++)
            row[v] = v + 1 < vectors ? load_elements(values + token * head_dim + v * VL)
                                     : load_some(values + token * head_dim + v * VL, width - v * VL);
        UNROLL for (int h = 0; h < heads; h++)
            UNROLL for (int v = 0; v < vectors; v++) sums[h][v] += row[v] * weights[h * SCORES + token];
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++) store(out + h * MAX_HEAD_DIM + v * VL, sums[h][v]);
}

static void add_block(DecodeScratch *own, int64_t group, int64_t from, const element *values, int64_t n,
                      int64_t head_dim) {
    for (int64_t at = 0; at < head_dim; at += 4 * VL) {
        const int64_t width = smaller(4 * VL, head_dim - at), vectors = parts_of(width, VL);
        for (int64_t h = 0; h < group; h += 4) {
#define CASE(hs, vs)                                                                                               \
    case (hs) * 8 + (vs):                                                                                          \
        add_values(hs, vs, own->scores + h * SCORES + from, values + at, n, head_dim, width,                         \
                   own->out + h * MAX_HEAD_DIM + at);                                                              \
        break;
#define CASES(hs) CASE(hs, 1) CASE(hs, 2) CASE(hs, 3) CASE(hs, 4)
            switch (smaller(4, group - h) * 8 + vectors) { CASES(1) CASES(2) CASES(3) CASES(4) }
#undef CASES
#undef CASE
        }
    }
}

INLINE void fetch(const element *from, int64_t count) {
    for (int64_t i = 0; i < count * (int64_t)sizeof(element); i += LINE)
        __builtin_prefetch((const char *)from + i, 0, 3);
}

/* One row's heads of one key head over its cached tokens [first, end): own->out (not yet divided), best, total. */
static void attend_row(DecodeScratch *own, const Cached *cached, const element *query, int64_t group, int64_t first,
                       int64_t end) {
    const int64_t head_dim = cached->head_dim, tile = smaller(16, cached->block);
    const float scale = 1.0f / sqrtf((float)head_dim);
    take_queries(own->queries, query, group, head_dim);
    memset(own->out, 0, group * MAX_HEAD_DIM * 4);
    for (int64_t h = 0; h < group; h++) own->best[h] = LOWEST, own->total[h] = 0;
    for (int64_t from = first; from < end; from += SPAN) {
        const int64_t until = smaller(end, from + SPAN);
        for (int64_t at = from, n; at < until; at += n) {
            n = smaller(smaller(until - at, tile), cached->block - at % cached->block);
            const element *keys = key_at(cached, at);
            /* A block is some lines in a row far from the last one: no processor guesses it. */
            if (at + AHEAD * tile < end) fetch(key_at(cached, at + AHEAD * tile), tile * head_dim);
            fetch(keys + cached->value_offset, n * head_dim);
            score_tokens(own->queries, group, keys, n, head_dim, own->scores + at - from);
        }
        for (int64_t h = 0; h < group; h++) weigh(own, h, until - from, scale, head_dim);
        for (int64_t at = from, n; at < until; at += n) {
            n = smaller(until - at, cached->block - at % cached->block);
            add_block(own, group, at - from, key_at(cached, at) + cached->value_offset, n, head_dim);
        }
    }
}

/* ---- prefill ---- */

typedef struct {
    element queries[QUERY_ROWS * MAX_HEAD_DIM];
    uint32_t keys[KEY_TILE * MAX_HEAD_DIM / PER_WORD];
    uint32_t values[KEY_TILE * MAX_HEAD_DIM / PER_WORD];
    float scores[QUERY_ROWS * KEY_TILE];
    element weights[QUERY_ROWS * KEY_TILE];
    float out[QUERY_ROWS * MAX_HEAD_DIM];
    float best[QUERY_ROWS], total[QUERY_ROWS];
} PrefillScratch;

/* Tokens [from, until) as the panels of a weight: the outputs are tokens, the inputs dimensions. */
static void pack_keys(const Cached *cached, int64_t from, int64_t until, uint32_t *panels) {
    const int64_t words = cached->head_dim / PER_WORD, count = parts_of(until - from, PANEL) * PANEL;
    for (int64_t at = 0, n; at < count; at += n) {
        uint32_t *panel = panels + at / PANEL * words * PANEL + at % PANEL;
        int64_t left = until - from - at;
        n = 1;
#if BF16_DOT
        int64_t in_block = cached->block - (from + at) % cached->block;
        if (left >= 16 && in_block >= 16 && at % 16 == 0) {
            const element *keys = key_at(cached, from + at);
            for (int64_t first = 0; first < words; first += 16) {
                __m512i columns[16];
                load_columns(keys, cached->head_dim, 16, first, words, columns);
                const int64_t some = smaller(16, words - first);
                for (int64_t i = 0; i < some; i++) _mm512_storeu_si512(panel + (first + i) * PANEL, columns[i]);
            }
            n = 16;
            continue;
        }
#endif
        const word *key = left > 0 ? (const word *)key_at(cached, from + at) : NULL;
        for (int64_t i = 0; i < words; i++) panel[i * PANEL] = key ? key[i] : 0;
    }
}

/* The same with dimensions as outputs and tokens as inputs, in panels of 64 dimensions. */
static void pack_values(const Cached *cached, int64_t from, int64_t until, uint32_t *panels) {
    const int64_t head_dim = cached->head_dim, steps = parts_of(until - from, PER_WORD);
    static const element nothing[MAX_HEAD_DIM];
    for (int64_t step = 0; step < steps; step++) {
        const element *rows[2] = {nothing, nothing};
        for (int i = 0; i < PER_WORD; i++) {
            int64_t token = from + step * PER_WORD + i;
            if (token < until) rows[i] = key_at(cached, token) + cached->value_offset;
        }
        for (int64_t at = 0; at < head_dim; at += PANEL) {
            element *out = (element *)(panels + (at * steps + step * PANEL));
            const int64_t width = smaller(PANEL, head_dim - at);
            for (int64_t i = 0; i < width; i++)
                for (int j = 0; j < PER_WORD; j++) out[i * PER_WORD + j] = rows[j][at + i];
            if (width < PANEL) memset(out + width * PER_WORD, 0, (PANEL - width) * 4);
        }
    }
}

/* Row's weights over the tile's tokens, of which it sees [low, high); its sums so far are scaled to the new best. */
static void weigh_row(PrefillScratch *own, int64_t row, int64_t low, int64_t high, int64_t count, float scale,
                      int64_t padded_dim) {
    float *scores = own->scores + row * KEY_TILE, before = own->best[row];
    element *weights = own->weights + row * KEY_TILE;
    const int64_t whole = parts_of(count, VL) * VL;
    if (high <= low) {
        memset(weights, 0, whole * sizeof(element));
        return;
    }
    const int64_t first = low / VL * VL, end = parts_of(high, VL) * VL;
    for (int64_t i = first; i < low; i++) scores[i] = -INFINITY;
    for (int64_t i = high; i < end; i++) scores[i] = -INFINITY;
    vfloat best = splat(LOWEST), total = {0};
    for (int64_t i = first; i < end; i += VL) best = at_least(load(scores + i), best);
    float highest = max_of(best) * scale;
    highest = highest > before ? highest : before;
    memset(weights, 0, first * sizeof(element));
    for (int64_t i = first; i < end; i += VL) {
        vfloat weight = exp_of(load(scores + i) * scale - highest);
        total += weight;
        store_elements(weights + i, weight);
    }
    for (int64_t i = first; i < low; i++) weights[i] = 0;
    memset(weights + high, 0, (whole - high) * sizeof(element));
    if (highest > before) {
        float share = before == LOWEST ? 0.0f : expf(before - highest), *out = own->out + row * padded_dim;
        own->total[row] *= share;
        for (int64_t i = 0; i < padded_dim; i += VL) store(out + i, load(out + i) * share);
    }
    own->best[row] = highest;
    own->total[row] += sum_of(total);
}

/* Some tokens of a chunk, at positions [first, first + count), for the heads of one key head.
 * query, out: of the first token; a token is query_stride and out_stride elements on. */
static void attend_tokens(PrefillScratch *own, const Cached *cached, const element *query, int64_t query_stride,
                          int64_t group, int64_t first, int64_t count, int64_t window, element *out,
                          int64_t out_stride) {
    const int64_t head_dim = cached->head_dim, padded = parts_of(head_dim, PANEL) * PANEL, rows = count * group;
    const int64_t words = head_dim / PER_WORD, last = first + count;
    const float scale = 1.0f / sqrtf((float)head_dim);
    for (int64_t t = 0; t < count; t++)
        memcpy(own->queries + t * group * head_dim, query + t * query_stride, group * head_dim * sizeof(element));
    memset(own->out, 0, rows * padded * 4);
    for (int64_t row = 0; row < rows; row++) own->best[row] = LOWEST, own->total[row] = 0;
    int64_t begin = window ? larger(0, first - window + 1) / cached->block * cached->block : 0;
    for (int64_t from = begin; from < last; from += KEY_TILE) {
        const int64_t until = smaller(last, from + KEY_TILE), keys = until - from, steps = parts_of(keys, PER_WORD);
        pack_keys(cached, from, until, own->keys);
        for (int64_t at = 0; at < keys; at += PANEL)
            multiply(rows, (const word *)own->queries, words, own->keys + at * words, words, own->scores + at, KEY_TILE,
                     0, 0);
        for (int64_t row = 0; row < rows; row++) {
            int64_t position = first + row / group, low = window ? larger(0, position - window + 1 - from) : 0;
            weigh_row(own, row, low, smaller(keys, position + 1 - from), keys, scale, padded);
        }
        pack_values(cached, from, until, own->values);
        for (int64_t at = 0; at < padded; at += PANEL)
            multiply(rows, (const word *)own->weights, KEY_TILE / PER_WORD, own->values + at * steps, steps,
                     own->out + at, padded, 1, 0);
    }
    for (int64_t row = 0; row < rows; row++) {
        element *to = out + row / group * out_stride + row % group * head_dim;
        float inverse = 1.0f / own->total[row];
        for (int64_t i = 0; i < head_dim; i += VL)
            store_some(to + i, load(own->out + row * padded + i) * inverse, head_dim - i);
    }
}
