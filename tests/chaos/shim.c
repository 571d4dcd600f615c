/* Turns the clock and the disk of one process, by a page that it shares with the campaign.
 *
 * Preloaded (ld.so(8)). Inert until `chaos_attach` is called or the environment names a page. The
 * monotonic clock is left alone, as it is when a machine's clock is set. A full disk refuses whatever
 * makes a file longer, and takes what overwrites.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S 1000000000LL

/* The layout is that of tests/chaos/shims.py. */
struct page {
    volatile int64_t clock_offset_ns;
    volatile int64_t sync_delay_ns;
    volatile int64_t disk_full;
};

static const struct page *page;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

int chaos_attach(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    void *mapped = mmap(NULL, sizeof(struct page), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped == MAP_FAILED)
        return -1;
    page = mapped;
    return 0;
}

__attribute__((constructor)) static void attach_by_environment(void)
{
    const char *path = getenv("CHAOS_SHIM");
    if (path && *path)
        chaos_attach(path);
}

/* --- the clock --- */

static void move(struct timespec *at, int64_t offset_ns)
{
    int64_t ns = at->tv_nsec + offset_ns % NS_PER_S;
    at->tv_sec += offset_ns / NS_PER_S;
    if (ns < 0) {
        ns += NS_PER_S;
        at->tv_sec -= 1;
    } else if (ns >= NS_PER_S) {
        ns -= NS_PER_S;
        at->tv_sec += 1;
    }
    at->tv_nsec = ns;
}

int clock_gettime(clockid_t clock, struct timespec *at)
{
    REAL(clock_gettime);
    int result = real(clock, at);
    if (result == 0 && page && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        move(at, page->clock_offset_ns);
    return result;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone)
{
    (void)zone;
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now) != 0)
        return -1;
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at)
        *at = now.tv_sec;
    return now.tv_sec;
}

/* A wait until a time of day ends by the kernel's clock, which is not moved. */
long syscall(long number, ...)
{
    REAL(syscall);
    va_list list;
    long a[6];
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    struct timespec until;
    if (number == SYS_futex && page && a[3] && (a[1] & FUTEX_CLOCK_REALTIME)
        && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET) {
        until = *(const struct timespec *)a[3];
        move(&until, -page->clock_offset_ns);
        a[3] = (long)&until;
    }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* --- the disk --- */

static void be_slow(void)
{
    int64_t delay_ns = page ? page->sync_delay_ns : 0;
    if (delay_ns > 0) {
        struct timespec rest = {delay_ns / NS_PER_S, delay_ns % NS_PER_S};
        while (nanosleep(&rest, &rest) != 0 && errno == EINTR)
            ;
    }
}

int fsync(int fd)
{
    REAL(fsync);
    be_slow();
    return real(fd);
}

int fdatasync(int fd)
{
    REAL(fdatasync);
    be_slow();
    return real(fd);
}

static int no_room(int fd, off_t end)
{
    struct stat file;
    if (!page || !page->disk_full || fd <= STDERR_FILENO)
        return 0;
    if (fstat(fd, &file) != 0 || !S_ISREG(file.st_mode) || end <= file.st_size)
        return 0;
    errno = ENOSPC;
    return 1;
}

static off_t here(int fd)
{
    off_t at = page && page->disk_full ? lseek(fd, 0, SEEK_CUR) : 0;
    return at < 0 ? 0 : at;
}

static off_t total(const struct iovec *parts, int count)
{
    off_t bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += (off_t)parts[i].iov_len;
    return bytes;
}

ssize_t write(int fd, const void *data, size_t bytes)
{
    REAL(write);
    return no_room(fd, here(fd) + (off_t)bytes) ? -1 : real(fd, data, bytes);
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t at)
{
    REAL(pwrite);
    return no_room(fd, at + (off_t)bytes) ? -1 : real(fd, data, bytes, at);
}

ssize_t pwrite64(int fd, const void *data, size_t bytes, off_t at)
{
    return pwrite(fd, data, bytes, at);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    REAL(pwritev);
    return no_room(fd, at + total(parts, count)) ? -1 : real(fd, parts, count, at);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t at)
{
    return pwritev(fd, parts, count, at);
}

int posix_fallocate(int fd, off_t at, off_t bytes)
{
    REAL(posix_fallocate);
    return no_room(fd, at + bytes) ? ENOSPC : real(fd, at, bytes);
}

int posix_fallocate64(int fd, off_t at, off_t bytes)
{
    return posix_fallocate(fd, at, bytes);
}
