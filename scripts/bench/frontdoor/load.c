/* The load generator: plain requests in a closed loop, or streams kept open, and what they saw, as JSON.
 *
 * load plain   --port P -c CONNECTIONS -t SECONDS [--warm S] [-n REQUESTS]
 * load streams --port P -s STREAMS -t SECONDS [--tokens N] [--ramp S] [--probes N] [--sample SHARE]
 * both         [--host H] [--path /v1/chat/completions] [--model M] [--auth TOKEN] [--prompt-bytes N]
 *
 * Streams do not end while they are measured, unless --tokens says how long they are on average (1 to 2N - 1, evenly): then another one
 * begins, on a connection of its own, when one ends. --sample reads only that share of the streams token by token (gaps and delays come
 * from them); the others are drained four times a second, which costs a tenth. Every token of every stream is still received, counted
 * and checked. --probes are short streams, one after the other, that measure the time to the first token while the rest flows.
 *
 * It prints "begin <ns>" and "end <ns>" around what it measures (for whoever samples the CPU of the others), then one JSON object.
 * Delays come from the stand-in's stamps (see engine.c): token_delay = received - sent; ttft_added = the request's way to the engine
 * plus the first token's way back. A stream that ends without [DONE], or in the middle of its framing, counts as truncated. */
#include "../native/base.h"

enum { PLAIN, STREAM, PROBE };
struct app {
    int kind, tokens, done, in_window, swept, slot;
    int64_t sent_ns, last_ns, due_ns;
};
#include "../native/client.h"

static const char *path = "/v1/chat/completions", *model = "bench", *auth = NULL, *host = "127.0.0.1";
static int concurrency = 32, n_streams = 200, tokens_each = 0, n_probes = 0, prompt_bytes = 600, port = 0;
static double seconds = 5, warm_s = 1, ramp_s = 20, sample = 1;
static int64_t limit_requests = 0;

static int measuring, stopping, renewed;
static int64_t requests, tokens, in_band_errors, truncated, refused, resets, reconnects, opened, streaming, pending, status_count[600];
static hist latency, ttft, ttft_added, gap, delay, probe_ttft, probe_added;
static int64_t serial = 0;
static conn *swept[100000], *waiting[256];
static int n_swept, sweep_at, n_waiting, n_sampled;
static uint32_t random_state = 2463534242u;

static uint32_t xorshift(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    return random_state ^= random_state << 5;
}

static void start(conn *c) {
    static char body[1 << 16], head[1024];
    int stream = c->a.kind != PLAIN, n = 0, k;
    int want = c->a.kind == PROBE ? 2 : !stream ? 16 : renewed ? 1 + (int)(xorshift() % (2 * (uint32_t)tokens_each - 1)) : tokens_each;
    n += snprintf(body + n, sizeof body - (size_t)n, "{\"model\":\"%s\",\"max_tokens\":%d,\"temperature\":0,", model, want);
    if (stream) n += snprintf(body + n, sizeof body - (size_t)n, "\"stream\":true,");
    int chat = strstr(path, "chat") != NULL;
    n += snprintf(body + n, sizeof body - (size_t)n,
                  chat ? "\"messages\":[{\"role\":\"system\",\"content\":\"You are a helpful assistant of the bench.\"},"
                         "{\"role\":\"user\",\"content\":\"question %lld: "
                       : "\"prompt\":\"question %lld: ",
                  (long long)++serial);
    static const char lorem[] = "how does one keep a long answer flowing while many others wait for their turn, ";
    for (k = 0; k < prompt_bytes && n < (int)sizeof body - 64; k++) body[n++] = lorem[k % (sizeof lorem - 1)];
    n += snprintf(body + n, sizeof body - (size_t)n, chat ? "\"}]}" : "\"}");
    k = snprintf(head, sizeof head,
                 "POST %s HTTP/1.1\r\nhost: %s:%d\r\ncontent-type: application/json\r\naccept: */*\r\n%s%s%scontent-length: %d\r\n\r\n", path,
                 host, port, auth ? "authorization: Bearer " : "", auth ? auth : "", auth ? "\r\n" : "", n);
    c->a.tokens = c->a.done = 0;
    c->a.in_window = measuring;
    c->a.last_ns = 0;
    c->a.sent_ns = now_ns();
    if (c->a.kind == STREAM) pending++;
    conn_request(c, head, (size_t)k, body, (size_t)n);
}

static void open_one(int kind) {
    conn *c = conn_open();
    c->a.kind = kind;
    if (kind == STREAM) opened++;
}

static void on_open(conn *c) { start(c); }

