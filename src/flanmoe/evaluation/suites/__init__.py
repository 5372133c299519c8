"""Suites: named evaluation tasks with their averages, run through lm-eval over one model."""

from flanmoe.evaluation.suites.choice import choose as choose
from flanmoe.evaluation.suites.config import SuiteConfig as SuiteConfig
from flanmoe.evaluation.suites.config import SuiteTask as SuiteTask
from flanmoe.evaluation.suites.config import named_suite as named_suite
from flanmoe.evaluation.suites.limits import limited as limited
from flanmoe.evaluation.suites.limits import shares as shares
from flanmoe.evaluation.suites.loading import Loaded as Loaded
from flanmoe.evaluation.suites.loading import load_evaluation as load_evaluation
from flanmoe.evaluation.suites.loading import load_suite as load_suite
from flanmoe.evaluation.suites.loading import warn_of_left_out as warn_of_left_out
from flanmoe.evaluation.suites.loading import warn_of_skipped as warn_of_skipped
from flanmoe.evaluation.suites.run import evaluate_loaded as evaluate_loaded
from flanmoe.evaluation.suites.run import evaluate_suite as evaluate_suite
from flanmoe.evaluation.suites.run import evaluate_tasks as evaluate_tasks
