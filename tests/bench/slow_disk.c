// A disk that is slow, hangs or fails: cc -shared -fPIC slow_disk.c -o slow_disk.so -ldl, then LD_PRELOAD it.
// It concerns reads, writes and syncs of files under SLOW_DISK_FOLDER: each takes SLOW_DISK_MS; while there is a file
// SLOW_DISK_HANG they do not return; while there is a file SLOW_DISK_FAIL they fail with EIO.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static void pause_ms(long ms) {
  const struct timespec pause = {ms / 1000, ms % 1000 * 1000000L};
  nanosleep(&pause, NULL);
}

// Whether a file of that name is there; `variable` holds the name.
static int is_there(const char *variable) {
  const char *path = getenv(variable);
  return path && access(path, F_OK) == 0;
}

// Returns whether the call is to fail.
static int delay(int fd) {
  const char *folder = getenv("SLOW_DISK_FOLDER"), *ms = getenv("SLOW_DISK_MS");
  if (!folder) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, sizeof path - 1);
  if (n <= 0) return 0;
  path[n] = 0;
  if (strncmp(path, folder, strlen(folder)) != 0) return 0;
  if (ms) pause_ms(atol(ms));
  while (is_there("SLOW_DISK_HANG")) pause_ms(5);
  return is_there("SLOW_DISK_FAIL");
}

#define SLOW(result, name, parameters, arguments)             \
  result name parameters {                                    \
    static result(*real) parameters;                          \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name);     \
    if (delay(fd)) {                                          \
      errno = EIO;                                            \
      return -1;                                              \
    }                                                         \
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
