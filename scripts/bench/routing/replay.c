/* Replays a trace against one or several fronts, in scaled time, and says what its clients saw, as JSON.
 *
 * replay --trace FILE --ports P[,P…] [--speed X] [--auth TOKEN] [--model M] [--block-chars N] [--until-ms T]
 *
 * The trace holds a line a request: arrival ms, input tokens, output tokens, then the ids of its 512-token blocks. A request goes out
 * when it is due, whatever became of those before (an open loop), to each port in turn. A block's text is "[b<8 digits>]" and letters that
 * follow from its id, block-chars in all, so that equal ids are equal text and a prompt's shared prefix is a shared prefix of its text.
 * Times are virtual: seconds here * speed. TTFT counts from when the request was due. */
#include "../native/base.h"

struct app {
    int request, port, tokens, done;
    int64_t due_ns, first_ns;
};
#include "../native/client.h"

typedef struct {
    int64_t at_ms;
    int input, output, n_ids, first_id;
} request;

static request *requests;
static uint32_t *ids;
static int n_requests, n_ids, n_ports, ports[64], block_chars = 512, next_port;
static double speed = 20;
static const char *auth = NULL, *model = "bench";
static conn *idle[64][4096];
static int n_idle[64];
static int64_t ok, failed, truncated, refused, resets, in_band, status_count[600], in_flight, in_flight_peak, output_tokens, last_end_ns, late_peak;
static hist ttft, e2e;

static void load_trace(const char *file, int64_t until_ms) {
    FILE *f = fopen(file, "r");
    char *line = NULL;
    size_t room = 0;
    int cap = 0, id_cap = 0;
    if (!f) die(file);
    while (getline(&line, &room, f) > 0) {
        char *p = line;
        request r = {.at_ms = strtoll(p, &p, 10), .first_id = n_ids};
        if (until_ms && r.at_ms > until_ms) break;
        r.input = (int)strtol(p, &p, 10);
        r.output = (int)strtol(p, &p, 10);
        for (char *q;; p = q) {
            uint32_t id = (uint32_t)strtoul(p, &q, 10);
            if (q == p) break;
            if (n_ids == id_cap && !(ids = realloc(ids, sizeof *ids * (size_t)(id_cap = id_cap ? 2 * id_cap : 65536)))) die("realloc");
            ids[n_ids++] = id;
            r.n_ids++;
        }
        if (n_requests == cap && !(requests = realloc(requests, sizeof *requests * (size_t)(cap = cap ? 2 * cap : 4096)))) die("realloc");
        requests[n_requests++] = r;
    }
    fclose(f);
    free(line);
}

static void start(conn *c) {
    static buf body;
    char text[512], head[1024];
    request *r = &requests[c->a.request];
    buf_clear(&body);
    int n = snprintf(text, sizeof text,
                     "{\"model\":\"%s\",\"stream\":true,\"stream_options\":{\"include_usage\":true},\"max_tokens\":%d,\"seed\":%d,\"temperature\":0,"
                     "\"messages\":[{\"role\":\"user\",\"content\":\"",
                     model, r->output, r->input);
    buf_add(&body, text, (size_t)n);
    for (int i = 0; i < r->n_ids; i++) {
        uint32_t id = ids[r->first_id + i], x = id * 2654435761u + 12345;
        buf_reserve(&body, (size_t)block_chars + 16);
        char *p = body.p + body.len;
        int k = sprintf(p, "[b%08u]", id);
        for (; k < block_chars; k++) {
            x = x * 1664525u + 1013904223u;
            p[k] = (x >> 28) < 3 ? ' ' : (char)('a' + (x >> 24) % 26);
        }
        body.len += (size_t)k;
    }
    buf_add(&body, "\"}]}", 4);
    n = snprintf(head, sizeof head,
                 "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n%s%s%scontent-length: %zu\r\n\r\n",
                 ports[c->a.port], auth ? "authorization: Bearer " : "", auth ? auth : "", auth ? "\r\n" : "", body.len);
    c->a.tokens = c->a.done = 0;
    c->a.first_ns = 0;
    conn_request(c, head, (size_t)n, body.p, body.len);
}

static void on_open(conn *c) { start(c); }

static void on_line(conn *c, const char *p, size_t n) {
    if (n < 6 || memcmp(p, "data:", 5)) return;
    int64_t sent, arrived;
    if (find_stamp(p, n, &sent, &arrived)) {
        c->a.tokens += atoi((const char *)memchr(p, '@', n) + 21);
        if (!c->a.first_ns) {
            c->a.first_ns = c->read_ns;
            hist_add(&ttft, (int64_t)((double)(c->read_ns - c->a.due_ns) * speed));
        }
    } else if (memmem(p, n, "[DONE]", 6)) c->a.done = 1;
    else if (memmem(p, n, "\"error\"", 7)) in_band++;
}

