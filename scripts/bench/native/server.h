/* The server side that the engine stand-ins share: one thread, epoll, keep-alive, requests handed over whole.
 *
 * The including file defines `struct app` (its own per-connection state) before including this, and provides
 * on_request() (answer now, or set c->busy and call conn_done() later) and on_gone() (the client went away). */
#ifndef BENCH_SERVER_H
#define BENCH_SERVER_H
#include "base.h"

typedef struct {
    int is_listener, fd, tag;
} listener;

typedef struct conn {
    int is_listener, fd, tag; /* as a listener's; tag says which one took it */
    int busy, dead, want_out;
    msg m;
    buf in, body, out;
    struct conn *next_dead;
    struct app a;
} conn;

static void on_request(conn *c);
static void on_gone(conn *c);

static int server_ep;
static conn *server_dead;
static int64_t server_open, server_requests;

static void conn_close(conn *c) {
    if (c->dead) return;
    c->dead = 1;
    on_gone(c);
    close(c->fd);
    server_open--;
    c->next_dead = server_dead;
    server_dead = c;
}

static void conn_watch(conn *c, int want_out) {
    if (c->want_out == want_out) return;
    c->want_out = want_out;
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP | (want_out ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(server_ep, EPOLL_CTL_MOD, c->fd, &e);
}

/* Sends now what the socket takes and keeps the rest. */
static void conn_send(conn *c, const char *p, size_t n) {
    if (c->dead) return;
    if (c->out.len == c->out.off) {
        ssize_t k = send(c->fd, p, n, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (k == (ssize_t)n) return;
        if (k < 0) {
            if (errno != EAGAIN) {
                conn_close(c);
                return;
            }
            k = 0;
        }
        p += k;
        n -= (size_t)k;
        buf_clear(&c->out);
    }
    buf_add(&c->out, p, n);
    conn_watch(c, 1);
}

static void conn_flush(conn *c) {
    ssize_t k = send(c->fd, c->out.p + c->out.off, c->out.len - c->out.off, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (k < 0) {
        if (errno != EAGAIN) conn_close(c);
        return;
    }
    c->out.off += (size_t)k;
    if (c->out.off == c->out.len) {
        buf_free(&c->out);
        conn_watch(c, 0);
        if (!c->busy && !c->m.keep_alive && c->m.state == M_DONE) conn_close(c);
    }
}

static void body_to_buf(void *ctx, const char *p, size_t n) { buf_add((buf *)ctx, p, n); }

static void conn_parse(conn *c) {
    while (!c->busy && !c->dead && c->in.off < c->in.len) {
        if (c->m.state == M_DONE) {
            msg_reset(&c->m);
            buf_clear(&c->body);
        }
        c->in.off += msg_read(&c->m, c->in.p + c->in.off, c->in.len - c->in.off, 1, body_to_buf, &c->body);
        if (c->m.state == M_BAD) {
            conn_close(c);
            return;
        }
        if (c->m.state != M_DONE) break;
        server_requests++;
        on_request(c);
        if (!c->busy && !c->dead && !c->m.keep_alive && c->out.len == c->out.off) conn_close(c);
    }
    if (c->in.off == c->in.len) buf_clear(&c->in);
    else if (c->in.off > 65536) {
        memmove(c->in.p, c->in.p + c->in.off, c->in.len - c->in.off);
        c->in.len -= c->in.off;
        c->in.off = 0;
    }
}

/* A long answer is complete: the connection may take its next request. */
static void conn_done(conn *c) {
    c->busy = 0;
    if (c->dead) return;
    if (!c->m.keep_alive && c->out.len == c->out.off) conn_close(c);
    else conn_parse(c);
}

static void conn_read(conn *c) {
    for (;;) {
        buf_reserve(&c->in, 16384);
        size_t room = c->in.cap - c->in.len;
        ssize_t k = recv(c->fd, c->in.p + c->in.len, room, MSG_DONTWAIT);
        if (k <= 0) {
            if (k == 0 || errno != EAGAIN) conn_close(c);
            return;
        }
        c->in.len += (size_t)k;
        conn_parse(c);
        if (c->dead || (size_t)k < room) return;
    }
}

static void reply(conn *c, int status, const char *type, const char *body, size_t n) {
    char head[256];
    int h = snprintf(head, sizeof head, "HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %zu\r\n%s\r\n", status,
                     status == 200 ? "OK" : "Error", type, n, c->m.keep_alive ? "" : "connection: close\r\n");
    static buf whole;
    buf_clear(&whole);
    buf_add(&whole, head, (size_t)h);
    buf_add(&whole, body, n);
    conn_send(c, whole.p, whole.len);
}
static void reply_json(conn *c, int status, const char *body) { reply(c, status, "application/json", body, strlen(body)); }

/* Listens on a port (0: any) and returns it. */
static int server_listen(const char *host, int port, int tag) {
    listener *l = calloc(1, sizeof *l);
    int one = 1;
    l->is_listener = 1;
    l->tag = tag;
    l->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(l->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    inet_pton(AF_INET, host, &a.sin_addr);
    if (bind(l->fd, (struct sockaddr *)&a, sizeof a) || listen(l->fd, 8192)) die("listen");
    socklen_t n = sizeof a;
    getsockname(l->fd, (struct sockaddr *)&a, &n);
    if (!server_ep) server_ep = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = l};
    epoll_ctl(server_ep, EPOLL_CTL_ADD, l->fd, &e);
    return ntohs(a.sin_port);
}

static void server_accept(listener *l) {
    for (;;) {
        int fd = accept4(l->fd, NULL, NULL, SOCK_NONBLOCK);
        if (fd < 0) return;
        set_nodelay(fd);
        conn *c = calloc(1, sizeof *c);
        c->fd = fd;
        c->tag = l->tag;
        server_open++;
        struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = c};
        epoll_ctl(server_ep, EPOLL_CTL_ADD, fd, &e);
    }
}

/* One turn of the loop: IO until at_ns at the latest. */
static void server_turn(int64_t at_ns) {
    static struct epoll_event ev[1024];
    int n = epoll_until(server_ep, ev, 1024, at_ns);
    for (int i = 0; i < n; i++) {
        conn *c = ev[i].data.ptr;
        if (c->is_listener) {
            server_accept(ev[i].data.ptr);
            continue;
        }
        if (c->dead) continue;
        if (ev[i].events & EPOLLOUT) conn_flush(c);
        if (!c->dead && ev[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) conn_read(c);
    }
    while (server_dead) {
        conn *c = server_dead;
        server_dead = c->next_dead;
        buf_free(&c->in);
        buf_free(&c->body);
        buf_free(&c->out);
        free(c);
    }
}
#endif
