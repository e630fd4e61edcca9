/* Whether all that the index keeps twice adds up; for tests. */

enum { GOOD, UNSORTED, BEFORE_HOME, GAP_BEFORE, BAD_RECORD, BAD_PARTITION_COUNT, BAD_HOLDER_COUNT, BAD_TOTALS };

static int check_refs(const struct index *index, ref_t ref, uint32_t *counts) {
    if (ref & 1) {
        counts[ref >> 3]++;
        return GOOD;
    }
    const struct record *record = record_at(&index->records, ref >> 1);
    if (record->num_refs < 2 || record->num_refs > record_capacity(record)) return BAD_RECORD;
    for (uint32_t at = 0; at < record->num_refs; at++) counts[record->refs[at] >> 3]++;
    return GOOD;
}

static int check_partition(const struct index *index, const struct partition *part, uint32_t *counts) {
    uint32_t num_entries = 0, run = 0; /* where this run of entries begins */
    for (uint32_t slot = 0; slot < part->num_slots; slot++) {
        const struct entry *entry = &part->entries[slot];
        if (!entry->ref) {
            run = slot + 1;
            continue;
        }
        num_entries++;
        if (slot > run && entry[-1].print >= entry->print) return UNSORTED;
        uint32_t home = home_of(index, part, entry->print);
        if (home > slot) return BEFORE_HOME;
        if (home < run) return GAP_BEFORE;
        int bad = check_refs(index, entry->ref, counts);
        if (bad) return bad;
    }
    return num_entries == part->num_entries && (!part->entries || run == part->num_slots) ? GOOD : BAD_PARTITION_COUNT;
}

/* GOOD, or what does not; -1 where there is no memory to find out. */
int32_t tailrace_index_check(const struct index *index) {
    uint32_t *counts = calloc(index->num_holders + 1, sizeof *counts);
    if (!counts) return -1;
    int bad = GOOD;
    uint64_t num_entries = 0, num_refs = 0, num_dead = 0;
    for (uint32_t at = 0; !bad && at < 1u << index->partition_bits; at++) {
        bad = check_partition(index, &index->partitions[at], counts);
        num_entries += index->partitions[at].num_entries;
    }
    for (uint32_t id = 0; !bad && id < index->num_holders; id++) {
        if (counts[id] != index->holders[id].num_blocks) bad = BAD_HOLDER_COUNT;
        num_refs += counts[id];
        if (index->holders[id].depth == DEAD) num_dead += counts[id];
    }
    if (!bad && (num_entries != index->num_entries || num_refs != index->num_refs || num_dead != index->num_dead))
        bad = BAD_TOTALS;
    free(counts);
    return bad;
}
