/* Counts a program's calls that change files below some folders, and lets one of them fail. Loaded with LD_PRELOAD.
 *
 * Environment
 *   TIDEMILL_IO_BELOW   prefixes of paths that count, separated by colons
 *   TIDEMILL_IO_TRACE   a line per call that counts: its kind and its path; `struck` before it where the fault was given
 *   TIDEMILL_IO_AT      number of the call that fails, from 1 on; the next one that the fault fits, where it does not fit that
 *   TIDEMILL_IO_FAULT   eio      the call fails with EIO and does nothing
 *                       enospc   the same with ENOSPC, where a call may ask for space
 *                       full     the same for this call and every later one
 *                       short    half of a write is done, and the call says so
 *                       kill     SIGKILL before the call
 *                       torn     half of a write is done, then SIGKILL
 *
 * One call is struck, or none where none is left that the fault fits. Calls that bypass libc (io_uring) are not seen: the
 * program only reads that way. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, OPEN_READ, WRITE, SYNC, RENAME, UNLINK, RESIZE, MKDIR };
static const char *const KINDS[] = {"open", "open_read", "write", "sync", "rename", "unlink", "resize", "mkdir"};

enum verdict { PASS, FAIL, HALF, HALF_AND_KILL };

static const char *below, *fault;
static long at;
static int trace = -1;
static long calls;
static int has_struck;
static int disk_is_full;

__attribute__((constructor)) static void start(void) {
    below = getenv("TIDEMILL_IO_BELOW");
    fault = getenv("TIDEMILL_IO_FAULT");
    const char *number = getenv("TIDEMILL_IO_AT"), *path = getenv("TIDEMILL_IO_TRACE");
    at = number ? atol(number) : 0;
    if (path) trace = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static int counts(const char *path) {
    for (const char *prefix = below; prefix && *prefix;) {
        size_t length = strcspn(prefix, ":");
        if (length && strncmp(path, prefix, length) == 0) return 1;
        prefix += length + (prefix[length] == ':');
    }
    return 0;
}

static int path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

static int path_of_name(int folder, const char *name, char *path) {
    if (name[0] == '/') return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX;
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, path, PATH_MAX) < 0) return 0;
    } else if (!path_of_fd(folder, path)) {
        return 0;
    }
    size_t length = strlen(path);
    return snprintf(path + length, PATH_MAX - length, "/%s", name) < (int)(PATH_MAX - length);
}

static void say(const char *word, enum kind kind, const char *path) {
    char line[PATH_MAX + 32];
    int length = snprintf(line, sizeof line, "%s%s %s\n", word, KINDS[kind], path);
    if (trace >= 0 && length > 0) syscall(SYS_write, trace, line, (size_t)length);
}

static int takes_space(enum kind kind) {
    return kind == OPEN || kind == WRITE || kind == SYNC || kind == RENAME || kind == RESIZE || kind == MKDIR;
}

/* Judges one call: whether it passes, and errno if it is to fail. */
static enum verdict judge(enum kind kind, const char *path, size_t bytes) {
    int before = errno;
    if (!counts(path)) return PASS;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    int is_full = __atomic_load_n(&disk_is_full, __ATOMIC_SEQ_CST);
    if (is_full && (kind == OPEN || kind == WRITE || kind == RESIZE || kind == MKDIR)) {
        say("", kind, path);
        errno = ENOSPC;
        return FAIL;
    }
    if (!at || number < at || !fault) {
        say("", kind, path);
        errno = before;
        return PASS;
    }
    int is_half = !strcmp(fault, "short") || !strcmp(fault, "torn");
    int is_space = !strcmp(fault, "enospc") || !strcmp(fault, "full");
    int fits = !(is_half && (kind != WRITE || bytes < 2)) && !(is_space && !takes_space(kind));
    if (!fits || __atomic_exchange_n(&has_struck, 1, __ATOMIC_SEQ_CST)) {
        say("", kind, path);
        errno = before;
        return PASS;
    }
    say("struck ", kind, path);
    if (!strcmp(fault, "kill")) kill(getpid(), SIGKILL);
    if (!strcmp(fault, "short")) return HALF;
    if (!strcmp(fault, "torn")) return HALF_AND_KILL;
    if (!strcmp(fault, "full")) __atomic_store_n(&disk_is_full, 1, __ATOMIC_SEQ_CST);
    errno = is_space ? ENOSPC : EIO;
    return FAIL;
}

