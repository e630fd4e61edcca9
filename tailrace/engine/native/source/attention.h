/* Attention that reads blocks where they lie: what decode and prefill share.
 *
 * Sums, maxima and weights are float; the softmax is online: Milakov & Gimelshein, "Online normalizer calculation for
 * softmax" (2018), tile by tile as in Dao et al., "FlashAttention" (2022). Heads that share a key head are computed
 * together, so a block is read once for all of them. */
#pragma once
#include <math.h>

#include "linear.h"

enum {
    MAX_GROUP = 128, /* query heads a key head */
    MAX_HEAD_DIM = 256
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
