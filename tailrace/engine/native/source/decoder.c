/* A decoder's forward pass over one step's tokens. */
#include "attention_jobs.h"
#include "int8.h"
#include "refine.h"

typedef struct {
    const Model *model;
    const Step *step;
} Forward;

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
    charge(thread, step->clock, NORMS);
    apply(thread, &weights->qkv, step->input, step->rounded, rows, (Target){TO_ELEMENTS, step->qkv, width});
    barrier(thread);
    charge(thread, step->clock, QKV);
    turn_and_write(thread, model, step, layer);
    barrier(thread);
    charge(thread, step->clock, ROTARY);
    attend(thread, model, step, layer);
    charge(thread, step->clock, ATTENTION);
    ready_and_apply(thread, &weights->attention_out, step->input, step->rounded, rows,
                    (Target){ADD_TO_FLOATS, step->hidden, model->hidden});
    barrier(thread);
    charge(thread, step->clock, ATTENTION_OUT);
    norm_rows(thread, step->hidden, weights->mlp_norm, rows, model->hidden, model->eps, step->input);
    ready_rows(thread, &weights->gate_up, step->input, rows, step->rounded);
    barrier(thread);
    charge(thread, step->clock, NORMS);
    apply(thread, &weights->gate_up, step->input, step->rounded, rows, (Target){SILU_MUL, step->gated, model->inner});
    barrier(thread);
    charge(thread, step->clock, GATE_UP);
    ready_and_apply(thread, &weights->down, step->gated, step->rounded, rows,
                    (Target){ADD_TO_FLOATS, step->hidden, model->hidden});
    barrier(thread);
    charge(thread, step->clock, DOWN);
}

static void run_forward(Thread *thread, void *given) {
    const Forward *forward = given;
    start_clock(thread, forward->step->clock);
    embed(thread, forward->model, forward->step);
    barrier(thread);
    charge(thread, forward->step->clock, EMBEDDING);
    for (int64_t layer = 0; layer < forward->model->num_layers; layer++)
        run_layer(thread, forward->model, forward->step, layer);
}

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

int64_t tailrace_num_parts(const Model *model, const Step *step) { return decode_jobs(model, step).parts; }

typedef struct {
    const Model *model;
    const float *hidden; /* [rows, hidden] */
    int64_t rows;
    element *normed; /* [rows, hidden] */
    char *rounded;   /* as in Step */
    float *logits;   /* [rows, vocab] */
    Clock *clock;
} Logits;

static void run_logits(Thread *thread, void *given) {
    const Logits *own = given;
    const Model *model = own->model;
    start_clock(thread, own->clock);
    norm_rows(thread, own->hidden, model->final_norm, own->rows, model->hidden, model->eps, own->normed);
    ready_rows(thread, &model->head, own->normed, own->rows, own->rounded);
    barrier(thread);
    apply(thread, &model->head, own->normed, own->rounded, own->rows,
          (Target){TO_FLOATS, own->logits, model->head.outputs});
    charge(thread, own->clock, HEAD);
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