static void on_token(conn *c, int64_t sent, int64_t arrived) {
    int64_t at = c->read_ns;
    if (c->a.tokens++ == 0) {
        if (c->a.kind == STREAM) {
            pending--, streaming++;
            if (n_sampled < sample * n_streams) n_sampled++;
            else if (n_swept < 100000) {
                c->a.swept = 1;
                c->a.slot = n_swept;
                swept[n_swept++] = c;
                conn_unwatch(c);
            }
        }
        int64_t added = arrived ? (arrived - c->a.sent_ns) + (at - sent) : 0;
        if (c->a.kind == PROBE) {
            if (c->a.in_window) {
                hist_add(&probe_ttft, at - c->a.sent_ns);
                if (arrived) hist_add(&probe_added, added);
            }
        } else {
            hist_add(&ttft, at - c->a.sent_ns);
            if (arrived) hist_add(&ttft_added, added);
        }
    } else if (measuring && c->a.kind == STREAM && !c->a.swept && c->a.last_ns)
        hist_add(&gap, at - c->a.last_ns);
    c->a.last_ns = at;
    if (measuring) {
        tokens++;
        if (c->a.kind == STREAM && !c->a.swept) hist_add(&delay, at - sent);
    }
}

static void on_line(conn *c, const char *p, size_t n) {
    if (c->a.kind == PLAIN || n < 6 || memcmp(p, "data:", 5)) return;
    int64_t sent, arrived;
    if (find_stamp(p, n, &sent, &arrived)) on_token(c, sent, arrived);
    else if (memmem(p, n, "[DONE]", 6)) c->a.done = 1;
    else if (memmem(p, n, "\"error\"", 7)) in_band_errors++;
}

static void on_end(conn *c, int how) {
    int kind = c->a.kind;
    if (how == END_OK && c->m.status < 600) status_count[c->m.status]++;
    if (how == END_REFUSED) refused++;
    if (how == END_RESET) resets++;
    if (how == END_TRUNCATED || (how == END_OK && kind != PLAIN && c->m.status == 200 && !c->a.done)) truncated++;
    if (kind == STREAM && how != END_REFUSED) {
        if (c->a.tokens) streaming--;
        else if (c->a.sent_ns) pending--;
    }
    if (kind == STREAM) opened--;
    if (c->a.swept) {
        swept[c->a.slot] = swept[--n_swept];
        swept[c->a.slot]->a.slot = c->a.slot;
        c->a.swept = 0;
    } else if (kind == STREAM && c->a.tokens) n_sampled--;
    if (kind == PLAIN && how == END_OK && c->m.status == 200 && c->a.in_window && measuring) {
        requests++;
        hist_add(&latency, c->read_ns - c->a.sent_ns);
        if (limit_requests && requests >= limit_requests) stopping = 1;
    }
    if (stopping) return;
    if (kind == STREAM) { /* the main loop opens another */
        conn_drop(c);
        return;
    }
    if (c->dead) {
        reconnects++;
        open_one(kind);
    } else if (kind == PROBE && n_waiting < 256) { /* a pause of its own, so that probes do not fall in step with the engine */
        c->a.due_ns = now_ns() + xorshift() % (40 * NS_PER_MS);
        waiting[n_waiting++] = c;
    } else
        start(c);
}

static void start_due_probes(int64_t now) {
    for (int i = n_waiting - 1; i >= 0; i--)
        if (waiting[i]->dead || waiting[i]->a.due_ns <= now) {
            conn *c = waiting[i];
            waiting[i] = waiting[--n_waiting];
            if (!c->dead) start(c);
        }
}

/* Reads some of the streams that are not sampled. */
static void sweep(int how_many) {
    for (; how_many > 0 && n_swept; how_many--) {
        sweep_at = (sweep_at + 1) % n_swept;
        conn_input(swept[sweep_at]);
    }
}

static int64_t errors(void) {
    int64_t n = in_band_errors + truncated + refused + resets;
    for (int i = 0; i < 600; i++)
        if (i != 200) n += status_count[i];
    return n;
}

static void report(int64_t begin_ns, int64_t end_ns, int64_t cpu_begin, int64_t cpu_end, double ramp_took_s) {
    double t = (double)(end_ns - begin_ns) / 1e9;
    printf("{\"seconds\": %.3f, \"requests\": %lld, \"requests_per_s\": %.1f, \"tokens\": %lld, \"tokens_per_s\": %.1f, ", t,
           (long long)requests, (double)requests / t, (long long)tokens, (double)tokens / t);
    printf("\"streams\": %lld, \"streams_wanted\": %d, \"ramp_s\": %.2f, \"errors\": %lld, \"truncated\": %lld, \"in_band_errors\": %lld, "
           "\"refused\": %lld, \"resets\": %lld, \"reconnects\": %lld, \"status\": {",
           (long long)streaming, n_streams, ramp_took_s, (long long)errors(), (long long)truncated, (long long)in_band_errors,
           (long long)refused, (long long)resets, (long long)reconnects);
    for (int i = 0, k = 0; i < 600; i++)
        if (status_count[i]) printf("%s\"%d\": %lld", k++ ? ", " : "", i, (long long)status_count[i]);
    printf("}, ");
    hist_print(stdout, "latency", &latency), printf(", ");
    hist_print(stdout, "ttft", &ttft), printf(", ");
    hist_print(stdout, "ttft_added", &ttft_added), printf(", ");
    hist_print(stdout, "probe_ttft", &probe_ttft), printf(", ");
    hist_print(stdout, "probe_ttft_added", &probe_added), printf(", ");
    hist_print(stdout, "gap", &gap), printf(", ");
    hist_print(stdout, "token_delay", &delay);
    printf(", \"cpu_s\": %.6f, \"cpu_share\": %.4f}\n", (double)(cpu_end - cpu_begin) / 1e9, (double)(cpu_end - cpu_begin) / 1e9 / t);
    fflush(stdout);
}

