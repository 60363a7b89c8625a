"""Which code a result depends on: a function, and every definition of this package that it can reach by name.

A module's text is read as a syntax tree without comments and docstrings, so prose never counts. From one definition
the names in it lead to others: in its own module, and in the modules of this package that are imported there or
within the function. A method called on a value leads to every class in reach that has a method of that name, since
the tree does not say which it is: what cannot be told counts.
"""

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = __name__.partition(".")[0]
PACKAGE_FOLDER = Path(__file__).parents[1]
WHOLE = "*"  # a module used as a value: all of it counts
ON_IMPORT = "on import"  # statements that run when a module is imported
Name = tuple[str, str]  # (module, definition)


@dataclass
class Outline:
    """A module: its definitions by name, what it imports of this package, and the classes that have a method."""

    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, Name] = field(default_factory=dict)
    methods: dict[str, set[str]] = field(default_factory=dict)


@cache
def code_of(thing: Callable[..., Any] | type) -> str:
    """Hash of the code of a function or class and of all that it reaches. Raises TypeError for a lambda or a closure."""
    thing = inspect.unwrap(thing)
    name, _, inner = thing.__qualname__.partition(".")
    if "<" in inner or "<" in name or getattr(thing, "__closure__", None):
        raise TypeError(f"{thing.__module__}.{thing.__qualname__} has no identity: give a plain function of a module")
    reached: dict[Name, str] = {}
    waiting = [(thing.__module__, name)]
    while waiting:
        module, one = here = waiting.pop()
        if here not in reached:
            reached[here] = "\n".join(ast.dump(node) for node in outline(module).definitions.get(one, ()))
            waiting += _leads_to(*here)
    lines = [f"{module}.{one} {text}" for (module, one), text in sorted(reached.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@cache
def outline(module: str) -> Outline:
    """Read a module's file; statements that run on import are a definition of their own, which counts with any other."""
    spec = importlib.util.find_spec(module) if module not in sys.modules else None
    path = spec.origin if spec else sys.modules[module].__file__
    found = Outline()
    for node in without_prose(Path(str(path)).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.imports |= dict(_imported(node))
        elif not isinstance(node, ast.Pass):
            for name in _bound(node) or [ON_IMPORT]:
                found.definitions.setdefault(name, []).append(node)
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found.methods.setdefault(inner.name, set()).add(node.name)
    return found


def without_prose(source: str) -> ast.Module:
    """The syntax tree of a text without its docstrings; `pass` stands where nothing else is left."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[:] = body[1:] or [ast.Pass()]
    return tree


def canonical(source: str) -> str:
    """A text of Python source in which comments, layout and docstrings do not count."""
    return ast.dump(without_prose(source))


def _bound(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [one.id for target in targets if target for one in ast.walk(target) if isinstance(one, ast.Name)]


def _imported(node: ast.stmt) -> Iterator[tuple[str, Name]]:
    """Local name -> (module, definition) of an import from this package; (module, `*`) for a module itself."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            place = PACKAGE_FOLDER.joinpath(*inner.split(".")[1:])
            is_module = place.is_dir() or place.with_suffix(".py").is_file()
            yield alias.asname or alias.name, (inner, WHOLE) if is_module else (str(node.module), alias.name)


def _leads_to(module: str, name: str) -> Iterator[Name]:
    """The definitions that one definition names."""
    known = outline(module)
    if ON_IMPORT in known.definitions:
        yield module, ON_IMPORT
    nodes = list(known.definitions.get(name, []))
    if name == WHOLE:
        nodes = [node for group in known.definitions.values() for node in group]
        yield from ((module, one) for one in known.definitions)
    elif not nodes:  # handed on from elsewhere
        yield known.imports.get(name, (module, WHOLE))
    imports, attributes = dict(known.imports), set()
    names: set[tuple[str, str | None]] = set()
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                imports |= dict(_imported(inner))
            elif isinstance(inner, ast.Attribute):
                attributes.add(inner.attr)
                if isinstance(inner.value, ast.Name):
                    names.add((inner.value.id, inner.attr))
            elif isinstance(inner, ast.Name):
                names.add((inner.id, None))
    dotted = {first for first, attribute in names if attribute}
    for first, attribute in names:
        target = imports.get(first)
        if target and target[1] == WHOLE:  # a module: what is taken from it, or all of it
            if attribute or first not in dotted:
                yield target[0], attribute or WHOLE
        elif target:
            yield target
        elif first in known.definitions:
            yield module, first
    for near in _in_reach(module, tuple(sorted(set(imports.values())))):
        for method in attributes & outline(near).methods.keys():
            yield from ((near, kind) for kind in outline(near).methods[method])


@cache
def _in_reach(module: str, also: tuple[Name, ...]) -> frozenset[str]:
    """This module, those of the package that it imports, and theirs."""
    found, waiting = set(), [module, *(target for target, _ in also)]
    while waiting:
        here = waiting.pop()
        if here not in found:
            found.add(here)
            waiting += [target for target, _ in outline(here).imports.values()]
    return frozenset(found)
