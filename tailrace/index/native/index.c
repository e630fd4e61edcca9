/* The prefix index of one process: events in, leading blocks of each holder out. Mirrored by compact.py. */

#include "table.h"
#include "check.h"

enum { SWEEP_EVENTS = 512, HASTE = 16 };
enum { PUBLISH = 1 }; /* the lower half of an event's kind; the upper half is the tier */

struct found {
    uint32_t holder;
    uint32_t depth;
    uint32_t by_tier[NUM_TIERS];
};

/* -- adding -------------------------------------------------------------------------------------------------------- */

static int has_room(const struct index *index, ref_t ref, int replaces) {
    const struct holder *holder = holder_of(index, ref);
    return holder->num_blocks < holder->max_blocks && index->num_refs - !!replaces < index->max_refs;
}

/* Another holder beside the one or those that `*place` has. 0 where there is no memory. */
static int join(struct index *index, ref_t *place, ref_t ref) {
    uint32_t name = *place >> 1;
    if (*place & 1) {
        if (!(name = record_new(&index->records, 0))) return 0;
        struct record *record = record_at(&index->records, name);
        record->refs[record->num_refs++] = *place;
    } else if (record_at(&index->records, name)->num_refs == record_capacity(record_at(&index->records, name))) {
        if (!(name = record_grow(&index->records, name))) return 0;
    }
    struct record *record = record_at(&index->records, name);
    record->refs[record->num_refs++] = ref;
    *place = name << 1;
    return 1;
}

/* Where the holder stands, or a dead one in its stead; NULL: nowhere. */
static ref_t *own_place(const struct index *index, ref_t *place, ref_t ref) {
    if (*place & 1) return *place >> 3 == ref >> 3 || is_dead(index, *place) ? place : NULL;
    struct record *record = record_at(&index->records, *place >> 1);
    ref_t *dead = NULL;
    for (uint32_t at = 0; at < record->num_refs; at++) {
        if (record->refs[at] >> 3 == ref >> 3) return &record->refs[at];
        if (is_dead(index, record->refs[at])) dead = &record->refs[at];
    }
    return dead;
}

/* Where the block has no holder yet, or others. */
static int add(struct index *index, struct entry *entry, uint64_t print, ref_t ref) {
    if (!entry->ref || entry->print != print) return insert(index, print, ref);
    ref_t place = entry->ref; /* entries are packed: no pointer into one */
    if (!join(index, &place, ref)) return 0;
    entry->ref = place;
    return 1;
}

/* 0, and nothing done, beyond a limit or where there is no memory. */
static int publish(struct index *index, uint64_t print, ref_t ref) {
    struct partition *part = partition_of(index, print);
    if (!part->entries && !rebuild(index, part, 1)) return 0;
    struct entry *entry = &part->entries[find_slot(index, part, print)];
    ref_t inline_ref = entry->ref, *place = NULL;
    if (entry->ref && entry->print == print) place = own_place(index, &inline_ref, ref);
    int is_own = place && *place >> 3 == ref >> 3;
    if (!is_own && !has_room(index, ref, place != NULL)) return 0;
    if (place) {
        if (!is_own) {
            uncount(index, *place);
            count(index, ref);
        }
        *place = ref;
        entry->ref = inline_ref;
        return 1;
    }
    if (!add(index, entry, print, ref)) return 0;
    count(index, ref);
    return 1;
}

/* -- removing ------------------------------------------------------------------------------------------------------ */

static void retract(struct index *index, uint64_t print, uint32_t holder) {
    struct partition *part = partition_of(index, print);
    if (!part->entries) return;
    uint32_t slot = find_slot(index, part, print);
    struct entry *entry = &part->entries[slot];
    if (!entry->ref || entry->print != print) return;
    if (entry->ref & 1) {
        if (entry->ref >> 3 != holder) return;
        uncount(index, entry->ref);
        remove_entry(index, part, slot);
        return;
    }
    uint32_t name = entry->ref >> 1;
    struct record *record = record_at(&index->records, name);
    for (uint32_t at = 0; at < record->num_refs; at++) {
        if (record->refs[at] >> 3 != holder) continue;
        uncount(index, record->refs[at]);
        record->refs[at] = record->refs[--record->num_refs];
        if (record->num_refs > 1) return;
        entry->ref = record->refs[0];
        record_free(&index->records, name, record->size_class);
        return;
    }
}

