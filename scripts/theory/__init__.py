"""`make theory`: the predictions of docs/theory.md against runs of the real optimizer."""
