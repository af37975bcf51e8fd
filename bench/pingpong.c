/*
 * The yardstick: a SEQPACKET ping-pong between two processes, in C.
 *
 *   pingpong SIZE SECONDS CLIENT_CPU SERVER_CPU [cred]
 *
 * Prints one JSON line: count, elapsed, p50 and p99 of one round trip, and CPU time of both
 * processes per round trip, all in nanoseconds. With "cred" both ends ask for SO_PASSCRED and
 * receive with recvmsg, which is the part of our own path that C would have to pay as well.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SAMPLE_COUNT_MAX (1u << 24)
#define BUFFER_SIZE 8304
#define WARMUP_NS 100000000ull

static int with_credentials;
static char buffer[BUFFER_SIZE];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("sched_setaffinity");
}

static uint64_t clock_ns(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static ssize_t receive(int fd)
{
    if (!with_credentials)
        return recv(fd, buffer, sizeof buffer, 0);
    char control[CMSG_SPACE(sizeof(struct ucred)) + CMSG_LEN(sizeof(int))];
    struct iovec vector = {buffer, sizeof buffer};
    struct msghdr header = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control,
        .msg_controllen = sizeof control};
    ssize_t size = recvmsg(fd, &header, MSG_CMSG_CLOEXEC);
    if (size > 0) {
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        if (!first || first->cmsg_type != SCM_CREDENTIALS)
            fail("no credentials");
    }
    return size;
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint64_t cpu_of(int who)
{
    struct rusage usage;
    getrusage(who, &usage);
    return (uint64_t)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000ull +
           (uint64_t)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000ull;
}

int main(int argc, char **argv)
{
    if (argc < 5 || argc > 6) {
        fprintf(stderr, "usage: pingpong SIZE SECONDS CLIENT_CPU SERVER_CPU [cred]\n");
        return 2;
    }
    size_t size = (size_t)atoi(argv[1]);
    double seconds = atof(argv[2]);
    int client_cpu = atoi(argv[3]), server_cpu = atoi(argv[4]);
    with_credentials = argc == 6 && !strcmp(argv[5], "cred");
    if (size < 1 || size > BUFFER_SIZE)
        fail("size");

    int pair[2], on = 1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair))
        fail("socketpair");
    if (with_credentials)
        for (int end = 0; end < 2; end++)
            if (setsockopt(pair[end], SOL_SOCKET, SO_PASSCRED, &on, sizeof on))
                fail("SO_PASSCRED");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0) {
        pin(server_cpu);
        close(pair[0]);
        for (;;) {
            ssize_t got = receive(pair[1]);
            if (got <= 0)
                _exit(0);
            if (send(pair[1], buffer, (size_t)got, 0) != got)
                _exit(1);
        }
    }
    pin(client_cpu);
    close(pair[1]);
    char *message = calloc(1, size);
    uint32_t *samples = malloc(SAMPLE_COUNT_MAX * sizeof *samples);
    if (!message || !samples)
        fail("malloc");

    uint64_t count = 0, warm = 0, start = clock_ns(CLOCK_MONOTONIC), end = start + WARMUP_NS;
    uint64_t own_cpu = 0, last = start;
    int measuring = 0;
    for (;;) {
        if (send(pair[0], message, size, 0) != (ssize_t)size || receive(pair[0]) != (ssize_t)size)
            fail("round trip");
        uint64_t now = clock_ns(CLOCK_MONOTONIC);
        if (!measuring) {
            warm++;
            if (now < end)
                continue;
            measuring = 1;
            own_cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
            last = start = clock_ns(CLOCK_MONOTONIC);
            end = start + (uint64_t)(seconds * 1e9);
            continue;
        }
        samples[count++] = (uint32_t)(now - last);
        last = now;
        if (now >= end || count == SAMPLE_COUNT_MAX)
            break;
    }
    own_cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - own_cpu;
    uint64_t elapsed = last - start;
    close(pair[0]);
    int state;
    if (waitpid(child, &state, 0) != child || state)
        fail("server");
    /* The server's CPU time covers the warm-up as well: scale it. */
    double server_cpu_ns = (double)cpu_of(RUSAGE_CHILDREN) * (double)count / (double)(count + warm);
    qsort(samples, count, sizeof *samples, by_value);
    printf("{\"count\": %llu, \"elapsed_ns\": %llu, "
           "\"p50_ns\": %u, \"p99_ns\": %u, \"cpu_ns\": %.0f}\n",
           (unsigned long long)count, (unsigned long long)elapsed, samples[count / 2],
           samples[count * 99 / 100], ((double)own_cpu + server_cpu_ns) / (double)count);
    return 0;
}
