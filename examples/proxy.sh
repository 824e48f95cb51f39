#!/usr/bin/env bash
# examples/proxy.sh EXPORT URL: start the proxy on this machine, ask it with curl, stop it.
set -euo pipefail
export SGT_TITAN_API_KEY=${SGT_TITAN_API_KEY:-$(openssl rand -hex 24)}
port=${PORT:-8080}

sgt-titan serve "$1" --upstream "$2" --port "$port" --served-name private &
proxy=$!
trap 'kill "$proxy"' EXIT
until curl -sf "localhost:$port/readyz" >/dev/null; do
  kill -0 "$proxy" # ends here if the proxy did not start
  sleep 1
done

# -N shows the answer as it comes. Key and prompt are no arguments: those every user of a machine can see.
curl -sSN "localhost:$port/v1/chat/completions" --data-binary @- \
  -H @<(echo "Authorization: Bearer $SGT_TITAN_API_KEY") -H 'Content-Type: application/json' <<'END'
{"model": "private", "messages": [{"role": "user", "content": "Who wrote Moby-Dick?"}], "stream": true, "max_tokens": 80}
END
