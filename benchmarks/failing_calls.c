/* Makes chosen calls of the C library fail, notes calls that change a disk, and moves the clock.

   Loaded with LD_PRELOAD into the processes under test, so that Python, its extensions and their libraries all meet the
   same faults. `failing_calls.py` compiles this file, and describes the variables and files that it reads. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* The absolute path of `path` as seen from the open folder `at`. */
static void absolute(char *out, int at, const char *path) {
    char link[64], base[PATH_MAX] = "";
    if (path[0] == '/') { snprintf(out, PATH_MAX, "%s", path); return; }
    if (at == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t size = readlink(link, base, sizeof base - 1);
    base[size < 0 ? 0 : size] = 0;
    if (path[0]) snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, path);
    else snprintf(out, PATH_MAX, "%s", base);
}

/* Whether a rule says that this call fails now; then errno is set, and the rule's count is one less. */
static int fails(const char *call, const char *path) {
    const char *rules = getenv("FAILING_CALLS");
    if (!rules) return 0;
    int saved = errno, file = syscall(SYS_openat, AT_FDCWD, rules, O_RDWR | O_CLOEXEC, 0), found = 0;
    if (file < 0) { errno = saved; return 0; }
    syscall(SYS_flock, file, LOCK_EX);
    char text[8192];
    ssize_t size = syscall(SYS_pread64, file, text, sizeof text - 1, 0L);
    text[size < 0 ? 0 : size] = 0;
    for (char *line = text, *end; (end = strchr(line, '\n')); line = end + 1) {
        char name[32], part[PATH_MAX];
        int number, left, at;
        *end = 0;
        if (sscanf(line, "%31s %d %n%d %4000[^\n]", name, &number, &at, &left, part) != 4) continue;
        if (left <= 0 || strcmp(name, call) || !strstr(path, part)) continue;
        char count[8];
        snprintf(count, sizeof count, "%06d", left - 1);
        syscall(SYS_pwrite64, file, count, 6L, (long)(line - text + at));
        found = number;
        break;
    }
    syscall(SYS_close, file);
    errno = found ? found : saved;
    return found;
}

/* Open the trace, for this thread alone until `unlock_trace`: a call and its line must not be parted by another thread's.
   -1 where nothing is traced. */
static int lock_trace(void) {
    const char *trace = getenv("CALLS_TRACE");
    if (!trace || !getenv("CALLS_TRACE_UNDER")) return -1;
    char name[PATH_MAX];
    snprintf(name, sizeof name, "%s/log", trace);
    int log = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    syscall(SYS_flock, log, LOCK_EX);
    return log;
}

static void unlock_trace(int log) {
    if (log >= 0) syscall(SYS_close, log);
}

/* Append a line to the trace, for paths that belong to it. `content`: an open file whose bytes are kept, or -1. */
static void note(int log, const char *call, const char *path, const char *other, int content) {
    const char *trace = getenv("CALLS_TRACE"), *under = getenv("CALLS_TRACE_UNDER");
    if (log < 0 || strncmp(path, under, strlen(under))) return;
    int saved = errno;
    char line[3 * PATH_MAX], copied[32] = "";
    if (content >= 0) {
        struct stat about;
        syscall(SYS_fstat, log, &about);
        snprintf(copied, sizeof copied, "%ld", (long)about.st_size);
        other = copied;
        char from[64], to[PATH_MAX], data[1 << 16];
        snprintf(from, sizeof from, "/proc/self/fd/%d", content);
        snprintf(to, sizeof to, "%s/%s", trace, copied);
        int in = syscall(SYS_openat, AT_FDCWD, from, O_RDONLY | O_CLOEXEC, 0);
        int out = syscall(SYS_openat, AT_FDCWD, to, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
        for (long n; (n = syscall(SYS_read, in, data, sizeof data)) > 0;) syscall(SYS_write, out, data, n);
        syscall(SYS_close, in);
        syscall(SYS_close, out);
    }
    int size = snprintf(line, sizeof line, "%s\t%s\t%s\n", call, path, other ? other : "");
    syscall(SYS_write, log, line, (long)size);
    errno = saved;
}

static int open_at(int at, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    absolute(full, at, path);
    if (fails("open", full)) return -1;
    int changes = (flags & (O_CREAT | O_TRUNC)) && (flags & O_TMPFILE) != O_TMPFILE, log = changes ? lock_trace() : -1;
    int is_new = (flags & O_CREAT) && syscall(SYS_faccessat, AT_FDCWD, full, F_OK);
    int file = syscall(SYS_openat, at, path, flags, mode);
    if (file >= 0 && changes) {
        if (is_new) note(log, "create", full, NULL, -1);
        else if (flags & O_TRUNC) note(log, "truncate", full, NULL, -1);
    }
    unlock_trace(log);
    return file;
}

#define MODE(flags, mode)                           \
    mode_t mode = 0;                                \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list rest;                               \
        va_start(rest, flags);                      \
        mode = va_arg(rest, mode_t);                \
        va_end(rest);                               \
    }

