"""docs/connectors.md shows the capabilities that calls are checked against."""

from pathlib import Path

from gateway.connectors.matrix import matrix

DOCUMENT = Path(__file__).parents[2] / "docs" / "connectors.md"


def test_the_published_matrix_is_the_one_of_the_code() -> None:
    text = DOCUMENT.read_text("utf-8")
    shown = text.split("<!-- python -m gateway.connectors.matrix -->\n")[1].split("<!-- end -->")[0]
    assert shown == matrix()
