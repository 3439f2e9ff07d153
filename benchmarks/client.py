"""`vllm bench serve`, command after command in one process: importing vLLM takes longer than most
of what is measured. A line of stdin is a command's arguments as a JSON list and the path of its
log; the answering line is "0", or the error.
"""

import contextlib
import json
import sys

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in sys.stdin:
        arguments, log = json.loads(line)
        answer = "0"
        with open(log, "w") as file, contextlib.redirect_stdout(file):
            try:
                main(parser.parse_args(arguments))
            except (Exception, SystemExit) as error:  # argparse exits
                answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(answer, flush=True)
