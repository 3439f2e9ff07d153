"""What the plugin overrides of vLLM, and whether it fits: read from the sources of both."""

import ast
import functools
from collections.abc import Iterable
from dataclasses import dataclass

from source_tree import Function, SourceTree, Symbol, definitions

PLUGIN, HOST = "vllm_dms", "vllm"
# A method with this comment has a signature of its own on purpose: only the plugin calls it.
OWN_SIGNATURE = "type: ignore[override]"


def belongs(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@dataclass(frozen=True)
class Override:
    """A name of vLLM's class that a class of the plugin defines too, or sets on `self`."""

    hook: str  # under the class that the plugin's derives from, whichever defines it
    cls: Symbol  # the plugin's class that inherits from vLLM's; `ours` may be in a mixin of it
    ours: Symbol
    theirs: Symbol
    in_class: bool  # False: vLLM has it on instances only

    @property
    def name(self) -> str:
        return self.hook.rpartition(".")[2]


def classes(tree: SourceTree, package: str = PLUGIN) -> list[Symbol]:
    """Those of the plugin that have a class of vLLM among their bases."""
    found = []
    for module in tree.modules(package):
        assert isinstance(module.node, ast.Module)
        for name, node in definitions(module.node.body).items():
            cls = Symbol(module.module, name, node)
            if cls.is_class and any(belongs(base.module, HOST) for base in tree.mro(cls)):
                found.append(cls)
    return found


@functools.cache
def overrides(tree: SourceTree, package: str = PLUGIN) -> tuple[Override, ...]:
    found: dict[tuple[str, str], Override] = {}
    for cls in classes(tree, package):
        order = tree.mro(cls)
        for position, mine in enumerate(order):
            if belongs(mine.module, package):
                bases = [base for base in order[position:] if belongs(base.module, HOST)]
                for name, ours in {**tree.assigned(mine), **tree.own(mine)}.items():
                    override = _override(tree, cls, name, ours, bases)
                    if override:
                        found.setdefault((override.hook, str(ours)), override)
    return tuple(found.values())


def _override(
    tree: SourceTree, cls: Symbol, name: str, ours: Symbol, bases: list[Symbol]
) -> Override | None:
    for base in bases:
        if theirs := tree.member(base, name):
            return Override(f"{base}.{name}", cls, ours, theirs, in_class=True)
    for base in bases:
        if theirs := tree.assigned(base).get(name):
            return Override(f"{base}.{name}", cls, ours, theirs, in_class=False)
    return None


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def defining_class(tree: SourceTree, hook: str) -> str:
    """`hook` under the module where its class stands, from which others may import it."""
    owner, _, name = hook.rpartition(".")
    found = tree.find(owner) if ":" in owner else None
    return f"{found}.{name}" if found else hook


def unlisted(tree: SourceTree, hooks: Iterable[str]) -> list[str]:
    """Overrides that are not among `hooks`. Every class has dunders; what vLLM has on instances
    only can't be looked up."""
    listed = {defining_class(tree, hook) for hook in hooks}
    return [
        f"{o.hook}: overridden by {o.ours}, but not among the required hooks"
        for o in overrides(tree)
        if o.in_class and not is_dunder(o.name) and o.hook not in listed
    ]


def stale(tree: SourceTree, hooks: Iterable[str]) -> list[str]:
    """Listed members of the classes that the plugin derives from which it no longer overrides."""
    overridden = {o.hook for o in overrides(tree)}
    bases = {hook.rpartition(".")[0] for hook in overridden}
    listed = {defining_class(tree, hook) for hook in hooks}
    return [
        f"{hook}: a required hook, but overridden by nothing"
        for hook in sorted(listed - overridden)
        if hook.rpartition(".")[0] in bases
    ]


def wrong_signatures(tree: SourceTree) -> list[str]:
    """Overriding methods that can't be called in every way that vLLM's own can."""
    return [
        f"{o.ours} overrides {o.hook}: {problem}"
        for o in overrides(tree)
        if not _own_signature(tree, o.ours)
        for problem in mismatches(o.ours, o.theirs)
    ]


def _own_signature(tree: SourceTree, method: Symbol) -> bool:
    file = tree.file(method.module)
    if file is None or not isinstance(method.node, Function):
        return False
    lines = file.read_text().splitlines()[method.node.lineno - 1 : method.node.body[0].lineno]
    return any(OWN_SIGNATURE in line for line in lines)


@dataclass(frozen=True)
class Parameter:
    name: str
    by_position: bool
    by_name: bool
    optional: bool


@dataclass(frozen=True)
class Signature:
    parameters: tuple[Parameter, ...]  # without self or cls
    more_positions: bool  # *args
    more_names: bool  # **kwargs

    def named(self, name: str) -> Parameter | None:
        return next((p for p in self.parameters if p.name == name and p.by_name), None)


def signature(method: Symbol) -> Signature:
    assert isinstance(method.node, Function)
    args = method.node.args
    positions = [*args.posonlyargs, *args.args]
    required = len(positions) - len(args.defaults)
    found = [
        Parameter(arg.arg, True, i >= len(args.posonlyargs), i >= required)
        for i, arg in enumerate(positions)
    ]
    if method.kind != "staticmethod" and "." in method.path:
        found = found[1:]
    found += [
        Parameter(arg.arg, False, True, default is not None)
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return Signature(tuple(found), args.vararg is not None, args.kwarg is not None)


def mismatches(ours: Symbol, theirs: Symbol) -> list[str]:
    """Why a call that `theirs` takes is not one that `ours` takes."""
    if ours.kind != theirs.kind:
        return [f"it is of kind {ours.kind!r}, in vLLM {theirs.kind!r}"]
    if not isinstance(ours.node, Function) or not isinstance(theirs.node, Function):
        return []
    if ours.kind == "attribute":
        return []
    mine, other = signature(ours), signature(theirs)
    if ours.node.name == "__init__":
        return _constructor_mismatches(mine, other)
    by_position = [p for p in mine.parameters if p.by_position]
    problems = []
    for i, parameter in enumerate(other.parameters):
        name = parameter.name
        if parameter.by_position:
            here = by_position[i] if i < len(by_position) else None
            if here.name != name if here else not mine.more_positions:
                problems.append(f"{name} is not its parameter {i + 1}")
        own = mine.named(name)
        if parameter.by_name and not own and not mine.more_names:
            problems.append(f"{name} can't be given by name")
        if own and parameter.optional and not own.optional:
            problems.append(f"{name} is not optional")
    if other.more_positions and not mine.more_positions:
        problems.append("it takes no *args")
    if other.more_names and not mine.more_names:
        problems.append("it takes no **kwargs")
    return problems + _not_passed(mine, other)


def _constructor_mismatches(mine: Signature, other: Signature) -> list[str]:
    """Who calls a constructor knows which class it is of, and may leave out what is optional."""
    required = [p.name for p in other.parameters if not p.optional]
    unknown = [name for name in required if not mine.named(name) and not mine.more_names]
    return [f"{name} can't be given" for name in unknown] + _not_passed(mine, other)


def _not_passed(mine: Signature, other: Signature) -> list[str]:
    names = {p.name for p in other.parameters}
    extra = [p.name for p in mine.parameters if p.name not in names and not p.optional]
    return [f"vLLM does not pass {name}" for name in extra]
