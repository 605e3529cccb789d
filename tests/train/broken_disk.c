/* A file system that fails, for LD_PRELOAD: write, fsync, rename and flock of the paths that hold BROKEN_PATH.

   BROKEN_CALL  write, fsync, rename or flock: it fails with BROKEN_ERRNO; short: write takes a third; slow: each takes BROKEN_MS.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is(const char *call) {
    const char *wanted = getenv("BROKEN_CALL");
    return wanted && !strcmp(wanted, call);
}

static int concerned(const char *path) {
    const char *part = getenv("BROKEN_PATH");
    return part && strstr(path, part);
}

static int concerned_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return concerned(path);
}

static int broken(const char *call) {
    if (is("slow")) usleep(1000 * atoi(getenv("BROKEN_MS")));
    if (!is(call)) return 0;
    errno = atoi(getenv("BROKEN_ERRNO"));
    return 1;
}

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    if (concerned_fd(fd)) {
        if (broken("write")) return -1;
        if (is("short") && size > 3) size /= 3;
    }
    return real(fd, data, size);
}

int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return concerned_fd(fd) && broken("fsync") ? -1 : real(fd);
}

int flock(int fd, int operation) {
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return concerned_fd(fd) && broken("flock") ? -1 : real(fd, operation);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return concerned(to) && broken("rename") ? -1 : real(from, to);
}
