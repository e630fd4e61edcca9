/* What a model and one of its steps are made of. tailrace/engine/native/library.py mirrors the structs. */
#pragma once
#include "clock.h"
#include "linear.h"

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
    float *partials;   /* [num_decode * heads, parts, head_dim + 2], where several threads share a row */
    atomic_llong *jobs; /* [num_layers]: attention jobs taken so far */
    Clock *clock;
} Step;

INLINE int64_t share(int64_t all, int64_t index, int64_t count) { return all * index / count; }

INLINE int is_within(int64_t x, int64_t end) { return x >= 0 && x < end; }

INLINE element *head_in_pool(const Model *model, const Step *step, int64_t layer, int64_t is_value, int64_t head,
                             int64_t block) {
    int64_t index = ((block * model->num_layers + layer) * 2 + is_value) * model->kv_heads + head;
    return step->pool + index * model->block * model->head_dim;
}
