"""vllm-dms, or python -m vllm_dms: the commands of this package, each imported only when it runs.

A server is started with `vllm serve`, as without this package.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass

import vllm_dms

NAME = "vllm-dms"


@dataclass(frozen=True)
class Command:
    module: str  # its main(argv) is the command
    help: str
    needs: tuple[str, ...]  # what is imported and not a dependency of this package
    remedy: str


COMMANDS = {
    "demo": Command(
        "vllm_dms.demo",
        "serve the checkpoint that comes with this package, with eviction and without, and compare",
        ("vllm", "openai"),
        "Install a supported vLLM, which brings it: the extra [cuda] does.",
    ),
    "verify": Command(
        "vllm_dms.verify",
        "what a DMS checkpoint evicts and what that changes, without a server",
        ("torch", "safetensors", "transformers"),
        "Install vLLM, which brings it, or torch and the extra [retrofit].",
    ),
    "retrofit": Command(
        "vllm_dms.retrofit.__main__",
        "train a dense checkpoint to decide what it forgets",
        ("torch", "safetensors", "tqdm", "transformers"),
        "Install torch and the extra [retrofit].",
    ),
}


def versions() -> str:
    """This package's version and vLLM's, by its metadata: importing it takes seconds."""
    try:
        vllm = f"vLLM {importlib.metadata.version('vllm')}"
    except importlib.metadata.PackageNotFoundError:
        vllm = "no vLLM installed"
    return f"{NAME} {vllm_dms.__version__} ({vllm})"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description=vllm_dms.__doc__,
        epilog=f"More: {NAME} COMMAND --help. A server: vllm serve MODEL --kv-cache-dtype dms",
    )
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command = COMMANDS.get(argv[0]) if argv else None
    parser = build_parser()
    if command is None:
        parser.parse_args(argv)  # help, the version or an error: it does not come back
        return 2
    missing = [name for name in command.needs if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(
            f"{argv[0]} needs {', '.join(missing)}, which this Python ({sys.executable}) lacks. "
            + command.remedy
        )
    return importlib.import_module(command.module).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
