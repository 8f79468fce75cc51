"""Disturbs a run at random, and compares its result with that of an undisturbed one."""
