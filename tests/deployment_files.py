"""What docker/ and examples/ tell a machine to run."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
EXAMPLES = ROOT / "examples"
GUIDE = ROOT / "docs" / "deployment.md"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's (keyword, rest of it), without comments and with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def wheel_pattern() -> str:
    """The file that the Dockerfile installs."""
    (name,) = re.findall(r"(?<=/)[\w.*-]+\.whl", " ".join(rest for _, rest in instructions()))
    return name


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def compose_service() -> dict[str, Any]:
    (service,) = documents("compose.yaml")[0]["services"].values()
    return service


def kubernetes(kind: str) -> dict[str, Any]:
    (found,) = (d for d in documents("kubernetes.yaml") if d["kind"] == kind)
    return found


def pod() -> dict[str, Any]:
    return kubernetes("Deployment")["spec"]["template"]


def container() -> dict[str, Any]:
    (found,) = pod()["spec"]["containers"]
    return found


def guide_commands() -> list[list[str]]:
    """Command lines of the guide's indented blocks, words as a shell would see them."""
    text = GUIDE.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines]


def served() -> dict[str, list[str]]:
    """Where it is written -> the arguments of a `vllm serve`."""
    lines = {"compose": compose_service()["command"], "kubernetes": container()["args"]}
    for words in guide_commands():
        if words[:2] == ["vllm", "serve"]:
            lines[" ".join(words)] = words[2:]
        elif words[:2] == ["docker", "run"] and "--entrypoint" not in words:
            (image,) = (i for i, word in enumerate(words) if word.startswith("vllm-dms:"))
            lines[" ".join(words)] = words[image + 1 :]
    return lines