static void say(const char *word, int64_t at) {
    printf("%s %lld\n", word, (long long)at);
    fflush(stdout);
}

int main(int argc, char **argv) {
    int streams = argc > 1 && !strcmp(argv[1], "streams");
    for (int i = 2; i < argc; i++) {
        const char *o = argv[i], *v = i + 1 < argc ? argv[i + 1] : "";
        i++;
        if (!strcmp(o, "--host")) host = v;
        else if (!strcmp(o, "--port")) port = atoi(v);
        else if (!strcmp(o, "--path")) path = v;
        else if (!strcmp(o, "--model")) model = v;
        else if (!strcmp(o, "--auth")) auth = v;
        else if (!strcmp(o, "--prompt-bytes")) prompt_bytes = atoi(v);
        else if (!strcmp(o, "-c")) concurrency = atoi(v);
        else if (!strcmp(o, "-s")) n_streams = atoi(v);
        else if (!strcmp(o, "-n")) limit_requests = atoll(v);
        else if (!strcmp(o, "-t")) seconds = atof(v);
        else if (!strcmp(o, "--warm")) warm_s = atof(v);
        else if (!strcmp(o, "--ramp")) ramp_s = atof(v);
        else if (!strcmp(o, "--tokens")) tokens_each = atoi(v);
        else if (!strcmp(o, "--probes")) n_probes = atoi(v) < 256 ? atoi(v) : 256;
        else if (!strcmp(o, "--sample")) sample = atof(v);
        else {
            fprintf(stderr, "load: unknown option %s\n", o);
            return 2;
        }
    }
    if (argc < 2 || !port || (!streams && strcmp(argv[1], "plain"))) {
        fprintf(stderr, "usage: load plain|streams --port P …\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    client_init(host, port);
    renewed = tokens_each > 0;
    if (!renewed) tokens_each = (int)((ramp_s + seconds + 5) * 50); /* no stream ends while it is measured */
    int64_t t0 = now_ns(), begin = 0, cpu0 = 0, warm_until = 0, give_up = t0 + (int64_t)(ramp_s * 1e9);
    if (!streams) {
        for (int i = 0; i < concurrency; i++) open_one(PLAIN);
        warm_until = t0 + (int64_t)(warm_s * 1e9);
    }
    double ramp_took_s = 0;
    int64_t next_sweep = t0;
    for (;;) {
        int64_t now = now_ns();
        if (n_swept && now >= next_sweep) {
            sweep(n_swept / 50 + 1);
            next_sweep = now + 5 * NS_PER_MS;
        }
        if (n_waiting) start_due_probes(now);
        if (streams && (!begin || renewed))
            while (opened < n_streams && opened - streaming < 64) open_one(STREAM);
        if (!warm_until && (streaming >= n_streams || now > give_up)) { /* all flow, or as many as will */
            ramp_took_s = (double)(now - t0) / 1e9;
            warm_until = now + (int64_t)(warm_s * 1e9);
        }
        if (!begin && warm_until && now >= warm_until) {
            for (int i = 0; i < n_probes; i++) open_one(PROBE);
            sweep(n_swept);
            begin = now_ns();
            cpu0 = cpu_ns();
            measuring = 1;
            say("begin", begin);
        }
        if (begin && (stopping || now >= begin + (int64_t)(seconds * 1e9))) {
            sweep(n_swept);
            int64_t end = now_ns(), cpu1 = cpu_ns();
            say("end", end);
            report(begin, end, cpu0, cpu1, ramp_took_s);
            return 0;
        }
        int64_t wake = begin ? begin + (int64_t)(seconds * 1e9) : warm_until ? warm_until : now + 5 * NS_PER_MS;
        if (n_swept && next_sweep < wake) wake = next_sweep;
        for (int i = 0; i < n_waiting; i++)
            if (waiting[i]->a.due_ns < wake) wake = waiting[i]->a.due_ns;
        client_turn(wake);
    }
}
