/* Several engines with a paged KV cache, in one process and in scaled time: what a router's choices are worth.
 *
 * engines [--engines N] [--speed X] [--blocks N] [--prefill TOKENS_PER_S] [--step-ms MS] [--decode-us US] [--budget TOKENS]
 *         [--max-seqs N] [--emit-ms MS] [--model NAME]
 *
 * It prints "listening <port of engine 0> … <round robin> <least loaded> <oracle>": behind the last three, the process itself spreads the
 * requests over the same engines, without a hop: in turn, to the fewest requests, and to the engine where the first token is expected
 * soonest with all caches and queues in sight.
 *
 * An engine works in steps, as vLLM does: one token for each running sequence, then as much prefill as the token budget leaves, in
 * chunks, in order of arrival. A step takes step-ms + prefill tokens / prefill rate + sequences decoding * decode-us of virtual time;
 * virtual time is real time * speed. The cache holds blocks of 512 tokens. A prompt's full blocks can be hit once computed, as the
 * longest prefix; never its last token. Unreferenced blocks are evicted least recently used first, the tail of a prompt before its
 * head. A sequence starts when all its blocks, output included, fit.
 *
 * A prompt is the text of its blocks, each begun by "[b<8 digits>]"; "seed" gives its length in tokens and "max_tokens" its output's. */
#include "../native/base.h"

#define BLOCK 512
typedef struct seq seq;
struct app {
    seq *s;
};
#include "../native/render.h"
#include "../native/server.h"

typedef struct block {
    uint32_t id;
    int refs, computed;
    struct block *next_in_bucket, *newer, *older; /* the LRU list holds blocks without references */
} block;

typedef struct {
    int index;
    block **buckets;
    int n_blocks, n_lru, n_private; /* blocks in the map; of them unreferenced; blocks with no name */
    block *oldest, *newest;
    seq *waiting_first, *waiting_last;
    int n_waiting, n_running, stepping;
    seq **running;
    int64_t step_end; /* virtual ns */
    int step_prefill;
    int64_t requests, prompt_tokens, cached_tokens, prefilled_tokens, generated_tokens, evicted, busy_v, queries, hits, waiting_peak;
    double kv_peak;
} engine;

struct seq {
    conn *c;
    engine *e;
    uint32_t *ids;
    int n_ids, n_full, input, output, cached, prefilled, generated, chunk, n_private, admitted, usage;
    block **held;
    int64_t arrived_v, last_token_v, last_emit_v;
    int unsent;
    seq *next;
};

static int n_engines = 8, capacity = 937, budget = 8192, max_seqs = 256;
static double speed = 20, prefill_rate = 6000, step_ms = 15, decode_us = 150, emit_ms = 200;
static const char *model = "bench";
static engine *engines;
static int64_t t0, worst_late_v, round_robin, cancelled, completed;
static hist gaps, ttft;

static int64_t virtual_now(void) { return (int64_t)((double)(now_ns() - t0) * speed); }
static int64_t real_at(int64_t v) { return t0 + (int64_t)((double)v / speed); }

/* ---- the cache ---- */
#define BUCKETS 4096
static block **bucket(engine *e, uint32_t id) { return &e->buckets[(id * 2654435761u) >> 20]; }

static block *cache_find(engine *e, uint32_t id) {
    for (block *b = *bucket(e, id); b; b = b->next_in_bucket)
        if (b->id == id) return b;
    return NULL;
}
static void lru_remove(engine *e, block *b) {
    *(b->older ? &b->older->newer : &e->oldest) = b->newer;
    *(b->newer ? &b->newer->older : &e->newest) = b->older;
    b->newer = b->older = NULL;
    e->n_lru--;
}
static void lru_add(engine *e, block *b) {
    b->older = e->newest;
    b->newer = NULL;
    *(e->newest ? &e->newest->newer : &e->oldest) = b;
    e->newest = b;
    e->n_lru++;
}
static void cache_drop(engine *e, block *b) {
    block **p = bucket(e, b->id);
    while (*p != b) p = &(*p)->next_in_bucket;
    *p = b->next_in_bucket;
    free(b);
    e->n_blocks--;
}
static int free_blocks(const engine *e) { return capacity - e->n_blocks - e->n_private; }
static void make_room(engine *e) {
    while (free_blocks(e) <= 0 && e->oldest) {
        block *b = e->oldest;
        lru_remove(e, b);
        cache_drop(e, b);
        e->evicted++;
    }
}