/* -- what is called ------------------------------------------------------------------------------------------------ */

void tailrace_index_free(struct index *index) {
    if (!index) return;
    uint32_t num_partitions = index->partitions ? 1u << index->partition_bits : 0;
    for (uint32_t at = 0; at < num_partitions; at++) free_entries(&index->partitions[at]);
    records_release(&index->records);
    free(index->partitions);
    free(index->holders);
    free(index);
}

/* `print_bits`: leading bits of a fingerprint that count, 64 but in tests. NULL where there is no memory. */
struct index *tailrace_index_new(uint32_t partition_bits, uint32_t print_bits, uint64_t max_refs) {
    struct index *index = calloc(1, sizeof *index);
    if (!index) return NULL;
    index->partition_bits = partition_bits;
    index->print_mask = ~UINT64_C(0) << (64 - print_bits);
    index->max_refs = max_refs;
    index->first_free = NONE;
    index->partitions = calloc((size_t)1 << partition_bits, sizeof *index->partitions);
    if (index->partitions) return index;
    tailrace_index_free(index);
    return NULL;
}

/* A holder that has nothing; -1 where there are too many or is no memory. */
int64_t tailrace_index_admit(struct index *index, uint32_t max_blocks) {
    uint32_t id = index->first_free;
    if (id != NONE) {
        index->first_free = index->holders[id].max_blocks;
    } else {
        id = index->num_holders;
        if (id == MAX_HOLDERS) return -1;
        if (!(id & (id - 1))) {
            struct holder *holders = realloc(index->holders, (id ? 2 * (size_t)id : 1) * sizeof *holders);
            if (!holders) return -1;
            index->holders = holders;
        }
        index->num_holders++;
    }
    index->holders[id] = (struct holder){.max_blocks = max_blocks};
    return id;
}

/* Nothing of it is found from here on; its entries go as events and sweeps come by. */
void tailrace_index_drop(struct index *index, uint32_t id) {
    struct holder *holder = &index->holders[id];
    holder->depth = DEAD;
    index->num_dead += holder->num_blocks;
    if (!holder->num_blocks) free_holder(index, id);
}

/* Some of the dead go with the events, more of them while they keep others out. */
static void sweep(struct index *index) {
    index->unswept_events += index->num_refs < index->max_refs ? 1 : HASTE;
    if (index->unswept_events < SWEEP_EVENTS) return;
    index->unswept_events = 0;
    sweep_next(index);
}

/* Returns how many publications were refused. */
uint64_t tailrace_index_apply(
    struct index *index, uint32_t id, const uint8_t *kinds, const uint8_t *hashes, int64_t num_events
) {
    uint64_t refused_before = index->num_refused;
    for (int64_t at = 0; at < num_events && at < AHEAD; at++) prefetch(index, hashes + at * HASH_BYTES);
    for (int64_t at = 0; at < num_events; at++) {
        if (at + AHEAD < num_events) prefetch(index, hashes + (at + AHEAD) * HASH_BYTES);
        if (index->num_dead) sweep(index);
        uint64_t print = print_of(index, hashes + at * HASH_BYTES);
        uint32_t tier = kinds[at] >> 4;
        if ((kinds[at] & 15) != PUBLISH || tier >= NUM_TIERS) retract(index, print, id);
        else if (!publish(index, print, id << 3 | tier << 1 | 1)) index->num_refused++;
    }
    return index->num_refused - refused_before;
}

static uint32_t refs_of(const struct index *index, const ref_t *ref, const ref_t **refs) {
    if (*ref & 1) {
        *refs = ref;
        return 1;
    }
    const struct record *record = record_at(&index->records, *ref >> 1);
    *refs = record->refs;
    return record->num_refs;
}

