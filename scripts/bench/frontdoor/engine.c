/* An OpenAI-compatible engine stand-in: answers at once or streams at a fixed rate, and costs next to nothing.
 *
 * engine [--port P] [--rate TOKENS_PER_S] [--spread] [--token-ids] [--model NAME] [--verbose]
 *
 * Every streamed token carries the monotonic time (ns) at which it was sent, the first one also that at which its request had
 * arrived: "@<sent>" or "@<sent>,<arrived>". On one machine that gives the client the delay a front door adds to each token.
 * All streams get their token in the same step, as from an engine with continuous batching; --spread gives every stream a phase
 * of its own (a step every millisecond), as from many engines. With --token-ids it tells them where asked to, as vLLM does. */
#include "../native/base.h"

#define EVENT_MAX 512
struct app {
    int tokens_left, slot, index, usage, total, first, chat, ids;
    int64_t arrived_ns;
    unsigned id;
    int event_len, stamp_at;
    char *event; /* the chunk as it goes out, stamp to be patched */
};
#include "../native/render.h"
#include "../native/server.h"

static double rate = 50;
static int slots = 1, verbose = 0, token_ids = 0, current_slot = 0, slot_for_next = 0;
static const char *model = "bench";
static unsigned ids = 0;
static int64_t started_ns, running, tokens_out, cancelled, stalled, late_steps, completed;

typedef struct {
    conn **c;
    int n, cap;
} slot_list;
static slot_list wheel[1000];

static void wheel_add(conn *c, int slot) {
    slot_list *s = &wheel[slot];
    if (s->n == s->cap && !(s->c = realloc(s->c, sizeof *s->c * (size_t)(s->cap = s->cap ? s->cap * 2 : 64)))) die("realloc");
    c->a.slot = slot;
    c->a.index = s->n;
    s->c[s->n++] = c;
    running++;
}
static void wheel_remove(conn *c) {
    slot_list *s = &wheel[c->a.slot];
    conn *last = s->c[--s->n];
    s->c[c->a.index] = last;
    last->a.index = c->a.index;
    running--;
}

/* The event's text, with a stamp of `n` zeros; returns where the stamp is. */
static int make_event(char *out, int *len, const struct app *a, int stamp_len) {
    char json[EVENT_MAX];
    static const char zeros[] = "0000000000000000000,0000000000000000000";
    char ids[64] = "", prompt[64] = "";
    if (token_ids) snprintf(ids, sizeof ids, ",\"token_ids\":%s", a->ids ? "[100000]" : "null");
    if (token_ids && a->first) snprintf(prompt, sizeof prompt, ",\"prompt_token_ids\":%s", a->ids ? "[1,2,3,4,5,6,7,8,9,10,11,12]" : "null");
    int n = a->chat ? snprintf(json, sizeof json,
                               "data: {\"id\":\"chatcmpl-%016x\",\"object\":\"chat.completion.chunk\",\"created\":1790000000,"
                               "\"model\":\"%.40s\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"@%.*s\"},"
                               "\"logprobs\":null,\"finish_reason\":null%s}]%s}\n\n",
                               a->id, model, stamp_len, zeros, ids, prompt)
                    : snprintf(json, sizeof json,
                               "data: {\"id\":\"cmpl-%016x\",\"object\":\"text_completion\",\"created\":1790000000,"
                               "\"model\":\"%.40s\",\"choices\":[{\"index\":0,\"text\":\"@%.*s\","
                               "\"logprobs\":null,\"finish_reason\":null%s}]%s}\n\n",
                               a->id, model, stamp_len, zeros, ids, prompt);
    *len = snprintf(out, EVENT_MAX, "%x\r\n%s\r\n", (unsigned)n, json);
    return (int)(strchr(out, '@') - out) + 1;
}

static void put_digits(char *at, int64_t v) {
    for (int i = 18; i >= 0; i--, v /= 10) at[i] = (char)('0' + v % 10);
}

static void on_gone(conn *c) {
    if (c->busy) {
        wheel_remove(c);
        cancelled++;
    }
    free(c->a.event);
    c->a.event = NULL;
}

