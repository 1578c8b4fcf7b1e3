"""Ways to fit a model, each a module with a `make_learner`, all run by one loop."""

from jvae.learners import aevb, full_bayes, mcem, score_function, wake_sleep
from jvae.learners.base import Learner

__all__ = ["Learner", "aevb", "full_bayes", "mcem", "score_function", "wake_sleep"]