int open(const char *path, int flags, ...) { MODE(flags, mode) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode) return open_at(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags, mode) return open_at(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags, mode) return open_at(at, path, flags, mode); }

ssize_t read(int file, void *data, size_t size) {
    char full[PATH_MAX];
    if (getenv("FAILING_CALLS")) {
        absolute(full, file, "");
        if (fails("read", full)) return -1;
    }
    return syscall(SYS_read, file, data, size);
}

static int sync_file(int file, long call) {
    char full[PATH_MAX];
    absolute(full, file, "");
    if (fails("fsync", full)) return -1;
    int log = lock_trace(), result = syscall(call, file);
    struct stat about;
    if (!result && !syscall(SYS_fstat, file, &about)) note(log, "sync", full, NULL, S_ISREG(about.st_mode) ? file : -1);
    unlock_trace(log);
    return result;
}
int fsync(int file) { return sync_file(file, SYS_fsync); }
int fdatasync(int file) { return sync_file(file, SYS_fdatasync); }

static int rename_at(int at, const char *from, int to_at, const char *to, unsigned flags) {
    char old[PATH_MAX], new[PATH_MAX];
    absolute(old, at, from);
    absolute(new, to_at, to);
    if (fails("rename", old)) return -1;
    int log = lock_trace(), result = syscall(SYS_renameat2, at, from, to_at, to, flags);
    if (!result) note(log, "rename", old, new, -1);
    unlock_trace(log);
    return result;
}
int rename(const char *from, const char *to) { return rename_at(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int at, const char *from, int to_at, const char *to) { return rename_at(at, from, to_at, to, 0); }
int renameat2(int at, const char *from, int to_at, const char *to, unsigned flags) {
    return rename_at(at, from, to_at, to, flags);
}

static int link_at(int at, const char *from, int to_at, const char *to, int flags) {
    char old[PATH_MAX], new[PATH_MAX];
    absolute(old, at, from);
    absolute(new, to_at, to);
    if (fails("link", old)) return -1;
    int log = lock_trace(), result = syscall(SYS_linkat, at, from, to_at, to, flags);
    if (!result) note(log, "link", old, new, -1);
    unlock_trace(log);
    return result;
}
int link(const char *from, const char *to) { return link_at(AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int at, const char *from, int to_at, const char *to, int flags) {
    return link_at(at, from, to_at, to, flags);
}

static int remove_at(int at, const char *path, int flags) {
    char full[PATH_MAX];
    absolute(full, at, path);
    if (fails("unlink", full)) return -1;
    int log = lock_trace(), result = syscall(SYS_unlinkat, at, path, flags);
    if (!result) note(log, "unlink", full, NULL, -1);
    unlock_trace(log);
    return result;
}
int unlink(const char *path) { return remove_at(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return remove_at(AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int at, const char *path, int flags) { return remove_at(at, path, flags); }

static int make_at(int at, const char *path, mode_t mode) {
    char full[PATH_MAX];
    absolute(full, at, path);
    if (fails("mkdir", full)) return -1;
    int log = lock_trace(), result = syscall(SYS_mkdirat, at, path, mode);
    if (!result) note(log, "mkdir", full, NULL, -1);
    unlock_trace(log);
    return result;
}
int mkdir(const char *path, mode_t mode) { return make_at(AT_FDCWD, path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { return make_at(at, path, mode); }

DIR *opendir(const char *path) {
    char full[PATH_MAX];
    absolute(full, AT_FDCWD, path);
    return fails("listdir", full) ? NULL : REAL(opendir)(path);
}
DIR *fdopendir(int file) {
    char full[PATH_MAX];
    absolute(full, file, "");
    return fails("listdir", full) ? NULL : REAL(fdopendir)(file);
}

#define STAT(name, type)                                          \
    int name(const char *path, struct type *about) {              \
        char full[PATH_MAX];                                      \
        absolute(full, AT_FDCWD, path);                           \
        return fails("stat", full) ? -1 : REAL(name)(path, about); \
    }
STAT(stat, stat)
STAT(stat64, stat64)

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    const char *shift = getenv("CLOCK_SHIFT_S");
    if (shift && clock == CLOCK_REALTIME) now->tv_sec += atol(shift);
    return result;
}
