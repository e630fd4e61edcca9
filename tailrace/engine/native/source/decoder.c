/* A decoder's forward pass over one step's tokens. tailrace/engine/native/library.py mirrors the structs. */
#include "attention.h"
#include "int8.h"
#include "refine.h"

typedef struct {
    const element *attention_norm, *query_norm, *key_norm, *mlp_norm;
    Linear qkv, attention_out, gate_up, down;
    int64_t window; /* 0: full */
} Layer;

typedef struct {
    int64_t num_layers, hidden, heads, kv_heads, head_dim, inner, vocab, max_positions;
    double eps;
    const element *embedding;
    const float *cosines, *sines; /* [positions, head_dim], as tailrace.engine.models.rotary has them */
    const element *final_norm;
    Linear head;
    const Layer *layers;
    Threads *threads;
    int64_t block, num_blocks; /* of the pool */
} Model;

typedef struct {
    int64_t slot, start, end;
} Chunk;

/* Decode rows come first in the step's tokens, then chunk after chunk. */
typedef struct {
    int64_t num_tokens, num_decode, num_chunks;
    const int64_t *decode; /* [num_decode] slots */
    const Chunk *chunks;
    const int32_t *tokens; /* [slots, tokens_stride] */
    int64_t tokens_stride;
    const int32_t *tables; /* [slots, tables_stride] */
    int64_t tables_stride;
    const int64_t *lengths; /* [slots] */
    int64_t num_slots;
    element *pool;
    float *hidden;     /* [num_tokens, hidden]: the result */
    int64_t *places;   /* [num_tokens, 2]: slot and position of each token */
    element *input;    /* [num_tokens, max(hidden, heads * head_dim)]: of the next product */
    element *qkv;      /* [num_tokens, (heads + 2 * kv_heads) * head_dim] */
    element *gated;    /* [num_tokens, inner] */
    char *rounded;     /* [num_tokens, rounded_bytes of the most inputs]: the product's input where weights are int8 */
    float *partials;   /* [num_decode * kv_heads * parts, group, head_dim + 2], where several threads share a row */
    atomic_llong *jobs; /* [num_layers]: attention jobs taken so far */
} Step;

typedef struct {
    const Model *model;
    const Step *step;
} Forward;

INLINE int64_t share(int64_t all, int64_t index, int64_t count) { return all * index / count; }

static void norm_row(const float *x, const element *weight, int64_t size, float eps, element *out) {
    vfloat squares = {0};
    for (int64_t i = 0; i < size; i += VL) {
        vfloat some = load_floats(x + i, size - i);
        squares += some * some;
    }
    float inverse = 1.0f / sqrtf(sum_of(squares) / (float)size + eps);
    for (int64_t i = 0; i < size; i += VL)
        store_some(out + i, load_floats(x + i, size - i) * inverse * load_some(weight + i, size - i), size - i);
}

static void norm_rows(Thread *thread, const float *x, const element *weight, int64_t rows, int64_t size, double eps,
                      element *out) {
    const int64_t end = share(rows, thread->index + 1, thread->count);
    for (int64_t row = share(rows, thread->index, thread->count); row < end; row++)
        norm_row(x + row * size, weight, size, (float)eps, out + row * size);
}

static void embed(Thread *thread, const Model *model, const Step *step) {
    const int64_t end = share(step->num_tokens, thread->index + 1, thread->count), size = model->hidden;
    for (int64_t i = share(step->num_tokens, thread->index, thread->count); i < end; i++) {
        const int64_t *place = step->places + 2 * i;
        const element *row = model->embedding + step->tokens[place[0] * step->tokens_stride + place[1]] * size;
        for (int64_t d = 0; d < size; d += VL)
            store_floats(step->hidden + i * size + d, load_some(row + d, size - d), size - d);
    }
}

/* One head, normed if there is a weight, then turned by its position's angles. x and out may be the same. */
static void turn_head(const Model *model, const element *x, const element *norm, const float *cosines,
                      const float *sines, element *out) {
    const int64_t size = model->head_dim, half = size / 2;
    float head[MAX_HEAD_DIM + VL] = {0};
    for (int64_t i = 0; i < size; i += VL) store(head + i, load_some(x + i, size - i));
    if (norm) {
        element normed[MAX_HEAD_DIM];
        norm_row(head, norm, size, (float)model->eps, normed);
        for (int64_t i = 0; i < size; i += VL) store(head + i, load_some(normed + i, size - i));
    }
    for (int64_t i = 0; i < half; i += VL) {
        const int64_t left = half - i;
        vfloat low = load_floats(head + i, left), high = load_floats(head + half + i, left);
        vfloat first = low * load_floats(cosines + i, left) + high * load_floats(sines + i, left);
        vfloat second = high * load_floats(cosines + half + i, left) + low * load_floats(sines + half + i, left);
        store_some(out + i, first, left);
        store_some(out + half + i, second, left);
    }
}

