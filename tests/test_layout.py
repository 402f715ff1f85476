"""Imports point one way: model ← data ← train ← search/… ← hparam_search."""

import ast
from graphlib import TopologicalSorter

from tests.conftest import REPOSITORY

ORDER = ["model", "data", "train", "search", "hparam_search"]


def imports() -> dict[str, set[str]]:
    """Return each module of the program → the modules of it that it imports, within functions too."""
    files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("search/*.py")]
    names = {".".join(file.relative_to(REPOSITORY).with_suffix("").parts): file for file in files}
    found = {}
    for name, file in names.items():
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = imported & names.keys()
    return found


def test_no_circle_and_no_import_against_the_arrows() -> None:
    graph = imports()
    assert graph["hparam_search"] >= {"data", "search.records", "search.trial"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    for name, imported in graph.items():
        rank = ORDER.index(name.split(".")[0])
        assert all(ORDER.index(other.split(".")[0]) <= rank for other in imported), name
