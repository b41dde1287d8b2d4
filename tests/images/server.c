/* A tiny static HTTP/1.1 server: what the demo's and the tests' containers run.
 *
 *   /server                serve on $PORT until SIGTERM
 *   /server exit N         end at once with code N
 *   /server sleep          sleep, deaf to SIGTERM as a first process without a handler is
 *   /server eat MIB        fill memory, then sleep
 *   /server get PORT PATH  exit 0 if 127.0.0.1 answers 200
 *   /server fetch HOST PORT PATH   the same of another host, by the container's own DNS
 *   /server read FILE      copy a file to standard output
 *
 * GET /health and /healthz answer 200 (500 with FAIL_HEALTH=1), /work takes 20 ms, and all paths
 * name service, version and allocation. READY_AFTER_MS, EXIT_AFTER_MS with EXIT_CODE, and
 * LOG_LINES make it slow to start, short-lived, or talkative.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { REQUEST_BYTES = 64 << 10, IDLE_MS = 120000, QUIET_MS = 100, DRAIN_MS = 9000 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int in_flight, stopping, wake[2];

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

static void pause_ms(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static int count(int change) {
    pthread_mutex_lock(&lock);
    int now = in_flight += change;
    pthread_mutex_unlock(&lock);
    return now;
}

/* Bytes that the whole request takes, 0 while some are missing, -1 if it never fits. */
static long request_length(char *text, long have) {
    text[have] = 0;
    char *end = strstr(text, "\r\n\r\n");
    if (!end) return have >= REQUEST_BYTES - 1 ? -1 : 0;
    long head = end - text + 4, body = 0;
    for (char *line = text; line < end; line = strstr(line, "\r\n") + 2) {
        if (!strncasecmp(line, "content-length:", 15)) body = atol(line + 15);
        if (!strncasecmp(line, "transfer-encoding: chunked", 26)) {
            char *last = strstr(end + 2, "\r\n0\r\n\r\n");
            return last ? last + 7 - text : have >= REQUEST_BYTES - 1 ? -1 : 0;
        }
    }
    if (body < 0 || head + body >= REQUEST_BYTES) return -1;
    return have >= head + body ? head + body : 0;
}

static int answer(int connection, char *request) {
    char method[16] = "", path[1024] = "", body[512], text[1024];
    if (sscanf(request, "%15s %1023s", method, path) != 2) return -1;
    int probe = !strcmp(path, "/health") || !strcmp(path, "/healthz");
    int failing = probe && !strcmp(setting("FAIL_HEALTH", "0"), "1");
    int closing = stopping || strcasestr(request, "\r\nconnection: close") != NULL;
    if (!strncmp(path, "/work", 5)) pause_ms(20);
    int size = snprintf(body, sizeof body, "service=%s version=%s alloc=%s\n",
                        setting("MILL_SERVICE", "-"), setting("VERSION", "-"),
                        setting("MILL_ALLOC", "-"));
    int length = snprintf(text, sizeof text,
                          "HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n"
                          "Connection: %s\r\n\r\n%s",
                          failing ? "500 Internal Server Error" : "200 OK", size,
                          closing ? "close" : "keep-alive",
                          strcmp(method, "HEAD") ? body : "");
    if (send(connection, text, length, MSG_NOSIGNAL) != length) return -1;
    return closing ? -1 : 0;
}

static void *serve(void *argument) {
    int connection = (int)(long)argument, on = 1;
    char *buffer = malloc(REQUEST_BYTES);
    long have = 0;
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct pollfd readable = {connection, POLLIN, 0};
    while (buffer && poll(&readable, 1, IDLE_MS) > 0) {
        count(+1);
        long got = recv(connection, buffer + have, REQUEST_BYTES - 1 - have, 0), length = 0;
        if (got > 0) have += got;
        int ended = got <= 0;
        while (!ended && have > 0 && (length = request_length(buffer, have)) != 0) {
            ended = length < 0 || answer(connection, buffer) < 0;
            if (!ended) memmove(buffer, buffer + length, have -= length);
        }
        count(-1);
        if (ended) break;
    }
    free(buffer);
    shutdown(connection, SHUT_WR); /* the last bytes go out before the close */
    close(connection);
    return NULL;
}

