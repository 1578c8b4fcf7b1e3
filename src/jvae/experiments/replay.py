"""Take the step at which a run failed once more, and name the first tensor that went bad.

python -m jvae.experiments.replay RUN/failure
"""

import tyro

from jvae.experiments import command_line, post_mortem


def main() -> None:
    """The command line."""
    prog = "python -m jvae.experiments.replay"
    command_line.run(lambda: post_mortem.run(tyro.cli(post_mortem.Config, prog=prog)))


if __name__ == "__main__":
    main()
