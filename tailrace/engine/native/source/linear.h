/* Products with packed weights.
 *
 * A weight [outputs, inputs] lies in panels of 64 outputs: for each word of inputs (a float, or a pair of bfloat16) the
 * 64 outputs' words side by side. Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), with
 * the packing of the weights done once at load and none of the activations. */
#pragma once
#include "threads.h"
#include "vector.h"

enum {
    PANEL = 64,
    LINE = 64,
    STEP_LINES = PANEL * 4 / LINE, /* of a step's words */
    TILE_ROWS = 384,       /* sums of a panel kept at once */
    SLAB_STEPS = 1024,     /* words of inputs at once: 256 KiB of a panel */
    ROWS_BYTES = 384 << 10 /* activations that stay in the second-level cache while the panels pass */
};

/* The most sums kept at once: rows by vectors of outputs. */
typedef struct {
    int64_t rows, vectors;
} Tile;

enum { NARROW_NV = NV / 2, MAX_TILE_ROWS = HAS_NARROW_TILES ? 2 * MR : MR, FEW_ROWS = 16 };

/* Up to FEW_ROWS wait for weights rather than for sums: more rows by fewer vectors read each weight less often. */
INLINE Tile tile_of(int64_t rows, int fetches) {
    if (HAS_NARROW_TILES && fetches && rows > MR && rows <= FEW_ROWS) return (Tile){2 * MR, NARROW_NV};
    return (Tile){MR, NV};
}

typedef struct {
    int64_t inputs, outputs;
    const uint32_t *words;
    const float *bias;   /* by column of the panels, or NULL */
    const float *scales; /* the same; not NULL: the words are four int8 each, see int8.h */
} Linear;

/* near: into the first-level cache. */
INLINE void fetch_line(const char *at, const int near) {
    if (near)
        __builtin_prefetch(at, 0, 3);
    else
        __builtin_prefetch(at, 0, 2);
}

/* out [rows, vectors * VL] = or += x [rows, steps] words times one slab of a panel, whose next `lines` lines a step
 * are fetched from `ahead`. */