static void finish_stream(conn *c) {
    char tail[1024], usage[512] = "";
    int u = 0, n;
    if (c->a.usage) {
        char json[400];
        int k = snprintf(json, sizeof json,
                         "data: {\"id\":\"chatcmpl-%016x\",\"object\":\"%s\",\"created\":1790000000,\"model\":\"%.40s\","
                         "\"choices\":[],\"usage\":{\"prompt_tokens\":12,\"completion_tokens\":%d,\"total_tokens\":%d}}\n\n",
                         c->a.id, c->a.chat ? "chat.completion.chunk" : "text_completion", model, c->a.total, c->a.total + 12);
        u = snprintf(usage, sizeof usage, "%x\r\n%s\r\n", (unsigned)k, json);
    }
    n = snprintf(tail, sizeof tail, "%.*se\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", u, usage);
    wheel_remove(c);
    completed++;
    conn_send(c, tail, (size_t)n);
    conn_done(c);
}

static void emit(conn *c) {
    if (c->out.len - c->out.off > 262144) { /* the reader does not keep up: a real engine would buffer for ever */
        stalled++;
        return;
    }
    if (c->a.first) {
        char event[EVENT_MAX];
        int len, at = make_event(event, &len, &c->a, 39);
        put_digits(event + at + 20, c->a.arrived_ns);
        put_digits(event + at, now_ns());
        c->a.first = 0;
        conn_send(c, event, (size_t)len);
    } else {
        put_digits(c->a.event + c->a.stamp_at, now_ns());
        conn_send(c, c->a.event, (size_t)c->a.event_len);
    }
    tokens_out++;
    if (!c->dead && --c->a.tokens_left == 0) finish_stream(c);
}

static void step(void) {
    slot_list *s = &wheel[current_slot];
    for (int i = s->n - 1; i >= 0; i--)
        if (i < s->n) emit(s->c[i]);
    current_slot = (current_slot + 1) % slots;
}

