/* From a worker's step to the clients' sockets: what nearly every token of a streamed answer takes.

   Most of a token's cost is memory that has gone cold since the step before, so what a token touches lies together,
   and is asked for before it is needed. Mirrored by outlet.py, which says who may write when. */

#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { LINE = 64, CELL_TEXT = 31, MAX_TEXT = 720, MAX_TAKEN = 128, FRAMING = 16 };
enum { TAKEN = 0, LEFT = -1 };

/* The text of a token inside of JSON's quotes; size 0: one that needs a closer look. */
struct cell {
    uint8_t size;
    char text[CELL_TEXT];
};

/* What all answers of a gateway share. */
struct desk {
    const struct cell *cells;
    uint64_t num_cells;
    const double *bounds; /* of the histogram of gaps between contents, ascending */
    uint64_t num_bounds;
    uint64_t *counts; /* num_bounds + 1 */
    double *sum;
};

/* One answer of one choice. */
struct outlet {
    const struct desk *desk;
    uint64_t handle;
    double wrote_at; /* CLOCK_MONOTONIC, seconds */
    int32_t fd;
    uint32_t is_open;
    uint32_t position; /* of the token that comes next */
    uint32_t num_taken; /* not collected yet */
    uint32_t before; /* bytes of `text` that come before a token's, and after it */
    uint32_t after;
    char text[MAX_TEXT];
    uint32_t taken[MAX_TAKEN];
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void observe(const struct desk *desk, double seconds) {
    uint64_t bucket = 0;
    while (bucket < desk->num_bounds && desk->bounds[bucket] < seconds) bucket++;
    desk->counts[bucket]++;
    *desk->sum += seconds;
}

static char *put_hex(char *end, uint32_t number) {
    int shift = 28;
    while (shift && !(number >> shift)) shift -= 4;
    for (; shift >= 0; shift -= 4) *end++ = "0123456789abcdef"[number >> shift & 15];
    return end;
}

/* One chunk of an HTTP body; returns its bytes. */
static size_t frame(const struct outlet *outlet, const struct cell *cell, char *chunk) {
    char *end = put_hex(chunk, outlet->before + cell->size + outlet->after);
    end = mempcpy(end, "\r\n", 2);
    end = mempcpy(end, outlet->text, outlet->before);
    end = mempcpy(end, cell->text, cell->size);
    end = mempcpy(end, outlet->text + outlet->before, outlet->after);
    return mempcpy(end, "\r\n", 2) - (void *)chunk;
}

/* TAKEN; LEFT, and nothing done; or how many bytes of the chunk the socket took: the rest is the caller's. */
static int32_t take(struct outlet *outlet, uint32_t position, uint32_t token) {
    const struct desk *desk = outlet->desk;
    if (!outlet->is_open || position != outlet->position || outlet->num_taken == MAX_TAKEN) return LEFT;
    if (token >= desk->num_cells || !desk->cells[token].size) return LEFT;
    char chunk[MAX_TEXT + CELL_TEXT + FRAMING];
    size_t size = frame(outlet, &desk->cells[token], chunk);
    ssize_t sent = send(outlet->fd, chunk, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent <= 0) return LEFT;
    double wrote_at = now();
    observe(desk, wrote_at - outlet->wrote_at);
    outlet->wrote_at = wrote_at;
    outlet->taken[outlet->num_taken++] = token;
    outlet->position++;
    if ((size_t)sent == size) return TAKEN;
    outlet->is_open = 0;
    return (int32_t)sent;
}

static struct outlet *find(struct outlet *const *slots, uint64_t num_slots, uint64_t handle) {
    struct outlet *outlet = slots[handle & (num_slots - 1)];
    return outlet && outlet->handle == handle ? outlet : NULL;
}

static void fetch(const struct outlet *outlet) {
    const char *end = outlet->text + outlet->before + outlet->after;
    for (const char *line = (const char *)outlet; line < end; line += LINE) __builtin_prefetch(line);
    __builtin_prefetch(outlet->taken + outlet->num_taken);
}

/* The rows of a step, in order. `outcomes`: as of `take`. Returns how many of them are not TAKEN. */
int64_t tailrace_write_step(
    struct outlet *const *slots, uint64_t num_slots, int64_t num_rows, const uint64_t *handles,
    const uint32_t *choices, const uint32_t *positions, const uint32_t *tokens, int32_t *outcomes
) {
    for (int64_t row = 0; row < num_rows; row++) {
        struct outlet *outlet = find(slots, num_slots, handles[row]);
        if (outlet) {
            fetch(outlet);
            if (tokens[row] < outlet->desk->num_cells) __builtin_prefetch(&outlet->desk->cells[tokens[row]]);
        }
    }
    int64_t num_left = 0;
    for (int64_t row = 0; row < num_rows; row++) {
        struct outlet *outlet = find(slots, num_slots, handles[row]);
        outcomes[row] = outlet && choices[row] == 0 ? take(outlet, positions[row], tokens[row]) : LEFT;
        num_left += outcomes[row] != TAKEN;
    }
    return num_left;
}

int32_t tailrace_take(struct outlet *outlet, uint32_t position, uint32_t token) {
    return take(outlet, position, token);
}

void tailrace_sizes(int64_t *sizes) {
    sizes[0] = sizeof(struct cell);
    sizes[1] = sizeof(struct desk);
    sizes[2] = sizeof(struct outlet);
}
