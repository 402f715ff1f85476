"""Measurements, each a program of its own; RESULTS.md has their figures. They print Markdown tables."""


def print_row(*cells: object) -> None:
    """Print a row of a Markdown table, fractions with at least four digits, zeros at the end left out."""
    texts = [format(cell, ".4g" if cell < 1000 else ".0f") if isinstance(cell, float) else str(cell) for cell in cells]
    print(f"| {' | '.join(texts)} |", flush=True)


def print_header(*cells: object) -> None:
    """Print the first row of a Markdown table, and the line below it."""
    print_row(*cells)
    print_row(*["---"] * len(cells))