static enum verdict judge_fd(enum kind kind, int fd, size_t bytes) {
    char path[PATH_MAX];
    return path_of_fd(fd, path) ? judge(kind, path, bytes) : PASS;
}

static enum verdict judge_name(enum kind kind, int folder, const char *name) {
    char path[PATH_MAX];
    return path_of_name(folder, name, path) ? judge(kind, path, 0) : PASS;
}

static int open_at(int folder, const char *name, int flags, mode_t mode) {
    int writes = (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0;
    if (judge_name(writes ? OPEN : OPEN_READ, folder, name) != PASS) return -1;
    return (int)syscall(SYS_openat, folder, name, flags, mode);
}

#define MODE(flags, mode)                          \
    mode_t mode = 0;                               \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list rest;                              \
        va_start(rest, flags);                     \
        mode = va_arg(rest, mode_t);               \
        va_end(rest);                              \
    }

int open(const char *name, int flags, ...) { MODE(flags, mode) return open_at(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags, mode) return open_at(AT_FDCWD, name, flags, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE(flags, mode) return open_at(folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE(flags, mode) return open_at(folder, name, flags, mode); }

/* Ends a write of which only half was to be done. */
static ssize_t half(enum verdict verdict, ssize_t done) {
    if (verdict == HALF_AND_KILL) kill(getpid(), SIGKILL);
    return done;
}

ssize_t write(int fd, const void *bytes, size_t count) {
    enum verdict verdict = judge_fd(WRITE, fd, count);
    if (verdict == FAIL) return -1;
    if (verdict == PASS) return syscall(SYS_write, fd, bytes, count);
    return half(verdict, syscall(SYS_write, fd, bytes, count / 2));
}

static ssize_t write_at(int fd, const void *bytes, size_t count, off_t position) {
    enum verdict verdict = judge_fd(WRITE, fd, count);
    if (verdict == FAIL) return -1;
    if (verdict == PASS) return syscall(SYS_pwrite64, fd, bytes, count, position);
    return half(verdict, syscall(SYS_pwrite64, fd, bytes, count / 2, position));
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t position) { return write_at(fd, bytes, count, position); }
ssize_t pwrite64(int fd, const void *bytes, size_t count, off_t position) { return write_at(fd, bytes, count, position); }

ssize_t writev(int fd, const struct iovec *pieces, int count) {
    enum verdict verdict = judge_fd(WRITE, fd, count > 0 ? pieces[0].iov_len : 0);
    if (verdict == FAIL) return -1;
    if (verdict == PASS) return syscall(SYS_writev, fd, pieces, count);
    return half(verdict, syscall(SYS_write, fd, pieces[0].iov_base, pieces[0].iov_len / 2));
}

int fsync(int fd) { return judge_fd(SYNC, fd, 0) == PASS ? (int)syscall(SYS_fsync, fd) : -1; }
int fdatasync(int fd) { return judge_fd(SYNC, fd, 0) == PASS ? (int)syscall(SYS_fdatasync, fd) : -1; }

int ftruncate(int fd, off_t length) { return judge_fd(RESIZE, fd, 0) == PASS ? (int)syscall(SYS_ftruncate, fd, length) : -1; }
int ftruncate64(int fd, off_t length) { return ftruncate(fd, length); }
int fallocate(int fd, int mode, off_t from, off_t length) {
    return judge_fd(RESIZE, fd, 0) == PASS ? (int)syscall(SYS_fallocate, fd, mode, from, length) : -1;
}
int fallocate64(int fd, int mode, off_t from, off_t length) { return fallocate(fd, mode, from, length); }

int renameat2(int folder, const char *from, int other, const char *to, unsigned flags) {
    if (judge_name(RENAME, other, to) != PASS) return -1;
    return (int)syscall(SYS_renameat2, folder, from, other, to, flags);
}
int renameat(int folder, const char *from, int other, const char *to) { return renameat2(folder, from, other, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int folder, const char *name, int flags) {
    return judge_name(UNLINK, folder, name) == PASS ? (int)syscall(SYS_unlinkat, folder, name, flags) : -1;
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdirat(int folder, const char *name, mode_t mode) {
    return judge_name(MKDIR, folder, name) == PASS ? (int)syscall(SYS_mkdirat, folder, name, mode) : -1;
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }
