/* Attention of chunks of new tokens over what is cached, the chunk included: products of packed keys and values. */
#pragma once
#include "attention.h"

enum {
    QUERY_ROWS = 384, /* rows (token, head) for which keys are packed; one token's heads always go together */
    TILE_QUERIES = 48, /* rows of which scores are kept at once, or a token's */
    MAX_TILE_QUERIES = MAX_GROUP > TILE_QUERIES ? MAX_GROUP : TILE_QUERIES,
    KEY_TILE = 256 /* cached tokens at once */
};

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
#endif

typedef struct {
    element queries[QUERY_ROWS * MAX_HEAD_DIM];
    uint32_t keys[KEY_TILE * MAX_HEAD_DIM / PER_WORD];
    uint32_t values[KEY_TILE * MAX_HEAD_DIM / PER_WORD];
    float scores[MAX_TILE_QUERIES * KEY_TILE];
    element weights[MAX_TILE_QUERIES * KEY_TILE];
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

/* Words [0, VL) of PER_WORD rows side by side: word i is of the rows' elements i. At most n elements are there. */
INLINE void pack_rows(const element *const rows[PER_WORD], int64_t n, uint32_t *out) {
#if BF16_DOT
    const __mmask16 mask = n >= VL ? 0xffff : (__mmask16)((1 << n) - 1);
    const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows[0]));
    const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows[1]));
    _mm512_storeu_si512(out, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
#else
    for (int64_t i = 0; i < VL; i++)
        for (int j = 0; j < PER_WORD; j++) ((element *)out)[i * PER_WORD + j] = i < n ? rows[j][i] : 0;
#endif
}

/* The same with dimensions as outputs and tokens as inputs, in panels of 64 dimensions. Tokens before `low` count as
 * zero: nobody sees them, their blocks may be others' by now, and what a weight of zero is multiplied with must be
 * finite. */
static void pack_values(const Cached *cached, int64_t from, int64_t until, int64_t low, uint32_t *panels) {
    const int64_t head_dim = cached->head_dim, steps = parts_of(until - from, PER_WORD);
    static const element nothing[MAX_HEAD_DIM];
    for (int64_t step = 0; step < steps; step++) {
        const element *rows[PER_WORD];
        for (int i = 0; i < PER_WORD; i++) {
            const int64_t token = from + step * PER_WORD + i;
            rows[i] = token >= low && token < until ? key_at(cached, token) + cached->value_offset : nothing;
        }
        for (int64_t at = 0; at < parts_of(head_dim, PANEL) * PANEL; at += VL) {
            const element *some[PER_WORD];
            for (int i = 0; i < PER_WORD; i++) some[i] = rows[i] + at;
            pack_rows(some, larger(0, head_dim - at), panels + at / PANEL * PANEL * steps + step * PANEL + at % PANEL);
        }
    }
}

/* x, elements [i, i + VL) of a row, with `other` for those that are not of [low, high). */
INLINE vfloat seen_of(vfloat x, int64_t i, int64_t low, int64_t high, float other) {
    if (i >= low && i + VL <= high) return x;
    vint lanes;
    UNROLL for (int lane = 0; lane < VL; lane++) lanes[lane] = lane;
    const vint is_seen = (lanes >= (int32_t)(low - i)) & (lanes < (int32_t)(high - i));
    return (vfloat)chosen(is_seen, (vword)x, (vword)splat(other));
}

/* Row's weights over the tile's first `count` tokens, of which it sees [low, high); its sums so far are scaled to the
 * new best. */
