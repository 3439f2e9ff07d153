"""Parse vLLM command lines exactly as the `vllm` command does, without running them.

    python parse_doors.py '[["serve", "model"], ["bench", "latency"]]'

prints a JSON list with one entry per command line: the parsed --kv-cache-dtype, or "exit N".
The modules are imported once; every line is parsed in a fork of that state, in which no plugin
has been loaded yet: whether it is loaded before the parser is built is what is asked.
"""

import json
import os
import sys

import vllm.plugins
from vllm.entrypoints.cli import launch, main, openai, preload, run_batch, serve  # noqa: F401
from vllm.utils.argparse_utils import FlexibleArgumentParser


def parse(argv: list[str]) -> object:
    """What the `vllm` command makes of argv; never returns from the command itself."""
    original = FlexibleArgumentParser.parse_args
    parsed = []

    def parse_args(self, *args, **kwargs):
        parsed.append(original(self, *args, **kwargs))
        raise SystemExit(0)

    FlexibleArgumentParser.parse_args = parse_args
    sys.argv = ["vllm", *argv]
    try:
        main.main()
    except SystemExit as stop:
        if not parsed:
            return f"exit {stop.code}"
    return getattr(parsed[0], "kv_cache_dtype", None)


def parse_in_fork(argv: list[str]) -> object:
    receive, send = os.pipe()
    if os.fork() == 0:
        os.write(send, json.dumps(parse(argv)).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as answer:
        text = answer.read()
    os.wait()
    return json.loads(text or '"died"')


if __name__ == "__main__":
    assert not vllm.plugins.plugins_loaded
    print(json.dumps([parse_in_fork(argv) for argv in json.loads(sys.argv[1])]))
