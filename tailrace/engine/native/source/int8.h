/* Products with weights of 8 bits.
 *
 * A weight is an int8 for each input, times a float for each output. So that a product needs no float but at its end, its
 * input is rounded to int8 as well, row by row and in groups of GROUP values, each with a scale of its own: the sum over
 * a group is an exact integer, and the groups' sums are added as floats in order. So a row's result depends neither on
 * the other rows nor on the processor. */
#pragma once
#include <math.h>

#include "linear.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

enum { GROUP = 64, PER_STEP = 4, GROUP_STEPS = GROUP / PER_STEP, OFFSET = 128 };

/* x of a group = scale * its bytes. Weights lie as bytes + OFFSET, which adds OFFSET * (sum of x's bytes) to each sum. */
typedef struct {
    float scale;
    int32_t offset; /* -OFFSET * (sum of the bytes) */
} Group;

typedef int8_t vbyte __attribute__((vector_size(VL)));
typedef int8_t vbyte_any __attribute__((vector_size(VL), aligned(1), may_alias));

/* ---- rounding ---- */

/* A rounded row: its groups, then its bytes, zero from the last input up to a whole step. */
INLINE int64_t rounded_bytes(int64_t inputs) {
    int64_t bytes = parts_of(inputs, GROUP) * (int64_t)sizeof(Group) + parts_of(inputs, PER_STEP) * PER_STEP;
    return parts_of(bytes, LINE) * LINE;
}

INLINE vint greater_of(vint a, vint b) {
#if defined(__AVX512F__)
    return (vint)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    return (vint)chosen(a > b, (vword)a, (vword)b);
#endif
}

INLINE int32_t greatest_in(vint x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t greatest = x[0];
    UNROLL for (int i = 1; i < VL; i++) greatest = x[i] > greatest ? x[i] : greatest;
    return greatest;
#endif
}

INLINE int32_t total_of(vint x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t total = 0;
    UNROLL for (int i = 0; i < VL; i++) total += x[i];
    return total;
#endif
}

/* GROUP values as bytes; halves go to even. Infinity and NaN make the scale NaN; values that are all below 1e-30, whose
 * scale had no inverse, become zero. */
INLINE Group round_group(const vfloat values[GROUP / VL], int8_t *out) {
    vint greatest = {0}, total = {0};
    UNROLL for (int v = 0; v < GROUP / VL; v++) greatest = greater_of(greatest, (vint)values[v] & 0x7fffffff);
    const int32_t bits = greatest_in(greatest); /* floats without signs are in the order of their bits, NaN last */
    float highest;
    memcpy(&highest, &bits, 4);
    const int is_finite = bits < 0x7f800000, is_zero = highest < 1e-30f;
    const vfloat inverse = splat(!is_finite || is_zero ? 0.0f : 127.0f / highest);
    const vfloat magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    UNROLL for (int v = 0; v < GROUP / VL; v++) {
        vint rounded = (vint)(product_of(values[v], inverse) + magic) - (vint)magic;
        total += rounded;
        *(vbyte_any *)(out + v * VL) = __builtin_convertvector(rounded, vbyte);
    }
    return (Group){!is_finite ? NAN : is_zero ? 0.0f : highest / 127.0f, -OFFSET * total_of(total)};
}

static void round_row(const element *x, int64_t inputs, char *out) {
    const int64_t groups = parts_of(inputs, GROUP), whole = inputs / GROUP;
    int8_t *bytes = (int8_t *)(out + groups * sizeof(Group));
    vfloat values[GROUP / VL];
    for (int64_t g = 0; g < whole; g++) {
        UNROLL for (int v = 0; v < GROUP / VL; v++) values[v] = load_elements(x + g * GROUP + v * VL);
        ((Group *)out)[g] = round_group(values, bytes + g * GROUP);
    }
    if (groups == whole) return;
    int8_t rest[GROUP];
    for (int v = 0; v < GROUP / VL; v++) {
        const int64_t left = inputs - whole * GROUP - v * VL;
        values[v] = left > 0 ? load_some(x + whole * GROUP + v * VL, left) : (vfloat){0};
    }
    ((Group *)out)[whole] = round_group(values, rest);
    memcpy(bytes + whole * GROUP, rest, parts_of(inputs - whole * GROUP, PER_STEP) * PER_STEP);
}

