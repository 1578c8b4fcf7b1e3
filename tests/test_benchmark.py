"""The benchmark measures what it says; its timings are nobody's business here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvae.experiments import benchmark, contestants
from jvae.experiments.config import ConfigError

SIZES = ((784, 500), (500, 40), (20, 500), (500, 784))


def count_products(jaxpr: Any) -> tuple[int, int]:
    """How many matrix products, and their floating-point operations."""
    count = operations = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left = equation.invars[0].aval.shape
            ((contracted,), _), _ = equation.params["dimension_numbers"]
            count += 1
            operations += 2 * left[contracted] * int(np.prod(equation.outvars[0].aval.shape))
    return count, operations


@pytest.mark.parametrize(
    ("multiply", "operands"),
    [
        (contestants.ordered_products, [784]),
        (contestants.unordered_products, [rows for rows, _ in SIZES] + [c for _, c in SIZES]),
    ],
)
def test_the_floor_is_the_products_of_a_step(
    multiply: Callable[..., contestants.Products], operands: list[int]
) -> None:
    given = tuple(jnp.zeros((100, size)) for size in operands)
    weights = tuple(jnp.zeros(size) for size in SIZES)
    jaxpr = jax.make_jaxpr(multiply)(given, weights).jaxpr
    # Forward and weight gradient of all four layers, input gradient of all but the first.
    entries = [rows * columns for rows, columns in SIZES]
    expected = 2 * 100 * (2 * sum(entries) + sum(entries[1:]))
    assert count_products(jaxpr) == (11, expected)


def test_a_short_run_is_recorded(tmp_path: Path) -> None:
    names = ("floor", "floor-unordered", "jvae-grey", "jvae-dynamic", "jvae-L1", "jvae-L10")
    config = benchmark.Config(
        contestants=(
            *names,
            *("jvae-step", "floor-8-seeds", "jvae-8-seeds", "floor-likelihood"),
            *("jvae-likelihood", "numpyro"),
        ),
        rounds=2,
        steps=2,
        short_steps=1,
        startup_repeats=0,
        out=tmp_path,
    )
    with jax.numpy_rank_promotion("allow"):  # as NumPyro's own code needs it
        benchmark.run(config)
    record = json.loads((tmp_path / "benchmark.json").read_text())
    (process,) = record["processes"]
    assert {name: len(seconds) for name, seconds in process["seconds"].items()} == dict.fromkeys(
        config.contestants, 2
    )
    assert all(np.isfinite(bound) for bound in process["bounds"].values())
    claims = {target["claim"]: target["measured"] for target in record["targets"]}
    assert len(claims) == len(benchmark.TARGETS) + 2
    pairs = zip(process["seconds"]["jvae-dynamic"], process["seconds"]["jvae-grey"], strict=True)
    ratio = np.median([a / b for a, b in pairs])
    assert claims["dynamic binarisation at most 1.10 × grey"]["median"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"contestants": ("jax",)}, r"contestants must be among .* got \['jax'\]"),
        ({"dataset": "mnist"}, "--dataset mnist needs --data-dir"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark.Config(**settings)  # type: ignore[arg-type]