static void weigh_row(PrefillScratch *own, int64_t row, const float *scores, element *weights, int64_t low,
                      int64_t high, int64_t count, float scale, int64_t padded_dim) {
    const float before = own->best[row];
    const int64_t first = smaller(low, count) / VL * VL, end = larger(first, parts_of(high, VL) * VL);
    const vfloat nothing = {0};
    vfloat best = splat(LOWEST), total = {0};
    for (int64_t i = first; i < end; i += VL)
        best = at_least(seen_of(load(scores + i), i, low, high, LOWEST), best);
    float highest = max_of(best) * scale;
    highest = highest > before ? highest : before;
    for (int64_t i = 0; i < first; i += VL) store_elements(weights + i, nothing);
    for (int64_t i = first; i < end; i += VL) {
        const vfloat weight = seen_of(exp_of(load(scores + i) * scale - highest), i, low, high, 0);
        total += weight;
        store_elements(weights + i, weight);
    }
    for (int64_t i = end; i < count; i += VL) store_elements(weights + i, nothing);
    if (highest > before && before > LOWEST) {
        float share = expf(before - highest), *out = own->out + row * padded_dim;
        own->total[row] *= share;
        for (int64_t i = 0; i < padded_dim; i += VL) store(out + i, load(out + i) * share);
    }
    own->best[row] = highest;
    own->total[row] += sum_of(total);
}

/* Tokens [from, until) are packed in `own`: what rows [row, row + rows) attend to of them. */
static void attend_tile(PrefillScratch *own, int64_t row, int64_t rows, int64_t group, int64_t first, int64_t window,
                        int64_t from, int64_t until, int64_t head_dim) {
    const int64_t words = head_dim / PER_WORD, padded = parts_of(head_dim, PANEL) * PANEL;
    const int64_t steps = parts_of(until - from, PER_WORD), seen = smaller(until, first + (row + rows) / group) - from;
    const float scale = 1.0f / sqrtf((float)head_dim);
    if (seen <= 0) return;
    const word *queries = (const word *)(own->queries + row * head_dim);
    for (int64_t at = 0; at < seen; at += PANEL)
        multiply(rows, queries, words, own->keys + at * words, words, own->scores + at, KEY_TILE, 0, 0);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t position = first + (row + i) / group, low = window ? larger(0, position - window + 1 - from) : 0;
        weigh_row(own, row + i, own->scores + i * KEY_TILE, own->weights + i * KEY_TILE, low,
                  smaller(seen, position + 1 - from), seen, scale, padded);
    }
    for (int64_t at = 0; at < padded; at += PANEL)
        multiply(rows, (const word *)own->weights, KEY_TILE / PER_WORD, own->values + at * steps,
                 parts_of(seen, PER_WORD), own->out + row * padded + at, padded, 1, 0);
}

/* Some tokens of a chunk, at positions [first, first + count), for the heads of one key head.
 * query, out: of the first token; a token is query_stride and out_stride elements on. */
static void attend_tokens(PrefillScratch *own, const Cached *cached, const element *query, int64_t query_stride,
                          int64_t group, int64_t first, int64_t count, int64_t window, element *out,
                          int64_t out_stride) {
    const int64_t head_dim = cached->head_dim, padded = parts_of(head_dim, PANEL) * PANEL, rows = count * group;
    const int64_t last = first + count, at_once = larger(1, TILE_QUERIES / group) * group;
    for (int64_t t = 0; t < count; t++)
        memcpy(own->queries + t * group * head_dim, query + t * query_stride, group * head_dim * sizeof(element));
    memset(own->out, 0, rows * padded * 4);
    for (int64_t row = 0; row < rows; row++) own->best[row] = LOWEST, own->total[row] = 0;
    /* Tiles begin where they do for other tokens, so that a row's result does not depend on what it came with. */
    const int64_t low = window ? larger(0, first - window + 1) : 0, begin = low / KEY_TILE * KEY_TILE;
    for (int64_t from = begin; from < last; from += KEY_TILE) {
        const int64_t until = smaller(last, from + KEY_TILE);
        pack_keys(cached, from, until, own->keys);
        pack_values(cached, from, until, low, own->values);
        for (int64_t row = 0; row < rows; row += at_once)
            attend_tile(own, row, smaller(at_once, rows - row), group, first, window, from, until, head_dim);
    }
    for (int64_t row = 0; row < rows; row++) {
        element *to = out + row / group * out_stride + row % group * head_dim;
        float inverse = 1.0f / own->total[row];
        for (int64_t i = 0; i < head_dim; i += VL)
            store_some(to + i, load(own->out + row * padded + i) * inverse, head_dim - i);
    }
}