/* Whether any holder that had all blocks before this one has it too. */
static int advance(struct index *index, ref_t ref, uint32_t depth, struct found *found, uint32_t *num_found) {
    const ref_t *refs;
    uint32_t num_refs = refs_of(index, &ref, &refs), num_advanced = 0;
    for (uint32_t at = 0; at < num_refs; at++) {
        struct holder *holder = holder_of(index, refs[at]);
        if (holder->depth != depth) continue;
        if (!depth) {
            memset(holder->by_tier, 0, sizeof holder->by_tier);
            found[(*num_found)++].holder = refs[at] >> 3;
        }
        holder->depth++;
        holder->by_tier[refs[at] >> 1 & 3]++;
        num_advanced++;
    }
    return num_advanced != 0;
}

/* How many of the next blocks, AHEAD at most, anybody has, with their references; their records are on their way. */
static int64_t find_ahead(const struct index *index, const uint8_t *hashes, int64_t num, ref_t *refs) {
    for (int64_t at = 0; at < num; at++) {
        refs[at] = find_ref(index, print_of(index, hashes + at * HASH_BYTES));
        if (!refs[at]) return at;
        if (!(refs[at] & 1)) __builtin_prefetch(record_at(&index->records, refs[at] >> 1));
    }
    return num;
}

/* Every block, up to the first that nobody has whom none failed before. `found`: room for all holders that are not
   dropped. Returns how many have the first block. */
uint32_t tailrace_index_walk(struct index *index, const uint8_t *hashes, int64_t num_blocks, struct found *found) {
    uint32_t num_found = 0;
    for (int64_t at = 0; at < num_blocks && at < AHEAD; at++) prefetch(index, hashes + at * HASH_BYTES);
    for (int64_t first = 0, goes_on = 1; goes_on && first < num_blocks; first += AHEAD) {
        int64_t ahead = first + 2 * AHEAD < num_blocks ? first + 2 * AHEAD : num_blocks;
        for (int64_t at = first + AHEAD; at < ahead; at++) prefetch(index, hashes + at * HASH_BYTES);
        ref_t refs[AHEAD];
        int64_t num = num_blocks - first < AHEAD ? num_blocks - first : AHEAD;
        int64_t num_held = find_ahead(index, hashes + first * HASH_BYTES, num, refs);
        goes_on = num_held == num;
        for (int64_t at = 0; at < num_held; at++) {
            if (advance(index, refs[at], first + at, found, &num_found)) continue;
            goes_on = 0;
            break;
        }
    }
    for (uint32_t at = 0; at < num_found; at++) {
        struct holder *holder = &index->holders[found[at].holder];
        found[at].depth = holder->depth;
        memcpy(found[at].by_tier, holder->by_tier, sizeof holder->by_tier);
        holder->depth = 0;
    }
    return num_found;
}

static uint32_t run_of(const struct found *found) {
    uint32_t num_blocks = 0;
    for (int tier = 0; tier < NUM_TIERS; tier++) num_blocks += found->by_tier[tier];
    return num_blocks;
}

/* A block of `at`'s place has this holder: its run goes on, or begins anew where there was a hole behind it. */
static void extend_run(struct index *index, ref_t ref, uint32_t at, uint32_t span, struct found *found, uint32_t *num) {
    struct holder *holder = holder_of(index, ref);
    if (holder->depth == DEAD) return;
    if (!holder->depth) {
        found[*num] = (struct found){.holder = ref >> 3, .depth = at + 1};
        holder->depth = ++*num; /* where it stands in `found`, from 1 on */
    }
    struct found *own = &found[holder->depth - 1];
    uint32_t run = run_of(own);
    if (run >= span) return;
    if (own->depth - run != at + 1) *own = (struct found){.holder = own->holder, .depth = at + 1};
    own->by_tier[ref >> 1 & 3]++;
}

/* The deepest place of each holder before which it has `span` blocks, or all. From the end on, every block: a run is as
   deep as its first block that is met. As `tailrace_index_walk`; tiers are counted within the run. */
