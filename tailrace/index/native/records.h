/* Sets of holders of blocks that have more than one: arrays of references, in pieces of a power of two of 16 bytes. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { UNIT_WORDS = 4, NUM_CLASSES = 15, SLAB_UNITS = 1 << 16, MAX_SLABS = 1 << 12 };

/* References follow the head. Class k has 1 << k units. */
struct record {
    uint16_t size_class;
    uint16_t num_refs;
    uint32_t refs[];
};

/* A record's name is the number of its first unit; 0 names none. Slabs stay where they are: nothing is copied. */
struct records {
    uint32_t *slabs[MAX_SLABS];
    uint32_t num_slabs;
    uint32_t num_used; /* units of the last slab */
    uint32_t free[NUM_CLASSES]; /* names, chained through the first word */
};

static struct record *record_at(const struct records *records, uint32_t name) {
    return (struct record *)(records->slabs[name / SLAB_UNITS] + (uint64_t)(name % SLAB_UNITS) * UNIT_WORDS);
}

static uint32_t record_capacity(const struct record *record) {
    return (UNIT_WORDS << record->size_class) - 1;
}

static void record_free(struct records *records, uint32_t name, uint32_t size_class) {
    *(uint32_t *)record_at(records, name) = records->free[size_class];
    records->free[size_class] = name;
}

/* What the last slab has left becomes free pieces. */
static void records_close_slab(struct records *records) {
    while (records->num_slabs && records->num_used < SLAB_UNITS) {
        uint32_t size_class = 31 - __builtin_clz(SLAB_UNITS - records->num_used);
        if (size_class >= NUM_CLASSES) size_class = NUM_CLASSES - 1;
        record_free(records, (records->num_slabs - 1) * SLAB_UNITS + records->num_used, size_class);
        records->num_used += 1u << size_class;
    }
}

static int records_open_slab(struct records *records) {
    if (records->num_slabs == MAX_SLABS) return 0;
    uint32_t *slab = malloc((size_t)SLAB_UNITS * UNIT_WORDS * sizeof *slab);
    if (!slab) return 0;
    records_close_slab(records);
    records->slabs[records->num_slabs++] = slab;
    records->num_used = records->num_slabs == 1; /* the name 0 is nobody's */
    return 1;
}

/* An empty record; 0 where there is no memory. */
static uint32_t record_new(struct records *records, uint32_t size_class) {
    uint32_t name = records->free[size_class];
    if (name) {
        records->free[size_class] = *(uint32_t *)record_at(records, name);
    } else {
        int fits = records->num_slabs && records->num_used + (1u << size_class) <= SLAB_UNITS;
        if (!fits && !records_open_slab(records)) return 0;
        name = (records->num_slabs - 1) * SLAB_UNITS + records->num_used;
        records->num_used += 1u << size_class;
    }
    struct record *record = record_at(records, name);
    record->size_class = size_class;
    record->num_refs = 0;
    return name;
}

/* The same references with twice the room; 0, and nothing changed, where there is none to be had. */
static uint32_t record_grow(struct records *records, uint32_t name) {
    const struct record *old = record_at(records, name);
    if (old->size_class + 1 >= NUM_CLASSES) return 0;
    uint32_t wider = record_new(records, old->size_class + 1);
    if (!wider) return 0;
    struct record *record = record_at(records, wider);
    record->num_refs = old->num_refs;
    memcpy(record->refs, old->refs, old->num_refs * sizeof *old->refs);
    record_free(records, name, old->size_class);
    return wider;
}

static void records_release(struct records *records) {
    for (uint32_t slab = 0; slab < records->num_slabs; slab++) free(records->slabs[slab]);
}
