// Names of a prompt's blocks: h_i = BLAKE2b-128(h_{i-1} || tokens_i), tokens as little-endian uint32. Mirrors hashing.py.
//
// BLAKE2b: RFC 7693, section 3.2, unkeyed, of messages of any number of whole words. Tokens are read from the list
// within the hashing: a block's compression waits for its own results, and the reads of the next fill those waits.

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are hashed as they lie in memory"
#endif

// Of Python's stable ABI, so that nobody has to have its headers.
typedef void Object;
extern Object *PyExc_OverflowError;
extern Object *PyList_New(intptr_t size);
extern Object *PyList_GetItem(Object *list, intptr_t index); // borrowed
extern int PyList_SetItem(Object *list, intptr_t index, Object *item); // takes the item over, in any case
extern Object *PyBytes_FromStringAndSize(const char *bytes, intptr_t size);
extern unsigned long PyLong_AsUnsignedLong(Object *number);
extern Object *PyErr_Occurred(void);
extern void PyErr_SetString(Object *type, const char *message);
extern void Py_DecRef(Object *object);

enum { HASH_BYTES = 16, HASH_WORDS = HASH_BYTES / 4, CHUNK_WORDS = 32 };

static const uint64_t start[8] = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
};

// Of a round, which word of the message goes where; the last two rounds are as the first two.
static const uint8_t order[12][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
};

static inline uint64_t rotate(uint64_t word, int by) { return word >> by | word << (64 - by); }

#define MIX(a, b, c, d, x, y)     \
    a += b + m[s[x]];             \
    d = rotate(d ^ a, 32);        \
    c += d;                       \
    b = rotate(b ^ c, 24);        \
    a += b + m[s[y]];             \
    d = rotate(d ^ a, 16);        \
    c += d;                       \
    b = rotate(b ^ c, 63)

static void compress(uint64_t h[8], const uint64_t m[16], uint64_t num_bytes, int is_last)
{
    uint64_t v0 = h[0], v1 = h[1], v2 = h[2], v3 = h[3], v4 = h[4], v5 = h[5], v6 = h[6], v7 = h[7];
    uint64_t v8 = start[0], v9 = start[1], va = start[2], vb = start[3];
    uint64_t vc = start[4] ^ num_bytes, vd = start[5], ve = is_last ? ~start[6] : start[6], vf = start[7];
#pragma GCC unroll 12
    for (int round = 0; round < 12; round++) {
        const uint8_t *s = order[round];
        MIX(v0, v4, v8, vc, 0, 1);
        MIX(v1, v5, v9, vd, 2, 3);
        MIX(v2, v6, va, ve, 4, 5);
        MIX(v3, v7, vb, vf, 6, 7);
        MIX(v0, v5, va, vf, 8, 9);
        MIX(v1, v6, vb, vc, 10, 11);
        MIX(v2, v7, v8, vd, 12, 13);
        MIX(v3, v4, v9, ve, 14, 15);
    }
    h[0] ^= v0 ^ v8, h[1] ^= v1 ^ v9, h[2] ^= v2 ^ va, h[3] ^= v3 ^ vb;
    h[4] ^= v4 ^ vc, h[5] ^= v5 ^ vd, h[6] ^= v6 ^ ve, h[7] ^= v7 ^ vf;
}

// The hash of one block, whose first token is number `first` of the list. 0: Python's error is set.
static int hash_block(Object *tokens, int64_t first, int64_t block_size, const uint8_t parent[HASH_BYTES],
                      uint8_t hash[HASH_BYTES])
{
    const int64_t num_words = HASH_WORDS + block_size;
    uint64_t h[8];
    memcpy(h, start, sizeof h);
    h[0] ^= 0x01010000 ^ HASH_BYTES;
    for (int64_t done = 0; done < num_words; done += CHUNK_WORDS) {
        uint32_t words[CHUNK_WORDS] = {0};
        uint64_t message[CHUNK_WORDS / 2];
        const int64_t count = num_words - done < CHUNK_WORDS ? num_words - done : CHUNK_WORDS;
        int64_t at = 0;
        if (!done) {
            memcpy(words, parent, HASH_BYTES);
            at = HASH_WORDS;
        }
        for (; at < count; at++) {
            const unsigned long token = PyLong_AsUnsignedLong(PyList_GetItem(tokens, first + done + at - HASH_WORDS));
            if (token > UINT32_MAX) {
                if (!PyErr_Occurred())
                    PyErr_SetString(PyExc_OverflowError, "beyond uint32");
                return 0;
            }
            words[at] = (uint32_t)token;
        }
        memcpy(message, words, sizeof message);
        compress(h, message, 4 * (uint64_t)(done + count), done + count == num_words);
    }
    memcpy(hash, h, HASH_BYTES);
    return 1;
}

// A list of the hashes of the first `num_blocks` full blocks of a list of tokens; `parent` is the hash before them.
// NULL: Python's error is set, as where a token is no uint32.
Object *tailrace_chain_hash(Object *tokens, int64_t num_blocks, int64_t block_size, const uint8_t *parent)
{
    Object *hashes = PyList_New(num_blocks);
    uint8_t hash[HASH_BYTES];
    for (int64_t block = 0; hashes && block < num_blocks; block++) {
        Object *name = NULL;
        if (hash_block(tokens, block * block_size, block_size, parent, hash))
            name = PyBytes_FromStringAndSize((const char *)hash, HASH_BYTES);
        if (!name || PyList_SetItem(hashes, block, name)) {
            Py_DecRef(hashes);
            return NULL;
        }
        parent = hash;
    }
    return hashes;
}
