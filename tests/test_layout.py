"""Imports point one way: model ← data ← train ← search/… ← hparam_search."""

import ast
from graphlib import TopologicalSorter

from tests.conftest import REPOSITORY

ORDER = ["model", "data", "train", "search", "hparam_search"]


def test_no_circle_and_no_import_against_the_arrows() -> None:
    files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("search/*.py")]
    names = {".".join(file.relative_to(REPOSITORY).with_suffix("").parts): file for file in files}
    graph = {}  # module → the modules that it imports, within functions too
    for name, file in names.items():
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = imported & names.keys()
    assert graph["hparam_search"] >= {"data", "search.records", "search.trial"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    for name, imported in graph.items():
        rank = ORDER.index(name.split(".")[0])
        assert all(ORDER.index(other.split(".")[0]) <= rank for other in imported), name