INLINE element *head_in_pool(const Model *model, const Step *step, int64_t layer, int64_t is_value, int64_t head,
                             int64_t block) {
    int64_t index = ((block * model->num_layers + layer) * 2 + is_value) * model->kv_heads + head;
    return step->pool + index * model->block * model->head_dim;
}

/* Turns queries in place; turns keys into the pool, where values go as they are. */
static void turn_and_write(Thread *thread, const Model *model, const Step *step, int64_t layer) {
    const Layer *weights = model->layers + layer;
    const int64_t size = model->head_dim, width = (model->heads + 2 * model->kv_heads) * size;
    const int64_t end = share(step->num_tokens, thread->index + 1, thread->count);
    for (int64_t i = share(step->num_tokens, thread->index, thread->count); i < end; i++) {
        const int64_t slot = step->places[2 * i], position = step->places[2 * i + 1];
        const float *cosines = model->cosines + position * size, *sines = model->sines + position * size;
        const int64_t block = step->tables[slot * step->tables_stride + position / model->block];
        const int64_t offset = position % model->block * size;
        element *queries = step->qkv + i * width, *keys = queries + model->heads * size;
        for (int64_t h = 0; h < model->heads; h++)
            turn_head(model, queries + h * size, weights->query_norm, cosines, sines, queries + h * size);
        for (int64_t h = 0; h < model->kv_heads; h++) {
            turn_head(model, keys + h * size, weights->key_norm, cosines, sines,
                      head_in_pool(model, step, layer, 0, h, block) + offset);
            memcpy(head_in_pool(model, step, layer, 1, h, block) + offset, keys + (model->kv_heads + h) * size,
                   size * sizeof(element));
        }
    }
}

static Cached cached_head(const Model *model, const Step *step, int64_t layer, int64_t head, int64_t slot) {
    const int64_t per_head = model->block * model->head_dim;
    return (Cached){head_in_pool(model, step, layer, 0, head, 0),
                    model->num_layers * 2 * model->kv_heads * per_head,
                    model->kv_heads * per_head,
                    model->block,
                    model->head_dim,
                    step->tables + slot * step->tables_stride};
}

/* Into how many parts a decode row is split, so that no thread is idle for long. */
INLINE int64_t num_parts(const Model *model, const Step *step) {
    if (model->threads->count == 1 || !step->num_decode) return 1;
    return parts_of(4 * model->threads->count, step->num_decode * model->kv_heads);
}

static void attend_part(Thread *thread, const Model *model, const Step *step, int64_t layer, int64_t row, int64_t head,
                        int64_t part, int64_t parts) {
    DecodeScratch *own = thread->scratch;
    const int64_t size = model->head_dim, group = model->heads / model->kv_heads, slot = step->decode[row];
    const int64_t length = step->lengths[slot], window = model->layers[layer].window;
    const int64_t begin = window ? larger(0, length - window) : 0;
    const int64_t each = larger(MIN_PART, parts_of(parts_of(length - begin, parts), model->block) * model->block);
    const int64_t first = smaller(length, begin + part * each), end = smaller(length, first + each);
    const Cached cached = cached_head(model, step, layer, head, slot);
    const element *query = step->qkv + row * (model->heads + 2 * model->kv_heads) * size + head * group * size;
    attend_row(own, &cached, query, group, parts == 1 ? begin : first, parts == 1 ? length : end);
    for (int64_t h = 0; h < group; h++) {
        const float *sums = own->out + h * MAX_HEAD_DIM;
        if (parts == 1) {
            element *out = step->input + (row * model->heads + head * group + h) * size;
            float inverse = 1.0f / own->total[h];
            for (int64_t i = 0; i < size; i += VL) store_some(out + i, load(sums + i) * inverse, size - i);
        } else {
            float *out = step->partials + (((row * model->kv_heads + head) * parts + part) * group + h) * (size + 2);
            memcpy(out, sums, size * 4);
            out[size] = own->best[h];
            out[size + 1] = own->total[h];
        }
    }
}

static void merge_parts(Thread *thread, const Model *model, const Step *step, int64_t parts) {
    const int64_t size = model->head_dim, group = model->heads / model->kv_heads, all = step->num_decode * model->heads;
    const int64_t end = share(all, thread->index + 1, thread->count);
    for (int64_t i = share(all, thread->index, thread->count); i < end; i++) {
        const float *first = step->partials + (i / group * parts * group + i % group) * (size + 2);
        float best = LOWEST, total = 0, sums[MAX_HEAD_DIM] = {0};
        for (int64_t p = 0; p < parts; p++) best = fmaxf(best, first[p * group * (size + 2) + size]);
        for (int64_t p = 0; p < parts; p++) {
            const float *part = first + p * group * (size + 2);
            const float weight = part[size + 1] == 0 ? 0 : expf(part[size] - best);
            total += weight * part[size + 1];
            for (int64_t d = 0; d < size; d++) sums[d] += weight * part[d];
        }
        for (int64_t d = 0; d < size; d++) step->input[i * size + d] = narrowed(sums[d] / total);
    }
}

