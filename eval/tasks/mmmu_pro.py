"""MMMU-Pro (Yue et al. 2024): college questions, and the same as screenshots (python -m data_prep.sources.mmmu_pro)."""

from eval.tasks.base import Task

TASKS = [Task("mmmu_pro", "mmmu_pro/test.jsonl", "college questions with pictures; rendered = the published screenshot")]
