"""NLVR v1 (Suhr et al. 2017): is a human sentence true of three boxes of objects? (python -m data_prep.sources.nlvr)"""

from eval.tasks.base import Task

TASKS = [Task("nlvr", "nlvr/test.jsonl", "true or false sentences about boxes of coloured objects; facts from the structured scene")]
