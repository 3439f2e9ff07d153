"""What another vLLM changes for this plugin, by syntax: the mechanical part of supporting it.

    python scripts/audit_vllm.py OLD NEW        e.g. 0.32.0 0.33.0

Each is a version, whose wheel is downloaded from PyPI (once), or a folder that has `vllm/`.
Prints Markdown: every required hook, override and import from vLLM, whether it is the same,
changed or gone, with signatures old and new, and where an override no longer takes what vLLM
passes. Neither vLLM nor torch is imported. Ends with status 1 if the plugin can't run as it is.
`docs/compatibility.md` says what to do with the rest.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import vllm_sources
from plugin_hooks import HOST, PLUGIN, Plugin, belongs, is_dunder
from source_tree import Function, SourceTree, Symbol

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vllm_dms.hooks import GRAFTED, REQUIRED_HOOKS  # noqa: E402 needs neither torch nor vLLM

STATUSES = ("same", "changed", "gone", "new")
MAX_SHOWN = 400  # characters of a changed assignment


@dataclass(frozen=True)
class Change:
    name: str
    where: str  # who uses it
    status: str
    details: tuple[str, ...] = ()


def compare(name: str, where: str, old: Symbol | None, new: Symbol | None) -> Change:
    if old is None or new is None:
        return Change(name, where, "gone" if new is None else "new")
    if old.code() == new.code():
        return Change(name, where, "same")
    return Change(name, where, "changed", tuple(differences(old, new)))


def differences(old: Symbol, new: Symbol) -> Iterator[str]:
    if isinstance(old.node, ast.ClassDef) and isinstance(new.node, ast.ClassDef):
        yield from members(old, new)
    elif isinstance(old.node, Function) and isinstance(new.node, Function):
        before, after = header(old), header(new)
        yield from ["body"] if before == after else [f"- {before}", f"+ {after}"]
    else:
        yield from (f"{sign} {s.code()}"[:MAX_SHOWN] for sign, s in (("-", old), ("+", new)))


def header(function: Symbol) -> str:
    node = function.node
    assert isinstance(node, Function)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def members(old: Symbol, new: Symbol) -> Iterator[str]:
    """Which members of a class differ."""
    before, after = ({n: s.code() for n, s in cls.members().items()} for cls in (old, new))
    groups = {
        "without": [name for name in before if name not in after],
        "with": [name for name in after if name not in before],
        "changed:": [name for name in before if name in after and before[name] != after[name]],
    }
    found = [f"{word} {', '.join(names)}" for word, names in groups.items() if names]
    yield from found or ["its bases or decorators"]


def hook_changes(old: SourceTree, new: SourceTree) -> list[Change]:
    return [compare(h, why, old.find(h), new.find(h)) for h, why in REQUIRED_HOOKS.items()]


def override_changes(old: Plugin, new: Plugin) -> list[Change]:
    """Constructors and attributes of instances too, which can't be required hooks. "new" is a name
    that only the plugin had."""
    before, after = (
        {(str(o.ours), o.name, o.hook.rpartition(":")[2]): o for o in plugin.overrides}
        for plugin in (old, new)
    )
    changes = []
    for key, override in (after | before).items():
        symbols = [o.theirs if o else None for o in (before.get(key), after.get(key))]
        changes.append(compare(override.hook, str(override.ours), *symbols))
    return changes


def used_names(tree: SourceTree, source: ast.Module, strings: bool) -> Iterator[tuple[str, int]]:
    """What a module takes from vLLM by name, and the line: imports, attributes of imported modules,
    and names in strings where ``strings``."""
    modules: dict[str, str] = {}
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if belongs(alias.name, HOST):
                    modules[alias.asname or alias.name] = alias.name
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names if belongs(node.module or "", HOST) else []:
                if tree.file(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    yield f"{node.module}.{alias.name}", node.lineno
                else:
                    yield f"{node.module}:{alias.name}", node.lineno
        elif strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = re.fullmatch(rf"({HOST}(?:\.\w+)+)(:\w+(\.\w+)*)?", node.value)
            if name and tree.file(name[1]):
                yield node.value, node.lineno
    for node in ast.walk(source):
        if not isinstance(node, ast.Attribute) or is_dunder(node.attr):
            continue
        owner = modules.get(ast.unparse(node.value))
        if owner and not tree.file(f"{owner}.{node.attr}"):
            yield f"{owner}:{node.attr}", node.lineno


def import_changes(
    old: SourceTree, new: SourceTree, files: Iterable[Path], strings: bool = True
) -> list[Change]:
    found: dict[str, str] = {}
    for file in sorted(files):
        for tree in (old, new):  # one of them may lack a module
            for name, line in used_names(tree, ast.parse(file.read_text()), strings):
                found.setdefault(name, f"{file.relative_to(ROOT)}:{line}")
    return [compare(n, w, old.find(n), new.find(n)) for n, w in sorted(found.items())]


def audit(old: SourceTree, new: SourceTree) -> dict[str, list[Change]]:
    plugin = [f for f in (ROOT / PLUGIN).rglob("*.py") if f.name != "hooks.py"]
    others = [f for d in ("tests", "benchmarks", "examples") for f in (ROOT / d).rglob("*.py")]
    return {
        "required hooks": hook_changes(old, new),
        "overrides": override_changes(Plugin(old, GRAFTED), Plugin(new, GRAFTED)),
        "imports": import_changes(old, new, plugin),
        "imports of tests and benchmarks": import_changes(old, new, others, strings=False),
    }


def report(title: str, sections: dict[str, list[Change]], wrong: list[str]) -> str:
    lines = [f"# {title}", "", f"| | {' | '.join(STATUSES)} |", "|---" * 5 + "|"]
    for section, changes in sections.items():
        counts = (sum(c.status == status for c in changes) for status in STATUSES)
        lines.append(f"| {section} | {' | '.join(map(str, counts))} |")
    lines += ["", "## Overrides that do not take what vLLM passes", ""]
    lines += [f"- {text}" for text in wrong] or ["None."]
    for section, changes in sections.items():
        lines += ["", f"## {section.capitalize()}"]
        for status in ("gone", "new", "changed", "same"):
            chosen = [change for change in changes if change.status == status]
            lines += ["", f"### {status} ({len(chosen)})", ""] if chosen else []
            for change in chosen:
                lines.append(f"- `{change.name}` ({change.where})")
                lines += [f"  - `{detail}`" for detail in change.details]
    return "\n".join(lines)


def tree_of(source: str) -> SourceTree:
    folder = Path(source)
    if not (folder / HOST).is_dir():
        folder = vllm_sources.get(source)
    return SourceTree(folder, ROOT)


def main() -> int:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    old, new = map(tree_of, sys.argv[1:])
    sections, wrong = audit(old, new), Plugin(new, GRAFTED).wrong_signatures()
    print(report(f"vLLM {sys.argv[1]} to {sys.argv[2]}", sections, wrong))
    needed = [*sections["required hooks"], *sections["overrides"]]
    return int(bool(wrong) or any(change.status in ("gone", "new") for change in needed))


if __name__ == "__main__":
    sys.exit(main())
