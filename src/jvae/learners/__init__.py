"""Ways to fit a model, each a module with a `make_learner`, all run by one loop."""

from jvae.learners import aevb, full_bayes, mcem, moving_baseline, wake_sleep
from jvae.learners.base import Learner

__all__ = ["Learner", "aevb", "full_bayes", "mcem", "moving_baseline", "wake_sleep"]