/* Accepts until told to stop, and then whoever had connected by that time. */
static void *accept_all(void *argument) {
    int listener = (int)(long)argument, connection;
    struct pollfd either[2] = {{listener, POLLIN, 0}, {wake[0], POLLIN, 0}};
    while (poll(either, 2, -1) < 0 || either[0].revents || !stopping) {
        if ((connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) < 0) continue;
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void *)(long)connection)) close(connection);
        else pthread_detach(thread);
    }
    close(listener);
    return NULL;
}

static void *exit_later(void *argument) {
    pause_ms((long)argument);
    exit(atoi(setting("EXIT_CODE", "1")));
}

static int listen_on(int port) {
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(port)};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 1024)) {
        perror("listen");
        exit(1);
    }
    return listener;
}

static int get(const char *host, const char *port, const char *path) {
    struct addrinfo wanted = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *to;
    if (getaddrinfo(host, port, &wanted, &to)) return 2;
    char text[2048] = "";
    int there = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(there, to->ai_addr, to->ai_addrlen)) return 1;
    int length = snprintf(text, sizeof text, "GET %.1000s HTTP/1.1\r\nHost: %.200s\r\n"
                          "Connection: close\r\n\r\n", path, host);
    if (send(there, text, length, MSG_NOSIGNAL) != length) return 1;
    long got = recv(there, text, sizeof text - 1, MSG_WAITALL);
    return got < 12 || strncmp(text + 9, "200", 3) != 0;
}

static int copy_file(const char *path) {
    char text[4096];
    long got;
    int file = open(path, O_RDONLY);
    while ((got = read(file, text, sizeof text)) > 0)
        if (write(1, text, got) != got) return 1;
    return got < 0;
}

static void eat(long mib) {
    for (; mib > 0; mib--) {
        char *some = malloc(1 << 20);
        if (some) memset(some, 1, 1 << 20);
    }
    for (;;) pause();
}

int main(int count_of_words, char **words) {
    const char *mode = count_of_words > 1 ? words[1] : "serve";
    const char *first = count_of_words > 2 ? words[2] : "";
    if (!strcmp(mode, "exit")) return atoi(first);
    if (!strcmp(mode, "eat")) eat(atol(first));
    if (!strcmp(mode, "read")) return copy_file(first);
    if (!strcmp(mode, "get"))
        return get("127.0.0.1", first, count_of_words > 3 ? words[3] : "/");
    if (!strcmp(mode, "fetch") && count_of_words > 4) return get(first, words[3], words[4]);
    while (!strcmp(mode, "sleep")) pause();

    sigset_t ends;
    int number;
    pthread_t thread;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    pthread_sigmask(SIG_BLOCK, &ends, NULL); /* from the first moment on: none is lost */
    const char *service = setting("MILL_SERVICE", "server"), *version = setting("VERSION", "-");
    int port = atoi(setting("PORT", "8080"));
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("%s %s: serving on port %d\n", service, version, port);
    fprintf(stderr, "%s %s: errors go here\n", service, version);
    for (long line = 1; line <= atol(setting("LOG_LINES", "0")); line++)
        fprintf(line % 2 ? stdout : stderr, "line %ld\n", line);
    if (atol(setting("EXIT_AFTER_MS", "0")) > 0)
        pthread_create(&thread, NULL, exit_later, (void *)atol(getenv("EXIT_AFTER_MS")));
    pause_ms(atol(setting("READY_AFTER_MS", "0")));
    int listener = listen_on(port);
    if (pipe(wake)) return 1;
    pthread_create(&thread, NULL, accept_all, (void *)(long)listener);

    sigwait(&ends, &number);
    stopping = 1;
    if (write(wake[1], "", 1) == 1) pthread_join(thread, NULL);
    for (int quiet = 0, spent = 0; quiet < QUIET_MS && spent < DRAIN_MS; spent += 5) {
        quiet = count(0) ? 0 : quiet + 5;
        pause_ms(5);
    }
    return 0;
}
