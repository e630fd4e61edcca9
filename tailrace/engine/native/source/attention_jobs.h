/* Attention of a whole step, cut into jobs that threads take as they come. */
#pragma once
#include "decode_attention.h"
#include "model.h"
#include "prefill_attention.h"

static Cached cached_head(const Model *model, const Step *step, int64_t layer, int64_t head, int64_t slot) {
    const int64_t per_head = model->block * model->head_dim;
    return (Cached){head_in_pool(model, step, layer, 0, head, 0),
                    model->num_layers * 2 * model->kv_heads * per_head,
                    model->kv_heads * per_head,
                    model->block,
                    model->head_dim,
                    step->tables + slot * step->tables_stride};
}

/* How decode is cut into jobs: each is a part of a row, for some key heads. */
typedef struct {
    int64_t heads, heads_each, parts, count;
} DecodeJobs;

INLINE int64_t begin_of(const Model *model, int64_t layer, int64_t length) {
    const int64_t window = model->layers[layer].window;
    return window ? larger(0, length - window) : 0;
}

/* Whole rows, unless there are so few that threads would be idle: then each span and key head is a job. */
static DecodeJobs decode_jobs(const Model *model, const Step *step) {
    if (!step->num_decode) return (DecodeJobs){1, 1, 1, 0};
    const int is_shared = model->threads->count > 1 && step->num_decode < 4 * model->threads->count;
    const int64_t group = model->heads / model->kv_heads;
    const int64_t each = is_shared ? 1 : heads_at_once(group, model->kv_heads, model->head_dim);
    const int64_t heads = parts_of(model->kv_heads, each);
    int64_t longest = 1;
    for (int64_t row = 0; row < step->num_decode; row++)
        if (is_within(step->decode[row], step->num_slots)) longest = larger(longest, step->lengths[step->decode[row]]);
    const int64_t parts = is_shared ? parts_of(longest, SPAN) : 1;
    return (DecodeJobs){heads, each, parts, step->num_decode * heads * parts};
}

/* An empty job where there is none of this number. */
static DecodeJob decode_job(const Model *model, const Step *step, int64_t layer, const DecodeJobs *jobs, int64_t job) {
    if (job >= jobs->count) return (DecodeJob){.cached = {.block = model->block, .head_dim = model->head_dim}};
    const int64_t part = job % jobs->parts, head = job / jobs->parts % jobs->heads * jobs->heads_each;
    const int64_t row = job / jobs->parts / jobs->heads, slot = step->decode[row], size = model->head_dim;
    const int64_t length = step->lengths[slot], group = model->heads / model->kv_heads;
    const int64_t first = begin_of(model, layer, length) + part * SPAN;
    return (DecodeJob){
        .cached = cached_head(model, step, layer, head, slot),
        .query = step->qkv + row * (model->heads + 2 * model->kv_heads) * size + head * group * size,
        .heads = smaller(jobs->heads_each, model->kv_heads - head),
        .group = group,
        .first = smaller(length, first),
        .end = jobs->parts == 1 ? length : smaller(length, first + SPAN),
    };
}

INLINE void put_divided(const float *sums, float total, int64_t size, element *out) {
    const float inverse = 1.0f / total;
    for (int64_t i = 0; i < size; i += VL) store_some(out + i, load(sums + i) * inverse, size - i);
}

/* Where head h of those of a job belongs: the next product's input, or a partial result. */
static void put_head(const Model *model, const Step *step, const DecodeJobs *jobs, int64_t job, int64_t h,
                     const DecodeScratch *own) {
    const int64_t size = model->head_dim, group = model->heads / model->kv_heads;
    const int64_t row = job / jobs->parts / jobs->heads, first = job / jobs->parts % jobs->heads * jobs->heads_each;
    const int64_t head = first * group + h;
    const float *sums = own->out + h * MAX_HEAD_DIM;
    if (jobs->parts == 1) {
        put_divided(sums, own->total[h], size, step->input + (row * model->heads + head) * size);
        return;
    }
    float *out = step->partials + ((row * model->heads + head) * jobs->parts + job % jobs->parts) * (size + 2);
    memcpy(out, sums, size * 4);
    out[size] = own->best[h];
    out[size + 1] = own->total[h];
}

