/* Which holder has which block, and on which tier: open addressing over fingerprints. See index.c for what is called.

   The table is 1 << partition_bits arrays, each of which grows by itself. A block's fingerprint is the first eight
   bytes of its hash; its leading bits choose the array, the next 32 its home there, by proportion. So an array is
   sorted by fingerprint, with gaps: an entry lies at its home or behind it, with no gap between (linear probing in
   order: Amble and Knuth, "Ordered hash tables", 1974). A search ends at the first larger fingerprint, an insertion
   shifts up to the next gap, and a rebuild copies from front to back. */

#include "records.h"

#include <sys/mman.h>

enum { HASH_BYTES = 16, NUM_TIERS = 3, AHEAD = 16, MIN_HOMES = 8, MAX_HOLDERS = 1 << 16 };
enum { MAPPED_BYTES = 1 << 16 };

/* 0: a gap. Odd: one holder, as holder << 3 | tier << 1 | 1. Even: a record's name << 1. */
typedef uint32_t ref_t;

struct entry {
    uint64_t print;
    ref_t ref;
} __attribute__((packed, aligned(4)));

struct partition {
    struct entry *entries;
    uint32_t num_homes;
    uint32_t num_slots; /* homes, and room behind them for what the last ones shift; the last slot is always a gap */
    uint32_t num_entries;
};

/* What a worker told between two resets. Dropped, it is dead until its last reference has been swept away. */
struct holder {
    uint32_t num_blocks;
    uint32_t max_blocks; /* of a free one: the next free one */
    uint32_t depth; /* in a walk: leading blocks so far, or its place among those found; else 0 */
    uint32_t mark; /* the last probe that found it */
    uint32_t by_tier[NUM_TIERS];
};

enum { DEAD = UINT32_MAX, NONE = UINT32_MAX };

struct index {
    struct partition *partitions;
    uint32_t partition_bits;
    uint32_t next_swept;
    uint64_t print_mask;
    struct holder *holders;
    uint32_t num_holders; /* free ones included */
    uint32_t first_free;
    uint64_t max_refs;
    uint64_t num_refs; /* dead ones included */
    uint64_t num_dead;
    uint64_t num_entries;
    uint64_t num_refused; /* publications beyond a limit, or without memory */
    uint64_t num_rebuilt; /* entries copied by rebuilds so far */
    uint64_t table_bytes;
    uint32_t unswept_events;
    uint32_t last_probe;
    struct records records;
};

/* -- where things are ---------------------------------------------------------------------------------------------- */

static uint64_t print_of(const struct index *index, const uint8_t *hash) {
    uint64_t print;
    memcpy(&print, hash, sizeof print);
    return print & index->print_mask;
}

static struct partition *partition_of(const struct index *index, uint64_t print) {
    return &index->partitions[print >> 1 >> (63 - index->partition_bits)];
}

static uint32_t home_of(const struct index *index, const struct partition *part, uint64_t print) {
    return (uint32_t)((print << index->partition_bits >> 32) * part->num_homes >> 32);
}

static void prefetch(const struct index *index, const uint8_t *hash) {
    uint64_t print = print_of(index, hash);
    const struct partition *part = partition_of(index, print);
    if (part->entries) __builtin_prefetch(&part->entries[home_of(index, part, print)]);
}

/* The first slot from its home on that is a gap or has no smaller fingerprint. */
static uint32_t find_slot(const struct index *index, const struct partition *part, uint64_t print) {
    uint32_t slot = home_of(index, part, print);
    while (part->entries[slot].ref && part->entries[slot].print < print) slot++;
    return slot;
}

static ref_t find_ref(const struct index *index, uint64_t print) {
    const struct partition *part = partition_of(index, print);
    if (!part->entries) return 0;
    const struct entry *entry = &part->entries[find_slot(index, part, print)];
    return entry->ref && entry->print == print ? entry->ref : 0;
}

static struct holder *holder_of(const struct index *index, ref_t ref) { return &index->holders[ref >> 3]; }
static int is_dead(const struct index *index, ref_t ref) { return holder_of(index, ref)->depth == DEAD; }

/* -- counting ------------------------------------------------------------------------------------------------------ */

static void free_holder(struct index *index, uint32_t id) {
    index->holders[id].max_blocks = index->first_free;
    index->first_free = id;
}

static void count(struct index *index, ref_t ref) {
    holder_of(index, ref)->num_blocks++;
    index->num_refs++;
}

static void uncount(struct index *index, ref_t ref) {
    struct holder *holder = holder_of(index, ref);
    holder->num_blocks--;
    index->num_refs--;
    if (holder->depth != DEAD) return;
    index->num_dead--;
    if (!holder->num_blocks) free_holder(index, ref >> 3);
}

/* -- memory -------------------------------------------------------------------------------------------------------- */

