import pytest

ROWS = pytest.StashKey()
HEADER = ("kernel", "sm", "registers", "budget", "spills", "shared", "load bits", "tensor")


@pytest.fixture
def aot_row(request):
    """Adds a row to the table that ends the run."""
    return request.config.stash.setdefault(ROWS, []).append


def pytest_terminal_summary(terminalreporter, config):
    rows = [HEADER, *config.stash.get(ROWS, [])]
    if len(rows) == 1:
        return
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(HEADER))]
    terminalreporter.section("ahead-of-time compiled kernels")
    for row in rows:
        name, *numbers = (str(cell) for cell in row)
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))]
        terminalreporter.line("  ".join(cells))