static void attend_chunk_part(Thread *thread, const Model *model, const Step *step, int64_t layer, const Chunk *chunk,
                              int64_t first_token, int64_t at, int64_t count, int64_t head) {
    const int64_t size = model->head_dim, group = model->heads / model->kv_heads, token = first_token + at;
    const int64_t width = (model->heads + 2 * model->kv_heads) * size, out_width = model->heads * size;
    const Cached cached = cached_head(model, step, layer, head, chunk->slot);
    attend_tokens(thread->scratch, &cached, step->qkv + token * width + head * group * size, width, group,
                  chunk->start + at, count, model->layers[layer].window,
                  step->input + token * out_width + head * group * size, out_width);
}

/* Threads take jobs as they come: (row, key head, part) of decode, then (chunk, tokens, key head). */
static void attend(Thread *thread, const Model *model, const Step *step, int64_t layer) {
    const int64_t parts = num_parts(model, step), group = model->heads / model->kv_heads;
    const int64_t at_once = larger(1, QUERY_ROWS / group);
    atomic_llong *taken = step->jobs + layer;
    int64_t mine = atomic_fetch_add(taken, 1), job = 0;
    for (int64_t row = 0; row < step->num_decode; row++)
        for (int64_t head = 0; head < model->kv_heads; head++)
            for (int64_t part = 0; part < parts; part++, job++)
                if (job == mine) {
                    attend_part(thread, model, step, layer, row, head, part, parts);
                    mine = atomic_fetch_add(taken, 1);
                }
    int64_t first_token = step->num_decode;
    for (int64_t c = 0; c < step->num_chunks; c++) {
        const Chunk *chunk = step->chunks + c;
        const int64_t size = chunk->end - chunk->start;
        for (int64_t at = 0; at < size; at += at_once)
            for (int64_t head = 0; head < model->kv_heads; head++, job++)
                if (job == mine) {
                    attend_chunk_part(thread, model, step, layer, chunk, first_token, at, smaller(at_once, size - at),
                                      head);
                    mine = atomic_fetch_add(taken, 1);
                }
        first_token += size;
    }
    barrier(thread);
    if (parts > 1) {
        merge_parts(thread, model, step, parts);
        barrier(thread);
    }
}

/* Where weights are int8: this thread's share of a product's input, rounded. The same share as norm_rows has. */
static void ready_rows(Thread *thread, const Linear *linear, const element *x, int64_t rows, char *rounded) {
    if (linear->scales) round_rows(thread, x, rows, linear->inputs, rounded);
}

static void apply(Thread *thread, const Linear *linear, const element *x, const char *rounded, int64_t rows,
                  Target to) {
    if (linear->scales)
        apply_rounded(thread, linear, rounded, rows, to);
    else
        apply_linear(thread, linear, x, rows, to);
}

/* Of an input that other threads had a part in. */
static void ready_and_apply(Thread *thread, const Linear *linear, const element *x, char *rounded, int64_t rows,
                            Target to) {
    if (linear->scales) {
        ready_rows(thread, linear, x, rows, rounded);
        barrier(thread);
    }
    apply(thread, linear, x, rounded, rows, to);
}

static void run_layer(Thread *thread, const Model *model, const Step *step, int64_t layer) {
    const Layer *weights = model->layers + layer;
    const int64_t rows = step->num_tokens, width = (model->heads + 2 * model->kv_heads) * model->head_dim;
    norm_rows(thread, step->hidden, weights->attention_norm, rows, model->hidden, model->eps, step->input);
    ready_rows(thread, &weights->qkv, step->input, rows, step->rounded);
    barrier(thread);
    apply(thread, &weights->qkv, step->input, step->rounded, rows, (Target){TO_ELEMENTS, step->qkv, width});
    barrier(thread);
    turn_and_write(thread, model, step, layer);
    barrier(thread);
    attend(thread, model, step, layer);
    ready_and_apply(thread, &weights->attention_out, step->input, step->rounded, rows,
                    (Target){ADD_TO_FLOATS, step->hidden, model->hidden});
    barrier(thread);
    norm_rows(thread, step->hidden, weights->mlp_norm, rows, model->hidden, model->eps, step->input);
    ready_rows(thread, &weights->gate_up, step->input, rows, step->rounded);
    barrier(thread);
    apply(thread, &weights->gate_up, step->input, step->rounded, rows, (Target){SILU_MUL, step->gated, model->inner});
    barrier(thread);
    ready_and_apply(thread, &weights->down, step->gated, step->rounded, rows,
                    (Target){ADD_TO_FLOATS, step->hidden, model->hidden});
    barrier(thread);
}

