"""What a suite's configuration makes of its tasks."""

from flanmoe.evaluation.suites import SuiteConfig


def test_the_template_of_a_suite_words_tasks_of_ours_without_words_of_their_own() -> None:
    config = SuiteConfig.parse(
        {
            "template": {"family": "answer_cue"},
            "tasks": ["a", {"name": "b", "renderer": "direct"}, "lm-eval/copa"],
        }
    )
    families = [task.template and task.template.family for task in config.tasks]
    assert families == ["answer_cue", None, None]
    assert SuiteConfig.parse(config.to_mapping()) == config
