/* What every native part of the benchmarks shares: a clock, a growing buffer, a histogram, an HTTP/1.1 body reader.
 *
 * Header-only on purpose: each tool is one translation unit, compiled in under a second when first used. */
#ifndef BENCH_BASE_H
#define BENCH_BASE_H
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S 1000000000LL
#define NS_PER_MS 1000000LL

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * NS_PER_S + t.tv_nsec;
}

/* CPU time of this process in ns: all that the kernel charges it, user and system. */
static inline int64_t cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (int64_t)t.tv_sec * NS_PER_S + t.tv_nsec;
}

static inline void die(const char *what) {
    perror(what);
    exit(1);
}

/* ---- a growing buffer; bytes before `off` are consumed ---- */
typedef struct {
    char *p;
    size_t off, len, cap;
} buf;

static inline void buf_reserve(buf *b, size_t more) {
    if (b->len + more <= b->cap) return;
    size_t cap = b->cap ? b->cap : 512;
    while (cap < b->len + more) cap *= 2;
    if (!(b->p = realloc(b->p, cap))) die("realloc");
    b->cap = cap;
}
static inline void buf_add(buf *b, const void *p, size_t n) {
    if (!n) return;
    buf_reserve(b, n);
    memcpy(b->p + b->len, p, n);
    b->len += n;
}
static inline void buf_clear(buf *b) { b->off = b->len = 0; }
static inline void buf_free(buf *b) {
    free(b->p);
    memset(b, 0, sizeof *b);
}

/* ---- histogram: log-linear, 128 steps an octave (values within 0.8%), nanoseconds ---- */
#define HIST_SUB 128
#define HIST_OCTAVES 40
typedef struct {
    uint64_t n, bucket[HIST_OCTAVES * HIST_SUB];
    double sum;
    int64_t max;
} hist;

static inline int hist_index(int64_t v) {
    if (v < HIST_SUB) return v < 0 ? 0 : (int)v;
    int top = 63 - __builtin_clzll((uint64_t)v); /* >= 7 */
    int i = (top - 6) * HIST_SUB + (int)((v >> (top - 7)) & (HIST_SUB - 1));
    return i < HIST_OCTAVES * HIST_SUB ? i : HIST_OCTAVES * HIST_SUB - 1;
}
static inline int64_t hist_value(int i) {
    if (i < HIST_SUB) return i;
    int top = i / HIST_SUB + 6;
    int64_t low = (1LL << top) | ((int64_t)(i % HIST_SUB) << (top - 7));
    return low + (1LL << (top - 7)) / 2;
}
static inline void hist_add(hist *h, int64_t v) {
    h->n++;
    h->sum += (double)v;
    if (v > h->max) h->max = v;
    h->bucket[hist_index(v)]++;
}
static inline double hist_q(const hist *h, double q) {
    if (!h->n) return -1;
    uint64_t want = (uint64_t)(q * (double)h->n), seen = 0;
    if (want >= h->n) want = h->n - 1;
    for (int i = 0; i < HIST_OCTAVES * HIST_SUB; i++)
        if ((seen += h->bucket[i]) > want) return (double)hist_value(i);
    return (double)h->max;
}
/* "name": {"n":…, "mean_us":…, "p50_us":…, "p90_us":…, "p99_us":…, "p999_us":…, "max_us":…} */
static inline void hist_print(FILE *f, const char *name, const hist *h) {
    if (!h->n) {
        fprintf(f, "\"%s\": {\"n\": 0}", name);
        return;
    }
    fprintf(f, "\"%s\": {\"n\": %llu, \"mean_us\": %.1f, \"p50_us\": %.1f, \"p90_us\": %.1f, \"p99_us\": %.1f, "
               "\"p999_us\": %.1f, \"max_us\": %.1f}",
            name, (unsigned long long)h->n, h->sum / (double)h->n / 1e3, hist_q(h, .5) / 1e3, hist_q(h, .9) / 1e3,
            hist_q(h, .99) / 1e3, hist_q(h, .999) / 1e3, (double)h->max / 1e3);
}

/* ---- an HTTP/1.1 message, head and body, read piece by piece ---- */
typedef enum { M_HEAD, M_FIXED, M_CHUNK_SIZE, M_CHUNK_DATA, M_CHUNK_END, M_TRAILER, M_TO_EOF, M_DONE, M_BAD } mstate;
typedef struct {
    mstate state;
    int64_t left;    /* bytes left of the body or of the chunk */
    int status;      /* of a response */
    int keep_alive;
    char method[8];  /* of a request */
    char path[256];
} msg;
typedef void (*body_sink)(void *ctx, const char *p, size_t n);

static inline void msg_reset(msg *m) { memset(m, 0, sizeof *m); }

static inline const char *header_value(const char *head, const char *end, const char *name, size_t *n) {
    size_t k = strlen(name);
    for (const char *l = memchr(head, '\n', (size_t)(end - head)); l && ++l < end;
         l = memchr(l, '\n', (size_t)(end - l))) {
        if ((size_t)(end - l) > k && l[k] == ':' && !strncasecmp(l, name, k)) {
            const char *v = l + k + 1, *e = memchr(v, '\r', (size_t)(end - v));
            while (*v == ' ') v++;
            *n = (size_t)((e ? e : end) - v);
            return v;
        }
    }
    return NULL;
}