static void run_forward(Thread *thread, void *given) {
    const Forward *forward = given;
    embed(thread, forward->model, forward->step);
    barrier(thread);
    for (int64_t layer = 0; layer < forward->model->num_layers; layer++)
        run_layer(thread, forward->model, forward->step, layer);
}

INLINE int is_within(int64_t x, int64_t end) { return x >= 0 && x < end; }

/* Tokens [start, end) of a slot, whose blocks up to there must be blocks of the pool. */
static int place_some(const Model *model, const Step *step, int64_t slot, int64_t start, int64_t end, int64_t **place) {
    if (!is_within(slot, step->num_slots) || !is_within(start, end) || end > model->max_positions) return 0;
    for (int64_t i = 0; i < parts_of(end, model->block); i++)
        if (!is_within(step->tables[slot * step->tables_stride + i], model->num_blocks)) return 0;
    for (int64_t position = start; position < end; position++) {
        if (!is_within(step->tokens[slot * step->tokens_stride + position], model->vocab)) return 0;
        *(*place)++ = slot;
        *(*place)++ = position;
    }
    return 1;
}

static int place_tokens(const Model *model, const Step *step) {
    int64_t *place = step->places;
    for (int64_t i = 0; i < step->num_decode; i++) {
        const int64_t slot = step->decode[i], length = is_within(slot, step->num_slots) ? step->lengths[slot] : 0;
        if (!place_some(model, step, slot, length - 1, length, &place)) return 0;
    }
    for (int64_t c = 0; c < step->num_chunks; c++) {
        const Chunk *chunk = step->chunks + c;
        if (!place_some(model, step, chunk->slot, chunk->start, chunk->end, &place)) return 0;
    }
    return 1;
}

/* 0, having changed nothing, when the step names a slot, token or block that does not exist. */
int tailrace_forward(const Model *model, const Step *step) {
    Forward forward = {model, step};
    if (!place_tokens(model, step)) return 0;
    memset((void *)step->jobs, 0, model->num_layers * sizeof *step->jobs);
    run_on_all(model->threads, run_forward, &forward);
    return 1;
}

int64_t tailrace_num_parts(const Model *model, const Step *step) { return num_parts(model, step); }

typedef struct {
    const Model *model;
    const float *hidden; /* [rows, hidden] */
    int64_t rows;
    element *normed; /* [rows, hidden] */
    char *rounded;   /* as in Step */
    float *logits;   /* [rows, vocab] */
} Logits;

static void run_logits(Thread *thread, void *given) {
    const Logits *own = given;
    const Model *model = own->model;
    norm_rows(thread, own->hidden, model->final_norm, own->rows, model->hidden, model->eps, own->normed);
    ready_rows(thread, &model->head, own->normed, own->rows, own->rounded);
    barrier(thread);
    apply(thread, &model->head, own->normed, own->rounded, own->rows,
          (Target){TO_FLOATS, own->logits, model->head.outputs});
}

void tailrace_logits(const Logits *logits) { run_on_all(logits->model->threads, run_logits, (void *)logits); }

Threads *tailrace_open_threads(int64_t count) {
    size_t bytes = TILE_ROWS * PANEL * sizeof(float);
    if (bytes < sizeof(DecodeScratch)) bytes = sizeof(DecodeScratch);
    if (bytes < sizeof(PrefillScratch)) bytes = sizeof(PrefillScratch);
    return open_threads(count, bytes);
}

void tailrace_close_threads(Threads *threads) { close_threads(threads); }

/* One product by itself, for tests and measurements: x [rows, inputs], rounded as in Step, out [rows, outputs]. */
typedef struct {
    const Linear *linear;
    const element *x;
    int64_t rows;
    char *rounded;
    float *out;
} Product;

static void run_product(Thread *thread, void *given) {
    const Product *own = given;
    ready_and_apply(thread, own->linear, own->x, own->rounded, own->rows,
                    (Target){TO_FLOATS, own->out, own->linear->outputs});
}

void tailrace_product(Threads *threads, const Product *product) { run_on_all(threads, run_product, (void *)product); }

int64_t tailrace_rounded_bytes(int64_t inputs) { return rounded_bytes(inputs); }

/* How the caller's view of the structs is checked. */
void tailrace_sizes(int64_t sizes[8]) {
    const int64_t own[8] = {sizeof(Linear), sizeof(Layer),  sizeof(Model),   sizeof(Chunk),
                            sizeof(Step),   sizeof(Logits), sizeof(Product), sizeof(Refinement)};
    memcpy(sizes, own, sizeof own);
}
