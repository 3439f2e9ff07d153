"""A whole checkpoint of the adapter form in two parts."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from vllm_dms.adapters import write_adapter


def split_adapter(whole: Path, base: Path, adapter: Path) -> None:
    """Writes its base without a word of DMS, and its adapter."""
    config = json.loads((whole / "config.json").read_text())
    weights = load_file(whole / "model.safetensors")
    decisions = {n: t for n, t in weights.items() if "dms_" in n}
    shutil.copytree(whole, base, dirs_exist_ok=True)
    plain = {k: v for k, v in config.items() if not k.startswith("dms_")}
    (base / "config.json").write_text(json.dumps(plain))
    rest = {n: t for n, t in weights.items() if n not in decisions}
    save_file(rest, base / "model.safetensors", {"format": "pt"})
    settings = {k: v for k, v in config.items() if k.startswith("dms_")}
    write_adapter(adapter, settings, decisions, "somebody/base", plain)