/* Large arrays are mapped: in the heap, arrays that all grow a little leave a sixth of it unused. */
static struct entry *alloc_entries(uint32_t num_slots) {
    size_t num_bytes = num_slots * sizeof(struct entry);
    if (num_bytes < MAPPED_BYTES) return malloc(num_bytes);
    void *entries = mmap(NULL, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return entries == MAP_FAILED ? NULL : entries;
}

static void free_entries(struct partition *part) {
    size_t num_bytes = part->num_slots * sizeof(struct entry);
    if (num_bytes < MAPPED_BYTES) free(part->entries);
    else munmap(part->entries, num_bytes);
}

/* -- rebuilding ---------------------------------------------------------------------------------------------------- */

/* What is left of a reference without the dead: 0, one holder, or the record. */
static ref_t purged(struct index *index, ref_t ref) {
    if (ref & 1) {
        if (!is_dead(index, ref)) return ref;
        uncount(index, ref);
        return 0;
    }
    struct record *record = record_at(&index->records, ref >> 1);
    uint32_t kept = 0;
    for (uint32_t at = 0; at < record->num_refs; at++) {
        if (is_dead(index, record->refs[at])) uncount(index, record->refs[at]);
        else record->refs[kept++] = record->refs[at];
    }
    record->num_refs = kept;
    if (kept > 1) return ref;
    ref_t left = kept ? record->refs[0] : 0;
    record_free(&index->records, ref >> 1, record->size_class);
    return left;
}

static void purge(struct index *index, struct partition *part) {
    for (uint32_t slot = 0; slot < part->num_slots; slot++) {
        struct entry *entry = &part->entries[slot];
        if (!entry->ref || (entry->ref = purged(index, entry->ref))) continue;
        part->num_entries--;
        index->num_entries--;
    }
}

/* Spreads the entries over as many homes. In place, the homes must be as many as before: each moves forward at most. */
static void spread(struct index *index, struct partition *to, const struct entry *from, uint32_t num_slots) {
    uint32_t next = 0;
    for (uint32_t slot = 0; slot < num_slots; slot++) {
        struct entry entry = from[slot];
        if (!entry.ref) continue;
        uint32_t home = home_of(index, to, entry.print);
        if (home < next) home = next;
        for (; next < home; next++) to->entries[next].ref = 0;
        to->entries[next++] = entry;
    }
    for (; next < to->num_slots; next++) to->entries[next].ref = 0;
    index->num_rebuilt += to->num_entries;
}

/* Slots that `spread` needs, the last gap included. */
static uint32_t slots_for(const struct index *index, const struct partition *part, const struct partition *old) {
    uint32_t next = 0;
    for (uint32_t slot = 0; slot < old->num_slots; slot++) {
        if (!old->entries[slot].ref) continue;
        uint32_t home = home_of(index, part, old->entries[slot].print);
        next = (home > next ? home : next) + 1;
    }
    return (next > part->num_homes ? next : part->num_homes) + 1;
}

/* Without the dead, and with room for `more`: four of five homes are taken afterwards. */
static int rebuild(struct index *index, struct partition *part, uint32_t more) {
    if (index->num_dead) purge(index, part);
    uint64_t wanted = (uint64_t)part->num_entries + more;
    struct partition fresh = {NULL, wanted + wanted / 4, 0, part->num_entries};
    if (fresh.num_homes < MIN_HOMES) fresh.num_homes = MIN_HOMES;
    fresh.num_slots = slots_for(index, &fresh, part) + 4 + fresh.num_homes / 64;
    fresh.entries = alloc_entries(fresh.num_slots);
    if (!fresh.entries) {
        spread(index, part, part->entries, part->num_slots);
        return 0;
    }
    spread(index, &fresh, part->entries, part->num_slots);
    index->table_bytes += ((uint64_t)fresh.num_slots - part->num_slots) * sizeof *fresh.entries;
    free_entries(part);
    *part = fresh;
    return 1;
}

/* One array without the dead. */
static void sweep_next(struct index *index) {
    struct partition *part = &index->partitions[index->next_swept];
    if (part->num_entries) rebuild(index, part, 0);
    index->next_swept = (index->next_swept + 1) & ((1u << index->partition_bits) - 1);
}

/* -- entries ------------------------------------------------------------------------------------------------------- */

/* Puts an entry that is not there. 0 where there is no memory. */
static int insert(struct index *index, uint64_t print, ref_t ref) {
    struct partition *part = partition_of(index, print);
    uint64_t is_full = (uint64_t)(part->num_entries + 1) * 10 > (uint64_t)part->num_homes * 9;
    /* Another try only where the end of the array is taken: few homes there, or equal leading bits. */
    for (uint32_t more = 1;; more = part->num_entries + 1) {
        if (is_full && !rebuild(index, part, more)) return 0;
        uint32_t slot = find_slot(index, part, print), gap = slot;
        while (part->entries[gap].ref) gap++;
        if (gap + 1 < part->num_slots) {
            memmove(&part->entries[slot + 1], &part->entries[slot], (gap - slot) * sizeof *part->entries);
            part->entries[slot] = (struct entry){print, ref};
            part->num_entries++;
            index->num_entries++;
            return 1;
        }
        is_full = 1;
    }
}

static void remove_entry(struct index *index, struct partition *part, uint32_t slot) {
    uint32_t end = slot + 1;
    while (part->entries[end].ref && home_of(index, part, part->entries[end].print) < end) end++;
    memmove(&part->entries[slot], &part->entries[slot + 1], (end - slot - 1) * sizeof *part->entries);
    part->entries[end - 1].ref = 0;
    part->num_entries--;
    index->num_entries--;
    if (part->num_homes > MIN_HOMES && part->num_entries * 2 < part->num_homes) rebuild(index, part, 1);
}
