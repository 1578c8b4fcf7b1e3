import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


CODE = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def run(code: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    return names


@pytest.mark.parametrize("code", CODE)
def test_the_readme_runs_as_it_stands(code: str) -> None:
    assert run(code)


def test_its_ten_lines_have_the_shapes_of_their_comments() -> None:
    names = run(CODE[0])
    assert names["bound"].shape == names["log_px"].shape == (100,)  # type: ignore[attr-defined]
    assert names["images"].shape == (16, 28, 28)  # type: ignore[attr-defined]