/* This thread's share of rows: the one that norm_rows gives it. x: [rows, inputs]; out: [rows, rounded_bytes]. */
static void round_rows(Thread *thread, const element *x, int64_t rows, int64_t inputs, char *out) {
    const int64_t end = rows * (thread->index + 1) / thread->count, stride = rounded_bytes(inputs);
    for (int64_t row = rows * thread->index / thread->count; row < end; row++)
        round_row(x + row * inputs, inputs, out + row * stride);
}

/* ---- products ---- */

/* sum + w * x for the four bytes of each word, w unsigned and x signed; no intermediate is cut to 16 bits. */
INLINE vint add_bytes(vint sum, vword w, uint32_t x) {
#if defined(__AVX512VNNI__)
    return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32((int)x));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
    return (vint)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32((int)x));
#elif defined(__SSE2__)
    typedef int16_t vshort __attribute__((vector_size(VL * 4)));
    typedef uint16_t vushort __attribute__((vector_size(VL * 4)));
    const vushort pairs = (vushort)w;
    const vshort bytes = (vshort)(x - (vword){0});
    const vshort even = (bytes << 8) >> 8, odd = bytes >> 8;
#if defined(__AVX512BW__)
    __m512i a = _mm512_madd_epi16((__m512i)(pairs & 0xff), (__m512i)even);
    __m512i b = _mm512_madd_epi16((__m512i)(pairs >> 8), (__m512i)odd);
#elif defined(__AVX2__)
    __m256i a = _mm256_madd_epi16((__m256i)(pairs & 0xff), (__m256i)even);
    __m256i b = _mm256_madd_epi16((__m256i)(pairs >> 8), (__m256i)odd);
#else
    __m128i a = _mm_madd_epi16((__m128i)(pairs & 0xff), (__m128i)even);
    __m128i b = _mm_madd_epi16((__m128i)(pairs >> 8), (__m128i)odd);
#endif
    return sum + (vint)a + (vint)b;
#else
    const int32_t bytes = (int32_t)x;
    sum += (vint)(w & 0xff) * (int32_t)(int8_t)bytes;
    sum += (vint)(w >> 8 & 0xff) * (int32_t)(int8_t)(bytes >> 8);
    sum += (vint)(w >> 16 & 0xff) * (int32_t)(int8_t)(bytes >> 16);
    return sum + (vint)(w >> 24) * (bytes >> 24);
#endif
}

/* What some rows' products read: the first row's groups and bytes of a slab. */
typedef struct {
    const Group *groups;
    const word *bytes;
    int64_t stride; /* bytes from row to row, of both */
} Rounded;

INLINE const Group *group_of(Rounded x, int64_t row) { return (const Group *)((const char *)x.groups + row * x.stride); }
INLINE const word *bytes_of(Rounded x, int64_t row) { return (const word *)((const char *)x.bytes + row * x.stride); }

/* out [rows, vectors * VL] = or += x times one slab, in the groups' order; `scales` of the outputs come with the last
 * slab. A group's sums fill the registers, so those of all groups are kept in `out`: faster than fewer sums at once. */
INLINE void multiply_rounded_rows(const int rows, const int vectors, Rounded x, const uint32_t *w, int64_t steps,
                                  float *out, int adds, const float *scales, const char *ahead, const int lines) {
    for (int64_t k = 0; k < steps; x.groups++, adds = 1) {
        const int64_t end = smaller(steps, k + GROUP_STEPS);
        vint sums[MAX_TILE_ROWS][NV];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = group_of(x, r)->offset - (vint){0};
        for (; k < end; k++) {
            vword column[NV];
            UNROLL for (int v = 0; v < vectors; v++) column[v] = *(const vword_any *)(w + k * PANEL + v * VL);
            UNROLL for (int i = 0; i < lines; i++) fetch_line(ahead + (k * lines + i) * LINE, vectors < NV);
            UNROLL for (int r = 0; r < rows; r++) {
                const uint32_t bytes = bytes_of(x, r)[k];
                UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = add_bytes(sums[r][v], column[v], bytes);
            }
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const vfloat scale = splat(group_of(x, r)->scale);
            UNROLL for (int v = 0; v < vectors; v++) {
                float *total = out + r * PANEL + v * VL;
                const vfloat before = adds ? load(total) : (vfloat){0};
                store(total, before + product_of(__builtin_convertvector(sums[r][v], vfloat), scale));
            }
        }
    }
    if (!scales) return;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) {
            float *total = out + r * PANEL + v * VL;
            store(total, product_of(load(total), load(scales + v * VL)));
        }
}

