"""The embedded twins: shapes, charts, tables and paths, exact in words and in pixels (python -m data_prep.twins)."""

from eval.tasks.base import Task

TASKS = [
    Task("twins", "twins/test.jsonl", "pictures never trained on, of combinations that were"),
    Task("twins_new", "twins/test_new.jsonl", "pictures with a combination (such as a colour with a shape) never trained on"),
]