uint32_t tailrace_index_runs(
    struct index *index, const uint8_t *hashes, int64_t num_blocks, struct found *found, uint32_t span
) {
    uint32_t num_found = 0, num_kept = 0;
    for (int64_t at = num_blocks - 1; at >= 0 && at >= num_blocks - AHEAD; at--) prefetch(index, hashes + at * HASH_BYTES);
    for (int64_t at = num_blocks - 1; at >= 0; at--) {
        if (at >= AHEAD) prefetch(index, hashes + (at - AHEAD) * HASH_BYTES);
        ref_t ref = find_ref(index, print_of(index, hashes + at * HASH_BYTES));
        const ref_t *refs;
        uint32_t num_refs = ref ? refs_of(index, &ref, &refs) : 0;
        for (uint32_t each = 0; each < num_refs; each++) extend_run(index, refs[each], at, span, found, &num_found);
    }
    for (uint32_t at = 0; at < num_found; at++) {
        index->holders[found[at].holder].depth = 0;
        uint32_t run = run_of(&found[at]);
        if (run >= span || run == found[at].depth) found[num_kept++] = found[at];
    }
    return num_kept;
}

/* Marks the holders of a block with a number that no other has. */
static void mark_holders(struct index *index, ref_t ref) {
    if (!++index->last_probe) {
        for (uint32_t id = 0; id < index->num_holders; id++) index->holders[id].mark = 0;
        index->last_probe = 1;
    }
    const ref_t *refs;
    uint32_t num_refs = ref ? refs_of(index, &ref, &refs) : 0;
    for (uint32_t at = 0; at < num_refs; at++) holder_of(index, refs[at])->mark = index->last_probe;
}

/* Holders that have all blocks before `low`, as far as anybody asked, and not the one at `high`. */
struct range {
    int64_t low, high;
    uint32_t begin, end;
};

/* The marked ones first. Returns where the others begin. */
static uint32_t divide(const struct index *index, struct found *found, uint32_t begin, uint32_t end) {
    for (uint32_t at = begin; at < end; at++) {
        struct found one = found[at];
        if (index->holders[one.holder].mark != index->last_probe) continue;
        found[at] = found[begin];
        found[begin++] = one;
    }
    return begin;
}

/* A binary search for each holder, together as long as they agree: right where nobody has a block without those before
   it. Else a holder has the last block that is counted and not the one after, and those between that were probed.
   As `tailrace_index_walk`, but for tiers, which it leaves alone. */
uint32_t tailrace_index_search(struct index *index, const uint8_t *hashes, int64_t num_blocks, struct found *found) {
    ref_t first = num_blocks ? find_ref(index, print_of(index, hashes)) : 0;
    if (!first) return 0;
    const ref_t *refs;
    uint32_t num_refs = refs_of(index, &first, &refs), num_found = 0;
    for (uint32_t at = 0; at < num_refs; at++)
        if (!is_dead(index, refs[at])) found[num_found++].holder = refs[at] >> 3;
    /* The upper half goes on the stack and the lower one is done first: at most one a halving. */
    struct range stack[64] = {{1, num_blocks, 0, num_found}};
    for (int top = 0; top >= 0;) {
        struct range range = stack[top--];
        while (range.begin < range.end && range.low < range.high) {
            int64_t middle = range.low + (range.high - range.low) / 2;
            mark_holders(index, find_ref(index, print_of(index, hashes + middle * HASH_BYTES)));
            uint32_t others = divide(index, found, range.begin, range.end);
            if (others > range.begin) stack[++top] = (struct range){middle + 1, range.high, range.begin, others};
            range = (struct range){range.low, middle, others, range.end};
        }
        for (uint32_t at = range.begin; at < range.end; at++) found[at].depth = range.low;
    }
    return num_found;
}

uint32_t tailrace_index_num_blocks(const struct index *index, uint32_t id) { return index->holders[id].num_blocks; }

void tailrace_index_stats(const struct index *index, uint64_t *stats) {
    stats[0] = index->num_entries;
    stats[1] = index->num_refs - index->num_dead;
    stats[2] = index->num_dead;
    stats[3] = index->num_refused;
    stats[4] = index->num_rebuilt;
    stats[5] = sizeof *index + ((uint64_t)1 << index->partition_bits) * sizeof *index->partitions + index->table_bytes
        + (uint64_t)index->records.num_slabs * SLAB_UNITS * UNIT_WORDS * sizeof(uint32_t)
        + index->num_holders * sizeof *index->holders;
}