INLINE void multiply_rows(const int rows, const int vectors, const word *x, int64_t x_stride, const uint32_t *w,
                          int64_t steps, float *out, int64_t out_stride, int adds, const char *ahead,
                          const int lines) {
    vfloat sums[MAX_TILE_ROWS][NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = adds ? load(out + r * out_stride + v * VL) : (vfloat){0};
    for (int64_t k = 0; k < steps; k++) {
        vword column[NV];
        UNROLL for (int v = 0; v < vectors; v++) column[v] = *(const vword_any *)(w + k * PANEL + v * VL);
        UNROLL for (int i = 0; i < lines; i++) fetch_line(ahead + (k * lines + i) * LINE, vectors < NV);
        UNROLL for (int r = 0; r < rows; r++) {
            uint32_t element_pair = x[r * x_stride + k];
            UNROLL for (int v = 0; v < vectors; v++) sums[r][v] = add_product(sums[r][v], column[v], element_pair);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) store(out + r * out_stride + v * VL, sums[r][v]);
}

/* CALL(n, l) with a tile's rows, and the lines a step that `multiply` fetches, as constants. */
#define WITH_LINES(CALL, n, l) \
    case (n) * 8 + (l): CALL(n, l); break;
#define WITH_ROWS(CALL, n) WITH_LINES(CALL, n, 0) WITH_LINES(CALL, n, 1) WITH_LINES(CALL, n, 2) WITH_LINES(CALL, n, 4)
#if defined(__AVX512F__) || defined(__aarch64__)
#define UP_TO_SIX_ROWS(CALL) WITH_ROWS(CALL, 5) WITH_ROWS(CALL, 6)
#else
#define UP_TO_SIX_ROWS(CALL)
#endif
#define SPECIALIZED_WIDE(CALL, rows, lines)                                                              \
    switch ((rows) * 8 + (lines)) {                                                                      \
        WITH_ROWS(CALL, 1) WITH_ROWS(CALL, 2) WITH_ROWS(CALL, 3) WITH_ROWS(CALL, 4) UP_TO_SIX_ROWS(CALL) \
    }
#if HAS_NARROW_TILES
/* Up to 12 rows are one tile, so two calls fetch; up to 16 are two, so four do. */
#define SPECIALIZED_NARROW(CALL, rows, lines)                                                     \
    switch ((rows) * 8 + (lines)) {                                                               \
        WITH_LINES(CALL, 7, 2) WITH_LINES(CALL, 8, 2) WITH_LINES(CALL, 9, 2)                      \
        WITH_LINES(CALL, 10, 2) WITH_LINES(CALL, 11, 2) WITH_LINES(CALL, 12, 2)                   \
        WITH_LINES(CALL, 6, 1) WITH_LINES(CALL, 7, 1) WITH_LINES(CALL, 8, 1)                      \
    }
#else
#define SPECIALIZED_NARROW(CALL, rows, lines)
#endif

static __attribute__((noinline)) void multiply_wide(int64_t rows, const word *x, int64_t x_stride, const uint32_t *w,
                                                    int64_t steps, float *out, int64_t out_stride, int adds,
                                                    const char *ahead, int lines) {
#define CALL(n, l) multiply_rows(n, NV, x, x_stride, w, steps, out, out_stride, adds, ahead, l)
    SPECIALIZED_WIDE(CALL, rows, lines)
#undef CALL
}

static __attribute__((noinline)) void multiply_narrow(int64_t rows, const word *x, int64_t x_stride, const uint32_t *w,
                                                      int64_t steps, float *out, int64_t out_stride, int adds,
                                                      const char *ahead, int lines) {
#define CALL(n, l) multiply_rows(n, NARROW_NV, x, x_stride, w, steps, out, out_stride, adds, ahead, l)
    SPECIALIZED_NARROW(CALL, rows, lines)
#undef CALL
}

/* out [rows, PANEL] = or += x times one slab. What follows the slab in memory comes next, so it is fetched meanwhile. */
static void multiply(int64_t rows, const word *x, int64_t x_stride, const uint32_t *w, int64_t steps, float *out,
                     int64_t out_stride, int adds, int fetches) {
    const Tile most = tile_of(rows, fetches);
    const int64_t blocks = parts_of(rows, most.rows), width = most.vectors * VL;
    const char *ahead = (const char *)(w + steps * PANEL);
    int64_t calls = blocks * (PANEL / width), missing = fetches ? STEP_LINES : 0;
    for (int64_t column = 0; column < PANEL; column += width) {
        for (int64_t i = 0; i < blocks; i++, calls--) {
            const int64_t first = rows * i / blocks, count = rows * (i + 1) / blocks - first;
            const int fetched = (int)parts_of(missing, calls); /* 4, 2, 1 or 0 */
            (most.vectors == NV ? multiply_wide : multiply_narrow)(count, x + first * x_stride, x_stride, w + column,
                                                                   steps, out + first * out_stride + column,
                                                                   out_stride, adds, ahead, fetched);
            ahead += fetched * steps * LINE;
            missing -= fetched;
        }
    }
}

typedef enum { TO_ELEMENTS, TO_FLOATS, ADD_TO_FLOATS, SILU_MUL } Ending;

typedef struct {
    Ending ending;
    void *out;
    int64_t stride;
} Target;

INLINE vfloat silu(vfloat x) { return x / (1.0f + exp_of(-x)); }

static void end_gated(const float *sums, int64_t rows, int64_t first_row, int64_t panel, const Linear *linear,
                      Target to) {
    const int64_t half = PANEL / 2, first = panel * half, columns = smaller(half, linear->outputs - first);
    for (int64_t row = 0; row < rows; row++) {
        element *out = (element *)to.out + (first_row + row) * to.stride + first;
        for (int64_t c = 0; c < columns; c += VL) {
            vfloat gate = load(sums + row * PANEL + c), up = load(sums + row * PANEL + half + c);
            if (linear->bias) {
                gate += load(linear->bias + panel * PANEL + c);
                up += load(linear->bias + panel * PANEL + half + c);
            }
            store_some(out + c, silu(gate) * up, columns - c);
        }
    }
}

static void end_plain(const float *sums, int64_t rows, int64_t first_row, int64_t panel, const Linear *linear,
                      Target to) {
    const int64_t first = panel * PANEL, columns = smaller(PANEL, linear->outputs - first);
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = (first_row + row) * to.stride + first;
        for (int64_t c = 0; c < columns; c += VL) {
            vfloat sum = load(sums + row * PANEL + c);
            float *floats = (float *)to.out + at + c;
            if (linear->bias) sum += load(linear->bias + first + c);
            if (to.ending == TO_ELEMENTS)
                store_some((element *)to.out + at + c, sum, columns - c);
            else if (to.ending == TO_FLOATS)
                store_floats(floats, sum, columns - c);
            else
                store_floats(floats, load_floats(floats, columns - c) + sum, columns - c);
        }
    }
}

INLINE int64_t num_panels(const Linear *linear, Ending ending) {
    return parts_of(linear->outputs, ending == SILU_MUL ? PANEL / 2 : PANEL);
}

/* x: [rows, inputs] elements, contiguous. Threads share the panels. Scratch: TILE_ROWS * PANEL floats. */
static void apply_linear(Thread *thread, const Linear *linear, const element *x, int64_t rows, Target to) {
    const int64_t steps = linear->inputs / PER_WORD, panels = num_panels(linear, to.ending);
    const int64_t from = panels * thread->index / thread->count, end = panels * (thread->index + 1) / thread->count;
    int64_t at_once = larger(MR, ROWS_BYTES / (linear->inputs * (int64_t)sizeof(element)));
    at_once = smaller(TILE_ROWS, at_once / MR * MR);
    float *sums = thread->scratch;
    for (int64_t first = 0; first < rows; first += at_once) {
        const int64_t count = smaller(at_once, rows - first);
        for (int64_t panel = from; panel < end; panel++) {
            for (int64_t k = 0; k < steps; k += SLAB_STEPS) {
                const uint32_t *slab = linear->words + (panel * steps + k) * PANEL;
                multiply(count, (const word *)(x + first * linear->inputs) + k, steps, slab,
                         smaller(SLAB_STEPS, steps - k), sums, PANEL, k > 0, 1);
            }
            (to.ending == SILU_MUL ? end_gated : end_plain)(sums, count, first, panel, linear, to);
        }
    }
}
