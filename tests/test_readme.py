import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
)
def test_the_readme_runs_as_it_stands(code: str) -> None:
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    # [100] nats, as its comments say.
    assert names["bound"].shape == names["log_px"].shape == (100,)  # type: ignore[attr-defined]
    assert names["images"].shape == (16, 28, 28)  # type: ignore[attr-defined]
