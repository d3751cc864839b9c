import pytest

HEADER = ("kernel", "sm", "registers", "budget", "spills", "shared", "load bits", "tensor")


@pytest.fixture
def aot_row(record_property):
    """Adds a row to the table that ends the run."""
    return lambda row: record_property("aot", [str(cell) for cell in row])


def pytest_terminal_summary(terminalreporter):
    reports = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
    ]
    found = [row for report in reports for name, row in report.user_properties if name == "aot"]
    if not found:
        return
    rows = [HEADER, *sorted(found, key=lambda row: (row[0], int(row[1])))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    terminalreporter.section("ahead-of-time compiled kernels")
    for row in rows:
        name, *numbers = row
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))]
        terminalreporter.line("  ".join(cells))
