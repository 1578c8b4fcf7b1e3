"""Runnable studies: each has a Config, a run and a main."""
