"""The progress bar: redrawn on a terminal, sparse lines elsewhere."""

import io

from doran_core.support.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_line_redrawn():
    stream = Terminal()
    with ProgressBar("merging", stream=stream) as bar:
        bar(0, 4 * 10**9)
        bar(1 * 10**9, 4 * 10**9)  # too soon after the first to be drawn
        bar(4 * 10**9, 4 * 10**9)
    drawn = stream.getvalue().split("\r")
    assert len(drawn) == 3
    assert "[" + "#" * 30 + "] merging 100%  4.00 GB of 4.00 GB" in drawn[-1]
    assert stream.getvalue().endswith("\n")


def test_elsewhere_only_the_end_is_printed_when_it_comes_soon():
    stream = io.StringIO()
    with ProgressBar("folding", unit="modules", stream=stream) as bar:
        for done in range(1, 4):
            bar(done, 3)
    assert stream.getvalue().splitlines() == ["folding 100%  3 modules of 3 modules  0 s"]


def test_nothing_to_do_is_all_done():
    stream = io.StringIO()
    ProgressBar("merging", stream=stream)(0, 0)
    assert "100%" in stream.getvalue()
