"""A wall clock that jumps, for processes that are started: what their C library answers. No other clock moves."""

import os
import struct
import subprocess
from pathlib import Path

_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset_s;

__attribute__((constructor)) static void open_offset(void) {
    int fd = open(getenv("SHIFTED_CLOCK"), O_RDONLY);
    void *page = mmap(NULL, sizeof *offset_s, PROT_READ, MAP_SHARED, fd, 0);
    if (fd < 0 || page == MAP_FAILED) abort();
    offset_s = page;
    close(fd);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*next)(clockid_t, struct timespec *);
    if (!next) next = dlsym(RTLD_NEXT, "clock_gettime");
    int status = next(clock, now);
    if (!status && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) && offset_s) now->tv_sec += *offset_s;
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*next)(struct timeval *, void *);
    if (!next) next = dlsym(RTLD_NEXT, "gettimeofday");
    int status = next(now, zone);
    if (!status && offset_s) now->tv_sec += *offset_s;
    return status;
}

time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}
"""


class ShiftedClock:
    """`environment` is what a process needs to live by it."""

    def __init__(self, directory: Path) -> None:
        source, library, self._offset = (directory / name for name in ("clock.c", "clock.so", "offset"))
        source.write_text(_SOURCE)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        self.jump(0)
        self.environment = {"LD_PRELOAD": str(library), "SHIFTED_CLOCK": str(self._offset)}

    def jump(self, seconds: int) -> None:
        """All these processes' wall clocks are so far from the real one from here on."""
        descriptor = os.open(self._offset, os.O_RDWR | os.O_CREAT)
        os.pwrite(descriptor, struct.pack("q", seconds), 0)
        os.close(descriptor)
