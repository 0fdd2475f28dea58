"""PuzzleVQA (Chia et al. 2024): abstract pattern puzzles (python -m data_prep.sources.puzzlevqa)."""

from eval.tasks.base import Task

TASKS = [Task("puzzlevqa", "puzzlevqa/test.jsonl", "which option completes the pattern; facts from the authors' captions")]