static inline void msg_head(msg *m, const char *p, const char *end, int is_request) {
    size_t n;
    int v10;
    if (is_request) {
        char version[16] = "";
        if (sscanf(p, "%7[A-Z] %255[^ ] %15[^\r]", m->method, m->path, version) != 3) {
            m->state = M_BAD;
            return;
        }
        v10 = !strcmp(version, "HTTP/1.0");
    } else {
        int minor;
        if (sscanf(p, "HTTP/1.%d %d", &minor, &m->status) != 2) {
            m->state = M_BAD;
            return;
        }
        v10 = minor == 0;
    }
    const char *c = header_value(p, end, "connection", &n);
    m->keep_alive = c ? !strncasecmp(c, "keep-alive", 10) || (!v10 && strncasecmp(c, "close", 5)) : !v10;
    const char *te = header_value(p, end, "transfer-encoding", &n);
    if (te && !strncasecmp(te, "chunked", 7)) {
        m->state = M_CHUNK_SIZE;
        return;
    }
    const char *cl = header_value(p, end, "content-length", &n);
    m->left = cl ? strtoll(cl, NULL, 10) : 0;
    if (!cl && !is_request && m->status != 204 && m->status != 304) m->state = M_TO_EOF;
    else m->state = m->left ? M_FIXED : M_DONE;
    if (!is_request && m->status < 200) m->state = M_HEAD; /* 100 Continue: the real head follows */
}

/* Reads from p[0..n); body bytes go to sink. Returns how many bytes it consumed; m->state says how far it is.
 * What it did not consume must be offered again, with more behind it. */
static inline size_t msg_read(msg *m, const char *p, size_t n, int is_request, body_sink sink, void *ctx) {
    size_t o = 0;
    while (m->state != M_DONE && m->state != M_BAD) {
        const char *q = p + o, *nl;
        size_t have = n - o;
        switch (m->state) {
        case M_HEAD: {
            const char *e = have ? memmem(q, have, "\r\n\r\n", 4) : NULL;
            if (!e) {
                if (have > 65536) m->state = M_BAD;
                return o;
            }
            msg_head(m, q, e + 2, is_request);
            o += (size_t)(e - q) + 4;
            break;
        }
        case M_FIXED:
        case M_CHUNK_DATA:
        case M_TO_EOF: {
            if (!have) return o;
            size_t k = m->state == M_TO_EOF || (int64_t)have < m->left ? have : (size_t)m->left;
            sink(ctx, q, k);
            o += k;
            if (m->state == M_TO_EOF) return o;
            if ((m->left -= (int64_t)k) == 0) m->state = m->state == M_FIXED ? M_DONE : M_CHUNK_END;
            break;
        }
        case M_CHUNK_SIZE: {
            if (!have || !(nl = memchr(q, '\n', have))) return o;
            int64_t v = 0;
            const char *d = q;
            for (;; d++) {
                int c = *d;
                if (c >= '0' && c <= '9') v = v * 16 + c - '0';
                else if ((c | 32) >= 'a' && (c | 32) <= 'f') v = v * 16 + (c | 32) - 'a' + 10;
                else break;
            }
            if (d == q) {
                m->state = M_BAD;
                return o;
            }
            m->left = v;
            m->state = v ? M_CHUNK_DATA : M_TRAILER;
            o += (size_t)(nl - q) + 1;
            break;
        }
        case M_CHUNK_END:
            if (have < 2) return o;
            o += 2;
            m->state = M_CHUNK_SIZE;
            break;
        case M_TRAILER:
            if (!have || !(nl = memchr(q, '\n', have))) return o;
            o += (size_t)(nl - q) + 1;
            if (nl - q <= 1) m->state = M_DONE;
            break;
        default:
            return o;
        }
    }
    return o;
}

/* ---- the little JSON that the tools read: a scan for "key": value, good for bodies that the benchmark itself makes ---- */
static inline const char *json_value(const char *p, size_t n, const char *key) {
    char quoted[64];
    int k = snprintf(quoted, sizeof quoted, "\"%s\"", key);
    const char *end = p + n, *v = n ? memmem(p, n, quoted, (size_t)k) : NULL;
    if (!v) return NULL;
    for (v += k; v < end && (*v == ' ' || *v == ':' || *v == '\n'); v++) {}
    return v < end ? v : NULL;
}
static inline int64_t json_int(const char *p, size_t n, const char *key, int64_t otherwise) {
    const char *v = json_value(p, n, key);
    return v && ((*v >= '0' && *v <= '9') || *v == '-') ? strtoll(v, NULL, 10) : otherwise;
}
static inline int json_true(const char *p, size_t n, const char *key) {
    const char *v = json_value(p, n, key);
    return v && *v == 't';
}

/* ---- sockets ---- */
static inline void set_nonblocking(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }
static inline void set_nodelay(int fd) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}
static inline void raise_file_limit(void) {
    struct rlimit l;
    getrlimit(RLIMIT_NOFILE, &l);
    l.rlim_cur = l.rlim_max;
    setrlimit(RLIMIT_NOFILE, &l);
}
/* Waits at most until `at_ns`; nanosecond timeouts where the kernel has them (5.11), milliseconds otherwise. */
static inline int epoll_until(int ep, struct epoll_event *ev, int max, int64_t at_ns) {
    int64_t d = at_ns - now_ns();
    if (d < 0) d = 0;
    struct timespec t = {d / NS_PER_S, d % NS_PER_S};
    static int old_kernel = 0;
    if (!old_kernel) {
        int n = epoll_pwait2(ep, ev, max, &t, NULL);
        if (n >= 0 || errno == EINTR) return n < 0 ? 0 : n;
        old_kernel = 1;
    }
    int n = epoll_wait(ep, ev, max, (int)((d + NS_PER_MS - 1) / NS_PER_MS));
    return n < 0 ? 0 : n;
}
#endif