static void on_end(conn *c, int how) {
    if (how == END_REFUSED && c->a.request < 0) { /* an idle connection was closed */
        for (int p = 0; p < n_ports; p++)
            for (int i = 0; i < n_idle[p]; i++)
                if (idle[p][i] == c) idle[p][i] = idle[p][--n_idle[p]];
        return;
    }
    in_flight--;
    last_end_ns = now_ns();
    int whole = how == END_OK && c->m.status == 200 && c->a.done && c->a.tokens == requests[c->a.request].output;
    if (how == END_OK && c->m.status < 600) status_count[c->m.status]++;
    if (how == END_REFUSED) refused++;
    if (how == END_RESET) resets++;
    if (how == END_TRUNCATED || (how == END_OK && c->m.status == 200 && !whole)) truncated++;
    if (whole) {
        ok++;
        output_tokens += c->a.tokens;
        hist_add(&e2e, (int64_t)((double)(last_end_ns - c->a.due_ns) * speed));
    } else failed++;
    c->a.request = -1;
    if (c->dead) return;
    if (n_idle[c->a.port] < 4096) idle[c->a.port][n_idle[c->a.port]++] = c;
    else conn_drop(c);
}

int main(int argc, char **argv) {
    const char *trace = NULL;
    int64_t until_ms = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *o = argv[i];
        char *v = argv[i + 1];
        if (!strcmp(o, "--trace")) trace = v;
        else if (!strcmp(o, "--ports"))
            for (char *t = strtok(v, ","); t && n_ports < 64; t = strtok(NULL, ",")) ports[n_ports++] = atoi(t);
        else if (!strcmp(o, "--speed")) speed = atof(v);
        else if (!strcmp(o, "--auth")) auth = v;
        else if (!strcmp(o, "--model")) model = v;
        else if (!strcmp(o, "--block-chars")) block_chars = atoi(v);
        else if (!strcmp(o, "--until-ms")) until_ms = atoll(v);
        else {
            fprintf(stderr, "replay: unknown option %s\n", o);
            return 2;
        }
    }
    if (!trace || !n_ports) {
        fprintf(stderr, "usage: replay --trace FILE --ports P[,P…]\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    client_init("127.0.0.1", ports[0]);
    load_trace(trace, until_ms);
    int64_t t0 = now_ns() + 200 * NS_PER_MS, give_up = t0 + (int64_t)(((double)requests[n_requests - 1].at_ms / 1e3 + 1200) / speed * 1e9);
    for (int next = 0; next < n_requests || in_flight;) {
        int64_t now = now_ns();
        if (now > give_up) break;
        while (next < n_requests && t0 + (int64_t)((double)requests[next].at_ms * 1e6 / speed) <= now) {
            int p = next_port++ % n_ports;
            int64_t due = t0 + (int64_t)((double)requests[next].at_ms * 1e6 / speed);
            if (now - due > late_peak) late_peak = now - due;
            client_to.sin_port = htons((uint16_t)ports[p]);
            conn *c = n_idle[p] ? idle[p][--n_idle[p]] : NULL;
            int fresh = !c;
            if (fresh) c = conn_open();
            c->a.port = p;
            c->a.request = next++;
            c->a.due_ns = due;
            if (++in_flight > in_flight_peak) in_flight_peak = in_flight;
            if (!fresh) start(c);
        }
        int64_t wake = next < n_requests ? t0 + (int64_t)((double)requests[next].at_ms * 1e6 / speed) : now + NS_PER_S;
        client_turn(wake < give_up ? wake : give_up);
    }
    double virtual_s = (double)(last_end_ns - t0) / 1e9 * speed;
    printf("{\"requests\": %d, \"ok\": %lld, \"failed\": %lld, \"unfinished\": %lld, \"truncated\": %lld, \"refused\": %lld, \"resets\": %lld, "
           "\"in_band_errors\": %lld, \"in_flight_peak\": %lld, \"virtual_s\": %.1f, \"output_tokens\": %lld, \"output_tokens_per_s\": %.1f, "
           "\"late_peak_ms\": %.2f, \"cpu_s\": %.3f, \"status\": {",
           n_requests, (long long)ok, (long long)failed, (long long)in_flight, (long long)truncated, (long long)refused, (long long)resets,
           (long long)in_band, (long long)in_flight_peak, virtual_s, (long long)output_tokens, (double)output_tokens / virtual_s,
           (double)late_peak / 1e6, (double)cpu_ns() / 1e9);
    for (int i = 0, k = 0; i < 600; i++)
        if (status_count[i]) printf("%s\"%d\": %lld", k++ ? ", " : "", i, (long long)status_count[i]);
    printf("}, ");
    hist_print(stdout, "ttft", &ttft), printf(", ");
    hist_print(stdout, "e2e", &e2e);
    printf("}\n");
    return 0;
}
