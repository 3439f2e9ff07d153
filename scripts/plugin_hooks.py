"""What the plugin overrides of vLLM, and whether it fits: read from the sources of both."""

import ast
from collections.abc import Iterable, Mapping
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
    ours: Symbol
    theirs: Symbol
    in_class: bool  # False: vLLM has it on instances only

    @property
    def name(self) -> str:
        return self.hook.rpartition(".")[2]


class Plugin:
    """The plugin's classes over those of one vLLM, both in `tree`.

    ``grafted``: classes of the plugin that are put before one of vLLM's at run time, both by name.
    """

    def __init__(
        self, tree: SourceTree, grafted: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        self.tree = tree
        self.grafted = [
            (tree.find(mine), tree.find(stock))
            for mine, stocks in (grafted or {}).items()
            for stock in stocks
        ]
        self.overrides = self._overrides()

    def classes(self) -> list[Symbol]:
        """Those that have a class of vLLM among their bases, in the sources."""
        found = []
        for module in self.tree.modules(PLUGIN):
            assert isinstance(module.node, ast.Module)
            for name, node in definitions(module.node.body).items():
                cls = Symbol(module.module, name, node)
                if cls.is_class and any(map(of_host, self.tree.mro(cls))):
                    found.append(cls)
        return found

    def _overrides(self) -> list[Override]:
        tree, found = self.tree, dict[tuple[str, str], Override]()
        orders = [tree.mro(cls) for cls in self.classes()]
        orders += [(*tree.mro(m), *tree.mro(s)) for m, s in self.grafted if m and s]
        for order in orders:
            for position, mine in enumerate(order):
                if belongs(mine.module, PLUGIN):
                    bases = [base for base in order[position:] if of_host(base)]
                    for name, ours in {**tree.assigned(mine), **tree.own(mine)}.items():
                        if override := self._override(name, ours, bases):
                            found.setdefault((override.hook, str(ours)), override)
        return list(found.values())

    def _override(self, name: str, ours: Symbol, bases: list[Symbol]) -> Override | None:
        for base in bases:
            if theirs := self.tree.member(base, name):
                return Override(f"{base}.{name}", ours, theirs, in_class=True)
        for base in bases:
            if theirs := self.tree.assigned(base).get(name):
                return Override(f"{base}.{name}", ours, theirs, in_class=False)
        return None

    def defining_class(self, hook: str) -> str:
        """`hook` under the module where its class stands, from which others may import it."""
        owner, _, name = hook.rpartition(".")
        found = self.tree.find(owner) if ":" in owner else None
        return f"{found}.{name}" if found else hook

    def unlisted(self, hooks: Iterable[str]) -> list[str]:
        """Overrides that are not among `hooks`. Every class has dunders; what vLLM has on instances
        only can't be looked up."""
        listed = {self.defining_class(hook) for hook in hooks}
        return [
            f"{o.hook}: overridden by {o.ours}, but not among the required hooks"
            for o in self.overrides
            if o.in_class and not is_dunder(o.name) and o.hook not in listed
        ]

    def stale(self, hooks: Iterable[str]) -> list[str]:
        """What is among `hooks` without being overridden."""
        overridden = {o.hook for o in self.overrides}
        return [
            f"{hook}: listed as overridden, but it is not"
            for hook in hooks
            if self.defining_class(hook) not in overridden
        ]

    def wrong_signatures(self) -> list[str]:
        """Overriding methods that can't be called in every way that vLLM's own can."""
        return [
            f"{o.ours} overrides {o.hook}: {problem}"
            for o in self.overrides
            if not self._own_signature(o.ours)
            for problem in mismatches(o.ours, o.theirs)
        ]

    def _own_signature(self, method: Symbol) -> bool:
        file = self.tree.file(method.module)
        if file is None or not isinstance(method.node, Function):
            return False
        lines = file.read_text().splitlines()[method.node.lineno - 1 : method.node.body[0].lineno]
        return any(OWN_SIGNATURE in line for line in lines)


def of_host(cls: Symbol) -> bool:
    return belongs(cls.module, HOST)


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


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


ANYTHING = Signature((), True, True)  # of a dispatcher, which says nothing of its callers


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
    if other == ANYTHING:
        return []
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
    unknown = [
        p.name
        for p in other.parameters
        if not (p.optional or mine.named(p.name) or mine.more_names)
        and not (p.by_position and mine.more_positions)
    ]
    return [f"{name} can't be given" for name in unknown] + _not_passed(mine, other)


def _not_passed(mine: Signature, other: Signature) -> list[str]:
    names = {p.name for p in other.parameters}
    extra = [p.name for p in mine.parameters if p.name not in names and not p.optional]
    return [f"vLLM does not pass {name}" for name in extra]