/* How many blocks of the prompt this engine could skip now. */
static int cache_hits(engine *e, const seq *s) {
    int h = 0;
    while (h < s->n_full && h * BLOCK + BLOCK < s->input) {
        block *b = cache_find(e, s->ids[h]);
        if (!b || !b->computed) break;
        h++;
    }
    return h;
}

/* Takes all the blocks of the sequence, or none. */
static int admit(engine *e, seq *s) {
    int hits = cache_hits(e, s), total = (s->input + s->output + BLOCK - 1) / BLOCK, resting = 0;
    for (int i = 0; i < hits; i++) resting += cache_find(e, s->ids[i])->refs == 0;
    if (total - hits > free_blocks(e) + e->n_lru - resting) return 0;
    s->held = calloc((size_t)s->n_full + 1, sizeof *s->held);
    for (int i = 0; i < hits; i++) {
        block *b = s->held[i] = cache_find(e, s->ids[i]);
        if (b->refs++ == 0) lru_remove(e, b);
    }
    for (int i = hits; i < s->n_full; i++) {
        make_room(e);
        if (cache_find(e, s->ids[i])) { /* another sequence is computing it: vLLM computes it twice, and keeps one */
            s->n_private++;
            e->n_private++;
            continue;
        }
        block *b = s->held[i] = calloc(1, sizeof *b);
        b->id = s->ids[i];
        b->refs = 1;
        block **p = bucket(e, b->id);
        b->next_in_bucket = *p;
        *p = b;
        e->n_blocks++;
    }
    for (int i = s->n_full; i < total; i++) {
        make_room(e);
        s->n_private++;
        e->n_private++;
    }
    s->cached = s->prefilled = hits * BLOCK;
    s->admitted = 1;
    e->cached_tokens += s->cached;
    e->queries += s->input;
    e->hits += s->cached;
    double kv = 1 - (double)(free_blocks(e) + e->n_lru) / capacity;
    if (kv > e->kv_peak) e->kv_peak = kv;
    return 1;
}

static void release(seq *s) {
    engine *e = s->e;
    e->n_private -= s->n_private;
    for (int i = s->n_full - 1; i >= 0; i--) {
        block *b = s->held[i];
        if (!b || --b->refs > 0) continue;
        if (b->computed) lru_add(e, b);
        else cache_drop(e, b);
    }
}

/* ---- the wire ---- */
static void emit_tokens(seq *s, int64_t v) {
    char json[640], chunk[700];
    int n = snprintf(json, sizeof json,
                     "data: {\"id\":\"chatcmpl-%p\",\"object\":\"chat.completion.chunk\",\"created\":1790000000,\"model\":\"%s\",\"choices\":"
                     "[{\"index\":0,\"delta\":{\"content\":\"@%019lld %d from %d\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n",
                     (void *)s, model, (long long)now_ns(), s->unsent, s->e->index);
    n = snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n", (unsigned)n, json);
    s->unsent = 0;
    s->last_emit_v = v;
    conn_send(s->c, chunk, (size_t)n);
}

