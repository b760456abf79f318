"""Evaluation by real generation: answers, metrics, scores per task."""

from .answers import answer_rows, generate_answers, stop_ids, too_long_to_answer
from .results import keep_unscored, results_file, write_results
from .scores import Prediction, Scores, TaskScore, UnscoredError, blind_baseline, evaluate, score
from .wording import normalize

__all__ = [
    "Prediction",
    "Scores",
    "TaskScore",
    "UnscoredError",
    "answer_rows",
    "blind_baseline",
    "evaluate",
    "generate_answers",
    "keep_unscored",
    "normalize",
    "results_file",
    "score",
    "stop_ids",
    "too_long_to_answer",
    "write_results",
]
