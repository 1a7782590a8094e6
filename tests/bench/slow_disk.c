// A disk on which every call takes SLOW_DISK_MS: cc -shared -fPIC slow_disk.c -o slow_disk.so -ldl, then LD_PRELOAD.
// Slow are reads, writes and syncs of files under SLOW_DISK_FOLDER.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static void wait_for(int fd) {
  const char *folder = getenv("SLOW_DISK_FOLDER"), *ms = getenv("SLOW_DISK_MS");
  if (!folder || !ms) return;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, sizeof path - 1);
  if (n <= 0) return;
  path[n] = 0;
  if (strncmp(path, folder, strlen(folder)) != 0) return;
  const long ns = atol(ms) * 1000000L;
  const struct timespec pause = {ns / 1000000000L, ns % 1000000000L};
  nanosleep(&pause, NULL);
}

#define SLOW(result, name, parameters, arguments)             \
  result name parameters {                                    \
    static result(*real) parameters;                          \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name);     \
    wait_for(fd);                                             \
    return real arguments;                                    \
  }

SLOW(ssize_t, pread, (int fd, void *data, size_t n, off_t at), (fd, data, n, at))
SLOW(ssize_t, pread64, (int fd, void *data, size_t n, off64_t at), (fd, data, n, at))
SLOW(ssize_t, preadv, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at))
SLOW(ssize_t, preadv64, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at))
SLOW(ssize_t, preadv2, (int fd, const struct iovec *v, int n, off_t at, int flags), (fd, v, n, at, flags))
SLOW(ssize_t, preadv64v2, (int fd, const struct iovec *v, int n, off64_t at, int flags), (fd, v, n, at, flags))
SLOW(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
SLOW(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at))
SLOW(ssize_t, pwritev, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at))
SLOW(ssize_t, pwritev64, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at))
SLOW(ssize_t, pwritev2, (int fd, const struct iovec *v, int n, off_t at, int flags), (fd, v, n, at, flags))
SLOW(ssize_t, pwritev64v2, (int fd, const struct iovec *v, int n, off64_t at, int flags), (fd, v, n, at, flags))
SLOW(int, fsync, (int fd), (fd))
SLOW(int, fdatasync, (int fd), (fd))
