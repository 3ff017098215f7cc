/* The render routes of vLLM, which vllm-router asks before it routes: the prompt of a request as token ids.
 *
 * A "token" here is four bytes of prompt text; its id is a hash of them. Equal prefixes give equal ids, which is all a router needs. */
#ifndef BENCH_RENDER_H
#define BENCH_RENDER_H
#include "base.h"

/* Calls for each string under "content" or "prompt"; good for bodies without escapes in them. */
static inline const char *next_prompt_text(const char *p, const char *end, size_t *n) {
    while (p < end) {
        const char *a = memmem(p, (size_t)(end - p), "\"content\"", 9), *b = memmem(p, (size_t)(end - p), "\"prompt\"", 8);
        const char *k = !a ? b : !b ? a : a < b ? a : b;
        if (!k) return NULL;
        for (p = k + (k == a ? 9 : 8); p < end && (*p == ' ' || *p == ':'); p++) {}
        if (p >= end || *p != '"') continue;
        const char *e = ++p;
        while (e < end && *e != '"') e += *e == '\\' ? 2 : 1;
        *n = (size_t)((e < end ? e : end) - p);
        return p;
    }
    return NULL;
}

static inline int render_ids(buf *out, const char *body, size_t body_n) {
    const char *p = body, *end = body + body_n;
    size_t n;
    int count = 0;
    while ((p = next_prompt_text(p, end, &n))) {
        for (size_t i = 0; i < n; i += 4) {
            uint32_t h = 2166136261u;
            char digits[12];
            for (size_t k = i; k < i + 4 && k < n; k++) h = (h ^ (unsigned char)p[k]) * 16777619u;
            int d = snprintf(digits, sizeof digits, "%s%u", count++ ? "," : "", 1000 + h % 100000);
            buf_add(out, digits, (size_t)d);
        }
        p += n;
    }
    return count;
}

/* The body of /v1/chat/completions/render (one object), /v1/completions/render (a list), or /tokenize. */
static inline void render_answer(buf *out, const char *path, const char *model, const char *body, size_t body_n) {
    char text[256];
    int tokenize = !strcmp(path, "/tokenize"), list = !strcmp(path, "/v1/completions/render");
    int n = tokenize ? snprintf(text, sizeof text, "{\"max_model_len\":131072,\"token_strs\":null,\"tokens\":[")
                     : snprintf(text, sizeof text, "%s{\"request_id\":\"render-1\",\"token_ids\":[", list ? "[" : "");
    buf_clear(out);
    buf_add(out, text, (size_t)n);
    int count = render_ids(out, body, body_n);
    n = tokenize ? snprintf(text, sizeof text, "],\"count\":%d}", count)
                 : snprintf(text, sizeof text, "],\"features\":null,\"sampling_params\":{},\"model\":\"%s\",\"stream\":false}%s", model, list ? "]" : "");
    buf_add(out, text, (size_t)n);
}
#endif
