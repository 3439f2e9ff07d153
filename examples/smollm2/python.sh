# Sourced: `python`, the interpreter with what `needs` names (torch, safetensors, tokenizers): PYTHON, or the clone's own
# environment (scripts/setup.sh), or python3.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
fi
missing=$("$python" -c 'import importlib.util as i, sys
print(*[m for m in sys.argv[1:] if i.find_spec(m) is None])' ${needs:-torch safetensors tokenizers}) || exit 1
if [ -n "$missing" ]; then
    echo "$python lacks: $missing. Set PYTHON to an interpreter that has them, or run scripts/setup.sh first." >&2
    exit 1
fi