static __attribute__((noinline)) void multiply_rounded_wide(int64_t rows, Rounded x, const uint32_t *w, int64_t steps,
                                                            float *out, int adds, const float *scales,
                                                            const char *ahead, int lines) {
#define CALL(n, l) multiply_rounded_rows(n, NV, x, w, steps, out, adds, scales, ahead, l)
    SPECIALIZED_WIDE(CALL, rows, lines)
#undef CALL
}

static __attribute__((noinline)) void multiply_rounded_narrow(int64_t rows, Rounded x, const uint32_t *w, int64_t steps,
                                                              float *out, int adds, const float *scales,
                                                              const char *ahead, int lines) {
#define CALL(n, l) multiply_rounded_rows(n, NARROW_NV, x, w, steps, out, adds, scales, ahead, l)
    SPECIALIZED_NARROW(CALL, rows, lines)
#undef CALL
}

/* As multiply in linear.h: out [rows, PANEL] = or += x times one slab, and what follows the slab is fetched meanwhile. */
static void multiply_rounded(int64_t rows, Rounded x, const uint32_t *w, int64_t steps, float *out, int adds,
                             const float *scales) {
    const Tile most = tile_of(rows, 1);
    const int64_t blocks = parts_of(rows, most.rows), width = most.vectors * VL;
    const char *ahead = (const char *)(w + steps * PANEL);
    int64_t calls = blocks * (PANEL / width), missing = STEP_LINES;
    for (int64_t column = 0; column < PANEL; column += width) {
        for (int64_t i = 0; i < blocks; i++, calls--) {
            const int64_t first = rows * i / blocks, count = rows * (i + 1) / blocks - first;
            const int fetched = (int)parts_of(missing, calls);
            const Rounded some = {group_of(x, first), bytes_of(x, first), x.stride};
            (most.vectors == NV ? multiply_rounded_wide : multiply_rounded_narrow)(
                count, some, w + column, steps, out + first * PANEL + column, adds, scales ? scales + column : NULL,
                ahead, fetched);
            ahead += fetched * steps * LINE;
            missing -= fetched;
        }
    }
}

/* As apply_linear, for a weight of bytes. x: what round_rows has made of all rows. */
static void apply_rounded(Thread *thread, const Linear *linear, const char *x, int64_t rows, Target to) {
    const int64_t steps = parts_of(linear->inputs, PER_STEP), panels = num_panels(linear, to.ending);
    const int64_t from = panels * thread->index / thread->count, end = panels * (thread->index + 1) / thread->count;
    const int64_t stride = rounded_bytes(linear->inputs), groups = parts_of(linear->inputs, GROUP);
    const int64_t at_once = smaller(TILE_ROWS, larger(MR, ROWS_BYTES / stride / MR * MR));
    float *sums = thread->scratch;
    for (int64_t first = 0; first < rows; first += at_once) {
        const int64_t count = smaller(at_once, rows - first);
        const char *tile = x + first * stride;
        for (int64_t panel = from; panel < end; panel++) {
            for (int64_t k = 0; k < steps; k += SLAB_STEPS) {
                const int64_t some = smaller(SLAB_STEPS, steps - k);
                const Rounded slab = {(const Group *)tile + k / GROUP_STEPS,
                                      (const word *)(tile + groups * sizeof(Group)) + k, stride};
                multiply_rounded(count, slab, linear->words + (panel * steps + k) * PANEL, some, sums, k > 0,
                                 k + some == steps ? linear->scales + panel * PANEL : NULL);
            }
            (to.ending == SILU_MUL ? end_gated : end_plain)(sums, count, first, panel, linear, to);
        }
    }
}