/* Threads take decode's jobs as they come, each one ahead: so it knows what to fetch. Returns the first that is not of
 * decode. */
static int64_t attend_decode(Thread *thread, const Model *model, const Step *step, int64_t layer,
                             const DecodeJobs *jobs) {
    atomic_llong *taken = step->jobs + layer;
    int64_t mine = atomic_fetch_add(taken, 1);
    if (mine >= jobs->count) return mine;
    Fetching fetching;
    DecodeJob job = decode_job(model, step, layer, jobs, mine);
    begin_fetching(&fetching, &job);
    while (mine < jobs->count) {
        const int64_t following = atomic_fetch_add(taken, 1);
        const DecodeJob next = decode_job(model, step, layer, jobs, following);
        attend_row(thread->scratch, &job, &next, &fetching);
        for (int64_t h = 0; h < job.heads * job.group; h++) put_head(model, step, jobs, mine, h, thread->scratch);
        mine = following;
        job = next;
    }
    return mine;
}

/* Puts the spans of each row together as attend_row does. */
static void merge_parts(Thread *thread, const Model *model, const Step *step, int64_t layer, int64_t parts) {
    const int64_t size = model->head_dim, all = step->num_decode * model->heads;
    const int64_t end = share(all, thread->index + 1, thread->count);
    for (int64_t i = share(all, thread->index, thread->count); i < end; i++) {
        const int64_t length = step->lengths[step->decode[i / model->heads]];
        const float *part = step->partials + i * parts * (size + 2);
        const float *behind = part + parts_of(length - begin_of(model, layer, length), SPAN) * (size + 2);
        float best = LOWEST, total = 0, sums[MAX_HEAD_DIM] = {0};
        for (; part < behind; part += size + 2) {
            const Shares shares = add_span_total(&best, &total, part[size], part[size + 1]);
            for (int64_t d = 0; d < size; d += VL)
                store(sums + d, shared_sum(load(sums + d), load_floats(part + d, size - d), shares));
        }
        put_divided(sums, total, size, step->input + i * size);
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

/* Tokens of a chunk's job: as many as share packed keys, but four jobs a thread. */
static int64_t tokens_at_once(const Model *model, const Step *step) {
    const int64_t group = model->heads / model->kv_heads, tokens = step->num_tokens - step->num_decode;
    const int64_t least = TILE_QUERIES / group, most = QUERY_ROWS / group;
    const int64_t shared = model->threads->count == 1 ? most : tokens * model->kv_heads / (4 * model->threads->count);
    return larger(1, smaller(most, larger(least, shared)));
}

/* Threads take jobs as they come: decode's, then (chunk, tokens, key head). */
static void attend(Thread *thread, const Model *model, const Step *step, int64_t layer) {
    const DecodeJobs jobs = decode_jobs(model, step);
    const int64_t at_once = tokens_at_once(model, step);
    int64_t mine = attend_decode(thread, model, step, layer, &jobs), job = jobs.count;
    int64_t first_token = step->num_decode;
    for (int64_t c = 0; c < step->num_chunks; c++) {
        const Chunk *chunk = step->chunks + c;
        const int64_t size = chunk->end - chunk->start;
        for (int64_t at = 0; at < size; at += at_once)
            for (int64_t head = 0; head < model->kv_heads; head++, job++)
                if (job == mine) {
                    attend_chunk_part(thread, model, step, layer, chunk, first_token, at, smaller(at_once, size - at),
                                      head);
                    mine = atomic_fetch_add(step->jobs + layer, 1);
                }
        first_token += size;
    }
    barrier(thread);
    if (jobs.parts > 1) {
        merge_parts(thread, model, step, layer, jobs.parts);
        barrier(thread);
    }
}
