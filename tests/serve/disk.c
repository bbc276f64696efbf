/* Preloaded into a process, this library records what is written to files below a folder, and makes some
   operations fail. Nothing is flushed: the record says what a disk would be sure to have.

   CEMG_DISK_FOLDER   the folder
   CEMG_DISK_LOG      file of records: kind ('w', 't', 's', 'u'), length of the path, offset, length, path,
   data CEMG_DISK_FAIL     "ERRNO ONE_IN SEED": about one in ONE_IN writes and flushes fails; unset: none */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int failing, one_in;
static unsigned seed;

static int is_watched(int file, char* path, size_t size) {
  const char* folder = getenv("CEMG_DISK_FOLDER");
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, size - 1);
  path[length < 0 ? 0 : length] = 0;
  return folder && length > 0 && strncmp(path, folder, strlen(folder)) == 0;
}

static void record(char kind, const char* path, int64_t offset, const void* data, int64_t size) {
  static int log = -1;
  if (log < 0) log = open(getenv("CEMG_DISK_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0666);
  int64_t header[4] = {kind, (int64_t)strlen(path), offset, size};
  struct iovec parts[3] = {
      {header, sizeof header}, {(void*)path, strlen(path)}, {(void*)data, data ? (size_t)size : 0}};
  if (writev(log, parts, 3) < 0) abort();
}

static int fails(const char* path) {
  static int is_known;
  const char* rule = getenv("CEMG_DISK_FAIL");
  if (!is_known) is_known = rule ? sscanf(rule, "%d %d %u", &failing, &one_in, &seed) : 1;
  if (!rule || !strstr(path, "sqlite") || rand_r(&seed) % one_in) return 0;
  errno = failing;
  return 1;
}

ssize_t pwrite64(int file, const void* data, size_t size, off64_t offset) {
  static ssize_t (*real)(int, const void*, size_t, off64_t);
  if (!real) *(void**)&real = dlsym(RTLD_NEXT, "pwrite64");
  char path[4096];
  if (!is_watched(file, path, sizeof path)) return real(file, data, size, offset);
  if (fails(path)) {
    int code = errno;
    if (real(file, data, size / 2, offset) < 0) abort(); /* a part was written */
    errno = code;
    return -1;
  }
  record('w', path, offset, data, size);
  return real(file, data, size, offset);
}

ssize_t pwrite(int file, const void* data, size_t size, off_t offset) {
  return pwrite64(file, data, size, offset);
}

int ftruncate64(int file, off64_t size) {
  static int (*real)(int, off64_t);
  if (!real) *(void**)&real = dlsym(RTLD_NEXT, "ftruncate64");
  char path[4096];
  if (is_watched(file, path, sizeof path)) record('t', path, size, NULL, 0);
  return real(file, size);
}

int ftruncate(int file, off_t size) {
  return ftruncate64(file, size);
}

int fsync(int file) {
  char path[4096];
  if (is_watched(file, path, sizeof path)) {
    if (fails(path)) return -1;
    record('s', path, 0, NULL, 0);
  }
  return 0;
}

int unlink(const char* path) { /* SQLite flushes the folder afterwards */
  static int (*real)(const char*);
  if (!real) *(void**)&real = dlsym(RTLD_NEXT, "unlink");
  const char* folder = getenv("CEMG_DISK_FOLDER");
  int result = real(path);
  if (result == 0 && folder && strncmp(path, folder, strlen(folder)) == 0) record('u', path, 0, NULL, 0);
  return result;
}

int fdatasync(int file) {
  return fsync(file);
}