static void generate(conn *c, int chat) {
    const char *b = c->body.p;
    size_t n = c->body.len;
    int64_t tokens = json_int(b, n, "max_tokens", json_int(b, n, "max_completion_tokens", 16));
    c->a.id = ++ids;
    c->a.chat = chat;
    c->a.ids = token_ids && json_true(b, n, "return_token_ids");
    if (!json_true(b, n, "stream")) {
        char out[768];
        snprintf(out, sizeof out,
                 "{\"id\":\"chatcmpl-%016x\",\"object\":\"%s\",\"created\":1790000000,\"model\":\"%.40s\",\"choices\":[{\"index\":0,%s"
                 "%s\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                 "\"usage\":{\"prompt_tokens\":12,\"completion_tokens\":16,\"total_tokens\":28}}",
                 c->a.id, chat ? "chat.completion" : "text_completion", model,
                 chat ? "\"message\":{\"role\":\"assistant\",\"content\":\"Hello there, this is an answer of a typical short length.\"},"
                      : "\"text\":\"Hello there, this is an answer of a typical short length.\",",
                 c->a.ids ? "\"token_ids\":[100000]," : "");
        completed++;
        reply_json(c, 200, out);
        return;
    }
    static const char head[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    c->a.arrived_ns = now_ns();
    c->a.usage = json_true(b, n, "include_usage");
    c->a.total = c->a.tokens_left = (int)(tokens > 0 ? tokens : 1);
    if (!c->a.event && !(c->a.event = malloc(EVENT_MAX))) die("malloc");
    c->a.first = 0;
    c->a.stamp_at = make_event(c->a.event, &c->a.event_len, &c->a, 19);
    c->a.first = 1;
    c->busy = 1;
    wheel_add(c, slot_for_next);
    slot_for_next = (slot_for_next + 7) % slots;
    conn_send(c, head, sizeof head - 1);
}

static void metrics(conn *c) {
    char o[2048];
    int n = snprintf(o, sizeof o,
                     "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine=\"0\",model_name=\"%s\"} %lld\n"
                     "# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{engine=\"0\",model_name=\"%s\"} 0\n"
                     "# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{engine=\"0\",model_name=\"%s\"} 0.1\n"
                     "# TYPE vllm:prefix_cache_queries_total counter\nvllm:prefix_cache_queries_total{engine=\"0\",model_name=\"%s\"} 0\n"
                     "# TYPE vllm:prefix_cache_hits_total counter\nvllm:prefix_cache_hits_total{engine=\"0\",model_name=\"%s\"} 0\n"
                     "# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total{engine=\"0\",model_name=\"%s\"} %lld\n"
                     "# TYPE vllm:request_success_total counter\nvllm:request_success_total{engine=\"0\",finished_reason=\"stop\","
                     "model_name=\"%s\"} %lld\n",
                     model, (long long)running, model, model, model, model, model, (long long)tokens_out, model, (long long)completed);
    reply(c, 200, "text/plain; version=0.0.4", o, (size_t)n);
}

static void on_request(conn *c) {
    char path[256], o[1024];
    snprintf(path, sizeof path, "%s", c->m.path);
    path[strcspn(path, "?")] = 0;
    if (verbose) fprintf(stderr, "%s %s %zu\n", c->m.method, c->m.path, c->body.len);
    if (!strcmp(path, "/v1/chat/completions")) return generate(c, 1);
    if (!strcmp(path, "/v1/completions")) return generate(c, 0);
    if (token_ids && !strcmp(path, "/detokenize")) return reply_json(c, 200, "{\"prompt\":\"Hi\"}");
    if (strstr(path, "/render") || !strcmp(path, "/tokenize")) {
        static buf answer;
        render_answer(&answer, path, model, c->body.p, c->body.len);
        return reply(c, 200, "application/json", answer.p, answer.len);
    }
    if (!strcmp(path, "/metrics")) return metrics(c);
    if (!strcmp(path, "/stats")) { /* the stand-in's own count, for the driver */
        snprintf(o, sizeof o,
                 "{\"open\": %lld, \"requests\": %lld, \"running\": %lld, \"tokens\": %lld, \"completed\": %lld, \"cancelled\": %lld, "
                 "\"stalled\": %lld, \"late_steps\": %lld, \"cpu_s\": %.6f, \"up_s\": %.3f}",
                 (long long)server_open, (long long)server_requests, (long long)running, (long long)tokens_out, (long long)completed,
                 (long long)cancelled, (long long)stalled, (long long)late_steps, (double)cpu_ns() / 1e9,
                 (double)(now_ns() - started_ns) / 1e9);
        return reply_json(c, 200, o);
    }
    if (!strcmp(path, "/health") || !strcmp(path, "/health_generate") || !strcmp(path, "/ping")) return reply_json(c, 200, "{}");
    if (!strcmp(path, "/version")) return reply_json(c, 200, "{\"version\":\"0.33.0\"}");
    if (!strcmp(path, "/v1/models")) {
        snprintf(o, sizeof o,
                 "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\",\"created\":1790000000,\"owned_by\":\"vllm\","
                 "\"root\":\"%s\",\"parent\":null,\"max_model_len\":131072}]}",
                 model, model);
        return reply_json(c, 200, o);
    }
    if (!strcmp(path, "/get_model_info") || !strcmp(path, "/model_info")) {
        snprintf(o, sizeof o, "{\"model_path\":\"%s\",\"tokenizer_path\":\"%s\",\"is_generation\":true,\"preferred_sampling_params\":null}",
                 model, model);
        return reply_json(c, 200, o);
    }
    if (!strcmp(path, "/get_server_info") || !strcmp(path, "/server_info")) {
        snprintf(o, sizeof o,
                 "{\"model_path\":\"%s\",\"served_model_name\":\"%s\",\"dp_size\":1,\"tp_size\":1,\"version\":\"0.33.0\","
                 "\"max_total_num_tokens\":1000000,\"max_running_requests\":4096}",
                 model, model);
        return reply_json(c, 200, o);
    }
    reply_json(c, 404, "{\"error\":{\"message\":\"no such route\",\"type\":\"invalid_request_error\",\"param\":null,\"code\":404}}");
}

int main(int argc, char **argv) {
    int port = 0;
    const char *host = "127.0.0.1";
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--port")) port = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--host")) host = argv[++i];
        else if (!strcmp(argv[i], "--rate")) rate = atof(argv[++i]);
        else if (!strcmp(argv[i], "--model")) model = argv[++i];
        else if (!strcmp(argv[i], "--spread")) slots = 0;
        else if (!strcmp(argv[i], "--token-ids")) token_ids = 1;
        else if (!strcmp(argv[i], "--verbose")) verbose = 1;
        else {
            fprintf(stderr, "engine: unknown option %s\n", argv[i]);
            return 2;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    int64_t period_ns = (int64_t)(1e9 / rate);
    if (!slots) slots = period_ns > NS_PER_MS ? (int)(period_ns / NS_PER_MS) : 1;
    if (slots > 1000) slots = 1000;
    int64_t step_ns = period_ns / slots;
    printf("listening %d\n", server_listen(host, port, 0));
    fflush(stdout);
    started_ns = now_ns();
    int64_t next = started_ns + step_ns;
    for (;;) {
        server_turn(running ? next : now_ns() + NS_PER_S);
        int64_t now = now_ns();
        if (now < next) continue;
        if (running) step();
        if (now > next + period_ns) { /* the core is overloaded: skip steps rather than burst */
            if (running) late_steps++;
            next = now;
        }
        next += step_ns;
    }
}
