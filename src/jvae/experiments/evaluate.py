"""Evaluate a finished run: log p(x) with its errors, and what its latents are used for.

python -m jvae.experiments.evaluate RUN
"""

import tyro

from jvae.experiments import assessment, command_line


def main() -> None:
    """The command line."""
    prog = "python -m jvae.experiments.evaluate"
    command_line.run(lambda: assessment.run(tyro.cli(assessment.Config, prog=prog)))


if __name__ == "__main__":
    main()
