"""Names, classes and signatures in Python sources, by their syntax: nothing is imported.

A name is written "package.module:attribute.path". It is followed through imports, base classes and
module-level instances, as getattr would; `__getattr__` of a module is not run, but what it offers
stands in vLLM's modules below `if TYPE_CHECKING`.
"""

import ast
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Symbol:
    """Something defined in a source: a module (no path), a class, a function, an assignment."""

    module: str
    path: str
    node: ast.AST

    def __str__(self) -> str:
        return f"{self.module}:{self.path}" if self.path else self.module

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)

    @property
    def kind(self) -> str:
        """How the member of a class is used: property and attribute are the same to a reader."""
        if not isinstance(self.node, Function):
            return "attribute"
        names = {ast.unparse(d).split(".")[-1] for d in self.node.decorator_list}
        for kind in ("staticmethod", "classmethod"):
            if kind in names:
                return kind
        return "attribute" if names & {"property", "cached_property"} else "method"

    def members(self) -> dict[str, "Symbol"]:
        """What the body of a class defines, annotations without a value included."""
        assert isinstance(self.node, ast.ClassDef)
        names = definitions(self.node.body)
        return {n: Symbol(self.module, f"{self.path}.{n}", node) for n, node in names.items()}

    def code(self) -> str:
        """The code without docstrings, comments and layout; of a module, nothing."""
        if isinstance(self.node, ast.Module):
            return ""
        return ast.unparse(WithoutTexts().visit(ast.parse(ast.unparse(self.node))))


class WithoutTexts(ast.NodeTransformer):
    """Drops docstrings, those of attributes too."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if isinstance(node.value, ast.Constant) else node


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that run when the body does, branches too; of two branches the first comes last, and
    so wins."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            handlers = getattr(node, "handlers", [])
            for branch in (*(h.body for h in handlers), getattr(node, "orelse", []), node.body):
                yield from statements(branch)
        else:
            yield node


def targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def definitions(body: Iterable[ast.stmt]) -> dict[str, ast.AST]:
    """What a module's or class's body defines; an imported name is its `alias` node's import."""
    found: dict[str, ast.AST] = {}
    for node in statements(body):
        if isinstance(node, Function | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = node
        for target in targets(node):
            if isinstance(target, ast.Name):
                found[target.id] = node
    return found


@functools.cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


class SourceTree:
    """Packages in `roots`, as they would be found on `sys.path`; parsed when asked for."""

    def __init__(self, *roots: Path | str) -> None:
        self.roots = [Path(root) for root in roots]
        self.module = functools.cache(self._module)
        self.mro = functools.cache(self._mro)
        self.own = functools.cache(Symbol.members)
        self._names = functools.cache(lambda module: definitions(module.node.body))

    def file(self, module: str) -> Path | None:
        for root in self.roots:
            path = root.joinpath(*module.split("."))
            for file in (path / "__init__.py", path.with_suffix(".py")):
                if file.is_file():
                    return file
        return None

    def modules(self, package: str) -> list[Symbol]:
        """All modules of a package, by name."""
        root = next(root for root in self.roots if (root / package).is_dir())
        files = sorted((root / package).rglob("*.py"))
        names = (".".join(file.relative_to(root).with_suffix("").parts) for file in files)
        found = (self.module(name.removesuffix(".__init__")) for name in names)
        return [module for module in found if module is not None]

    def _module(self, name: str) -> Symbol | None:
        file = self.file(name)
        return Symbol(name, "", parse(file)) if file else None

    def find(self, name: str) -> Symbol | None:
        """What "module:attribute.path" names; None if it is not there."""
        module, _, path = name.partition(":")
        found = self.module(module)
        for part in path.split(".") if path else []:
            found = self.member(found, part) if found else None
        return found

    def member(self, owner: Symbol, name: str) -> Symbol | None:
        """Attribute `name` of a module, class or module-level instance."""
        if isinstance(owner.node, ast.Module):
            return self._in_module(owner, name)
        if owner.is_class:
            found = (self.own(cls).get(name) for cls in self.mro(owner))
            return next((symbol for symbol in found if symbol), None)
        value, module = getattr(owner.node, "value", None), self.module(owner.module)
        if not isinstance(value, ast.Call) or module is None:
            return None
        cls = self.expression(module, value.func)
        return self.member(cls, name) if cls else None

    def _in_module(self, module: Symbol, name: str) -> Symbol | None:
        node = self._names(module).get(name)
        if isinstance(node, ast.Import):
            alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
            return self.module(alias.name if alias.asname else name)
        if isinstance(node, ast.ImportFrom):
            alias = next(a for a in node.names if (a.asname or a.name) == name)
            source = self.source_of(module, node)
            # A package may import its own submodule.
            return self.find(f"{source}{'.' if source == module.module else ':'}{alias.name}")
        if node is not None:
            return Symbol(module.module, name, node)
        found = (self.find(f"{source}:{name}") for source in self._stars(module))
        symbol = next((symbol for symbol in found if symbol), None)
        return symbol or self.module(f"{module.module}.{name}")

    def _stars(self, module: Symbol) -> list[str]:
        """The modules from which this one imports everything."""
        assert isinstance(module.node, ast.Module)
        nodes = (node for node in module.node.body if isinstance(node, ast.ImportFrom))
        return [self.source_of(module, n) for n in nodes if n.names[0].name == "*"]

    def source_of(self, module: Symbol, node: ast.ImportFrom) -> str:
        """The full name of the module that a statement in `module` imports from."""
        if not node.level:
            return node.module or ""
        file = self.file(module.module)
        parts = module.module.split(".")
        drop = node.level - (file is not None and file.name == "__init__.py")
        parts = parts[: len(parts) - drop]
        return ".".join([*parts, node.module] if node.module else parts)

    def expression(self, module: Symbol, node: ast.expr) -> Symbol | None:
        """What a name, a dotted name or a generic's subscript in `module` stands for."""
        if isinstance(node, ast.Subscript):
            return self.expression(module, node.value)
        if isinstance(node, ast.Name):
            return self._in_module(module, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.expression(module, node.value)
            return self.member(owner, node.attr) if owner else None
        return None

    def assigned(self, cls: Symbol) -> dict[str, Symbol]:
        """Attributes that the methods of a class set on `self`."""
        found: dict[str, Symbol] = {}
        for node in ast.walk(cls.node):
            for target in targets(node) if isinstance(node, ast.stmt) else []:
                for item in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(item, ast.Attribute) and ast.unparse(item.value) == "self":
                        path = f"{cls.path}.{item.attr}"
                        found.setdefault(item.attr, Symbol(cls.module, path, node))
        return found

    def _mro(self, cls: Symbol) -> tuple[Symbol, ...]:
        """Its classes in the order of lookup, as far as they are in this tree."""
        assert isinstance(cls.node, ast.ClassDef)
        module = self.module(cls.module)
        bases = [self.expression(module, base) for base in cls.node.bases] if module else []
        known = [base for base in bases if base is not None and base.is_class]
        lists = [list(self.mro(base)) for base in known] + [known]
        order = [cls]
        while lists := [rest for rest in lists if rest]:
            heads = (rest[0] for rest in lists)
            head = next(h for h in heads if not any(h in rest[1:] for rest in lists))
            order.append(head)
            lists = [[c for c in rest if c != head] for rest in lists]
        return tuple(order)
