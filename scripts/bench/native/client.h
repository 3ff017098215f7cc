/* The client side that the generators share: one thread, epoll, keep-alive, answers read as they come.
 *
 * The including file defines `struct app` before including this, and provides on_open() (connected, nothing under way),
 * on_line() (one line of the body, without its end) and on_end() (the exchange is over: END_OK, or what broke). */
#ifndef BENCH_CLIENT_H
#define BENCH_CLIENT_H
#include "base.h"

enum { END_OK, END_TRUNCATED, END_REFUSED, END_RESET };

typedef struct conn {
    int fd, connected, busy, dead;
    msg m;
    buf carry;    /* bytes of the wire not yet consumed */
    buf line;     /* an unfinished line of the body */
    buf out;
    int64_t read_ns;
    struct conn *next_dead;
    struct app a;
} conn;

static void on_open(conn *c);
static void on_line(conn *c, const char *p, size_t n);
static void on_end(conn *c, int how);

static int client_ep;
static conn *client_dead;
static struct sockaddr_in client_to;
static struct epoll_event client_ev[1024];
#define SCRATCH (1 << 18)
static char client_scratch[2 * SCRATCH];

static void client_init(const char *host, int port) {
    client_ep = epoll_create1(0);
    client_to.sin_family = AF_INET;
    client_to.sin_port = htons((uint16_t)port);
    if (inet_pton(AF_INET, host, &client_to.sin_addr) != 1) die("host must be an IPv4 address");
}

static conn *conn_open(void) {
    conn *c = calloc(1, sizeof *c);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) die("socket");
    set_nodelay(c->fd);
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
    epoll_ctl(client_ep, EPOLL_CTL_ADD, c->fd, &e);
    if (connect(c->fd, (struct sockaddr *)&client_to, sizeof client_to) && errno != EINPROGRESS) die("connect");
    return c;
}

static void conn_drop(conn *c) {
    if (c->dead) return;
    c->dead = 1;
    close(c->fd);
    c->next_dead = client_dead;
    client_dead = c;
}

static void conn_end(conn *c, int how) {
    if (c->dead) return;
    if (how != END_OK || !c->m.keep_alive) conn_drop(c);
    c->busy = 0;
    on_end(c, how);
}

static void conn_flush(conn *c) {
    while (c->out.off < c->out.len) {
        ssize_t k = send(c->fd, c->out.p + c->out.off, c->out.len - c->out.off, MSG_NOSIGNAL);
        if (k < 0) {
            if (errno != EAGAIN) conn_end(c, END_RESET);
            return;
        }
        c->out.off += (size_t)k;
    }
    buf_clear(&c->out);
}

/* Starts an exchange: the request's bytes as they go out. */
static void conn_request(conn *c, const char *head, size_t head_n, const char *body, size_t body_n) {
    msg_reset(&c->m);
    buf_clear(&c->line);
    c->busy = 1;
    buf_add(&c->out, head, head_n);
    buf_add(&c->out, body, body_n);
    conn_flush(c);
}

static void lines(void *ctx, const char *p, size_t n) {
    conn *c = ctx;
    const char *end = p + n, *nl;
    while (p < end && (nl = memchr(p, '\n', (size_t)(end - p)))) {
        if (c->line.len) {
            buf_add(&c->line, p, (size_t)(nl - p));
            on_line(c, c->line.p, c->line.len);
            buf_clear(&c->line);
        } else if (nl > p)
            on_line(c, p, (size_t)(nl - p));
        p = nl + 1;
    }
    buf_add(&c->line, p, (size_t)(end - p));
}

static void conn_input(conn *c) {
    for (;;) {
        size_t had = c->carry.len;
        if (had > SCRATCH) return conn_end(c, END_RESET);
        memcpy(client_scratch, c->carry.p ? c->carry.p : "", had);
        ssize_t k = recv(c->fd, client_scratch + had, SCRATCH, 0);
        if (k < 0) {
            if (errno != EAGAIN) conn_end(c, END_RESET);
            return;
        }
        if (k == 0) {
            if (!c->busy) conn_drop(c), on_end(c, END_REFUSED);
            else if (c->m.state == M_TO_EOF) c->m.keep_alive = 0, conn_end(c, END_OK);
            else conn_end(c, c->m.state == M_HEAD ? END_RESET : END_TRUNCATED);
            return;
        }
        c->read_ns = now_ns();
        size_t n = had + (size_t)k, o = msg_read(&c->m, client_scratch, n, 0, lines, c);
        buf_clear(&c->carry);
        buf_add(&c->carry, client_scratch + o, n - o);
        if (c->m.state == M_BAD) return conn_end(c, END_TRUNCATED);
        if (c->m.state == M_DONE && c->busy) {
            if (c->line.len) on_line(c, c->line.p, c->line.len);
            conn_end(c, END_OK);
        }
        if (c->dead || k < SCRATCH) return;
    }
}

/* Takes a connection out of the ready list (only its end is still reported): its owner reads it when it likes. */
__attribute__((unused)) static void conn_unwatch(conn *c) {
    struct epoll_event e = {.events = EPOLLET, .data.ptr = c};
    epoll_ctl(client_ep, EPOLL_CTL_MOD, c->fd, &e);
}

static void client_turn(int64_t at_ns) {
    int n = epoll_until(client_ep, client_ev, 1024, at_ns);
    for (int i = 0; i < n; i++) {
        conn *c = client_ev[i].data.ptr;
        uint32_t e = client_ev[i].events;
        if (c->dead) continue;
        if (!c->connected) {
            if (e & (EPOLLERR | EPOLLHUP)) {
                conn_drop(c);
                on_end(c, END_REFUSED);
                continue;
            }
            if (e & EPOLLOUT) {
                c->connected = 1;
                on_open(c);
                continue;
            }
        }
        if (e & EPOLLOUT && c->out.len) conn_flush(c);
        if (!c->dead && e & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) conn_input(c);
    }
    while (client_dead) {
        conn *c = client_dead;
        client_dead = c->next_dead;
        buf_free(&c->carry);
        buf_free(&c->line);
        buf_free(&c->out);
        free(c);
    }
}

/* "@<19 digits>[,<19 digits>]" in a line of the body: when the engine sent it and, in the first, when the request had arrived. */
static inline int find_stamp(const char *p, size_t n, int64_t *sent, int64_t *arrived) {
    const char *at = memchr(p, '@', n), *end = p + n;
    if (!at || end - at < 20) return 0;
    int64_t v = 0;
    for (int i = 1; i <= 19; i++) v = v * 10 + (at[i] - '0');
    *sent = v;
    *arrived = 0;
    if (end - at >= 40 && at[20] == ',') {
        v = 0;
        for (int i = 21; i <= 39; i++) v = v * 10 + (at[i] - '0');
        *arrived = v;
    }
    return 1;
}
#endif
