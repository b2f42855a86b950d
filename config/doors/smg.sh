#!/usr/bin/env bash
# smg in front of two servers. docs/doors.md says what was seen of it.

options=(
    --host 127.0.0.1 --port 8080
    --worker-urls http://127.0.0.1:8001 http://127.0.0.1:8002
    --backend vllm                     # whose API the servers have
    --disable-tokenizer-autoload       # it sends text on, and needs no tokenizer
    --policy cache_aware               # a conversation goes where its beginning is in the prefix cache
    --balance-abs-threshold 16         # unless one server has so many answers more in the making
    --balance-rel-threshold 1.5        # and half as many again
    --health-check-endpoint /ready     # 503 while a server leaves or drains; its default is /health
    --health-check-interval-secs 1     # its default, a minute, is longer than a drain
    --health-check-timeout-secs 1
    --health-failure-threshold 2
    --health-success-threshold 1
    --worker-startup-check-interval 1  # its default lets clients wait half a minute for a server that is up
    --request-timeout-secs 630         # above `limits.request_seconds`
    --retry-max-retries 3              # its backoff goes up to half a minute otherwise
    --retry-initial-backoff-ms 50
    --retry-max-backoff-ms 500
    --disable-circuit-breaker          # a full server is no broken one: ten 503 would close it for a minute
    --prometheus-host 127.0.0.1 --prometheus-port 29000
)
exec smg launch "${options[@]}" "$@"