static void finish(seq *s) {
    char json[640] = "", tail[1024];
    int n = 0;
    if (s->usage)
        n = snprintf(json, sizeof json,
                     "data: {\"id\":\"chatcmpl-%p\",\"object\":\"chat.completion.chunk\",\"created\":1790000000,\"model\":\"%s\",\"choices\":"
                     "[],\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,\"total_tokens\":%d,\"prompt_tokens_details\":"
                     "{\"cached_tokens\":%d}}}\n\n",
                     (void *)s, model, s->input, s->output, s->input + s->output, s->cached);
    n = n ? snprintf(tail, sizeof tail, "%x\r\n%s\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", (unsigned)n, json)
          : snprintf(tail, sizeof tail, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
    conn *c = s->c;
    release(s);
    completed++;
    c->a.s = NULL;
    free(s->ids);
    free(s->held);
    free(s);
    conn_send(c, tail, (size_t)n);
    conn_done(c);
}

/* ---- steps ---- */
static void start_step(engine *e, int64_t v) {
    int left = budget, decoding = 0, prefill = 0;
    for (int i = 0; i < e->n_running; i++) {
        seq *s = e->running[i];
        s->chunk = 0;
        if (s->prefilled >= s->input) decoding++, left--;
    }
    for (int i = 0; i < e->n_running && left > 0; i++) {
        seq *s = e->running[i];
        if (s->prefilled >= s->input) continue;
        s->chunk = s->input - s->prefilled < left ? s->input - s->prefilled : left;
        left -= s->chunk;
        prefill += s->chunk;
    }
    while (e->waiting_first && left > 0 && e->n_running < max_seqs && admit(e, e->waiting_first)) {
        seq *s = e->waiting_first;
        if (!(e->waiting_first = s->next)) e->waiting_last = NULL;
        e->n_waiting--;
        e->running[e->n_running++] = s;
        s->chunk = s->input - s->prefilled < left ? s->input - s->prefilled : left;
        left -= s->chunk;
        prefill += s->chunk;
    }
    e->stepping = decoding + prefill > 0;
    if (!e->stepping) return;
    int64_t took = (int64_t)(step_ms * 1e6 + prefill / prefill_rate * 1e9 + decoding * decode_us * 1e3);
    e->step_prefill = prefill;
    e->step_end = v + took;
    e->busy_v += took;
    e->prefilled_tokens += prefill;
}

static void token(seq *s, int64_t v) {
    s->generated++;
    s->unsent++;
    s->e->generated_tokens++;
    if (s->generated == 1) hist_add(&ttft, v - s->arrived_v);
    else hist_add(&gaps, v - s->last_token_v);
    s->last_token_v = v;
    if (s->generated == 1 || s->generated == s->output || v - s->last_emit_v >= (int64_t)(emit_ms * 1e6)) emit_tokens(s, v);
}

static void end_step(engine *e) {
    int64_t v = e->step_end, late = virtual_now() - v;
    if (late > worst_late_v) worst_late_v = late;
    int n = e->n_running, kept = 0;
    seq **over = malloc(sizeof *over * (size_t)(n + 1));
    int n_over = 0;
    for (int i = 0; i < n; i++) {
        seq *s = e->running[i];
        int decoding = s->prefilled >= s->input;
        if (s->chunk) {
            s->prefilled += s->chunk;
            for (int k = s->cached / BLOCK; k < s->n_full && (k + 1) * BLOCK <= s->prefilled; k++)
                if (s->held[k]) s->held[k]->computed = 1;
        }
        if (s->c && (decoding || (s->chunk && s->prefilled >= s->input))) token(s, v);
        if (!s->c || s->generated >= s->output) over[n_over++] = s;
        else e->running[kept++] = s;
    }
    e->n_running = kept;
    for (int i = 0; i < n_over; i++) {
        if (over[i]->c) finish(over[i]);
        else {
            release(over[i]);
            free(over[i]->ids);
            free(over[i]->held);
            free(over[i]);
        }
    }
    free(over);
    start_step(e, late > (int64_t)(50e6 * speed) ? virtual_now() : v); /* more than 50 real ms late: do not try to catch up */
}

static void on_gone(conn *c) {
    seq *s = c->a.s;
    c->a.s = NULL;
    if (!s) return;
    cancelled++;
    s->c = NULL; /* a running one leaves at the end of its step */
    if (s->admitted) return;
    engine *e = s->e;
    for (seq **p = &e->waiting_first, *before = NULL; *p; before = *p, p = &(*p)->next)
        if (*p == s) {
            *p = s->next;
            if (e->waiting_last == s) e->waiting_last = before;
            e->n_waiting--;
            break;
        }
    free(s->ids);
    free(s);
}

/* ---- choices made inside the process ---- */
static int64_t expected_v(engine *e, const seq *s, int64_t v) {
    int64_t queued = 0;
    int decoding = 0, needed = (s->input + s->output + BLOCK - 1) / BLOCK;
    for (int i = 0; i < e->n_running; i++) {
        int left = e->running[i]->input - e->running[i]->prefilled;
        if (left > 0) queued += left;
        else decoding++;
    }
    queued -= e->step_prefill * (e->stepping ? 1 : 0);
    if (queued < 0) queued = 0;
    int room = free_blocks(e) + e->n_lru;
    for (seq *w = e->waiting_first; w; w = w->next) {
        int hits = cache_hits(e, w);
        queued += w->input - hits * BLOCK;
        needed += (w->input + w->output + BLOCK - 1) / BLOCK;
    }
    int64_t work = queued + s->input - cache_hits(e, s) * BLOCK;
    double cost = e->stepping && e->step_end > v ? (double)(e->step_end - v) : 0;
    cost += (double)work / prefill_rate * 1e9 + (double)(work / budget + 1) * (step_ms * 1e6 + decoding * decode_us * 1e3);
    if (needed > room) cost += (double)(needed - room) * BLOCK / (decoding + 1) * step_ms * 1e6; /* waits until enough has been generated */
    return (int64_t)cost;
}

static engine *choose(int tag, const seq *s, int64_t v) {
    if (tag < n_engines) return &engines[tag];
    if (tag == n_engines) return &engines[round_robin++ % n_engines];
    engine *best = NULL;
    int64_t least = 0;
    for (int k = 0; k < n_engines; k++) {
        engine *e = &engines[(k + round_robin) % n_engines];
        int64_t cost = tag == n_engines + 1 ? e->n_running + e->n_waiting : expected_v(e, s, v);
        if (!best || cost < least) best = e, least = cost;
    }
    round_robin++;
    return best;
}

static void generate(conn *c) {
    const char *b = c->body.p, *end = b + c->body.len;
    static uint32_t ids[4096];
    int n = 0;
    for (const char *p = b; n < 4096 && (p = memmem(p, (size_t)(end - p), "[b", 2)) && end - p > 10; p += 10) ids[n++] = (uint32_t)strtoul(p + 2, NULL, 10);
    int64_t v = virtual_now();
    seq *s = calloc(1, sizeof *s);
    s->input = (int)json_int(b, c->body.len, "seed", 16);
    s->output = (int)json_int(b, c->body.len, "max_tokens", json_int(b, c->body.len, "max_completion_tokens", 16));
    s->usage = json_true(b, c->body.len, "include_usage");
    if (s->output < 1) s->output = 1;
    s->n_ids = n;
    s->n_full = s->input / BLOCK < n ? s->input / BLOCK : n;
    if (!n || !json_true(b, c->body.len, "stream")) { /* a router's or a worker's trial: answered aside */
        free(s);
        return reply_json(c, 200,
                          "{\"id\":\"chatcmpl-0\",\"object\":\"chat.completion\",\"created\":1790000000,\"model\":\"bench\",\"choices\":[{\"index\":0,"
                          "\"message\":{\"role\":\"assistant\",\"content\":\"ready\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                          "\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1,\"total_tokens\":2}}");
    }
    if ((s->input + s->output) / BLOCK + 2 > capacity) {
        free(s);
        return reply_json(c, 400, "{\"error\":{\"message\":\"longer than the cache\",\"type\":\"invalid_request_error\",\"code\":400}}");
    }
    s->ids = malloc(sizeof *ids * (size_t)n);
    memcpy(s->ids, ids, sizeof *ids * (size_t)n);
    engine *e = s->e = choose(c->tag, s, v);
    s->c = c;
    s->arrived_v = v;
    c->a.s = s;
    c->busy = 1;
    e->requests++;
    e->prompt_tokens += s->input;
    if (e->waiting_last) e->waiting_last->next = s;
    else e->waiting_first = s;
    e->waiting_last = s;
    if (++e->n_waiting > e->waiting_peak) e->waiting_peak = e->n_waiting;
    static const char head[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    conn_send(c, head, sizeof head - 1);
    if (!e->stepping) start_step(e, v);
}

static void metrics(conn *c) {
    engine *e = &engines[c->tag < n_engines ? c->tag : 0];
    char o[2048], l[128];
    snprintf(l, sizeof l, "{engine=\"0\",model_name=\"%s\"}", model);
    int n = snprintf(o, sizeof o,
                     "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running%s %d\n"
                     "# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting%s %d\n"
                     "# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc%s %.4f\n"
                     "# TYPE vllm:prefix_cache_queries_total counter\nvllm:prefix_cache_queries_total%s %lld\n"
                     "# TYPE vllm:prefix_cache_hits_total counter\nvllm:prefix_cache_hits_total%s %lld\n"
                     "# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total%s %lld\n"
                     "# TYPE vllm:prompt_tokens_total counter\nvllm:prompt_tokens_total%s %lld\n"
                     "# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{block_size=\"%d\",num_gpu_blocks=\"%d\",engine=\"0\"} 1\n",
                     l, e->n_running, l, e->n_waiting, l, 1 - (double)(free_blocks(e) + e->n_lru) / capacity, l, (long long)e->queries, l,
                     (long long)e->hits, l, (long long)e->generated_tokens, l, (long long)e->prompt_tokens, BLOCK, capacity);
    reply(c, 200, "text/plain; version=0.0.4", o, (size_t)n);
}

static void stats(conn *c) {
    static char o[65536];
    FILE *f = fmemopen(o, sizeof o, "w");
    fprintf(f, "{\"speed\": %g, \"completed\": %lld, \"cancelled\": %lld, \"worst_late_ms\": %.1f, \"cpu_s\": %.3f, \"virtual_s\": %.3f, ", speed,
            (long long)completed, (long long)cancelled, (double)worst_late_v / 1e6, (double)cpu_ns() / 1e9, (double)virtual_now() / 1e9);
    hist_print(f, "inter_token", &gaps), fprintf(f, ", ");
    hist_print(f, "ttft_at_engine", &ttft);
    fprintf(f, ", \"engines\": [");
    for (int i = 0; i < n_engines; i++) {
        engine *e = &engines[i];
        fprintf(f,
                "%s{\"requests\": %lld, \"prompt_tokens\": %lld, \"cached_tokens\": %lld, \"prefilled_tokens\": %lld, \"generated_tokens\": %lld, "
                "\"evicted_blocks\": %lld, \"busy_s\": %.3f, \"waiting_peak\": %lld, \"kv_peak\": %.3f}",
                i ? ", " : "", (long long)e->requests, (long long)e->prompt_tokens, (long long)e->cached_tokens, (long long)e->prefilled_tokens,
                (long long)e->generated_tokens, (long long)e->evicted, (double)e->busy_v / 1e9, (long long)e->waiting_peak, e->kv_peak);
    }
    fprintf(f, "]}");
    fclose(f);
    reply_json(c, 200, o);
}

static void on_request(conn *c) {
    char path[256], o[512];
    static buf answer;
    snprintf(path, sizeof path, "%s", c->m.path);
    path[strcspn(path, "?")] = 0;
    if (!strcmp(path, "/v1/chat/completions") || !strcmp(path, "/v1/completions")) return generate(c);
    if (strstr(path, "/render") || !strcmp(path, "/tokenize")) {
        render_answer(&answer, path, model, c->body.p, c->body.len);
        return reply(c, 200, "application/json", answer.p, answer.len);
    }
    if (!strcmp(path, "/metrics")) return metrics(c);
    if (!strcmp(path, "/stats")) return stats(c);
    if (!strcmp(path, "/health") || !strcmp(path, "/health_generate") || !strcmp(path, "/ping")) return reply_json(c, 200, "{}");
    if (!strcmp(path, "/version")) return reply_json(c, 200, "{\"version\":\"0.33.0\"}");
    if (!strcmp(path, "/v1/models")) {
        snprintf(o, sizeof o,
                 "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\",\"created\":1790000000,\"owned_by\":\"vllm\",\"root\":\"%s\","
                 "\"parent\":null,\"max_model_len\":131072}]}",
                 model, model);
        return reply_json(c, 200, o);
    }
    if (!strcmp(path, "/get_model_info") || !strcmp(path, "/model_info")) {
        snprintf(o, sizeof o, "{\"model_path\":\"%s\",\"tokenizer_path\":\"%s\",\"is_generation\":true}", model, model);
        return reply_json(c, 200, o);
    }
    if (!strcmp(path, "/get_server_info") || !strcmp(path, "/server_info")) {
        snprintf(o, sizeof o, "{\"model_path\":\"%s\",\"served_model_name\":\"%s\",\"dp_size\":1,\"tp_size\":1,\"version\":\"0.33.0\"}", model, model);
        return reply_json(c, 200, o);
    }
    reply_json(c, 404, "{\"error\":{\"message\":\"no such route\",\"type\":\"invalid_request_error\",\"param\":null,\"code\":404}}");
}

int main(int argc, char **argv) {
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *o = argv[i], *v = argv[i + 1];
        if (!strcmp(o, "--engines")) n_engines = atoi(v);
        else if (!strcmp(o, "--speed")) speed = atof(v);
        else if (!strcmp(o, "--blocks")) capacity = atoi(v);
        else if (!strcmp(o, "--prefill")) prefill_rate = atof(v);
        else if (!strcmp(o, "--step-ms")) step_ms = atof(v);
        else if (!strcmp(o, "--decode-us")) decode_us = atof(v);
        else if (!strcmp(o, "--budget")) budget = atoi(v);
        else if (!strcmp(o, "--max-seqs")) max_seqs = atoi(v);
        else if (!strcmp(o, "--emit-ms")) emit_ms = atof(v);
        else if (!strcmp(o, "--model")) model = v;
        else {
            fprintf(stderr, "engines: unknown option %s\n", o);
            return 2;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    t0 = now_ns();
    engines = calloc((size_t)n_engines, sizeof *engines);
    printf("listening");
    for (int i = 0; i < n_engines + 3; i++) {
        if (i < n_engines) {
            engines[i].index = i;
            engines[i].buckets = calloc(BUCKETS, sizeof(block *));
            engines[i].running = calloc((size_t)max_seqs + 1, sizeof(seq *));
        }
        printf(" %d", server_listen("127.0.0.1", 0, i));
    }
    printf("\n");
    fflush(stdout);
    for (;;) {
        int64_t next = now_ns() + NS_PER_S;
        for (int i = 0; i < n_engines; i++)
            if (engines[i].stepping && real_at(engines[i].step_end) < next) next = real_at(engines[i].step_end);
        server_turn(next);
        int64_t v = virtual_now();
        for (int i = 0; i < n_engines; i++)
            while (engines[i].stepping && engines[i].step_end <= v) end_step(&engines[i]);
    }
}
